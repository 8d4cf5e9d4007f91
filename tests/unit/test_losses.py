"""The loss against its definition, with label smoothing and low precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddr import losses
from fastddr.config import Config, LossConfig


def by_hand(logits: torch.Tensor, grades: list[int], smoothing: float) -> float:
    probabilities = logits.double().softmax(1)
    total = 0.0
    for row, grade in zip(probabilities, grades, strict=True):
        target = torch.full_like(row, smoothing / len(row))
        target[grade] += 1 - smoothing
        total -= (target * row.log()).sum().item()
    return total / len(grades)


@settings(deadline=None, max_examples=30)
@given(
    grades=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_mean_over_the_photographs(grades: list[int], smoothing: float, seed: int) -> None:
    logits = torch.randn(len(grades), 5, generator=torch.Generator().manual_seed(seed))
    loss = losses.CrossEntropy(label_smoothing=smoothing)
    assert loss(logits, torch.tensor(grades)).item() == pytest.approx(by_hand(logits, grades, smoothing), rel=1e-5)


def shares(n: int, classes: int, seed: int) -> torch.Tensor:
    """Two classes a row, as mixing makes them."""
    generator = torch.Generator().manual_seed(seed)
    eye, part = torch.eye(classes), torch.rand(n, 1, generator=generator)
    first, second = (torch.randint(classes, (n,), generator=generator) for _ in range(2))
    return eye[first] * part + eye[second] * (1 - part)


@settings(max_examples=30)
@given(
    n=st.integers(1, 6),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    classes=st.sampled_from([5, 6]),
    seed=st.integers(0, 99),
)
def test_shares_of_grades_count_as_such(n: int, smoothing: float, classes: int, seed: int) -> None:
    logits = torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    target = shares(n, classes, seed)
    loss = losses.CrossEntropy(label_smoothing=smoothing)
    smooth = target.double() * (1 - smoothing) + smoothing / classes
    expected = -(smooth * logits.double().log_softmax(1)).sum(1).mean().item()
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-5)
    assert loss(logits.bfloat16(), target.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_whole_shares_are_grades(smoothing: float) -> None:
    logits, grades = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    loss = losses.CrossEntropy(label_smoothing=smoothing)
    assert torch.allclose(loss(logits, torch.eye(5)[grades]), loss(logits, grades), rtol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_whatever_the_logits(autocast: bool) -> None:
    logits, grades = torch.randn(4, 5).bfloat16(), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = losses.CrossEntropy()(logits, grades)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(logits, [0, 1, 2, 3], 0.0), rel=1e-5)


@settings(max_examples=40)
@given(n=st.integers(1, 6), smoothing=st.sampled_from([0.0, 0.1, 0.5]), soft=st.booleans(), seed=st.integers(0, 99))
def test_weights_multiply_each_part_of_the_target(n: int, smoothing: float, soft: bool, seed: int) -> None:
    """Mixed and smoothed targets alike; and over photographs, so that micro batches add up to their batch."""
    generator = torch.Generator().manual_seed(seed)
    logits, weight = torch.randn(n, 5, generator=generator), torch.rand(5, generator=generator) * 3
    grades = torch.randint(5, (n,), generator=generator)
    target = shares(n, 5, seed) if soft else torch.eye(5)[grades]
    loss = losses.CrossEntropy(label_smoothing=smoothing, weight=weight)
    smooth = (target.double() * (1 - smoothing) + smoothing / 5) * weight.double()
    each = -(smooth * logits.double().log_softmax(1)).sum(1)
    given_ = target if soft else grades
    assert loss(logits, given_).item() == pytest.approx(each.mean().item(), rel=1e-4, abs=1e-6)
    assert loss(logits.bfloat16(), given_).dtype == torch.float32


def test_weights_of_the_grades() -> None:
    grades = np.repeat([0, 2, 3, 4], [50, 30, 15, 5])
    inverse = losses.class_weights("inverse", grades, 5)
    # Each of the four grades that are there has a quarter of all weight.
    torch.testing.assert_close(inverse, torch.tensor([0.5, 0.0, 25 / 30, 25 / 15, 5.0]))
    counts = np.bincount(grades, minlength=5)
    for beta in (0.0, 0.9, 0.999):
        effective = losses.class_weights("effective", grades, 5, beta).double().numpy()
        expected = np.array([(1 - beta) / (1 - beta**count) if count else 0.0 for count in counts])
        assert effective @ counts == pytest.approx(100), "the mean over the photographs is 1"
        np.testing.assert_allclose(effective / effective[0], expected / expected[0], rtol=1e-6)
    assert losses.class_weights("effective", grades, 5, 0.0)[[0, 2, 3, 4]].tolist() == [1, 1, 1, 1]


def test_the_configuration_chooses_the_loss() -> None:
    grades, cpu = np.array([0, 0, 0, 1]), torch.device("cpu")
    plain = losses.from_config(Config(), grades, cpu)
    assert isinstance(plain, losses.CrossEntropy)
    assert plain.weight is None
    weighted = losses.from_config(Config(loss=LossConfig(class_weights="inverse")), grades, cpu)
    torch.testing.assert_close(weighted.weight, torch.tensor([2 / 3, 2.0, 0, 0, 0]))
    sixth = Config(loss=LossConfig(class_weights="inverse"), ungradable="class")
    assert losses.from_config(sixth, np.array([0, 5]), cpu).weight.tolist() == [1, 0, 0, 0, 0, 1]
    assert isinstance(losses.from_config(Config(loss=LossConfig(name="mse")), grades, cpu), losses.MeanSquare)


def test_squared_distance_to_the_grade_or_to_the_mean_of_its_shares() -> None:
    values, grades = torch.tensor([[0.5], [3.0], [9.0]]), torch.tensor([0, 4, 1])
    loss = losses.MeanSquare()
    assert loss(values, grades).item() == pytest.approx((0.25 + 1 + 64) / 3)
    mixed = torch.tensor([[0.5, 0, 0, 0, 0.5], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
    assert loss(values, mixed).item() == pytest.approx((1.5**2 + 0 + 64) / 3)
    assert loss(values.bfloat16(), grades).dtype == torch.float32
