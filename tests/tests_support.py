"""Small things that several test files share."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from fastddr import checkpoints, cli, loaders
from fastddr.config import AugmentConfig, Config
from fastddr.data.manifest import Manifest

#: The tiny set of the fixture `tiny`, grades 0-5 by split: every grade in every split, odd counts.
TINY = {"train": (9, 4, 7, 3, 4, 1), "valid": (3, 2, 3, 1, 2, 0), "test": (4, 2, 3, 2, 2, 1)}
TINY_SIZE = 80

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

#: Small enough for seconds; everything that costs memory of state is on: EMA, clipping, accumulation, warm-up.
SMALL = [
    "--epochs", "2", "--batch-size", "8", "--micro-batch-size", "4", "--image-size", "64", "--canvas", "80",
    "--convmixer.dim", "8", "--convmixer.depth", "1", "--convmixer.kernel-size", "3", "--convmixer.patch-size", "8",
    "--cnn.width", "4", "--resnet.depth", "10", "--resnet.width", "16", "--tracking.no-wandb",
    "--tracking.no-tensorboard", "--tracking.log-every-steps", "1", "--threads", "1", "--loading.threads", "1",
    "--optimizer.ema-decay", "0.9", "--optimizer.clip-norm", "1", "--optimizer.warmup-ratio", "0.4",
]  # fmt: skip


def unlistable(patch: pytest.MonkeyPatch, folder: Path, code: int, *, once: bool = False) -> list[str]:
    """Let the system refuse to list a folder, with the error of this number; the calls that it refused."""
    refused: list[str] = []

    def instead(call: Any) -> Any:
        def listing(place: Any = ".") -> Any:
            if os.fspath(place) == str(folder) and not (once and refused):
                refused.append(call.__name__)
                raise OSError(code, os.strerror(code), str(folder))
            return call(place)

        return listing

    for name in ("listdir", "scandir"):
        patch.setattr(os, name, instead(getattr(os, name)))
    return refused


def settings(data: Path, run: Path, *more: str) -> Config:
    """The configuration of a small run."""
    return cli.parse(["--data", str(data), "--run-dir", str(run), *SMALL, *more], "test")


def train(data: Path, run: Path, *more: str) -> Path:
    """Train a small run to its end; its folder."""
    from fastddr.trainer import Trainer

    with Trainer(settings(data, run, *more)) as trainer:
        trainer.fit()
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint of a run with averaged weights: these, the weights and the moments, by name."""
    saved = checkpoints.load(run / "checkpoints" / "last")
    assert saved.ema is not None
    moments = {f"{i}.{k}": torch.as_tensor(v) for i, s in saved.optimizer["state"].items() for k, v in s.items()}
    return saved.model | {f"ema.{k}": v for k, v in saved.ema.items()} | moments


def status(run: Path) -> dict[str, Any]:
    """What a run says of itself."""
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, in lines that are JSON: NaN is none."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def report(run: Path) -> dict[str, Any]:
    """The figures of a run's report, by split."""
    found: dict[str, Any] = json.loads((run / "report" / "metrics.json").read_text())
    return found


def evaluated(run: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, str]], Path]:
    """Figures, rows of predictions.csv, and the folder of a new evaluation."""
    from fastddr.__main__ import main

    before = set((run / "evaluations").glob("*"))
    assert main(["evaluate", str(run), *arguments]) == 0
    [folder] = set((run / "evaluations").glob("*")) - before
    return json.loads((folder / "metrics.json").read_text()), table(folder / "predictions.csv"), folder


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def content(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder, hidden ones too, and which folders there are."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def launching(ranks: int, script: str | Path, *arguments: str) -> list[str]:
    """The command `accelerate launch`, as the README has it, of a script or of a module by its name."""
    script_ = ["-m", script] if isinstance(script, str) else [str(script)]
    many = ["--multi_gpu"] if ranks > 1 else []
    return [sys.executable, "-m", "accelerate.commands.launch", *many, "--num_processes", str(ranks),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0", *script_, *arguments]  # fmt: skip


def environment() -> dict[str, str]:
    """Of processes that import fastddr from here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "WANDB_MODE": "offline"}


def printed(code: str) -> str:
    """What a fresh interpreter prints for a piece of code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.strip()


def launch(ranks: int, script: str | Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of `launching`, to its end."""
    command = launching(ranks, script, *arguments)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment())


def forked(
    ranks: int | str, script: str | Path, *arguments: str, cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Ranks of a script or of a module by its name, to their end, where the launcher is not the point: `forked.py`."""
    script_ = ["-m", script] if isinstance(script, str) else [str(script)]
    command = [sys.executable, str(Path(__file__).parent / "forked.py"), str(ranks), *script_, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment())


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """A process that is gone afterwards, with all that it has started, frozen or not, also where a test fails."""
    with process:
        try:
            yield process
        finally:
            # Who its children are is known only while it is there.
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            for child in below:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


@contextmanager
def job(data: Path, cwd: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks that train in the folder `run` until somebody ends them; what they say goes into the file `said`."""
    train = ROOT / "fastddr" / "train.py"
    command = launching(2, train, "--data", str(data), "--run-dir", "run", *SMALL, "--micro-batch-size", "2",
                        "--epochs", "100000", *more)  # fmt: skip
    with (cwd / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=cwd, stdout=said, stderr=said, env=environment())
    with ended(process):
        yield process


def first_checkpoint(process: subprocess.Popen[bytes], cwd: Path) -> None:
    """Wait until a `job` in this folder has saved."""
    said, ends = cwd / "said", time.monotonic() + 200
    while not (cwd / "run" / "checkpoints" / "last").exists():
        assert time.monotonic() < ends, said.read_text()[-3000:]
        assert process.poll() is None, f"exit code {process.returncode}: {said.read_text()[-3000:]}"
        time.sleep(0.1)


def task(found: Manifest, split: str = "train", **changes: Any) -> loaders.Task:
    """A loader's task on a split of a manifest: 64 px windows of an 80 px canvas, four at a time."""
    settings: dict[str, Any] = {
        "files": found.files(),
        "grades": found.grade,
        "widths": found.width,
        "heights": found.height,
        "ids": found.ids(split),
        "train": split == "train",
        "image_size": 64,
        "canvas": TINY_SIZE,
        "augment": AugmentConfig(),
        "seed": 1,
        "batch_size": 4,
        "threads": 1,
    }
    return loaders.Task(**(settings | changes))


def batches(name: str, wanted: loaders.Task, epoch: int = 0, start: int = 0) -> list[loaders.Batch]:
    """An epoch of a loader that is closed again."""
    loader = loaders.build(name, wanted)
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


def runs_ahead(loader: loaders.Loader, epoch: int = 0) -> None:
    """An epoch of few batches on a card is handed out behind a training that does not begin for seconds."""
    training = torch.cuda.Event()
    for number, batch in enumerate(loader.epoch(epoch)):
        assert batch.image.device.type == "cuda"
        batch.image.sum()
        if number == 0:
            torch.cuda._sleep(10**10)
            training.record()
        else:
            assert not training.query(), "the host has waited for the training"
    torch.cuda.synchronize()


def warm_for_running_ahead(loader: loaders.Loader) -> None:
    """What a loader does only at first, which may wait for the card: it compiles, builds, and takes pinned memory.

    Of that as much as several batches need at once: in the second epoch the card is kept behind for half a second.
    """
    list(loader.epoch(1))
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    list(loader.epoch(1))
    torch.cuda.synchronize()


def same(one: loaders.Batch, other: loaders.Batch) -> bool:
    """To the bit."""
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in ("image", "grade", "id", "valid"))


def elsewhere(network: nn.Module, layout: torch.memory_format) -> list[str]:
    """The names of convolutions and BatchNorms that get a map in another layout; it grows as the network is used."""
    found: list[str] = []
    names = {module: name for name, module in network.named_modules()}

    def look(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if not given[0].is_contiguous(memory_format=layout):
            found.append(names[module])

    for module in names:
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_pre_hook(look)
    return found


def first_batch(kind: Any, wanted: loaders.Task) -> torch.Tensor:
    """What a peer of the benchmarks gives first; where it cannot be had here, the test is skipped with its reason."""
    if (missing := kind.missing(wanted)) is not None:
        pytest.skip(missing)
    threads = torch.get_num_threads()
    peer = kind(wanted)
    try:
        images: torch.Tensor = next(peer.batches()).clone()
    finally:
        peer.close()
        torch.set_num_threads(threads)
    return images
