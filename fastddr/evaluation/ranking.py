"""Figures of a score that ranks photographs: areas under the ROC and precision-recall curves, operating points.

scikit-learn computes the figures of a split, in double precision. The same for many samples of the photographs at once,
which the bootstrap needs and no library has, is `sampled`; `tests/unit/test_bootstrap.py` holds it against scikit-learn
with the counts as weights.

b: samples    n: photographs    g: different scores
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

#: Names of the endpoints: this grade or worse.
ENDPOINTS = {"any": 1, "referable": 2, "severe": 3}
#: Specificity at which sensitivity is read off the ROC curve, and the reverse.
FIXED = 0.9

#: The points of the ROC curve, of the ill and of the well photographs.
OPERATING = ("sensitivity_at_specificity_90", "specificity_at_sensitivity_90")
#: What is said of a score, in the order of the tables.
KEYS = ("auc", "average_precision", *OPERATING)


def figures(
    score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], *, operating: bool = True
) -> dict[str, float | None]:
    """`KEYS` of a score; all None unless both answers occur. Without `operating` only the areas.

    `average_precision` is the area under the precision-recall curve as a step function, without interpolation.
    The operating points take their threshold from these very photographs, so they flatter a little.
    """
    # A second of imports, for which no run waits before it has something to score.
    from sklearn.metrics import auc, average_precision_score, roc_curve

    if not positive.any() or positive.all():
        return dict.fromkeys(_keys(operating))
    alarms, hits, _ = roc_curve(positive, score, drop_intermediate=False)
    found: dict[str, float | None] = {
        "auc": float(auc(alarms, hits)),
        "average_precision": float(average_precision_score(positive, score)),
    }
    if operating:
        found["sensitivity_at_specificity_90"] = float(hits[_within(1 - alarms)].max())
        found["specificity_at_sensitivity_90"] = float((1 - alarms[_within(hits)]).max())
    return found


class Ranked:
    """A score in falling order, ready to be weighed by samples of the photographs."""

    def __init__(self, score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> None:
        self._order = np.argsort(-score, kind="stable")
        in_order = score[self._order]
        self._positive = positive[self._order].astype(np.float32)
        # Photographs of one score are called together, so the curve has a point only behind the last of them.
        ends = np.flatnonzero(np.append(in_order[1:] != in_order[:-1], True)) if len(score) else np.zeros(0, int)
        self._ends = slice(None) if len(ends) == len(score) else ends

    def sampled(
        self, counts: Float[np.ndarray, "b n"], *, operating: bool = True
    ) -> dict[str, Float[np.ndarray, " b"]]:
        """`KEYS` of each sample, which holds photograph i `counts[:, i]` times; NaN without both answers.

        Counts are float32, in which whole numbers are exact up to 16 million. Without `operating` only the areas.
        """
        weight = counts[:, self._order]
        called = np.cumsum(weight, 1)[:, self._ends]
        hits = np.cumsum(np.multiply(weight, self._positive, out=weight), 1)[:, self._ends]
        if not hits.shape[1]:
            return {key: np.full(len(counts), np.nan) for key in _keys(operating)}
        alarms = called - hits
        # Sums of many products are taken in double precision.
        ill, well = hits[:, -1].astype(np.float64), alarms[:, -1].astype(np.float64)
        both = (ill > 0) & (well > 0)
        # A division by zero only where `both` is false; its result is thrown away.
        ill, well = np.where(ill > 0, ill, 1), np.where(well > 0, well, 1)
        gained = np.diff(hits, axis=1, prepend=0)
        below = np.einsum("bg,bg->b", gained, alarms[:, -1:] - alarms, dtype=np.float64)
        tied = np.einsum("bg,bg->b", gained, np.diff(alarms, axis=1, prepend=0), dtype=np.float64)
        precision = np.divide(hits, called, out=np.zeros(hits.shape), where=called > 0, dtype=np.float64)
        found = {
            "auc": (below + tied / 2) / (ill * well),
            "average_precision": np.einsum("bg,bg->b", gained, precision) / ill,
        }
        if operating:
            # Both curves rise: the best point is the last that has too few false alarms, or the first of enough hits.
            allowed = (alarms <= (1 - FIXED + 1e-12) * well[:, None]).sum(1)
            needed = (hits < (FIXED - 1e-12) * ill[:, None]).sum(1)
            row = np.arange(len(counts))
            at_most = np.where(allowed > 0, hits[row, np.maximum(allowed - 1, 0)], 0)
            found["sensitivity_at_specificity_90"] = at_most / ill
            found["specificity_at_sensitivity_90"] = 1 - alarms[row, np.minimum(needed, hits.shape[1] - 1)] / well
        return {key: np.where(both, values, np.nan) for key, values in found.items()}


def _keys(operating: bool) -> tuple[str, ...]:
    return KEYS if operating else KEYS[:2]


def _within(rate: np.ndarray) -> np.ndarray:
    """Where a rate is at least `FIXED`, up to a rounding: 9 of 10 is."""
    return rate >= FIXED - 1e-12
