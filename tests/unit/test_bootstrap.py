"""The bootstrap against scikit-learn with counts as weights, against theory, and its promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from sklearn import metrics as sk

from fastddr.evaluation import bootstrap, ranking
from fastddr.evaluation.calibration import at_bound, temperature
from fastddr.evaluation.metrics import figures

#: DDR's grades: half healthy, few severe.
SHARES = torch.tensor([0.5, 0.05, 0.35, 0.02, 0.08])


def answers(n: int, skill: float = 1.5, seed: int = 0, noise: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a grader with some skill, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    grades = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    drawn = torch.randn(n, 5, generator=torch.Generator().manual_seed(100 + noise))
    return drawn + skill * torch.nn.functional.one_hot(grades, 5), grades


def differences(
    one: torch.Tensor, other: torch.Tensor, grades: torch.Tensor, patients: list[str] | None = None
) -> dict[str, Any]:
    return bootstrap.differences(*(bootstrap.sampled(logits, grades, patients=patients) for logits in (one, other)))


@st.composite
def weighed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, truth and counts of a few samples: some photographs in none, some truths all one answer."""
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    score = rng.integers(0, draw(st.integers(1, 20)) + 1, n) / 20
    positive = rng.random(n) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    counts = rng.integers(0, 4, (3, n))
    return score, positive, counts


@settings(max_examples=150, deadline=None)
@given(weighed())
def test_each_sample_has_the_figures_of_scikit_learn(split: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The counts as sample weights: to 1e-9."""
    score, positive, counts = split
    found = ranking.Ranked(score, positive).sampled(counts.astype(np.float32))
    for row, weight in enumerate(counts):
        drawn = weight > 0
        if not (positive & drawn).any() or (positive | ~drawn).all():
            assert all(np.isnan(values[row]) for values in found.values())
            continue
        given_ = {"sample_weight": weight[drawn]}
        truth, said = positive[drawn], score[drawn]
        assert found["auc"][row] == pytest.approx(sk.roc_auc_score(truth, said, **given_), abs=1e-9)
        precision = sk.average_precision_score(truth, said, **given_)
        assert found["average_precision"][row] == pytest.approx(precision, abs=1e-9)
        alarms, hits, _ = sk.roc_curve(truth, said, drop_intermediate=False, **given_)
        sensitivity = hits[1 - alarms >= 0.9 - 1e-9].max()
        assert found["sensitivity_at_specificity_90"][row] == pytest.approx(sensitivity, abs=1e-9)
        specificity = (1 - alarms)[hits >= 0.9 - 1e-9].max()
        assert found["specificity_at_sensitivity_90"][row] == pytest.approx(specificity, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(weighed())
def test_a_sample_of_each_photograph_once_is_the_split(split: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    score, positive, counts = split
    found = ranking.Ranked(score, positive).sampled(np.ones((1, counts.shape[1]), np.float32))
    for key, value in ranking.figures(score, positive).items():
        if value is None:
            assert np.isnan(found[key][0])
        else:
            assert found[key][0] == pytest.approx(value, abs=1e-9), key


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """A tree of figures or intervals as one level; an interval is a leaf."""
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in leaves(item, f"{name}.{key}").items()}
    if isinstance(tree, list) and name.endswith(".recall"):
        return {k: v for i, item in enumerate(tree) for k, v in leaves(item, f"{name}.{i}").items()}
    return {name: tree}


def test_every_figure_lies_in_its_interval_and_samples_are_the_same_each_time() -> None:
    logits, grades = answers(600)
    point = figures(logits, grades)
    found = bootstrap.intervals(logits, grades, point)
    assert found == bootstrap.intervals(logits, grades, point)
    assert found.pop("samples") == bootstrap.SAMPLES
    values, inside = leaves(point), leaves(found)
    # Of the calibration error a sample drawn again knows nothing: noise only ever adds to it.
    assert set(inside) == set(values) - {".n", ".confusion_matrix", ".ece"}
    for name, (low, high) in inside.items():
        assert low < values[name] < high, name


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """Recall: the normal approximation of a share. AUC: Hanley and McNeil 1982, from the variance of its two means."""
    logits, grades = answers(1500)
    point = figures(logits, grades)
    found = bootstrap.intervals(logits, grades, point)
    for grade, (low, high) in enumerate(found["recall"]):
        share, n = point["recall"][grade], int((grades == grade).sum())
        assert high - low == pytest.approx(2 * 1.96 * (share * (1 - share) / n) ** 0.5, rel=0.2)
    score = logits.double().softmax(1)[:, 2:].sum(1).numpy()
    ill = grades.numpy() >= 2
    above = (score[ill][:, None] > score[~ill][None, :]).mean(1), (score[ill][:, None] > score[~ill][None, :]).mean(0)
    error = sum(part.var(ddof=1) / len(part) for part in above) ** 0.5  # DeLong 1988
    low, high = found["referable"]["auc"]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.12)


def test_what_is_undefined_has_no_interval() -> None:
    logits, grades = answers(60)
    kept = grades != 3
    point = figures(logits[kept], grades[kept])
    found = bootstrap.intervals(logits[kept], grades[kept], point)
    assert point["recall"][3] is None
    assert found["recall"][3] is None
    only = figures(logits[:1], torch.zeros(1, dtype=torch.int64))
    of_one = bootstrap.intervals(logits[:1], torch.zeros(1, dtype=torch.int64), only)
    assert of_one["auc"] is None
    assert of_one["referable"]["sensitivity"] is None
    nobody = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    empty = leaves(bootstrap.intervals(*nobody, figures(*nobody)))
    assert set(empty.values()) == {None, bootstrap.SAMPLES}


def test_a_perfect_grader_is_sure() -> None:
    _, grades = answers(80)
    logits = 40.0 * torch.nn.functional.one_hot(grades, 5)
    found = bootstrap.intervals(logits, grades, figures(logits, grades))
    for key in ("qwk", "macro_f1", "auc", "average_precision"):
        assert found[key] == pytest.approx([1, 1])
    # What did not happen in 80 photographs may happen in 1 of 22: Wilson's, at all right, is n / (n + z²).
    assert found["accuracy"] == pytest.approx([80 / (80 + 1.959964**2), 1])
    for values in found["endpoints"].values():
        assert values["sensitivity_at_specificity_90"] == pytest.approx(values["sensitivity"])
        assert values["specificity_at_sensitivity_90"] == pytest.approx(values["specificity"])


def test_balanced_accuracy_is_no_surer_than_the_recall_of_a_rare_grade() -> None:
    """A grade with two photographs, never found: samples without it are no perfect ones."""
    grades = torch.tensor([0] * 50 + [1] * 5 + [2] * 35 + [3] * 2 + [4] * 8)
    logits = 20.0 * torch.nn.functional.one_hot(torch.where(grades == 3, 2, grades), 5)
    found = bootstrap.intervals(logits, grades, figures(logits, grades))
    # Each recall is at one end: its interval is as wide as n / (n + z²) leaves.
    width = {n: 1.959964**2 / (n + 1.959964**2) for n in (50, 5, 35, 2, 8)}
    below = sum(width[n] ** 2 for n in (50, 5, 35, 8)) ** 0.5 / 5
    assert found["balanced_accuracy"] == pytest.approx([0.8 - below, 0.8 + width[2] / 5])
    # One photograph of each of two grades a patient, both right or both wrong: a mean is no surer than either recall.
    truth, right, patients = torch.tensor([0, 2] * 20), torch.arange(40) < 32, [f"p{row // 2}" for row in range(40)]
    logits = 20.0 * torch.nn.functional.one_hot(torch.where(right, truth, 1), 5)
    found = bootstrap.intervals(logits, truth, figures(logits, truth), patients=patients)
    assert found["balanced_accuracy"] == pytest.approx(found["recall"][0])
    # Of one patient nothing is known, of whose grade alone little.
    assert bootstrap.intervals(logits, truth, figures(logits, truth), patients=["p"] * 40)["balanced_accuracy"] is None
    alone = [f"p{row}" if grade == 0 else "q" for row, grade in enumerate(truth.tolist())]
    found = bootstrap.intervals(logits, truth, figures(logits, truth), patients=alone)
    assert found["recall"][2] is None
    assert found["balanced_accuracy"][0] < 0.8 - 0.8 / 2


@pytest.mark.parametrize(("share", "n"), [(0.9, 10), (0.95, 35), (0.5, 20), (0.99, 236)])
def test_an_interval_of_a_share_holds_the_truth_in_95_of_100_samples(share: float, n: int) -> None:
    """Exactly, by the binomial distribution; a percentile bootstrap of 10 photographs held 0.9 in 65."""
    hits = np.arange(n + 1)
    found = np.array([bootstrap.share(k / n, n) for k in hits])
    inside = (found[:, 0] <= share) & (share <= found[:, 1])
    assert 0.92 <= binom.pmf(hits, n, share)[inside].sum() <= 0.99


def test_patients_of_one_photograph_each_change_nothing() -> None:
    logits, grades = answers(300)
    point = figures(logits, grades)
    alone = bootstrap.intervals(logits, grades, point)
    patients = [f"{row:04d}" for row in range(300)]
    known = bootstrap.intervals(logits, grades, point, patients=patients)
    assert known.pop("patients") == 300
    torch.testing.assert_close(known, alone, rtol=1e-9, atol=1e-12)
    # Those whose patient is not known stand for themselves, and are not all of one.
    again = bootstrap.intervals(logits, grades, point, patients=[""] * 300)
    torch.testing.assert_close(again, alone, rtol=1e-9, atol=1e-12)
    some = bootstrap.intervals(logits, grades, point, patients=["a", "a", *[""] * 298])
    assert (some["patients"], some["unnamed"]) == (1, 298)


def test_photographs_that_say_the_same_twice_are_worth_half() -> None:
    """Every patient has two photographs with one answer: intervals are those of half as many photographs."""
    logits, grades = answers(400)
    once = leaves(bootstrap.intervals(logits, grades, figures(logits, grades)))
    both, truth = logits.repeat(2, 1), grades.repeat(2)
    patients = [f"p{row}" for row in range(400)] * 2
    twice = leaves(bootstrap.intervals(both, truth, figures(both, truth), patients=patients))
    assert twice[".patients"] == 400
    naive = leaves(bootstrap.intervals(both, truth, figures(both, truth)))
    for name, (low, high) in ((name, value) for name, value in once.items() if isinstance(value, list)):
        assert twice[name] == pytest.approx([low, high], abs=0.25 * (high - low)), name
        assert twice[name][1] - twice[name][0] > 1.2 * (naive[name][1] - naive[name][0]), name
    drawn = differences(both, both.roll(1, 1), truth, patients)["qwk"]
    assert drawn.std() > 1.25 * differences(both, both.roll(1, 1), truth)["qwk"].std()


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("patients", [6, 20, 60])
def test_of_patients_an_interval_of_a_share_holds_the_truth_as_often_as_it_says(share: float, patients: int) -> None:
    """Four photographs a patient, half of whose patients are all right or all wrong; 2,000 sets."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(patients), 4)
    held, naive = [], []
    for _ in range(2000):
        one, alike = rng.random((patients, 1)) < share, rng.random((patients, 1)) < 0.5
        right = np.where(alike, one, rng.random((patients, 4)) < share).ravel()
        for found, n in ((held, bootstrap.independent(right, groups)), (naive, 4 * patients)):
            low, high = bootstrap.share(right.mean(), n)
            found.append(low <= share <= high)
    assert 0.93 <= np.mean(held) <= (0.97 if patients == 60 else 0.995)
    assert np.mean(naive) < 0.91


def test_where_all_are_right_a_patient_counts_once_at_most() -> None:
    patients = np.repeat(np.arange(200), 2)
    assert bootstrap.independent(np.ones(400, dtype=bool), patients) == pytest.approx(200, rel=0.01)
    assert bootstrap.independent(np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)) == 0
    assert bootstrap.independent(np.array([True, False]), np.array([4, 4])) == 0, "one patient tells of no other"


@pytest.mark.parametrize("patients", [5, 10, 40])
def test_one_more_that_is_wrong_makes_no_lower_bound_better(patients: int) -> None:
    groups, bounds = np.repeat(np.arange(patients), 2), []
    for wrong in range(patients + 1):
        right = np.ones(2 * patients, dtype=bool)
        right[: 2 * wrong : 2] = False  # of one eye of so many patients
        bounds.append(bootstrap.share(right.mean(), bootstrap.independent(right, groups))[0])
    assert bounds == sorted(bounds, reverse=True)


def test_of_few_patients_only_shares_have_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, grades = answers(60)
    counted: list[int] = []
    figured = bootstrap._Weighed.figures

    def count(self: Any, counts: np.ndarray) -> Any:
        counted.append(len(counts))
        return figured(self, counts)

    monkeypatch.setattr(bootstrap._Weighed, "figures", count)
    patients = [f"p{row % 9}" for row in range(60)]
    found = bootstrap.intervals(logits, grades, figures(logits, grades), patients=patients)
    assert found["qwk"] is None
    assert found["referable"]["auc"] is None
    assert found["accuracy"] is not None
    drawn = differences(logits, logits.roll(1, 0), grades, patients)["qwk"]
    assert bootstrap.interval(drawn) is None
    assert counted == [1, 1, 1], "nothing is drawn that is not told"
    each = bootstrap.intervals(logits[:5], grades[:5], figures(logits[:5], grades[:5]), patients=list("abcde"))
    assert (each["loss"], each["patients"]) == (None, 5), "also where each has one photograph"
    enough = [f"p{row % 10}" for row in range(60)]
    assert bootstrap.intervals(logits, grades, figures(logits, grades), patients=enough)["qwk"] is not None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30))
def test_photographs_are_worth_at_most_their_number(rows: list[tuple[bool, int]]) -> None:
    right, groups = (np.array(column) for column in zip(*rows, strict=True))
    n = bootstrap.independent(right, groups)
    assert 0 <= n <= len(rows)
    assert (n == 0) == (len(set(groups.tolist())) == 1 < len(rows))
    if n == 0:
        return
    low, high = bootstrap.share(float(right.mean()), n)
    assert 0 <= low <= right.mean() <= high <= 1


@given(st.integers(1, 5000), st.floats(0, 1))
def test_an_interval_of_a_share_is_scipys(n: int, part: float) -> None:
    hits = round(part * n)
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    found = bootstrap.share(hits / n, n)
    assert found == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert (found[0] == 0, found[1] == 1) == (hits == 0, hits == n), "without a rounding error"


def test_new_photographs_have_another_mix_of_grades() -> None:
    """Two graders with one answer each: their difference is that of two shares, and as uncertain as the mix."""
    _, grades = answers(2000)
    always = [40.0 * torch.nn.functional.one_hot(torch.full_like(grades, grade), 5) for grade in (0, 2)]
    found = differences(always[0], always[1], grades)["accuracy"]
    each = (grades == 2).double() - (grades == 0).double()
    assert found.std() == pytest.approx(float(each.std()) / 2000**0.5, rel=0.1)


def test_pairs_are_surer_than_two_intervals() -> None:
    """Two graders that err on the same photographs: their difference is known better than either."""
    one, grades = answers(500)
    other = one + 0.3 * torch.randn(500, 5, generator=torch.Generator().manual_seed(5))
    found = differences(one, other, grades)
    low, high = bootstrap.interval(found["accuracy"])
    alone = bootstrap.intervals(one, grades, figures(one, grades))["accuracy"]
    assert high - low < 0.8 * (alone[1] - alone[0])
    exact = figures(other, grades)["accuracy"] - figures(one, grades)["accuracy"]
    assert low < exact < high
    same = differences(one, one, grades)
    assert all(np.all(values == 0) for values in (same["accuracy"], same["qwk"], same["referable"]["auc"]))


def test_many_photographs_take_fewer_samples() -> None:
    assert bootstrap.samples(3759) == 2000
    assert bootstrap.samples(40_000) == 500
    assert bootstrap.samples(10**6) == bootstrap.LEAST


def test_a_temperature_undoes_what_was_done() -> None:
    logits, grades = answers(5000)
    honest = logits * temperature(logits, grades) ** -1
    assert temperature(honest, grades) == pytest.approx(1, abs=1e-3)
    assert temperature(3 * honest, grades) == pytest.approx(3, rel=1e-3)
    cooled = figures(3 * honest / temperature(3 * honest, grades), grades)
    assert cooled["ece"] < figures(3 * honest, grades)["ece"]
    assert cooled["accuracy"] == figures(logits, grades)["accuracy"]
    assert [at_bound(temperature(scale * honest, grades)) for scale in (1e-3, 1, 1e3)] == [True, False, True]
    with pytest.raises(ValueError, match="none"):
        temperature(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
