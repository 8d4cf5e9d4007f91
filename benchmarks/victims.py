"""Trainings that are started to be disturbed: how they are run, what they have saved, and which processes they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from whole import ROOT, launcher

from fastddr import checkpoints
from fastddr.data import synthetic
from fastddr.runs import RunFolder

#: In the environment of every process of a training: which run it is of.
_MARK = "FASTDDR_FAULTS"
#: A small model with all the state that training can have: moments, averages, warm-up, clipping, accumulation. On a GPU
#: only deterministic algorithms bring two runs to the same weights.
MODEL = [
    "--image-size", "96", "--canvas", "112", "--batch-size", "16", "--micro-batch-size", "4",
    "--convmixer.dim", "32", "--convmixer.depth", "2", "--convmixer.kernel-size", "5", "--convmixer.patch-size", "8",
    "--optimizer.ema-decay", "0.99", "--optimizer.clip-norm", "1", "--optimizer.warmup-ratio", "0.2",
    "--tracking.no-wandb", "--tracking.no-tensorboard", "--threads", "1", "--loading.threads", "1", "--deterministic",
]  # fmt: skip


def on_cpu(ranks: int) -> bool:
    """Whether so many ranks have to train on the CPU although there is a card: NCCL refuses two of them on one."""
    return 0 < torch.cuda.device_count() < ranks


class Runs:
    """Starts trainings in a scratch folder, as a user would."""

    def __init__(self, data: str | None, ranks: int, scratch: Path) -> None:
        """On these photographs, or on a few synthetic ones; with so many ranks where `start` is not told otherwise."""
        self.scratch, self._ranks = scratch, ranks
        self.data = data or str(_photographs(scratch / "synthetic"))
        self._environment = os.environ | {
            "FASTDDR_CACHE": str(scratch / "cache"), "WANDB_MODE": "offline",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip

    def start(self, run: Path, *more: str, ranks: int | None = None) -> subprocess.Popen[str]:
        """A training that goes on in the background; what it says stands beside the run."""
        ranks = ranks or self._ranks
        script = [str(ROOT / "fastddr" / "train.py"), "--data", self.data, "--run-dir", str(run), *MODEL, *more]
        command = [sys.executable, *(launcher(ranks) if ranks > 1 else ()), *script]
        environment = self._environment | {_MARK: run.name}
        if on_cpu(ranks):
            environment["CUDA_VISIBLE_DEVICES"] = ""  # by gloo
        with (self.scratch / f"{run.name}.txt").open("a") as said:
            return subprocess.Popen(command, env=environment, stdout=said, stderr=said, text=True)

    def finish(self, run: Path, *more: str) -> None:
        """Train to the end.

        Raises:
            RuntimeError: it did not end well.
        """
        if self.start(run, *more).wait() != 0:
            raise RuntimeError(self.said(run)[-3000:])

    def said(self, run: Path) -> str:
        """All that the trainings of a run have printed."""
        return (self.scratch / f"{run.name}.txt").read_text()

    def wait(self, done: Callable[[], bool], process: subprocess.Popen[str], run: Path) -> None:
        """Wait for something that a training does.

        Raises:
            RuntimeError: it ended before, or took five minutes.
        """
        ends = time.monotonic() + 300
        while not done():
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"training ended or hung before its time: {self.said(run)[-3000:]}")
            time.sleep(0.002)

    def first_checkpoint(self, process: subprocess.Popen[str], run: Path) -> None:
        """Wait until a training has saved."""
        self.wait(lambda: (run / "checkpoints" / "last").exists(), process, run)


def _photographs(root: Path) -> Path:
    few = {split: tuple(max(2, n // 4) for n in grades) for split, grades in synthetic.DEFAULT_COUNTS.items()}
    return synthetic.generate(root, counts=few, size=128, seed=0)


def status(run: Path) -> dict[str, Any]:
    return RunFolder(run).status()


def state(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint, by name."""
    saved = checkpoints.load(run / "checkpoints" / "last")
    found = dict(saved.model)
    found |= {f"ema.{name}": tensor for name, tensor in (saved.ema or {}).items()}
    for index, moments in saved.optimizer["state"].items():
        found |= {f"{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def processes(run: Path, rank: int | None = None) -> list[int]:
    """The processes of a run's training, ranks before their launcher; or that of one rank."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or it has ended meanwhile
            continue
        own = [entry[5:] for entry in environment if entry.startswith(b"RANK=")]
        if f"{_MARK}={run.name}".encode() in environment and (rank is None or own == [str(rank).encode()]):
            found.append((not own, int(folder.name)))
    return [process for _, process in sorted(found)]


def kill(run: Path) -> None:
    """Kill launcher and ranks alike, as a power cut does; none of them is there any more afterwards."""
    while found := processes(run):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
