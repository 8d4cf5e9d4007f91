"""What a run loses when something goes wrong: kills, requests to stop, full disks, frozen ranks, bad numbers.

    python benchmarks/faults.py                              # all of it, on synthetic photographs
    python benchmarks/faults.py --data DDR-dataset --kills 20 --ranks 2
    python benchmarks/faults.py --only saves disk            # parts of it

Every part trains for real, in processes of its own, and a row is what came of it:

    kills      kill -9 at random moments after the first checkpoint, every other one while a checkpoint is written;
               the next start must resume, and end with the weights, moments and averages of an undisturbed run, and
               with its steps in metrics.jsonl, W&B (offline) and TensorBoard. W&B writes every 15 s, so it is what W&B
               lost that these short runs show; what it has twice is shown by a test
    stops      SIGTERM: seconds until the checkpoint stands
    saves      how long training stands still for a checkpoint, and how long writing it takes
    disk       a disk that is full from the n-th call of a save on, for every n: is the checkpoint before whole?
    bad        steps whose gradient is not finite: how many were kept from the weights
    ranks      a rank that is killed, and one that freezes: seconds until the job has said so and ended
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import hazards
import numpy as np
import script
import torch
from records import steps_logged, steps_of_tensorboard, steps_of_wandb
from victims import MODEL, Runs, equal, kill, on_cpu, processes, state, status

from fastddr import checkpoints, cli
from fastddr.errors import UserError
from fastddr.trainer import Trainer

PARTS = ("kills", "stops", "saves", "disk", "bad", "ranks")


@dataclass
class Options(script.Output):
    """Break training in every way, and count what is lost."""

    data: str | None = None
    """Photographs to train on; by default 240 synthetic ones."""
    ranks: int = 1
    """Processes of the runs that are killed and stopped."""
    kills: int = 20
    """How many runs are killed."""
    stops: int = 10
    """How many runs are asked to stop."""
    steps: int = 60
    """Steps of each run that is killed; a checkpoint is due after every second one."""
    only: tuple[str, ...] = PARTS
    """Which parts to run."""
    seed: int = 0
    """Of the moments."""


def _count(name: str, good: int, of: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "median": good, "low": good, "high": good, "unit": f"of {of}", "n": of, **more}


def _where(ranks: int) -> str:
    """For the names of rows of so many ranks, whose machine may have a card that they did not use."""
    return ", on the CPU" if on_cpu(ranks) else ""


# ------------------------------------------------------------------------------------------------------------- parts


def kills(options: Options, runs: Runs) -> list[dict[str, Any]]:
    """Kill runs, start them again, and compare how they end with a run that nobody disturbed."""
    rng = random.Random(options.seed)
    arguments = _arguments(options, runs)
    undisturbed = runs.scratch / "undisturbed"
    runs.finish(undisturbed, *arguments)
    wanted, lines = state(undisturbed), steps_logged(undisturbed)
    logs = {"metrics.jsonl": steps_logged, "W&B": steps_of_wandb, "TensorBoard": steps_of_tensorboard}
    if find_spec("wandb") is None:
        harness.say("  W&B is left out: it is not installed")
        del logs["W&B"]
    for name, read in logs.items():
        if read(undisturbed) != lines:
            raise RuntimeError(f"{name} of the undisturbed run has other steps than its metrics.jsonl")
    same = resumed = unloadable = writing = 0
    whole = dict.fromkeys(logs, 0)
    for number in range(options.kills):
        run = runs.scratch / f"killed-{number}"
        process = runs.start(run, *arguments)
        folder = run / "checkpoints"
        runs.first_checkpoint(process, run)
        # Anywhere in what is left of the training; a save may be as short as a step.
        step = rng.randrange(4, options.steps - 4)
        runs.wait(lambda run=run, step=step: status(run).get("step", 0) >= step, process, run)
        if number % 2:
            runs.wait(lambda folder=folder: any(folder.glob(".writing")), process, run)
        else:
            time.sleep(rng.random() * 0.1)
        kill(run)
        process.wait()
        writing += any(folder.glob(".writing"))
        told: list[str] = []
        found = checkpoints.load_newest(folder, told.append)
        unloadable += len(told)
        if status(run).get("state") != "running":
            raise RuntimeError(f"{run.name} had ended before it was killed: take more --steps.")
        runs.finish(run, *arguments)
        at = 0 if found is None else found.state["progress"]["step"]
        resumed += f"resumed at step {at}" in runs.said(run) and at > 0
        same += equal(state(run), wanted)
        for name, read in logs.items():
            whole[name] += read(run) == lines
        shutil.rmtree(run)
        harness.say(f"  kill {number + 1} at step {at}: {same} the same, {resumed} resumed")
    more = {"ranks": options.ranks, "steps": options.steps}
    counts = {
        "ends with the weights of an undisturbed run": same,
        "resumed from a checkpoint": resumed,
        **{f"{name} without a doubled or missing step": count for name, count in whole.items()},
        "a checkpoint was being written": writing,
        "checkpoints that do not load": unloadable,
    }
    killed = f"killed{_where(options.ranks)}"
    return [_count(f"{killed}: {name}", count, options.kills, **more) for name, count in counts.items()]


def _arguments(options: Options, runs: Runs) -> list[str]:
    """So many epochs that a run has `steps` steps, or a few more."""
    from fastddr.data import manifest

    photographs = len(manifest.read(runs.data).ids("train"))
    epochs = max(1, round(options.steps / (photographs // 16)))
    return [
        "--epochs", str(epochs), "--save-every-steps", "2", "--tracking.log-every-steps", "1", "--tracking.wandb",
        "--tracking.no-log-code", "--tracking.tensorboard",
    ]  # fmt: skip


def stops(options: Options, runs: Runs) -> list[dict[str, Any]]:
    """SIGTERM in the midst of training: how long until the checkpoint stands, and until everything has ended."""
    rng = random.Random(options.seed)
    saved, ended = [], []
    for number in range(options.stops):
        run = runs.scratch / f"stopped-{number}"
        process = runs.start(run, "--epochs", "100000")
        runs.first_checkpoint(process, run)
        time.sleep(rng.random())
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        runs.wait(lambda run=run: status(run).get("state") == "preempted", process, run)
        saved.append(time.monotonic() - began)
        process.wait()
        ended.append(time.monotonic() - began)
        if checkpoints.load(run / "checkpoints" / "last").state["progress"]["step"] != status(run)["step"]:
            raise RuntimeError(f"{run.name} did not save the step at which it stopped")
        shutil.rmtree(run)
    return [
        {
            "name": f"{name}{_where(options.ranks)}", **harness.spread(values), "unit": "s",
            "p95": round(float(np.percentile(values, 95)), 3), "ranks": options.ranks,
        }
        for name, values in (("SIGTERM to the checkpoint", saved), ("SIGTERM to the end of all processes", ended))
    ]  # fmt: skip


def saves(options: Options, runs: Runs) -> list[dict[str, Any]]:
    """How long training stands still for a checkpoint, in models of several sizes."""
    rows = []
    models = {
        "quickstart": ["--preset", "quickstart"],
        "ConvMixer 512/12": ["--preset", "report-convmixer"],
        "ResNet-50": ["--preset", "report-resnet", "--resnet.depth", "50"],
    }
    for name, chosen in models.items():
        run = runs.scratch / f"saves-{name.split()[0]}"
        small = ["--image-size", "64", "--canvas", "64", "--batch-size", "4", "--micro-batch-size", "auto"]
        more = [*chosen, *small, "--tracking.no-wandb", "--tracking.no-tensorboard"]
        config = cli.parse(["--data", runs.data, "--run-dir", str(run), *more], "faults")
        stall: list[float] = []
        with Trainer(config) as trainer:
            saver = trainer.saver
            assert saver is not None
            for weight in trainer.bare_model.parameters():
                weight.grad = torch.zeros_like(weight)
            trainer.optimizer.step()  # without it there would be no moments to save
            written: list[float] = []
            for _ in range(9):
                began = time.perf_counter()
                saver.save(trainer.progress, best=False)
                stall.append(1e3 * (time.perf_counter() - began))
                saver.flush()
                written.append(1e3 * (time.perf_counter() - began))
            size = sum(file.stat().st_size for file in (run / "checkpoints" / "last").iterdir())
        shutil.rmtree(run)
        about = {"unit": "ms", "mib": round(size / 2**20, 1)}
        rows.append({"name": f"a save of {name}: training stands still", **harness.spread(stall), **about})
        rows.append({"name": f"a save of {name}: until it is on the disk", **harness.spread(written), **about})
    return rows


def disk(options: Options, runs: Runs) -> list[dict[str, Any]]:
    """A disk that is full from the n-th call of a save on, and a kill there: what the newest whole checkpoint is."""
    rows = []
    model = torch.nn.Linear(50, 50)
    hazard = {
        "the disk is full from its n-th call on": hazards.full,
        "the process is killed at its n-th call": hazards.die,
    }
    for name, then in hazard.items():
        folder = runs.scratch / f"disk-{then.__name__}"
        whole = 0

        def snapshot(step: int) -> checkpoints.Snapshot:
            moved = copy.deepcopy(model)
            moved.load_state_dict({key: value + step for key, value in model.state_dict().items()})
            training = checkpoints.Training(moved, moved, torch.optim.SGD(moved.parameters()), None)
            return training.snapshot(step, {"step": step})

        def check(number: int, folder: Path = folder) -> None:
            nonlocal whole
            told: list[str] = []
            found = checkpoints.load_newest(folder, told.append)
            whole += found is not None and not told and found.state["step"] in (number - 1, 10**6)
            checkpoints.write(folder, snapshot(number), best=True)

        checkpoints.write(folder, snapshot(0), best=True)
        calls = hazards.each(
            lambda folder=folder: checkpoints.write(folder, snapshot(10**6), best=False), then, check=check
        )
        rows.append(_count(f"a save, {name}: a whole checkpoint is there", whole, calls + 1))
    return [*rows, *_small_disk(runs)]


def _small_disk(runs: Runs) -> list[dict[str, Any]]:
    """A real disk that fills up, where this user may mount one."""
    folder = runs.scratch / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        harness.say("  a real disk that fills up: left out, this user may not mount one")
        return []
    try:
        run = folder / "run"
        process = runs.start(
            run, "--epochs", "100000", "--save-every-steps", "1", "--keep-checkpoints", "1000", ranks=1
        )
        process.wait()
        said, told = runs.said(run), list[str]()
        there = checkpoints.load_newest(run / "checkpoints", told.append) is not None
        good = there and not told and "No space left on device" in said and "Traceback" not in said
        harness.say(f"  {said.strip().splitlines()[-1]}")
        return [_count("a real disk fills up: one sentence, and the newest checkpoint is whole", int(good), 1)]
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def bad(options: Options, runs: Runs) -> list[dict[str, Any]]:
    """Spoil the loss of some steps, and count those that leave weights, averages and moments finite and unchanged."""
    run, spoilt = runs.scratch / "bad", list(range(3, 40, 4))
    more = ["--epochs", "100000", "--optimizer.on-nonfinite", "skip", "--max-hours", "1"]
    config = cli.parse(["--data", runs.data, "--run-dir", str(run), *MODEL, *more], "faults")
    kept = unchanged = 0
    with Trainer(config) as trainer:
        criterion, look = trainer.criterion, trainer.watch.look
        before: dict[str, torch.Tensor] = {}

        class Spoiling(torch.nn.Module):
            def forward(self, logits: torch.Tensor, grade: torch.Tensor) -> torch.Tensor:
                loss: torch.Tensor = criterion(logits, grade)
                return loss * float("nan") if trainer.progress.step + 1 in spoilt else loss

        def watched(found: torch.Tensor, step: int, ids: Any) -> Any:
            nonlocal kept, unchanged, before
            now = _learnt(trainer)
            if step in spoilt:
                kept += all(value.isfinite().all() for value in now.values())
                unchanged += all(torch.equal(now[k], v) for k, v in before.items() if v.is_floating_point())
            before = now
            told = look(found, step, ids)
            if step > max(spoilt):
                (run / "STOP").touch()
            return told

        trainer.criterion, trainer.watch.look = Spoiling(), watched
        trainer.fit()
        told = trainer.progress.skipped
    return [
        _count("steps with a loss that is not finite: weights stayed as they were", min(kept, unchanged), len(spoilt)),
        _count("steps with a loss that is not finite: told", told, len(spoilt)),
    ]


def _learnt(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of weights, averaged weights and moments, by name."""
    parts: dict[str, Any] = {"model": trainer.bare_model.state_dict()}
    if trainer.ema is not None:
        parts["ema"] = trainer.ema.state_dict()
    parts |= {f"moments {number}": held for number, held in enumerate(trainer.optimizer.state.values())}
    return {
        f"{part} {name}": torch.as_tensor(value).clone() for part, held in parts.items() for name, value in held.items()
    }


def ranks(options: Options, runs: Runs) -> list[dict[str, Any]]:
    """Of two ranks one is killed, or frozen: seconds until status.json says so, and until all has ended."""
    rows = []
    for how, number in (("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)):
        run = runs.scratch / f"rank-{how}"
        process = runs.start(run, "--epochs", "100000", "--rank-timeout-minutes", "0.25", ranks=2)
        runs.first_checkpoint(process, run)
        began = time.monotonic()
        os.kill(processes(run, rank=1)[0], number)
        runs.wait(lambda run=run: status(run).get("state") == "failed", process, run)
        said = time.monotonic() - began
        process.wait()
        ended = time.monotonic() - began
        about = f"a rank is {how}{_where(2)}" + (" (timeout 15 s)" if how == "frozen" else "")
        for what, value in (("the reason is told", said), ("all has ended", ended)):
            rows.append({"name": f"{about}: {what}", **harness.spread([value]), "unit": "s", "ranks": 2})
    return rows


def main(options: Options) -> None:
    """Run, print and write."""
    unknown = [part for part in options.only if part not in PARTS]
    if unknown:
        raise UserError(f"--only {unknown[0]}: known are {', '.join(PARTS)}.")
    if options.steps < 9:
        raise UserError(f"--steps {options.steps}: give at least 9, so that a run can be killed within them.")
    do: dict[str, Callable[[Options, Runs], list[dict[str, Any]]]] = {
        "kills": kills, "stops": stops, "saves": saves, "disk": disk, "bad": bad, "ranks": ranks,
    }  # fmt: skip
    harness.begin()
    rows: list[dict[str, Any]] = []
    # A disk of ours that could not be unmounted must not hide what went wrong.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        harness.writing("faults", rows, options.out, wandb=options.wandb),
    ):
        runs = Runs(options.data, options.ranks, Path(scratch))
        for part in options.only:
            harness.say(part)
            rows += do[part](options, runs)
        harness.show("What is lost when something goes wrong", rows, ("p95", "ranks", "mib"))


if __name__ == "__main__":
    script.run(main, Options)
