"""From logits and grades to figures: pure functions, no device, no files, no model.

A confusion matrix here has **rows = truth, columns = prediction**. An undefined figure (the recall of a grade
without a photograph, the kappa of one grade against itself) is None, never NaN, and a mean over grades leaves
out those that the truth does not hold: else a split without grade 3 would score below one with it.

Where ungradable is a sixth class, kappa is of the photographs that truth and prediction both grade, and sensitivity
and specificity are of those that the truth grades, with "ungradable" for a prediction counted as referred.

scikit-learn computes the areas under curves (`ranking`). The rates of a matrix are written out in `rates`, for many
matrices at once: the bootstrap needs them for two thousand, while the libraries take labels only and average over
absent grades otherwise. `tests/unit/test_metrics.py` holds them against each other.

C: grades that the model tells apart    n: photographs    b: matrices
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastddr.data.grades import ICDR
from fastddr.evaluation import ranking

#: Equal-width bins of confidence for the expected calibration error and the reliability diagram.
BINS = 15

MEANS = ("accuracy", "qwk", "macro_f1", "balanced_accuracy")


#: A score, and whether each photograph is one of those that should score high.
Ranking = tuple[np.ndarray, np.ndarray]


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
    patients: Sequence[str] | None = None
    """Of each photograph, "" where not known; None where none is."""


def figures(logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"]) -> dict[str, Any]:
    """All figures of one split but their intervals, ready for JSON.

    `loss` is the cross-entropy in nats, whatever the model was trained with. Rates lie in 0..1. The predicted
    grade is the largest logit, the lowest grade of a tie. `auc` and `average_precision` are means, over the grades
    present, of one grade against the rest. `endpoints` ranks by the summed probability of a grade and all worse
    ones, `referable` is the one of them that is grade 2 or worse. `ece` is the expected calibration error (L1,
    `BINS` bins) of the predicted grade's probability.

    Raises ValueError for a grade outside 0..C-1 and for a logit that is not finite: a grade read off NaN
    would look like any other.
    """
    logits, grades = logits.detach().cpu().double(), grades.detach().cpu().long()
    _check(logits, grades)
    n, classes = logits.shape
    pairs = torch.bincount(grades * classes + logits.argmax(1), minlength=classes**2)
    found = figures_from_confusion(pairs.view(classes, classes))
    one_by_one = [
        ranking.figures(*one_against_rest(logits, grades, grade), operating=False) for grade in range(classes)
    ]
    endpoints: dict[str, Any] = found["endpoints"]
    for name, values in endpoints.items():
        values |= ranking.figures(*worse_than(logits, grades, name))
    sure = confidence(logits, grades)
    return {
        "n": n,
        "loss": sure["loss"],
        **{key: found[key] for key in (*MEANS, "recall", "confusion_matrix")},
        **{key: _mean_of([values[key] for values in one_by_one]) for key in ("auc", "average_precision")},
        "referable": endpoints.get("referable"),
        "endpoints": endpoints,
        "ece": sure["ece"],
        **({"without_ungradable": found["without_ungradable"]} if "without_ungradable" in found else {}),
    }


def deciding(values: Mapping[str, Any]) -> float:
    """Of figures, the one by which an epoch is the best: kappa; where it is undefined, accuracy.

    With ungradable as a class it is macro F1: kappa is of what is graded, and a model could raise it by grading less.
    """
    score: float | None = values[headline(values)[-1]]
    return float(values["accuracy"]) if score is None else score


def headline(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the figures that the terminal shows of an epoch; the last is the one that decides."""
    return ("loss", "accuracy", "qwk", "macro_f1")[: 3 if len(values["recall"]) <= len(ICDR) else 4]


def confidence(logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"]) -> dict[str, float | None]:
    """Those of `figures` that another temperature changes: `loss` and `ece`; None of no photographs."""
    logits, grades = logits.detach().cpu().double(), grades.detach().cpu().long()
    if not len(grades):
        return {"loss": None, "ece": None}
    # torchmetrics' has a bin more, of probabilities that are 1 in float32.
    bins = reliability(logits, grades)
    each = zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True)
    ece = sum(count * abs(sure - right) for count, sure, right in each if count) / len(grades)
    return {"loss": float(torch.nn.functional.cross_entropy(logits, grades)), "ece": ece}


def one_against_rest(logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"], grade: int) -> Ranking:
    """The score of a grade, its log-odds, and which photographs have it."""
    return _log_odds(logits, slice(grade, grade + 1)), (grades == grade).numpy()


def worse_than(logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"], endpoint: str) -> Ranking:
    """The score of an endpoint, the log-odds of its grades, and which of the graded photographs reach it."""
    graded, least = grades < len(ICDR), ranking.ENDPOINTS[endpoint]
    return _log_odds(logits[graded], slice(least, None)), (grades[graded] >= least).numpy()


def _log_odds(logits: Float[Tensor, "n C"], of: slice) -> np.ndarray:
    """Log-odds of the summed probability of some grades, in double precision.

    They rank as the probability does, which for a sure model is 1 for many, or ordered by rounding.
    """
    here = torch.zeros(logits.shape[1], dtype=torch.bool)
    here[of] = True
    logits = logits.double()
    return (logits[:, here].logsumexp(1) - logits[:, ~here].logsumexp(1)).numpy()


def figures_from_confusion(matrix: Any) -> dict[str, Any]:
    """The figures that a (C, C) confusion matrix alone gives: `n`, rates, and the matrix as lists.

    Rows = truth, columns = prediction. Accuracy and quadratic-weighted kappa would not notice a swapped axis;
    recall, sensitivity and specificity do. With ungradable as a sixth class, `without_ungradable` has what the graders
    of the other photographs see: there "ungradable" is just a wrong answer.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 2:
        raise ValueError(f"a confusion matrix is C x C with C >= 2, not {' x '.join(map(str, counts.shape))}")
    found = {key: value[0] for key, value in rates(counts[None]).items()}
    endpoints = {
        name: {key: _number(found[f"{name}_{key}"]) for key in ("sensitivity", "specificity")}
        for name in ranking.ENDPOINTS
        if f"{name}_sensitivity" in found
    }
    values: dict[str, Any] = {
        "n": int(counts.sum()),
        **{key: _number(found[key]) for key in MEANS},
        "recall": [_number(value) for value in found["recall"]],
        "confusion_matrix": counts.astype(int).tolist(),
        "referable": endpoints.get("referable"),
        "endpoints": endpoints,
    }
    if len(counts) > len(ICDR):
        graded = counts.copy()
        graded[len(ICDR) :] = 0
        others = {key: value[0] for key, value in rates(graded[None]).items()}
        values["without_ungradable"] = {
            "n": int(graded.sum()), **{key: _number(others[key]) for key in MEANS}
        }  # fmt: skip
    return values


def reliability(logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"]) -> dict[str, list[Any]]:
    """The bins behind `ece`: for each of `BINS` equal bins of confidence `count`, `confidence`, `accuracy`.

    The last two are means over the bin, None where it is empty.
    """
    logits, grades = logits.detach().cpu().double(), grades.detach().cpu().long()
    confidence, predicted = (value.numpy() for value in logits.softmax(1).max(1))
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    sums = {
        "confidence": np.bincount(bins, confidence, minlength=BINS),
        "accuracy": np.bincount(bins, predicted == grades.numpy(), minlength=BINS),
    }
    means = {key: [_number(value) for value in _ratio(total, count)] for key, total in sums.items()}
    return {"count": count.tolist(), **means}


def rates(matrices: np.ndarray) -> dict[str, np.ndarray]:
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
    found = {
        "accuracy": _ratio(hit.sum(1), n),
        "qwk": 1 - _ratio((weight * scale).sum((1, 2)) * scale.sum((1, 2)), (weight * expected).sum((1, 2))),
        "macro_f1": _mean(f1),
        "balanced_accuracy": _mean(recall),
        "recall": recall,
    }
    for name, least in ranking.ENDPOINTS.items():
        if m.shape[-1] > least:
            # A photograph that is called ungradable is referred too.
            ill = slice(least, len(ICDR))
            found[f"{name}_sensitivity"] = _ratio(m[:, ill, least:].sum((1, 2)), truth[:, ill].sum(1))
            found[f"{name}_specificity"] = _ratio(m[:, :least, :least].sum((1, 2)), truth[:, :least].sum(1))
    return found


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN (and no warning) over 0."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN (and no warning) where nothing is left."""
    return _ratio(np.nansum(values, -1), (~np.isnan(values)).sum(-1))


def _number(value: float) -> float | None:
    """The value, or None for NaN: JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of what is defined."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


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
