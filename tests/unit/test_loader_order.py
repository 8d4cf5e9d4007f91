"""Determinism of the loaders: the same bits, whatever the threads, the prefetch, the ranks and the first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import POLICIES, REAL
from tests_support import batches, same, task

from fastddr import loaders
from fastddr.data import manifest
from fastddr.data.grades import UNGRADABLE

WORLDS = [1, 2, 3, 4, 8]
#: The fixtures hold photographs, which no example changes.
few = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True, max_examples=8)

Whole = Callable[..., list[loaders.Batch]]


@pytest.fixture(scope="module")
def whole(found: manifest.Manifest, mixed: manifest.Manifest) -> Whole:
    """An epoch of one rank with one thread, made once: what everything else is held against."""

    @cache
    def made(name: str, policy: str, of: str, epoch: int) -> list[loaders.Batch]:
        return batches(name, few_of(of, policy, found, mixed), epoch)

    return made


def few_of(of: str, policy: str, found: manifest.Manifest, mixed: manifest.Manifest, **changes: Any) -> loaders.Task:
    """Training batches of four from a few photographs, two of which make a global batch."""
    given_ = {"tiny": found, "mixed": mixed}[of]
    train = given_.ids("train")[:24]
    wanted = {"ids": train, "batch_size": 6 if of == "mixed" else 8, "accumulation": 2, "augment": POLICIES[policy]}
    return task(given_, **wanted | changes)


@pytest.mark.parametrize("name", REAL)
@few
@given(
    threads=st.integers(0, 3),
    prefetch=st.one_of(st.none(), st.integers(1, 5)),
    step=st.integers(0, 3),
    epoch=st.integers(0, 1),
    policy=st.sampled_from(sorted(POLICIES)),
    of=st.sampled_from(["tiny", "mixed"]),
)
def test_threads_prefetch_and_where_an_epoch_begins_change_nothing(
    name: str,
    threads: int,
    prefetch: int | None,
    step: int,
    epoch: int,
    policy: str,
    of: str,
    found: manifest.Manifest,
    mixed: manifest.Manifest,
    whole: Whole,
) -> None:
    if name == "torchvision":
        # Workers are processes, whose start takes longer than all the rest.
        threads = min(threads, 1)
    wanted = few_of(of, policy, found, mixed, threads=threads, prefetch=prefetch)
    expected = whole(name, policy, of, epoch)
    step = min(step, wanted.steps)
    loader = loaders.build(name, wanted)
    try:
        assert len(expected) == len(loader) == wanted.steps * 2
        for begin in (step, 0):
            got = list(loader.epoch(epoch, begin))
            assert len(got) == len(expected) - 2 * begin
            assert all(same(a, b) for a, b in zip(got, expected[2 * begin :], strict=True))
    finally:
        loader.close()


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("policy", "accumulation"), [("report", 1), ("fundus", 3)])
def test_the_global_batches_are_the_same_on_any_number_of_ranks(
    name: str, policy: str, accumulation: int, found: manifest.Manifest
) -> None:
    wanted = {
        "ids": np.flatnonzero(found.grade < UNGRADABLE), "batch_size": 24, "threads": 0 if name == "torchvision" else 1,
        "augment": POLICIES[policy],
    }  # fmt: skip
    alone = batches(name, task(found, **wanted), 1)
    assert len(alone) == 2
    for world in WORLDS:
        if 24 % (world * accumulation):
            continue
        parts = [
            batches(name, task(found, **wanted, rank=rank, world=world, accumulation=accumulation), 1)
            for rank in range(world)
        ]
        for step, together in enumerate(alone):
            micro = [part[step * accumulation + m] for part in parts for m in range(accumulation)]
            for field in ("image", "grade", "id", "valid"):
                joined = torch.cat([getattr(batch, field) for batch in micro])
                assert torch.equal(joined, getattr(together, field)), (world, field)


@pytest.mark.parametrize("name", REAL)
@few
@given(
    count=st.sampled_from([1, 7, 8, 23, 24, 25, 47, 48, 49]),
    world=st.sampled_from(WORLDS),
)
def test_an_evaluation_has_each_photograph_once_on_any_number_of_ranks(
    name: str, count: int, world: int, found: manifest.Manifest
) -> None:
    ids = np.flatnonzero(found.grade < UNGRADABLE)[:count]
    wanted = {"ids": ids, "batch_size": 24, "train": False, "threads": 0 if name == "torchvision" else 1}
    alone = batches(name, task(found, **wanted))
    parts = [batches(name, task(found, **wanted, rank=rank, world=world)) for rank in range(world)]
    assert len(alone) == -(-count // 24)
    joined = {
        field: torch.cat([getattr(part[k], field) for k in range(len(alone)) for part in parts])
        for field in ("image", "grade", "id", "valid")
    }
    for field, values in joined.items():
        assert torch.equal(values, torch.cat([getattr(batch, field) for batch in alone])), field
    assert joined["valid"].tolist() == [True] * count + [False] * (24 * len(alone) - count), "padding at the tail"
    assert joined["id"][joined["valid"]].tolist() == ids.tolist()
    assert joined["grade"][joined["valid"]].tolist() == found.grade[ids].tolist()
