"""From logits and grades to figures: pure functions, no device, no files, no model.

A confusion matrix here has **rows = truth, columns = prediction**. An undefined figure (the recall of a grade
without a photograph, the kappa of one grade against itself) is None, never NaN, and a mean over grades leaves
out those that the truth does not hold: else a split without grade 3 would score below one with it.

Where ungradable is a sixth class, kappa is of the photographs that truth and prediction both grade, and sensitivity
and specificity are of those that the truth grades, with "ungradable" for a prediction counted as referred.

torchmetrics counts the matrix and computes AUC and calibration error. The rates of a matrix are written out
in `_rates`, for many matrices at once: the bootstrap needs them for two thousand, while torchmetrics takes
labels only and averages over absent grades otherwise. `tests/unit/test_metrics.py` holds the two against each
other.

C: grades that the model tells apart    n: photographs    b: matrices
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from fastddr.data.grades import ICDR, REFERABLE

#: Equal-width bins of confidence for the expected calibration error and the reliability diagram.
BINS = 15
#: Bootstrap samples behind every interval.
SAMPLES = 2000

_MEANS = ("accuracy", "qwk", "macro_f1", "balanced_accuracy")


@dataclass(frozen=True)
class SplitResult:
    """What a model said of a split: one row a photograph, in any order, each photograph once.

    `weights` says which weights spoke, for a reader: "best (step 120, epoch 9)".
    """

    logits: Float[Tensor, "n C"]
    grades: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]
    paths: Sequence[str]
    weights: str

    def __post_init__(self) -> None:
        sizes = {len(self.logits), len(self.grades), len(self.ids), len(self.paths)}
        if len(sizes) != 1:
            raise ValueError(f"logits, grades, ids and paths differ in length: {sorted(sizes)}")


def figures(logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"]) -> dict[str, Any]:
    """All figures of one split but their intervals, ready for JSON.

    `loss` is the cross-entropy in nats, whatever the model was trained with. Rates lie in 0..1. The predicted
    grade is the largest logit, the lowest grade of a tie. `auc` is the mean, over the grades present, of one
    grade against the rest; `referable.auc` ranks by the summed probability of the referable grades. `ece` is
    the expected calibration error (L1, `BINS` bins) of the predicted grade's probability.

    Raises ValueError for a grade outside 0..C-1 and for a logit that is not finite: a grade read off NaN
    would look like any other.
    """
    logits, grades = logits.detach().cpu().double(), grades.detach().cpu().long()
    _check(logits, grades)
    n, classes = logits.shape
    matrix = multiclass_confusion_matrix(logits.argmax(1), grades, num_classes=classes)
    rates = figures_from_confusion(matrix)
    probabilities = logits.softmax(1)
    ece = multiclass_calibration_error(probabilities, grades, classes, n_bins=BINS) if n else None
    aucs = [_auc(probabilities[:, grade], grades == grade) for grade in range(classes)]
    present = [auc for auc in aucs if auc is not None]
    referable = rates["referable"]
    if referable is not None:
        graded = grades < len(ICDR)
        referable["auc"] = _auc(probabilities[graded, REFERABLE:].sum(1), grades[graded] >= REFERABLE)
    return {
        "n": n,
        "loss": float(torch.nn.functional.cross_entropy(logits, grades)) if n else None,
        **{key: rates[key] for key in (*_MEANS, "recall", "confusion_matrix")},
        "auc": float(np.mean(present)) if present else None,
        "referable": referable,
        "ece": None if ece is None else float(ece),
    }


def figures_from_confusion(matrix: Any) -> dict[str, Any]:
    """The figures that a (C, C) confusion matrix alone gives: `n`, rates, and the matrix as lists.

    Rows = truth, columns = prediction. Accuracy and quadratic-weighted kappa would not notice a swapped axis;
    recall, sensitivity and specificity do.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 2:
        raise ValueError(f"a confusion matrix is C x C with C >= 2, not {' x '.join(map(str, counts.shape))}")
    rates = {key: value[0] for key, value in _rates(counts[None]).items()}
    return {
        "n": int(counts.sum()),
        **{key: _number(rates[key]) for key in _MEANS},
        "recall": [_number(value) for value in rates["recall"]],
        "confusion_matrix": counts.astype(int).tolist(),
        "referable": {key: _number(rates[key]) for key in ("sensitivity", "specificity")}
        if "sensitivity" in rates
        else None,
    }


def intervals(matrix: Any, *, level: float = 0.95, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Percentile-bootstrap intervals `[low, high]` of the rates of a (C, C) confusion matrix, rows = truth.

    Photographs are drawn again within each grade, so the mix of grades stays as it is; drawing photographs of
    one grade is drawing its row of the matrix from a multinomial, so nothing is drawn one by one. Photographs
    count as independent; two eyes of one patient are not, so the truth is a little wider. The interval speaks
    of the photographs, not of the training seed, and is [1, 1] where a rate is 1: a percentile bootstrap
    cannot see what did not happen. None where the rate itself is undefined.
    """
    counts = np.asarray(matrix).astype(np.int64)
    point = figures_from_confusion(counts)
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = np.zeros((samples, *counts.shape), dtype=np.int64)
    for grade, row in enumerate(counts):
        if row.sum():
            drawn[:, grade] = rng.multinomial(row.sum(), row / row.sum(), size=samples)
    rates = _rates(drawn)

    def interval(estimate: float | None, values: np.ndarray) -> list[float] | None:
        # A sample may leave kappa undefined (one grade, all in one column) where the whole split does not.
        values = values[~np.isnan(values)]
        if estimate is None or not values.size:
            return None
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return [float(low), float(high)]

    referable = point["referable"]
    return {
        **{key: interval(point[key], rates[key]) for key in _MEANS},
        "recall": [interval(value, rates["recall"][:, grade]) for grade, value in enumerate(point["recall"])],
        "referable": {key: interval(referable[key], rates[key]) for key in ("sensitivity", "specificity")}
        if referable is not None
        else None,
    }


def reliability(logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"]) -> dict[str, list[Any]]:
    """The bins behind `ece`: for each of `BINS` equal bins of confidence `count`, `confidence`, `accuracy`.

    The last two are means over the bin, None where it is empty.
    """
    logits, grades = logits.detach().cpu().double(), grades.detach().cpu().long()
    _check(logits, grades)
    confidence, predicted = (value.numpy() for value in logits.softmax(1).max(1))
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    sums = {
        "confidence": np.bincount(bins, confidence, minlength=BINS),
        "accuracy": np.bincount(bins, predicted == grades.numpy(), minlength=BINS),
    }
    means = {key: [_number(value) for value in _ratio(total, count)] for key, total in sums.items()}
    return {"count": count.tolist(), **means}


def _rates(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """Rates of (b, C, C) confusion matrices as (b,) arrays, `recall` (b, C); NaN where undefined."""
    m = matrices.astype(np.float64)
    truth, predicted, hit = m.sum(2), m.sum(1), np.diagonal(m, axis1=1, axis2=2)
    n = truth.sum(1)
    absent = truth == 0
    f1 = np.where(absent, np.nan, _ratio(2 * hit, truth + predicted))
    recall = _ratio(hit, truth)
    # A sixth class, ungradable, is no step of the scale: kappa is of what truth and prediction both grade.
    scale = m[:, : len(ICDR), : len(ICDR)]
    grade = np.arange(scale.shape[-1])
    weight = (grade[:, None] - grade[None, :]) ** 2.0  # Cohen 1968, quadratic: the farther, the worse
    expected = scale.sum(2)[:, :, None] * scale.sum(1)[:, None, :]
    rates = {
        "accuracy": _ratio(hit.sum(1), n),
        "qwk": 1 - _ratio((weight * scale).sum((1, 2)) * scale.sum((1, 2)), (weight * expected).sum((1, 2))),
        "macro_f1": _mean(f1),
        "balanced_accuracy": _mean(recall),
        "recall": recall,
    }
    if m.shape[-1] > REFERABLE:
        # A photograph that is called ungradable is referred too.
        ill = slice(REFERABLE, len(ICDR))
        rates["sensitivity"] = _ratio(m[:, ill, REFERABLE:].sum((1, 2)), truth[:, ill].sum(1))
        rates["specificity"] = _ratio(m[:, :REFERABLE, :REFERABLE].sum((1, 2)), truth[:, :REFERABLE].sum(1))
    return rates


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN (and no warning) over 0."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN (and no warning) where nothing is left."""
    return _ratio(np.nansum(values, -1), (~np.isnan(values)).sum(-1))


def _number(value: float) -> float | None:
    """The value, or None for NaN: JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _auc(score: Float[Tensor, " n"], positive: Tensor) -> float | None:
    """Area under the ROC curve of a score in 0..1; None unless both answers occur."""
    if not positive.any() or positive.all():
        return None
    # A sum of probabilities may exceed 1 by a rounding, and torchmetrics would then take all for logits.
    return float(binary_auroc(score.clamp(0, 1), positive.long()))


def _check(logits: Tensor, grades: Tensor) -> None:
    """ValueError unless logits are finite (n, C >= 2) and grades (n,) lie in 0..C-1."""
    if logits.ndim != 2 or grades.ndim != 1 or len(logits) != len(grades) or logits.shape[1] < 2:
        raise ValueError(f"logits are (n, C) and grades (n,), not {(*logits.shape,)} and {(*grades.shape,)}")
    finite = logits.isfinite().all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{int((~finite).sum())} of {len(logits)} rows of logits are not finite, first {row}")
    outside = (grades < 0) | (grades >= logits.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"grade {int(grades[row])} in row {row}: the model tells apart 0..{logits.shape[1] - 1}; "
            "ungradable and unlabelled photographs are left out before scoring"
        )
