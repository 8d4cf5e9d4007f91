"""What stops a loader, as `benchmarks/loader.py` tells it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import needs_dali
from tests_support import task

from fastddr import loaders
from fastddr.data import manifest


@needs_dali
@pytest.mark.parametrize(("name", "stages"), [
    ("dali", ["Python", "read", "decode", "warp", "normalise"]), ("resident", ["gather, Python", "normalise"]),
])  # fmt: skip
def test_no_turn_of_a_profile_works_for_another(
    name: str, stages: list[str], load: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that were made while others were timed would be counted as if they had cost nothing."""
    from nvidia.dali import Pipeline

    profile = load("stages")
    loader = loaders.build(name, task(manifest.read(tiny), store="ram"))
    for _ in loader.epoch(0):
        pass
    under_way = {id(pipeline): 0 for weak in Pipeline._pipes if (pipeline := weak()) is not None}
    begun, received = Pipeline.schedule_run, Pipeline.outputs

    def schedule(pipeline: Any) -> None:
        # The first one fills the queue.
        first = id(pipeline) not in under_way
        under_way[id(pipeline)] = under_way.get(id(pipeline), 0) + (pipeline.prefetch_queue_depth if first else 1)
        begun(pipeline)

    def outputs(pipeline: Any, *settings: Any, **named: Any) -> Any:
        under_way[id(pipeline)] -= 1
        return received(pipeline, *settings, **named)

    monkeypatch.setattr(Pipeline, "schedule_run", schedule)
    monkeypatch.setattr(Pipeline, "outputs", outputs)
    clock: list[int] = []

    def timed(work: Any, seconds: float) -> Any:
        # By then what the pipelines had begun before this turn is received, and it alone is at work.
        clock.append(sum(count > 0 for count in under_way.values()))
        return lambda: float(work())

    def raced(trials: Any) -> Any:
        took = {}
        for stage, trial in trials.items():
            took[stage] = [trial()]
            assert not any(under_way.values()), f"{stage} left batches on their way"
        return took

    monkeypatch.setattr(profile, "_repeated", timed)
    monkeypatch.setattr(profile, "_raced", raced)
    found = profile.of(loader, 1e3, 0.0)
    assert list(found.shares) == stages
    assert clock == [1] * len(clock)
    assert next(iter(loader.epoch(1))).image.shape[1] == 3, "the loader goes on afterwards"
    loader.close()


@pytest.mark.parametrize("name", ["_torchvision", "_resident"])
def test_the_first_round_of_a_profile_warms_up(
    name: str, load: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = load("stages")
    wanted = task(manifest.read(tiny))
    rounds: list[int] = []

    def timed(work: Any, seconds: float) -> Any:
        times = iter([1e9, *(1.0 + 0.1 * turn for turn in range(stages.ROUNDS))])
        return lambda: rounds.append(work()) or next(times)

    monkeypatch.setattr(stages, "_repeated", timed)
    given: Any = SimpleNamespace(task=wanted)
    slots: list[torch.Tensor] = []

    def slot(size: int) -> Any:
        slots.append(torch.zeros(size, dtype=torch.uint8))
        return nullcontext(SimpleNamespace(host=slots[-1]))

    python = "Python"
    if name == "_resident":
        # As on a GPU whose photographs are in the host's memory.
        python, given = "gather, Python", loaders.build("resident", replace(wanted, store="ram"))
        if given._finisher is not None:
            given._finisher.close()
        given._finisher, given._ring = None, SimpleNamespace(slot=slot)
    found = getattr(stages, name)(given, 1e-3, 0.0).shares
    assert rounds, "nothing was timed"
    for values in found.values():
        assert len(values) == stages.ROUNDS
    assert max(found[python]) < 100, "a cold round is no share"
    if name == "_resident":
        assert list(found) == [python, "copy, kernel, waiting"]
        assert len(slots) == len(rounds), "photographs are gathered on the clock"
        assert all(pixels.any() for pixels in slots)
        given.close()
