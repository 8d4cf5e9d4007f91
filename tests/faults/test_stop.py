"""A run that is asked to stop saves, ends, and goes on to the weights of a run that nobody disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests_support import SMALL, forked, lines, settings, status, train, weights

from fastddr import config, ranks, runs, stopping
from fastddr import trainer as trainer_module
from fastddr.errors import UserError
from fastddr.stopping import Stopping, StopRequested
from fastddr.trainer import Trainer


def figures(run: Path) -> list[dict[str, Any]]:
    """All logged lines but what differs from run to run: times, speeds, memory."""
    keep = ("step", "epoch", "train/loss", "train/accuracy", "train/lr", "valid/", "final/")
    same = [{key: value for key, value in line.items() if key.startswith(keep)} for line in lines(run)]
    return [{key: value for key, value in line.items() if not key.endswith("_gib")} for line in same]


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("runs") / "undisturbed")


#: Each epoch has 3 steps and 3 batches of valid, with a call behind the last: in an epoch, at its end, in a validation
#: and at its end, and in the final scoring.
@pytest.mark.parametrize(("call", "step"), [(2, 2), (3, 3), (5, 3), (7, 3), (16, 6)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    undisturbed: Path, tiny: Path, tmp_path: Path, call: int, step: int
) -> None:
    run = tmp_path / "run"
    with Trainer(settings(tiny, run)) as trainer:
        calls = 0

        def ask() -> str | None:
            nonlocal calls
            calls += 1
            return "a test" if calls == call else None

        trainer.stopping._agreed = ask  # type: ignore[method-assign]  # a stop at a call of its own
        trainer.fit()
        assert trainer.stopped == "a test"
    assert status(run) == {"state": "preempted", "step": step, "reason": "a test"}
    assert os.readlink(run / "checkpoints" / "last") == f"step-{step:08d}"
    assert not (run / "report").exists()
    with Trainer(settings(tiny, run)) as trainer:
        trainer.fit()
        trainer.fit()
        assert trainer.stopped is None
    assert status(run)["state"] == "done"
    one, other = weights(undisturbed), weights(run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert figures(run) == figures(undisturbed), "no step is doubled or missing, and no validation"
    for place, of in ((undisturbed, ""), (run, " at the last start")):
        rows = (place / "report" / "report.md").read_text().splitlines()
        assert all(any(row.startswith(f"| {fact}{of} |") for row in rows) for fact in ("Command", "Device", "Versions"))
    assert len((run / "test_scorings.jsonl").read_text().splitlines()) == 1


#: Each start is killed at another place: before there is a link to a checkpoint, in a step, at the last call of a save,
#: and as the report is made.
KILLED = """
import os, signal, sys
from pathlib import Path
from fastddr import checkpoints, train, trainer

number = len(list(Path().glob("start-*")))
Path(f"start-{number}").touch()
place, name, call = [
    (checkpoints, "point", 1), (trainer, "training_step", 3), (checkpoints, "point", 2), (trainer, "write_final", 1),
][number]
real, calls = getattr(place, name), 0

def killed(*arguments, **keywords):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **keywords)

setattr(place, name, killed)
sys.exit(train.main())
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(undisturbed: Path, tiny: Path, tmp_path: Path) -> None:
    """After a kill no `finally` runs: nothing is flushed, closed or let go of by Python."""
    run, often, script = tmp_path / "run", ("--save-every-steps", "1", "--tracking.tensorboard"), tmp_path / "killed.py"
    script.write_text(KILLED)
    done = forked("1,1,1,1", script, "--data", str(tiny), "--run-dir", "run", *SMALL, *often, cwd=tmp_path)
    assert len(list(tmp_path.glob("start-*"))) == 4
    assert done.returncode == -signal.SIGKILL % 256, done.stderr[-3000:]
    assert status(run) == {"state": "running", "step": 6, "reason": ""}
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    train(moved, run, *often)
    assert status(run)["state"] == "done"
    assert config.load_preset(str(run / "config.yaml")).data == str(moved), "where `fastddr evaluate` looks"
    one, other = weights(undisturbed), weights(run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert figures(run) == figures(undisturbed), "no step is doubled or missing, and no validation"
    losses = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("how", ["stopped", "saved"])
def test_means_stand_for_each_step_once_where_a_run_goes_on_within_them(tiny: Path, tmp_path: Path, how: str) -> None:
    """An epoch of three steps is logged in one line, unless a checkpoint stands between them."""
    every = ("--tracking.log-every-steps", "3")
    whole = {line["step"]: line for line in figures(train(tiny, tmp_path / "whole", *every)) if "train/loss" in line}
    run = tmp_path / "run"
    with Trainer(settings(tiny, run, *every, *(("--save-every-steps", "2") if how == "saved" else ()))) as trainer:
        ask, calls = trainer.stopping._agreed, 0

        def asked() -> str | None:
            nonlocal calls
            calls += 1
            return "a test" if how == "stopped" and calls == 2 else ask()

        trainer.stopping._agreed = asked  # type: ignore[method-assign]  # likewise
        trainer.fit()
    if how == "stopped":
        train(tiny, run, *every)
    parts = {line["step"]: line for line in figures(run) if "train/loss" in line}
    assert sorted(parts) == ([2, 3, 6] if how == "stopped" else [2, 3, 4, 6])
    for name in ("train/loss", "train/accuracy"):
        assert 2 * parts[2][name] + parts[3][name] == pytest.approx(3 * whole[3][name])


def test_hours_and_the_file(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = Trainer(settings(tiny, run, "--max-hours", "1e-9"))
    with pytest.raises(UserError, match="not open"):
        trainer.fit()
    with trainer:
        with pytest.raises(UserError, match="a Trainer is open"), Trainer(settings(tiny, tmp_path / "beside")):
            pass
        assert not (tmp_path / "beside").exists()
        assert trainer.stopping._ends == trainer._entered + 3600e-9
        trainer.fit()
        trainer.fit()
    assert status(run) == {"state": "preempted", "step": 1, "reason": "max_hours 1e-09"}
    with pytest.raises(UserError, match="closed"), trainer:
        pass
    # What is left of an earlier request stops nobody; a new one does, and is taken away when it was followed.
    (run / "STOP").touch()
    with Trainer(settings(tiny, run)) as trainer:
        assert not (run / "STOP").exists()
        (run / "STOP").touch()
        trainer.fit()
        assert trainer.stopped == "the file STOP"
    assert not (run / "STOP").exists()
    assert status(run)["step"] == 2


def test_a_launchers_sigterm_does_not_cut_short_what_a_failing_run_writes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends one to all ranks when the first has ended; outside of `fit` that would be the end."""
    write = runs.RunFolder.set_status

    def signalled(self: runs.RunFolder, state: Any, step: int | None, reason: str = "") -> None:
        if state == "failed":
            signal.raise_signal(signal.SIGTERM)
        write(self, state, step, reason)

    monkeypatch.setattr(runs.RunFolder, "set_status", signalled)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(UserError, match="no"), Trainer(settings(tiny, tmp_path / "run")):
            raise UserError("no")
        assert heard == []
        assert status(tmp_path / "run")["state"] == "failed"
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM], "afterwards as before"
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------------------ by itself


def listener(tmp_path: Path) -> Stopping:
    return Stopping(tmp_path / "STOP", None, rank=0, world=1)


def test_a_second_ctrl_c_stops_at_once_and_a_copy_of_the_first_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = listener(tmp_path)
    with asked.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested, match=r"^Ctrl-C$"):
            asked.check()
        monkeypatch.setattr(stopping, "_COPIES", 0.0)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    said = capfd.readouterr().err.strip()
    assert said == "Ctrl-C: the run saves a checkpoint and ends; Ctrl-C again stops at once", "once"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nohup_is_obeyed(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asked = listener(tmp_path)
        with asked.listening():
            signal.raise_signal(signal.SIGHUP)
            assert asked.ask() is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with asked.listening():
            signal.raise_signal(signal.SIGHUP)
            assert asked.ask() == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    seen = []

    def listen() -> None:
        with listener(tmp_path).listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_only_rank_0_looks_for_the_file(tmp_path: Path) -> None:
    other = Stopping(tmp_path / "STOP", None, rank=1, world=1)
    (tmp_path / "STOP").touch()
    other.check()
    with pytest.raises(StopRequested, match="the file STOP"):
        listener(tmp_path).check()


def test_a_hiccup_of_the_file_system_is_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> bool:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "exists", stale)
    assert listener(tmp_path).ask() is None


def test_hours_count_from_where_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the import: a notebook may have imported fastddr hours ago."""
    now = time.monotonic() + 7200
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert Stopping(tmp_path / "STOP", 1, rank=0, world=1).ask() is None
    assert Stopping(tmp_path / "STOP", 1, rank=0, world=1, since=now - 3599).ask() is None
    assert Stopping(tmp_path / "STOP", 1, rank=0, world=1, since=now - 3601).ask() == "max_hours 1"


def test_a_start_that_its_hours_bring_no_further_is_not_preempted(tmp_path: Path) -> None:
    """A scheduler would start it for ever: to prepare and to score valid takes longer than it may take."""
    over = Stopping(tmp_path / "STOP", 1e-9, rank=0, world=1)
    with pytest.raises(UserError, match="max_hours 1e-09 is over before this start got any further"):
        over.check()
    over.saved()
    with pytest.raises(StopRequested):
        over.check()
    stepped = Stopping(tmp_path / "STOP", 1e-9, rank=0, world=1)
    assert stepped.ask() is not None
    with pytest.raises(StopRequested):
        stepped.check()
    asked = Stopping(tmp_path / "STOP", 1e-9, rank=0, world=1)
    asked._reason()
    asked._hear(signal.SIGTERM, None)
    with pytest.raises(StopRequested):  # the next start may have more time
        asked.check()


@pytest.mark.parametrize(("here", "there"), [
    (None, "SIGTERM"), (None, "the file STOP"), ("max_hours 1e-09", "SIGHUP"), ("max_hours 1e-09", None),
])  # fmt: skip
def test_all_ranks_say_the_same_reason(
    here: str | None, there: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has not heard the signal yet: what it writes is what a scheduler reads."""

    def highest(answer: torch.Tensor, **_: object) -> SimpleNamespace:
        answer[0] = max(int(answer[0]), asked._reasons.index(there))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(ranks, "talk", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", highest)
    asked = Stopping(tmp_path / "STOP", 1e-9 if here else None, rank=0, world=2)
    assert asked.ask() is None, "the answer comes one call late"
    assert asked.ask() == (there or here)


def test_a_checkpoint_that_the_clock_wants_is_wanted_until_it_is_taken(tmp_path: Path) -> None:
    """Also where the answer came while a split was scored, which saves nothing."""
    asked = Stopping(tmp_path / "STOP", None, 1e-9, rank=0, world=1)
    asked.check()
    assert asked.wanted
    asked._save_every = 3600
    asked.check()
    assert asked.wanted, "still"
    asked.saved()
    asked.check()
    assert not asked.wanted


def test_a_stop_that_comes_while_a_run_is_set_up_is_followed(tiny: Path, tmp_path: Path) -> None:
    """Of a new run too, whose folder may hold nothing else yet."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    with Trainer(settings(tiny, run)) as trainer:
        trainer.fit()
    assert status(run) == {"state": "preempted", "step": 1, "reason": "the file STOP"}


def test_a_run_that_is_done_stays_done_whatever_comes_after(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while W&B uploads: the next start must not score test again."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastddr.trainer.reporting.summary", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "done"
    train(tiny, tmp_path / "run")
    assert len((tmp_path / "run" / "test_scorings.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("why", "state", "step"), [(ranks.INTERRUPTED, "preempted", 4), ("ValueError: 1", "failed", 5)]
)
def test_a_run_is_preempted_where_another_rank_was(
    why: str, state: str, step: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first compiled step a rank that was asked to stop can agree on nothing with the others, and ends.

    Nothing is saved then, and a run that is preempted stands where it was saved.
    """
    trained, steps = trainer_module.training_step, 0

    def lost(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise ranks.RankLost(f"rank 1 ended: {why}")
        return trained(*arguments)

    monkeypatch.setattr(trainer_module, "training_step", lost)
    with pytest.raises(ranks.RankLost):
        train(tiny, tmp_path / "run", "--save-every-steps", "4")
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == (state, step)


def test_a_run_that_cannot_go_on_is_not_asked_to_try_again(tiny: Path, tmp_path: Path) -> None:
    """A scheduler would start one that is `preempted` for ever."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(tiny, data)
    with Trainer(settings(data, run, "--max-hours", "1e-9")) as trainer:
        trainer.fit()
    assert status(run)["state"] == "preempted"
    with pytest.raises(UserError, match="other settings"):
        train(data, run, "--lr", "1")
    assert status(run)["state"] == "preempted", "a slip of the hand changes nothing"
    stood = status(run)["step"]
    assert stood > 0
    shutil.rmtree(data)
    with pytest.raises(UserError):
        train(data, run)
    found = status(run)
    assert (found["state"], found["reason"][:9]) == ("failed", "UserError")
    assert found["step"] == stood, "its checkpoint is of that step"


#: Holds the run in the folder until its input ends.
HOLDER = """
import sys
from pathlib import Path
from fastddr import runs
held = runs.hold(Path(sys.argv[1]), print)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_are_never_at_one_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PATIENCE", 0.3)
    run = tmp_path / "run"
    with Trainer(settings(tiny, run, "--max-hours", "1e-9")) as trainer:
        trainer.fit()
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {other.pid} on .* is at this run; wait until it has ended"):
            train(tiny, run)
        assert status(run)["state"] == "preempted"
        # A start that finds no run yet, but one who is about to begin it.
        with pytest.raises(UserError, match="is at this run"):
            runs.hold(run, print, begins=True)
        other.kill()
    train(tiny, run)
    assert status(run)["state"] == "done"
    with pytest.raises(UserError, match="another start has begun a run here"):
        runs.hold(run, print, begins=True)
