"""From the one value that a regression head gives (`loss.name mse`) to logits of the grades.

Four thresholds cut the values into five grades. They and the spread are fitted on valid, after each epoch, for the
weights that are scored there, and lie in the checkpoint of these weights. Nothing is fitted on train or test.

The thresholds are those of the highest quadratic-weighted kappa that any four reach on these photographs. With costs
(prediction − truth)² kappa is 1 − D / E, where D, the sum of the costs, and E, the sum that chance would give, are both
sums over photographs; so the least D / E is found by Dinkelbach's method ("On Nonlinear Fractional Programming", 1967),
each of whose steps is a shortest path over the sorted values.

n: photographs    b: batch    C: grades
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastddr.config import Config
from fastddr.data.grades import ICDR
from fastddr.evaluation.calibration import temperature
from fastddr.evaluation.metrics import MEANS, SplitResult

#: Range of the spread: below it a neighbouring grade has less than 1e-21, above it all grades are as likely.
_SIGMA = (0.1, 10.0)
#: How far from its lower threshold, in grades, a value counts as if it were no nearer.
_AWAY = 1e-9


@dataclass(frozen=True)
class Grading:
    """How a value becomes a grade: grade k lies above threshold k − 1 and up to threshold k."""

    thresholds: tuple[float, ...] = tuple(grade + 0.5 for grade in range(len(ICDR) - 1))
    """Rising; by default a value is rounded."""
    sigma: float = 1.0
    """Standard deviation of the value about its grade, in grades."""

    def logits(self, values: Float[Tensor, "b 1"]) -> Float[Tensor, "b C"]:
        """float32 logits whose largest is always the grade that the thresholds give, and 0.

        The thresholds are mapped to 0.5, 1.5, … by straight lines, of slope 1 outside; logit k is then
        −(g − k)² / (2 sigma²) but for a number that all k share. A value that is not finite gives NaN.
        """
        x = values.double()
        # Filled where they are: a tensor of a list would be copied, and the host would wait for the card.
        cuts = torch.stack([x.new_full((), threshold) for threshold in self.thresholds])
        edges = torch.cat([cuts[:1] - 1, cuts, cuts[-1:] + 1])
        above = (x > cuts).sum(1, keepdim=True)
        low, high, grade = edges[above], edges[above + 1], above.double()
        g = grade - 0.5 + (x - low) / (high - low)
        # What rounding could move across a threshold is held on its side of it.
        g = torch.where(grade > 0, torch.maximum(g, grade - 0.5 + _AWAY), g)
        g = torch.where(grade < len(cuts), torch.minimum(g, grade + 0.5), g)
        k = torch.arange(len(cuts) + 1, device=x.device)
        return ((k - grade) * (g - (k + grade) / 2) / self.sigma**2).float()


class Graded(nn.Module):
    """A model of one value, as a model of logits."""

    def __init__(self, model: nn.Module, grading: Grading) -> None:
        super().__init__()
        self.model, self.grading = model, grading
        self.training = model.training  # who scores sets it back to what it was

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b C"]:
        """Images to logits (`Grading.logits`)."""
        return self.grading.logits(self.model(image))


def wrap(model: nn.Module, config: Config, saved: Mapping[str, Any] | None) -> nn.Module:
    """The model as it is scored: itself, or where it gives one value, with the grading of its checkpoint around it.

    `saved` is `grading` of the checkpoint's progress; None before the first validation, when values are rounded.
    """
    if config.loss.name != "mse":
        return model
    return Graded(model, _grading(saved))


def unwrap(model: nn.Module) -> tuple[nn.Module, dict[str, Any] | None]:
    """The bare model and its grading, as `wrap` takes them."""
    return (model.model, asdict(model.grading)) if isinstance(model, Graded) else (model, None)


def fitted(found: SplitResult, config: Config) -> tuple[SplitResult, dict[str, Any] | None]:
    """Valid under weights as they are, as logits; and the grading that was fitted to it, as JSON values.

    Where the model gives logits anyway, they stay, and there is no grading.
    """
    if config.loss.name != "mse":
        return found, None
    grading = fit(found.logits[:, 0], found.grades)
    return replace(found, logits=grading.logits(found.logits)), asdict(grading)


def logged(values: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What `metrics.jsonl` has of a validation: of its figures (`metrics.figures`), and of a regression the grading."""
    named = ("loss", *MEANS, "auc")
    found = {f"valid/{name}": values[name] for name in named}
    found |= {f"valid/recall_{grade}": recall for grade, recall in enumerate(values["recall"])}
    if saved is not None:
        grading = _grading(saved)
        cuts = {f"valid/threshold_{number}": cut for number, cut in enumerate(grading.thresholds)}
        found |= {**cuts, "valid/sigma": grading.sigma}
    return found


def _grading(saved: Mapping[str, Any] | None) -> Grading:
    return Grading() if saved is None else Grading(tuple(saved["thresholds"]), saved["sigma"])


def fit(values: Float[Tensor, " n"], grades: Int[Tensor, " n"]) -> Grading:
    """Thresholds of the highest kappa on these photographs, then the spread of the highest likelihood.

    Rounding stays where nothing is better, and where all photographs have one grade. A grade that no photograph should
    get has its two thresholds between the same two values.
    """
    x, y = values.double().cpu().numpy(), grades.cpu().numpy()
    grading = Grading(_thresholds(x, y, Grading().thresholds))
    # The square of the spread divides the logits, as a temperature does.
    sigma2 = temperature(grading.logits(values.cpu().float()[:, None]), grades, *(bound**2 for bound in _SIGMA))
    return replace(grading, sigma=sigma2**0.5)


def _thresholds(x: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], start: tuple[float, ...]) -> tuple[float, ...]:
    if len(np.unique(y)) < 2:
        return start
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    grade = np.arange(len(start) + 1)
    costs = (grade[:, None] - y) ** 2.0
    by_chance = costs.mean(1)
    # Values that are equal have one grade, so no cut lies between them.
    places = np.flatnonzero(np.r_[True, x[1:] > x[:-1], True])
    sums = np.c_[np.zeros(len(grade)), costs.cumsum(1)][:, places]

    def ratio(predicted: Int[np.ndarray, " n"]) -> float:
        return float(costs[predicted, np.arange(len(y))].sum() / by_chance[predicted].sum())

    best, cuts = ratio(np.searchsorted(start, x)), None
    while True:
        path = _shortest(sums - best * by_chance[:, None] * places)
        found = ratio(np.searchsorted(places[path], np.arange(len(y)), side="right"))
        if found >= best - 1e-12:
            break
        best, cuts = found, places[path]
    return start if cuts is None else _between(x, cuts)


def _shortest(sums: Float[np.ndarray, "C places"]) -> Int[np.ndarray, " cuts"]:
    """The rising places of C − 1 cuts that make the sum least, each grade's share being a difference of its `sums`."""
    total, before = sums[0], []
    for own in sums[1:]:
        here = total - own
        least = np.minimum.accumulate(here)
        new = np.r_[True, here[1:] < least[:-1]]
        before.append(np.maximum.accumulate(np.where(new, np.arange(len(here)), 0)))
        total = own + least
    path = [len(total) - 1]
    for step in reversed(before):
        path.append(step[path[-1]])
    return np.array(path[:0:-1])


def _between(x: Float[np.ndarray, " n"], cuts: Int[np.ndarray, " cuts"]) -> tuple[float, ...]:
    """A threshold for each cut, which lies before x[cut]; several of one place share the gap evenly."""
    padded = np.r_[x[0] - 1, x, x[-1] + 1]
    found = []
    for number, cut in enumerate(cuts):
        alike = np.flatnonzero(cuts == cut)
        low, high = padded[cut], padded[cut + 1]
        found.append(float(low + (high - low) * (number - alike[0] + 1) / (len(alike) + 1)))
    return tuple(found)
