"""From values to grades: thresholds of the highest kappa, and logits that agree with them."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastddr.config import Config, LossConfig
from fastddr.evaluation import grading
from fastddr.evaluation.grading import Graded, Grading, fit
from fastddr.evaluation.metrics import SplitResult, figures

floats = st.floats(-1e6, 1e6, width=32)
rising = st.lists(floats, min_size=4, max_size=4, unique=True).map(sorted).map(tuple)


@settings(max_examples=200)
@given(cuts=rising, values=st.lists(floats, min_size=1, max_size=20), sigma=st.floats(0.1, 10))
def test_the_largest_logit_is_the_thresholds_grade(cuts: tuple[float, ...], values: list[float], sigma: float) -> None:
    """On the thresholds too, and one float beside them."""
    near = [np.nextafter(np.float32(cut), np.float32(to)) for cut in cuts for to in (-np.inf, np.inf)]
    x = torch.tensor([*values, *cuts, *near], dtype=torch.float32)
    logits = Grading(cuts, sigma).logits(x[:, None])
    expected = [sum(value > cut for cut in cuts) for value in x.double().tolist()]
    assert logits.argmax(1).tolist() == expected
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_logits_are_those_of_a_normal_distribution_about_the_grade() -> None:
    found = Grading((1.0, 2.0, 4.0, 5.0), 0.5)
    # 3 is half way between the thresholds to grade 2; 0 and 7 lie outside.
    logits = found.logits(torch.tensor([[3.0], [0.0], [7.0], [4.25]]))
    k = torch.arange(5)
    for row, g in zip(logits, (2.0, -0.5, 5.5, 2.75), strict=True):
        expected = -((g - k) ** 2) / (2 * 0.5**2)
        torch.testing.assert_close(row.softmax(0), expected.softmax(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_not_hidden(value: float) -> None:
    assert not Grading().logits(torch.tensor([[value]])).isfinite().all()


def kappa(values: torch.Tensor, grades: torch.Tensor, cuts: tuple[float, ...]) -> float:
    """Cohen 1968, quadratic, written out."""
    predicted, truth = np.searchsorted(cuts, values.double().numpy()), grades.numpy()
    chance = ((predicted[:, None] - truth[None, :]) ** 2).mean()
    return 1 - ((predicted - truth) ** 2).mean() / chance


@settings(max_examples=30)
@given(
    # Of one grade alone kappa cannot be made better.
    pairs=st.lists(st.tuples(st.integers(-2, 12), st.integers(0, 4)), min_size=2, max_size=6).filter(
        lambda pairs: len({grade for _, grade in pairs}) > 1
    ),
)
def test_no_other_thresholds_have_a_higher_kappa(pairs: list[tuple[int, int]]) -> None:
    values = torch.tensor([pair[0] / 2 for pair in pairs])
    grades = torch.tensor([pair[1] for pair in pairs])
    fitted = fit(values, grades)
    assert all(low < high for low, high in itertools.pairwise(fitted.thresholds))
    # Between each two values, below and above them all; several thresholds of one gap lie a hundredth apart.
    seen = sorted(set(values.tolist()))
    gaps = [seen[0] - 1, *((low + high) / 2 for low, high in itertools.pairwise(seen)), seen[-1] + 1]
    tries = itertools.combinations_with_replacement(gaps, 4)
    best = max(kappa(values, grades, tuple(cut + n / 100 for n, cut in enumerate(cuts))) for cuts in tries)
    rounded = Grading().thresholds
    assert kappa(values, grades, fitted.thresholds) == pytest.approx(max(best, kappa(values, grades, rounded)))


def test_thresholds_stay_where_nothing_is_better() -> None:
    grades = torch.arange(5).repeat(3)
    assert fit(grades.float() + 0.1, grades).thresholds == Grading().thresholds
    assert fit(torch.randn(9), torch.full((9,), 2)).thresholds == Grading().thresholds, "one grade has no kappa"


def test_a_shifted_scale_is_found_and_many_photographs_are_quick() -> None:
    generator = torch.Generator().manual_seed(0)
    grades = torch.randint(5, (3000,), generator=generator)
    values = 0.4 * grades - 3 + 0.05 * torch.randn(3000, generator=generator)
    fitted = fit(values, grades)
    assert fitted.thresholds == pytest.approx([-2.8, -2.4, -2.0, -1.6], abs=0.05)
    assert kappa(values, grades, fitted.thresholds) > 0.98
    assert fit(values, grades) == fitted


def test_the_spread_is_the_most_likely_one() -> None:
    generator = torch.Generator().manual_seed(0)
    grades = torch.randint(5, (2000,), generator=generator)
    values = grades + 0.7 * torch.randn(2000, generator=generator)
    fitted = fit(values, grades)

    def loss(sigma: float) -> float:
        return figures(Grading(fitted.thresholds, sigma).logits(values[:, None]), grades)["loss"]

    assert all(loss(fitted.sigma) <= loss(fitted.sigma * factor) for factor in (0.5, 0.9, 1.1, 2.0))
    assert 0.5 < fitted.sigma < 1.0
    assert fit(grades.float(), grades).sigma < 0.2, "no spread at all"


def test_a_model_of_logits_is_left_alone_and_one_of_values_is_graded() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1))
    image = torch.randn(4, 3, 1, 1)
    assert grading.wrap(model, Config(), None) is model
    regression = Config(loss=LossConfig(name="mse"))
    rounding, own = Grading(), Grading((0.0, 0.1, 0.2, 0.3), 2.0)
    for saved, expected in ((None, rounding), (asdict(own), own)):
        graded = grading.wrap(model, regression, saved)
        assert isinstance(graded, Graded)
        assert torch.equal(graded(image), expected.logits(model(image)))


def test_fitted_gives_logits_and_what_a_checkpoint_keeps() -> None:
    values, grades = torch.randn(20, 1), torch.arange(20) % 5
    found = SplitResult(values, grades, torch.arange(20), [str(n) for n in range(20)], "current")
    assert grading.fitted(found, Config()) == (found, None)
    graded, kept = grading.fitted(found, Config(loss=LossConfig(name="mse")))
    expected = fit(values[:, 0], grades)
    assert kept == asdict(expected)
    assert torch.equal(graded.logits, expected.logits(values))
    values_of = figures(graded.logits, grades)
    plain, regression = grading.logged(values_of, None), grading.logged(values_of, kept)
    assert [*regression][len(plain) :] == [*(f"valid/threshold_{n}" for n in range(4)), "valid/sigma"]
    assert [*plain][:4] == ["valid/loss", "valid/accuracy", "valid/qwk", "valid/macro_f1"]
    assert [plain[f"valid/recall_{grade}"] for grade in range(5)] == values_of["recall"]
