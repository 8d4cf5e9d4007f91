"""How sure a figure is: 95 % intervals over the photographs, and of the difference of two models.

A share of photographs (accuracy, the recall of a grade, sensitivity, specificity) has Wilson's score interval (Wilson,
"Probable inference, the law of succession, and statistical inference", 1927): of few photographs, and near 0 and 1, a
bootstrap is far too narrow, and [1, 1] where a share is 1 (Brown, Cai and DasGupta, "Interval estimation for a binomial
proportion", 2001). All other figures have a percentile bootstrap, which draws the photographs again, with replacement.
They count as independent; two eyes of one patient are not, so the truth is a little wider. An interval speaks of the
photographs, not of the training seed.

The calibration error has none: binning adds noise to it that only ever makes it larger, and a sample drawn again adds
it a second time, so that the figure may lie outside of its own interval.

A sample is a row of counts, how often each photograph was drawn, and each figure is computed from a block of such rows
at once. Two models of the same photographs are compared on the same samples (paired), so what is hard for both cancels.

b: samples    n: photographs    C: grades
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from fastddr.data.grades import ICDR
from fastddr.evaluation import ranking
from fastddr.evaluation.metrics import MEANS, one_against_rest, rates, worse_than

#: Bootstrap samples behind an interval of up to `FEW` photographs; for more they fall, down to `LEAST`, with the work.
SAMPLES, FEW, LEAST = 2000, 10_000, 400
LEVEL = 0.95
#: Numbers in a block of counts: what stays in a core's cache.
_BLOCK = 100_000

Sampled = dict[str, Any]


def intervals(
    logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"], point: Mapping[str, Any], *, seed: int = 0
) -> dict[str, Any]:
    """95 % intervals `[low, high]` in the shape of the figures `point` (`metrics.figures` of the same photographs).

    None where the figure itself is undefined. `samples` says how many samples there were.
    """
    found = _interval_of(point, _drawn([logits], grades, seed)[0])
    truth = np.asarray(point["confusion_matrix"]).sum(1)
    found["accuracy"] = share(point["accuracy"], int(truth.sum()))
    found["recall"] = [share(value, n) for value, n in zip(point["recall"], truth.tolist(), strict=True)]
    for name, values in point["endpoints"].items():
        least = ranking.ENDPOINTS[name]
        for key, of in (("sensitivity", truth[least : len(ICDR)]), ("specificity", truth[:least])):
            found["endpoints"][name][key] = share(values[key], int(of.sum()))
    return {**found, "referable": found["endpoints"].get("referable"), "samples": samples(len(grades))}


def differences(
    first: Float[Tensor, "n C"], second: Float[Tensor, "n C"], grades: Int[Tensor, " n"], *, seed: int = 0
) -> Sampled:
    """Samples of each figure of `second` less that of `first`, paired; in the shape of the figures, (b,) each."""
    one, other = _drawn([first, second], grades, seed)
    return _joined([one, other], lambda values: values[1] - values[0])


def interval(values: Float[np.ndarray, " b"]) -> list[float] | None:
    """`[low, high]` around the middle 95 % of what is defined; None where nothing is."""
    # A sample may leave kappa undefined (one grade, all in one column) where the whole split does not.
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def share(value: float | None, n: int) -> list[float] | None:
    """Wilson's `[low, high]` of a share of `n` photographs; None where it is undefined."""
    # Half a second of imports, as torchmetrics in `metrics`.
    from scipy.stats import binomtest

    if value is None:
        return None
    low, high = binomtest(round(value * n), n).proportion_ci(LEVEL, method="wilson")
    return [float(low), float(high)]


def samples(n: int) -> int:
    """How many samples of n photographs are drawn."""
    return int(np.clip(SAMPLES * FEW // max(n, 1), LEAST, SAMPLES))


def _drawn(models: Sequence[Tensor], grades: Tensor, seed: int) -> list[Sampled]:
    """Each model's figures of the same samples."""
    truth = grades.detach().cpu().long()
    weighed = [_Weighed(logits.detach().cpu().double(), truth) for logits in models]
    blocks: list[list[Sampled]] = [[] for _ in models]
    for counts in _counts(len(truth), samples(len(truth)), seed):
        for model, found in zip(weighed, blocks, strict=True):
            found.append(model.figures(counts))
    return [_joined(found, np.concatenate) for found in blocks]


def _counts(n: int, total: int, seed: int) -> Iterator[Float[np.ndarray, "b n"]]:
    """How often each of n photographs is in each sample, a block of samples at a time."""
    rng = np.random.Generator(np.random.Philox(seed))
    rows = max(1, _BLOCK // max(n, 1))
    for start in range(0, total, rows):
        here = min(rows, total - start)
        picked = rng.integers(0, max(n, 1), (here, n)) + n * np.arange(here)[:, None]
        yield np.bincount(picked.ravel(), minlength=here * n).reshape(here, n).astype(np.float32)


class _Weighed:
    """A model's answers, ready to be weighed."""

    def __init__(self, logits: Float[Tensor, "n C"], grades: Int[Tensor, " n"]) -> None:
        self._classes = classes = logits.shape[1]
        truth, predicted = grades.numpy(), logits.argmax(1).numpy()
        logs = logits.log_softmax(1)
        probabilities = logs.exp()
        self._loss = -logs[np.arange(len(truth)), truth].numpy()
        self._cells = _members(truth * classes + predicted, classes * classes)
        self._grades = [ranking.Ranked(*one_against_rest(probabilities, grades, grade)) for grade in range(classes)]
        self._endpoints = {
            name: ranking.Ranked(*worse_than(probabilities, grades, name))
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
