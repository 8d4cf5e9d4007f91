"""Temperature scaling (Guo et al., On calibration of modern neural networks, 2017): one number, fitted on valid."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Within these a temperature is searched for.
LOWEST, HIGHEST = 0.05, 20.0


def at_bound(value: float) -> bool:
    """Whether a temperature is where its search ended, and a better one may lie beyond."""
    return not LOWEST * 1.001 < value < HIGHEST / 1.001


def temperature(
    logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"], lowest: float = LOWEST, highest: float = HIGHEST
) -> float:
    """The T for which softmax(logits / T) has the least cross-entropy; within `lowest` and `highest`, above 0.

    Above 1 the model was too sure of itself. Fit it on valid, use it on test. Raises ValueError without photographs.
    """
    # As scikit-learn in `ranking`: not before there is something to fit.
    from scipy.optimize import minimize_scalar

    if not len(grades):
        raise ValueError("a temperature is fitted on photographs, and there are none")
    logits, grades = logits.detach().cpu().double(), grades.detach().cpu().long()

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / math.exp(log_t), grades))

    bounds = (math.log(lowest), math.log(highest))
    return float(math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5}).x))
