"""The loss against its definition, with padding, label smoothing and low precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddr import losses
from fastddr.errors import UserError


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
    padding=st.integers(0, 3),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_mean_over_the_valid_photographs(grades: list[int], padding: int, smoothing: float, seed: int) -> None:
    n = len(grades)
    logits = torch.randn(n + padding, 5, generator=torch.Generator().manual_seed(seed))
    target = torch.tensor(grades + [0] * padding)
    valid = torch.arange(n + padding) < n
    loss = losses.build("cross_entropy", label_smoothing=smoothing)
    expected = by_hand(logits[:n], grades, smoothing)
    assert loss(logits, target, valid).item() == pytest.approx(expected, rel=1e-5)
    assert loss(logits[:n], target[:n]).item() == pytest.approx(expected, rel=1e-5)


def shares(n: int, classes: int, seed: int) -> torch.Tensor:
    """Two classes a row, as mixing makes them."""
    generator = torch.Generator().manual_seed(seed)
    eye, part = torch.eye(classes), torch.rand(n, 1, generator=generator)
    first, second = (torch.randint(classes, (n,), generator=generator) for _ in range(2))
    return eye[first] * part + eye[second] * (1 - part)


@settings(max_examples=30)
@given(
    n=st.integers(1, 6),
    padding=st.integers(0, 3),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    classes=st.sampled_from([5, 6]),
    seed=st.integers(0, 99),
)
def test_shares_of_grades_count_as_such(n: int, padding: int, smoothing: float, classes: int, seed: int) -> None:
    logits = torch.randn(n + padding, classes, generator=torch.Generator().manual_seed(seed))
    logits[n:] = float("inf")  # padding may be anything
    target, valid = shares(n + padding, classes, seed), torch.arange(n + padding) < n
    loss = losses.build("cross_entropy", label_smoothing=smoothing)
    smooth = target[:n].double() * (1 - smoothing) + smoothing / classes
    expected = -(smooth * logits[:n].double().log_softmax(1)).sum(1).mean().item()
    assert loss(logits[:n], target[:n]).item() == pytest.approx(expected, rel=1e-5)
    assert loss(logits, target, valid).item() == pytest.approx(expected, rel=1e-5)
    half = loss(logits[:n].bfloat16(), target[:n].bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_whole_shares_are_grades(smoothing: float) -> None:
    logits, grades = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    loss = losses.build("cross_entropy", label_smoothing=smoothing)
    assert torch.allclose(loss(logits, torch.eye(5)[grades]), loss(logits, grades), rtol=1e-6)


def test_padding_gets_no_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    for grades in (torch.tensor([1, 2, 3]), torch.eye(5)[[1, 2, 3]]):
        logits.grad = None
        losses.build()(logits, grades, torch.tensor([True, True, False])).backward()
        assert logits.grad is not None
        assert logits.grad[:2].abs().min() > 0
        assert not logits.grad[2].any()


def test_a_batch_of_padding_alone_is_zero() -> None:
    loss = losses.build()(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
    assert loss.item() == 0


@pytest.mark.parametrize("valid", [None, torch.ones(4, dtype=torch.bool)])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_whatever_the_logits(valid: torch.Tensor | None, autocast: bool) -> None:
    logits, grades = torch.randn(4, 5).bfloat16(), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = losses.build()(logits, grades, valid)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(logits, [0, 1, 2, 3], 0.0), rel=1e-5)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_impossible_label_smoothing(smoothing: float) -> None:
    with pytest.raises(UserError, match=f"label_smoothing={smoothing}"):
        losses.build(label_smoothing=smoothing)


def test_unknown_loss() -> None:
    with pytest.raises(UserError, match=r"'crossentropy'.*'cross_entropy'\?$"):
        losses.build("crossentropy")
