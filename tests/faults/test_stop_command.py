"""A command that is asked to stop from outside: by a signal, a launcher that is gone, a terminal that is closed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests_support import ROOT, SMALL, ended, environment, launching, status

from fastddr import checkpoints


def endless(data: Path) -> list[str]:
    """The command of a run, in the folder `run`, that ends by a request alone."""
    command = [sys.executable, str(ROOT / "fastddr" / "train.py"), "--data", str(data), "--run-dir", "run", *SMALL]
    return [*command, "--epochs", "100000"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_command(number: int, tiny: Path, tmp_path: Path) -> None:
    begun = subprocess.Popen(endless(tiny), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with ended(begun) as process:
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent is dead")
def test_a_trainer_whose_launcher_is_killed_saves_and_ends(tiny: Path, tmp_path: Path) -> None:
    _, script, *arguments = endless(tiny)
    begun = subprocess.Popen(
        launching(1, Path(script), *arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment(),
    )  # fmt: skip
    with ended(begun) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if line.startswith("epoch 2/"):
                break
        trainers = psutil.Process(launcher.pid).children(recursive=True)
        try:
            launcher.kill()
            said, _ = launcher.communicate(timeout=120)  # until the trainer ends, which writes there too
        finally:
            for trainer in trainers:
                with suppress(psutil.NoSuchProcess):
                    trainer.kill()
    found = status(tmp_path / "run")
    assert (found["state"], found["reason"]) == ("preempted", "SIGTERM"), said
    assert checkpoints.load(tmp_path / "run" / "checkpoints" / "last").state["progress"]["step"] == found["step"] >= 6


@pytest.mark.slow
def test_a_closed_terminal_stops_the_command(tiny: Path, tmp_path: Path) -> None:
    """A connection that is lost takes the terminal away: a signal comes, and nothing can be written any more."""
    window, terminal = os.openpty()
    begun = subprocess.Popen(
        endless(tiny), cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    with ended(begun) as process:
        os.close(terminal)
        seen = b""
        while b"epoch 2/" not in seen:
            part = os.read(window, 4096)
            assert part, "it has ended"  # which Linux tells by an error
            seen += part
        os.close(window)
        assert process.wait(timeout=120) == 3
    found = status(tmp_path / "run")
    assert (found["state"], found["reason"]) == ("preempted", "SIGHUP")
    assert checkpoints.load(tmp_path / "run" / "checkpoints" / "last").state["progress"]["step"] == found["step"] >= 3
