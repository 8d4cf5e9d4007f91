"""Losses: what the training step makes small. Always in float32, whatever the model's precision."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastddr.config import Config


class CrossEntropy(nn.CrossEntropyLoss):
    """Mean cross-entropy in nats over the photographs of a batch, with label smoothing and class weights.

    `label_smoothing` is the share of the target that is spread evenly over all grades: Szegedy et al.,
    "Rethinking the Inception Architecture" (2016), section 7. `weight` (classes) multiplies each grade's part of the
    target, smoothed and mixed as it is. The sum is divided by the number of photographs and not by their weights, as
    PyTorch does for grades but not for shares: so a global batch has the same gradient however it is cut.
    """

    def forward(
        self, logits: Float[Tensor, "b classes"], grades: Int[Tensor, " b"] | Float[Tensor, "b classes"]
    ) -> Float[Tensor, ""]:
        """One float32 number. `grades` are numbers of classes, or where photographs were mixed the share of each class,
        of any float dtype."""
        grades = grades.float() if grades.is_floating_point() else grades.long()
        if self.weight is None:
            return super().forward(logits.float(), grades)
        return F.cross_entropy(
            logits.float(), grades, self.weight, reduction="none", label_smoothing=self.label_smoothing
        ).mean()


class MeanSquare(nn.Module):
    """Mean squared distance of one value a photograph to its grade."""

    def forward(
        self, values: Float[Tensor, "b 1"], grades: Int[Tensor, " b"] | Float[Tensor, "b classes"]
    ) -> Float[Tensor, ""]:
        """One float32 number. Where `grades` are shares of grades, the target is their mean."""
        if grades.is_floating_point():
            grades = grades.float() @ torch.arange(grades.shape[1], dtype=torch.float32, device=grades.device)
        return (values[:, 0].float() - grades.float()).square().mean()


def class_weights(kind: str, grades: Int[np.ndarray, " n"], classes: int, beta: float = 0.999) -> Float[Tensor, " C"]:
    """Weights of the grades by their numbers among `grades`, of the mean 1 over these photographs; 0 of an absent one.

    `inverse`: ∝ 1 / n. `effective`: ∝ (1 − beta) / (1 − beta^n), Cui et al., "Class-Balanced Loss Based on Effective
    Number of Samples" (2019), equation 4; they scale to the mean 1 over classes, which changes the learning rate.
    """
    counts = np.bincount(grades, minlength=classes).astype(np.float64)
    numbers = counts if kind == "inverse" else (1 - beta**counts) / (1 - beta)
    weights = np.divide(1.0, numbers, out=np.zeros(classes), where=counts > 0)
    return torch.from_numpy(weights * counts.sum() / (weights @ counts)).float()


def from_config(config: Config, grades: Int[np.ndarray, " n"], device: torch.device) -> nn.Module:
    """The loss of a configuration; `grades` are those of the training photographs."""
    loss = config.loss
    if loss.name == "mse":
        return MeanSquare()
    weight = None
    if loss.class_weights != "none":
        weight = class_weights(loss.class_weights, grades, config.num_classes, loss.beta)
    return CrossEntropy(weight=weight, label_smoothing=loss.label_smoothing).to(device)
