"""How sure a figure is: 95 % intervals over the photographs, and of the difference of two models.

A share of photographs (accuracy, the recall of a grade, sensitivity, specificity) has Wilson's score interval (Wilson,
"Probable inference, the law of succession, and statistical inference", 1927): of few photographs, and near 0 and 1, a
bootstrap is far too narrow, and [1, 1] where a share is 1 (Brown, Cai and DasGupta, "Interval estimation for a binomial
proportion", 2001). All other figures have a percentile bootstrap, which draws the photographs again, with replacement.
The operating points are shares whose threshold is drawn too: they have the bootstrap, which knows of the threshold,
widened to Wilson's. Balanced accuracy, the mean of the recalls, has its interval from theirs (MOVER: Zou and Donner,
"Construction of confidence limits about effect measures: a general approach", 2008): samples that miss a rare grade
would have the mean of others. What is left to the bootstrap (kappa, macro F1, areas) is too narrow of few photographs
of a grade. An interval speaks of the photographs, not of the training seed.

Photographs of one patient err together. Where patients are known, whole patients are drawn (the cluster bootstrap of
Field and Welsh, "Bootstrapping clustered data", 2007), and a share counts as one of as many photographs as would tell
as much were they independent (Korn and Graubard, "Confidence intervals for proportions with small expected number of
positive counts estimated from survey data", 1998; in Wilson's interval: Franco et al., "Comparative study of confidence
intervals for proportions in complex sample surveys", 2019). Of fewer than `FEWEST` patients a bootstrap has too few
different samples, and only shares and their mean have intervals. Where patients are not known photographs count as
independent, and if they are not, the truth is wider.

The calibration error has none: binning adds noise to it that only ever makes it larger, and a sample drawn again adds
it a second time, so that the figure may lie outside of its own interval.

A sample is a row of counts, how often each photograph was drawn, and each figure is computed from a block of such rows
at once. Two models of the same photographs are compared on the same samples (paired), so what is hard for both cancels.

b: samples    n: photographs    p: patients    C: grades
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastddr.data.grades import ICDR
from fastddr.evaluation import ranking
from fastddr.evaluation.metrics import MEANS, one_against_rest, rates, worse_than

#: Bootstrap samples behind an interval of up to `FEW` photographs; for more they fall, down to `LEAST`, with the work.
SAMPLES, FEW, LEAST = 2000, 10_000, 400
LEVEL = 0.95
#: Patients of whom a bootstrap may be drawn, at least.
FEWEST = 10
#: How alike photographs of one patient are is judged as if so many more patients, all alike, had been seen: few tell
#: little of it, and none if all of their photographs are right.
_ALIKE = 2.0
#: Numbers in a block of counts: what stays in a core's cache.
_BLOCK = 100_000

Sampled = dict[str, Any]


def intervals(
    logits: Float[Tensor, "n C"],
    grades: Int[Tensor, " n"],
    point: Mapping[str, Any],
    *,
    patients: Sequence[str] | None = None,
    drawn: Sampled | None = None,
) -> dict[str, Any]:
    """95 % intervals `[low, high]` in the shape of the figures `point` (`metrics.figures` of the same photographs).

    None where the figure itself is undefined. `samples` says how many samples there were. Where patients are known,
    `patients` is their number, and `unnamed` that of photographs whose patient is not known, if there are any: each
    stands for itself.

    Args:
        patients: of each photograph, "" where the patient is not known.
        drawn: what `sampled` made of the same, where it is there already.
    """
    groups = _groups(patients, len(grades))
    drawn = sampled(logits, grades, patients=patients) if drawn is None else drawn
    found = _interval_of(point, drawn)
    truth, predicted = grades.detach().cpu().numpy(), logits.detach().cpu().argmax(1).numpy()

    def of(value: float | None, right: np.ndarray, among: np.ndarray) -> list[float] | None:
        n = 0.0 if value is None else independent(right[among], groups[among])
        return share(value, n) if value is not None and n > 0 else None

    everywhere = np.ones(len(truth), dtype=bool)
    found["accuracy"] = of(point["accuracy"], predicted == truth, everywhere)
    found["recall"] = [of(value, predicted == truth, truth == grade) for grade, value in enumerate(point["recall"])]
    found["balanced_accuracy"] = _of_mean(point["recall"], found["recall"], predicted == truth, truth, groups)
    for name, values in point["endpoints"].items():
        least, graded, here = ranking.ENDPOINTS[name], truth < len(ICDR), found["endpoints"][name]
        called = predicted >= least
        here["sensitivity"] = of(values["sensitivity"], called, graded & (truth >= least))
        here["specificity"] = of(values["specificity"], ~called, truth < least)
        score, ill = worse_than(logits.detach().cpu(), grades.detach().cpu(), name)
        for key, among, ranks in zip(ranking.OPERATING, (ill, ~ill), (score, -score), strict=True):
            here[key] = _wider(here[key], values[key], ranks[among], groups[graded][among])
    named = [name for name in patients or () if name]
    told = {"patients": len(set(named))} if named else {}
    if named and len(named) < len(grades):
        told["unnamed"] = len(grades) - len(named)
    return {**found, "referable": found["endpoints"].get("referable"), "samples": samples(len(grades)), **told}


def sampled(
    logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"], *, patients: Sequence[str] | None = None
) -> Sampled:
    """Each figure of each sample, (b,), in the shape of the figures; for every model the photographs of a sample are
    the same."""
    truth, groups = grades.detach().cpu().long(), _groups(patients, len(grades))
    model = _Weighed(logits.detach().cpu().double(), truth)
    few = any(patients or ()) and len(np.unique(groups)) < FEWEST
    # Of few patients one sample, for the shape alone.
    blocks = [model.figures(counts) for counts in _counts(groups, 1 if few else samples(len(truth)))]
    drawn = _joined(blocks, np.concatenate)
    return _joined([drawn], lambda values: np.full_like(values[0], np.nan)) if few else drawn


def differences(first: Sampled, second: Sampled) -> Sampled:
    """Each figure of `second` less that of `first`, paired; both of `sampled`, of the same photographs."""
    return _joined([first, second], lambda values: values[1] - values[0])


def interval(values: Float[np.ndarray, " b"]) -> list[float] | None:
    """`[low, high]` around the middle 95 % of what is defined; None where nothing is."""
    # A sample may leave kappa undefined (one grade, all in one column) where the whole split does not.
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def share(value: float, n: float) -> list[float]:
    """Wilson's `[low, high]` of a share of `n` photographs, which need not be a whole number."""
    # SciPy's has whole numbers alone.
    z2 = NormalDist().inv_cdf(0.5 + LEVEL / 2) ** 2
    middle, half = value + z2 / (2 * n), math.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n * n)))
    low, high = ((middle + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    # It holds the share; at 0 and 1 a bound is just that, which rounding may miss.
    return [min(value, max(0.0, low)), max(value, min(1.0, high))]


def _of_mean(
    recalls: Sequence[float | None],
    bounds: Sequence[list[float] | None],
    right: Bool[np.ndarray, " n"],
    truth: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
) -> list[float] | None:
    """The interval of the mean of the recalls of the grades present, from theirs, `bounds`; None where none has one."""
    there = [(grade, value) for grade, value in enumerate(recalls) if value is not None]
    if not any(bounds):
        return None
    mean = math.fsum(value for _, value in there) / len(there)
    # A recall without an interval, that of one patient's photographs, may be anything.
    known = [(value, *(bounds[grade] or (0.0, 1.0))) for grade, value in there]
    below = math.hypot(*(value - low for value, low, _ in known)) / len(there)
    above = math.hypot(*(high - value for value, _, high in known)) / len(there)
    patients = int(groups.max()) + 1
    if patients < len(groups):
        # Recalls are not independent where a patient has photographs of several grades: what that adds to the variance.
        each = [(truth == grade, value) for grade, value in there]
        apart = np.stack(
            [np.bincount(groups[of], (right[of] - value) / of.sum(), minlength=patients) for of, value in each]
        )
        alone, together = (apart**2).sum(), (apart.sum(0) ** 2).sum()
        wider = math.sqrt(max(1.0, together / alone)) if alone else 1.0
        below, above = below * wider, above * wider
    return [max(0.0, mean - below), min(1.0, mean + above)]


def _wider(
    drawn: list[float] | None, value: float | None, score: Float[np.ndarray, " m"], groups: Int[np.ndarray, " m"]
) -> list[float] | None:
    """The interval that a bootstrap has `drawn` of an operating point, widened to Wilson's; None where either has none.

    `value` is the share of these photographs that the operating point has right: those of the highest scores.
    """
    if drawn is None or value is None:
        return None
    right = np.zeros(len(score), dtype=bool)
    # Photographs of one score are right together, so it does not matter which of them comes first.
    right[np.argsort(-score)[: round(value * len(score))]] = True
    n = independent(right, groups)
    if n == 0:
        return None
    low, high = share(value, n)
    return [min(drawn[0], low), max(drawn[1], high)]


def independent(right: Bool[np.ndarray, " m"], groups: Int[np.ndarray, " m"]) -> float:
    """How many independent photographs would tell as much of a share as these, of which each has a patient.

    Their number over the design effect: the variance of the share by whole patients (linearised, as of a ratio of two
    sums over patients) to that of as many independent photographs, at least 1. It is drawn towards that of patients
    whose photographs are all alike, the more the fewer patients have one of the rarer kind (`_ALIKE`). The variance is
    known by few patients only, for which Korn and Graubard take the squared ratio of Student's t at n − 1 and at
    patients − 1. 0 of one patient with several photographs, who tells nothing of others.
    """
    _, place = np.unique(groups, return_inverse=True)
    n, patients = len(right), int(place.max(initial=-1)) + 1
    if patients in (0, n):
        return float(n)
    if patients == 1:
        return 0.0
    # Half a second of imports, as scikit-learn in `ranking`.
    from scipy.stats import t

    value = right.mean()
    alike = float((np.bincount(place) ** 2).sum()) / n
    effect, rare = 1.0, 0
    if 0 < value < 1:
        apart = np.bincount(place, right - value, minlength=patients)
        variance = patients / (patients - 1) * (apart**2).sum() / n**2
        effect = max(1.0, variance * (n - 1) / (value * (1 - value)))
        rare = len(np.unique(place[right == (value < 0.5)]))
    effect = (rare * effect + _ALIKE * alike) / (rare + _ALIKE)
    tail = 0.5 + LEVEL / 2
    return n / effect * float(t.ppf(tail, n - 1) / t.ppf(tail, patients - 1)) ** 2


def _groups(patients: Sequence[str] | None, n: int) -> Int[np.ndarray, " n"]:
    """A number for each photograph, the same for those of one patient, from 0 on without a gap."""
    if patients is None:
        return np.arange(n)
    _, found = np.unique([name or f"\n{row}" for row, name in enumerate(patients)], return_inverse=True)
    return found.astype(np.int64)


def samples(n: int) -> int:
    """How many samples of n photographs are drawn."""
    return int(np.clip(SAMPLES * FEW // max(n, 1), LEAST, SAMPLES))


def _counts(groups: Int[np.ndarray, " n"], total: int) -> Iterator[Float[np.ndarray, "b n"]]:
    """How often each photograph is in each sample, as often as its patient; a block of samples at a time."""
    rng = np.random.Generator(np.random.Philox(0))
    patients = int(groups.max(initial=-1)) + 1
    rows = max(1, _BLOCK // max(len(groups), 1))
    for start in range(0, total, rows):
        here = min(rows, total - start)
        picked = rng.integers(0, max(patients, 1), (here, patients)) + patients * np.arange(here)[:, None]
        drawn = np.bincount(picked.ravel(), minlength=here * patients).reshape(here, patients).astype(np.float32)
        yield drawn if patients == len(groups) else drawn[:, groups]


class _Weighed:
    """A model's answers, ready to be weighed."""

    def __init__(self, logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"]) -> None:
        self._classes = classes = logits.shape[1]
        truth, predicted = grades.numpy(), logits.argmax(1).numpy()
        logs = logits.log_softmax(1)
        self._loss = -logs[np.arange(len(truth)), truth].numpy()
        self._cells = _members(truth * classes + predicted, classes * classes)
        self._grades = [ranking.Ranked(*one_against_rest(logits, grades, grade)) for grade in range(classes)]
        self._endpoints = {
            name: ranking.Ranked(*worse_than(logits, grades, name))
            for name, least in ranking.ENDPOINTS.items()
            if classes > least
        }
        self._graded = truth < len(ICDR)

    def figures(self, counts: Float[np.ndarray, "b n"]) -> Sampled:
        """Each figure of each sample, (b,); NaN where undefined."""
        classes = self._classes
        of_matrix = rates((counts @ self._cells).reshape(-1, classes, classes))
        one_by_one = [ranked.sampled(counts, operating=False) for ranked in self._grades]
        n = np.maximum(counts.sum(1), 1)
        graded = counts[:, self._graded]
        endpoints = {
            name: {
                **{key: of_matrix[f"{name}_{key}"] for key in ("sensitivity", "specificity")},
                **ranked.sampled(graded),
            }
            for name, ranked in self._endpoints.items()
        }
        return {
            "loss": counts @ self._loss / n,
            **{key: of_matrix[key] for key in MEANS},
            "recall": [of_matrix["recall"][:, grade] for grade in range(classes)],
            **{key: _mean_of(np.stack([values[key] for values in one_by_one])) for key in ("auc", "average_precision")},
            "referable": endpoints.get("referable"),
            "endpoints": endpoints,
        }


def _members(groups: Int[np.ndarray, " n"], number: int) -> Float[np.ndarray, "n k"]:
    """1 where a photograph is of a group, else 0: a row of counts times this is the count of each group."""
    member = np.zeros((len(groups), number), dtype=np.float32)
    member[np.arange(len(groups)), groups] = 1
    return member


def _mean_of(values: Float[np.ndarray, "k b"]) -> Float[np.ndarray, " b"]:
    """Mean of what is defined in each column; NaN (and no warning) where nothing is."""
    known = ~np.isnan(values)
    number = known.sum(0)
    return np.where(number, np.where(known, values, 0).sum(0) / np.maximum(number, 1), np.nan)


def _joined(trees: Sequence[Any], join: Callable[[list[Any]], Any]) -> Any:
    """One tree of figures from several of the same shape, leaf by leaf."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: _joined([tree[key] for tree in trees], join) for key in first}
    if isinstance(first, list):
        return [_joined(list(parts), join) for parts in zip(*trees, strict=True)]
    return None if first is None else join(list(trees))


def _interval_of(point: Any, drawn: Any) -> Any:
    """The intervals of a tree of figures, for what was drawn."""
    if isinstance(drawn, dict):
        return {key: _interval_of((point or {}).get(key), value) for key, value in drawn.items()}
    if isinstance(drawn, list):
        return [_interval_of(value, samples_) for value, samples_ in zip(point, drawn, strict=True)]
    return None if point is None or drawn is None else interval(drawn)
