"""`memory.py`: the search for the largest batch and crop, beside what the plan says; `answers.py`: how soon."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fastddr.errors import UserError
from fastddr.memory import questions
from fastddr.memory.allowances import DECLARED, GIB, Allowance
from fastddr.memory.predicting import Case, fits, needed, tape_of, usable

#: Of a card of which all may be used by PyTorch's allocator.
WHOLE = Allowance(context=0, workspaces=0, decoder=0, share=0.0, source="test")


@pytest.fixture
def memory(load: Callable[[str], Any]) -> Any:
    return load("memory")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is the module for all examples
@given(limit=st.integers(0, 5000), most=st.sampled_from([64, 100, 1024]))
def test_the_search_is_within_a_sixteenth(memory: Any, limit: int, most: int) -> None:
    asked: list[int] = []

    def works(count: int) -> bool:
        asked.append(count)
        return count <= limit

    found = memory.searched(works, most)
    truth = min(limit, most)
    assert found <= truth <= found + max(1, found // 16) - (truth <= 16)
    assert max(asked) <= most
    assert len(asked) == len(set(asked)) <= 20


@pytest.fixture
def card(memory: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Trials go through where their tape, the allocator replayed, stays below the limit; `problem` otherwise."""

    def make(problem: str) -> None:
        def in_process(trial: Any) -> dict[str, Any]:
            tape = memory.trace(trial.make, trial.steps, (2, 3))
            fits = needed(tape, trial.batch_size) <= trial.limit_gib * GIB
            return {"allocated": [1]} if fits else {"failed": problem}

        monkeypatch.setattr(memory, "in_process", in_process)

    return make


@pytest.mark.parametrize(("what", "unit"), [("batch", "photographs"), ("crop", "px")])
def test_the_largest_is_found_and_predicted(
    memory: Any, card: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, what: str, unit: str
) -> None:
    card("torch.OutOfMemoryError: CUDA out of memory.")
    monkeypatch.setattr(memory, "MOST_BATCH", 16)
    monkeypatch.setattr(memory, "MOST_SIDE", 128)
    trial = memory.Trial("convmixer-16-2-k3-p8", 64, 4, "fp32", False, limit_gib=0.004)
    row = memory.largest(trial, what, WHOLE)
    assert row["predicted"] == row["median"] > 0
    assert (row["share"], row["unit"], row["n"]) == (1.0, unit, 1)
    # A card with less to give is predicted less.
    less = memory.largest(trial, what, replace(WHOLE, context=GIB // 500))
    assert less["predicted"] < less["median"] == row["median"]


def test_what_fails_otherwise_is_a_row_without_a_figure(memory: Any, card: Callable[[str], None]) -> None:
    card("RuntimeError: no kernel image")
    trial = memory.Trial("convmixer-16-2-k3-p8", 64, 4, "fp32", False, limit_gib=1e-6)
    row = memory.largest(trial, "batch", WHOLE)
    assert "no kernel image" in row["failed"]
    assert "median" not in row


def test_only_a_process_that_does_not_see_the_card_traces(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's optimizers ask for the card in every step, also of a trace: a context that trials would count."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen: list[str] = []

    class Pool:
        def __init__(self, count: int, context: Any, initializer: Callable[[], None]) -> None:
            assert (count, context.get_start_method()) == (1, "spawn"), "a fork would have the parent's CUDA"
            self.begin = initializer

        def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", "0")
                self.begin()
                return SimpleNamespace(result=partial(lambda found: found, work(*arguments)))

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(memory, "_tracer", memory._tracer.__wrapped__)
    monkeypatch.setattr(memory.harness, "end_with_parent", lambda: None)
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "trace", lambda *arguments: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    memory.traced(memory.Trial("convmixer-16-2-k3-p8", 32, 4, "fp32", False))
    assert seen == [""]
    # Trials have this process's environment.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(("size", "share"), [(24.0, 0.25), (4.0, None), (0.5, None)])
def test_an_emulated_card_has_no_room_for_what_libraries_load(
    memory: Any, monkeypatch: pytest.MonkeyPatch, size: float, share: float | None
) -> None:
    """Of 80 GiB a context of 1 is there before the first step, 4 after it, and 2 are in the allocator's cache."""
    used, capped = [1 * GIB, 0], []
    trial = memory.Trial("convmixer-16-2-k3-p8", 32, 16, "fp32", False, limit_gib=size)
    monkeypatch.setattr(memory, "_first_step", lambda *_: used.__setitem__(slice(None), [4 * GIB, 2 * GIB]))
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda device: (80 * GIB - sum(used), 80 * GIB))
    monkeypatch.setattr(memory.torch.cuda, "memory_reserved", lambda device: used[1])
    monkeypatch.setattr(memory.torch.cuda, "empty_cache", lambda: used.__setitem__(1, 0))
    monkeypatch.setattr(memory.torch.cuda, "set_per_process_memory_fraction", lambda part, device: capped.append(part))
    if share is None:
        with pytest.raises(torch.OutOfMemoryError, match="the context alone is larger") as problem:
            memory.cap(trial, torch.device("cuda", 0))
        # As the process that asked reads it.
        monkeypatch.setattr(memory, "in_process", lambda trial: {"failed": f"torch.OutOfMemoryError: {problem.value}"})
        assert not memory.works(trial)
    else:
        memory.cap(trial, torch.device("cuda", 0))
    assert (capped, used[1]) == ([] if share is None else [share], 0)


@pytest.mark.parametrize("size", [0.0, -8.0, 80.0, float("nan")])
def test_a_card_that_cannot_be_emulated_is_refused(memory: Any, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=int(79.25 * GIB))
    monkeypatch.setattr(memory.torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(memory.harness, "begin", lambda out: pytest.fail("it was begun"))
    with pytest.raises(UserError, match=rf"--cards {size:g}: .* own 79\.25 GiB"):
        memory.main(memory.Options(cards=(8.0, size)))


def test_a_compiled_step_is_held_against_the_plans_estimate(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "in_process", lambda trial: {"allocated": [2**20] * 5})
    eager = memory.Trial("convmixer-16-2-k3-p8", 32, 64, "fp32", False)
    rows = [memory.row(trial, gpu=False) for trial in (eager, memory.replace(eager, compiled=True))]
    config = questions.configured([
        "--model", "convmixer", "--convmixer.dim", "16", "--convmixer.depth", "2", "--convmixer.kernel-size", "3",
        "--convmixer.patch-size", "8", "--image-size", "32", "--precision", "fp32", "--optimizer.name", "adam",
    ])  # fmt: skip
    for row, compiled in zip(rows, (False, True), strict=True):
        case = Case(memory.replace(config, compile=compiled), 64)
        kept = tape_of(case).peak(64).kinds["activations"] / GIB
        assert row["activations_gib"] == pytest.approx(kept, rel=0.02)
        assert row.get("estimated", False) == compiled
    assert rows[1]["predicted_gib"] < rows[0]["predicted_gib"]
    assert memory.errors([rows[1]] * 9) == [], "an estimate is no prediction that could be off"
    assert memory.errors([rows[0]] * 5 + [rows[1]])[0]["configurations"] == 5


# ------------------------------------------------------------------------------------------------------------- cards.py


def test_the_largest_batch_by_card_is_the_plans(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards, accounts, plots = map(load, ("cards", "accounts", "plots"))
    flags = ("--model", "cnn", "--cnn.width", "8", "--cnn.blocks", "2")
    monkeypatch.setattr(cards, "TRAININGS", {"small": flags})
    monkeypatch.setattr(cards.planning, "MOST", 300)
    out = tmp_path / "cards.json"
    cards.main(cards.Options(cards=(1.0, 1.35, 4.0), image_sizes=(64,), out=out))
    rows = json.loads(out.read_text())["rows"]
    found = {row["card_gib"]: row["median"] for row in rows}
    config = questions.configured([*flags, "--image-size", "64"])
    for card, most in found.items():
        limit = usable(card, DECLARED)
        assert not most or fits(Case(config, most), limit, DECLARED)
        assert most >= 300 or not fits(Case(config, most + 1), limit, DECLARED)
    assert found[1.0] == 0 < found[1.35] < found[4.0]
    assert f"| small | 64 | 0 | {found[1.35]} | {found[4.0]} |" in accounts.cards(rows)
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "Figure", lambda **kinds: figures.append(Figure(**kinds)) or figures[-1])
    assert plots.save(plots.cards(rows), "Cards", tmp_path / "cards.png").stat().st_size > 10_000
    [line] = figures[0].axes[0].lines
    assert [*line.get_xdata()] == [1.35, 4.0], "no point where nothing fits"
    with pytest.raises(UserError, match="sizes in GiB above 0"):
        cards.main(cards.Options(cards=(0.0,)))


# ----------------------------------------------------------------------------------------------------------- answers.py


def test_questions_are_asked_with_an_empty_cache_and_again(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers, asked = load("answers"), []

    def seconds(arguments: tuple[str, ...], cache: Path) -> float:
        asked.append((arguments[0], cache.name))
        return 30.0 if len(asked) % 3 == 2 else 3.0

    monkeypatch.setattr(answers, "seconds", seconds)
    out = tmp_path / "answers.json"
    answers.main(answers.Options(out=out), {"small": (("--vram", "8"), 20.0)})
    rounds = [[("predict", "none"), ("plan", str(number)), ("plan", str(number))] for number in range(1, 6)]
    assert asked == [one for round_ in rounds for one in round_]
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert (rows["small"]["target"], rows["small"]["met"], rows["small"]["flags"]) == (20.0, False, "--vram 8")
    assert rows["small, again"]["median"] == 3.0
    assert "target" not in rows["small, again"]


def test_a_question_that_cannot_be_answered_is_one_sentence(load: Callable[[str], Any], tmp_path: Path) -> None:
    answers = load("answers")
    assert answers.seconds(("predict", "--help"), tmp_path) > 0
    with pytest.raises(UserError, match=r"fastddr plan: .*needs the card's memory"):
        answers.seconds(("plan",), tmp_path)
