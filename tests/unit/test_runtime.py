"""Precision, batch division and threads: chosen in code, with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastddr.errors import UserError
from fastddr.ranks import cores
from fastddr.runtime import choose_precision, divide_batch


@pytest.mark.parametrize(
    ("asked", "launched", "capability", "chosen"),
    [
        ("auto", "no", None, "fp32"),
        ("auto", "", None, "fp32"),
        ("auto", "no", (9, 0), "bf16"),
        ("auto", "no", (8, 0), "bf16"),
        ("auto", "no", (7, 5), "fp16"),
        ("fp32", "no", (9, 0), "fp32"),
        ("fp16", "no", (9, 0), "fp16"),
        ("auto", "fp16", (9, 0), "fp16"),
        ("fp32", "bf16", (9, 0), "bf16"),
        ("bf16", "no", None, "bf16"),
    ],
)
def test_precision(asked: str, launched: str, capability: tuple[int, int] | None, chosen: str) -> None:
    got, reason = choose_precision(asked, launched, capability)
    assert got == chosen
    assert reason


@pytest.mark.parametrize(("asked", "launched"), [("fp16", "no"), ("auto", "fp16"), ("auto", "fp8")])
def test_precision_that_nothing_here_can(asked: str, launched: str) -> None:
    with pytest.raises(UserError, match=r"fp16|fp8"):
        choose_precision(asked, launched, None)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_a_batch_that_divides_is_divided(micro: int, accumulation: int, world: int) -> None:
    assert divide_batch(micro * accumulation * world, micro, world) == (micro, accumulation)
    assert divide_batch(micro * accumulation * world, "auto", world) == (micro * accumulation, 1)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_a_batch_is_divided_without_rest_or_refused(batch: int, micro: int, world: int) -> None:
    try:
        got, accumulation = divide_batch(batch, micro, world)
    except UserError as error:
        assert batch % world or (batch // world) % micro
        assert str(batch) in str(error)  # noqa: PT017
    else:
        assert got == micro
        assert got * accumulation * world == batch


def test_cores_are_shared_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddr.ranks.available_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cores() == 1
