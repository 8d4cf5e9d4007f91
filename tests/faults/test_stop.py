"""A run that is asked to stop saves, ends, and goes on to the weights of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import ROOT, SMALL, settings, train, weights

from fastddr import checkpoints, stopping
from fastddr.stopping import Stopping, StopRequested
from fastddr.trainer import Trainer


def figures(run: Path) -> list[dict[str, Any]]:
    """All logged lines but what differs from run to run: times, speeds, memory."""
    keep = ("step", "epoch", "train/loss", "train/accuracy", "train/lr", "valid/", "final/")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key.startswith(keep)} for line in logged]


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("runs") / "undisturbed")


#: Each epoch has 3 steps and 3 batches of valid: in an epoch, at its end, in a validation, and in the final scoring.
@pytest.mark.parametrize(("call", "step"), [(2, 2), (3, 3), (5, 3), (8, 5), (14, 6)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    undisturbed: Path, tiny: Path, tmp_path: Path, call: int, step: int
) -> None:
    run = tmp_path / "run"
    with Trainer(settings(tiny, run)) as trainer:
        calls = 0

        def check() -> bool:
            nonlocal calls
            calls += 1
            if calls == call:
                raise StopRequested("a test")
            return False

        trainer.stopping.check = check  # type: ignore[method-assign]
        trainer.fit()
        assert trainer.stopped == "a test"
    assert status(run) == {"state": "preempted", "step": step, "reason": "a test"}
    assert os.readlink(run / "checkpoints" / "last") == f"step-{step:08d}"
    assert not (run / "report").exists()
    with Trainer(settings(tiny, run)) as trainer:
        trainer.fit()
        assert trainer.stopped is None
    assert status(run)["state"] == "done"
    one, other = weights(undisturbed), weights(run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert figures(run) == figures(undisturbed), "no step is doubled or missing, and no validation"
    assert len((run / "test_scorings.jsonl").read_text().splitlines()) == 1


def test_hours_and_the_file(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trainer(settings(tiny, run, "--max-hours", "1e-9")) as trainer:
        trainer.fit()
    assert status(run) == {"state": "preempted", "step": 1, "reason": "max_hours 1e-09"}
    # What is left of an earlier request stops nobody; a new one does, and is taken away when it was followed.
    (run / "STOP").touch()
    with Trainer(settings(tiny, run)) as trainer:
        assert not (run / "STOP").exists()
        (run / "STOP").touch()
        trainer.fit()
        assert trainer.stopped == "the file STOP"
    assert not (run / "STOP").exists()
    assert status(run)["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_command(number: int, undisturbed: Path, tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "fastddr" / "train.py"), "--data", str(tiny), "--run-dir", "run", *SMALL]
    process = subprocess.Popen(
        [*command, "--epochs", "100000"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "Traceback" not in err
    said = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert f"{said}: the run saves a checkpoint and ends" in err
    assert f"({said}), and saved; the same command with --run-dir run goes on" in out
    found = status(tmp_path / "run")
    assert (found["state"], found["reason"]) == ("preempted", said)
    assert found["step"] >= 6
    assert checkpoints.load(tmp_path / "run" / "checkpoints" / "last").state["progress"]["step"] == found["step"]


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
    listener(tmp_path).check()
    assert not (tmp_path / "STOP").exists(), "what was there before is taken away by rank 0"
