"""Whole runs of `fastddr/train.py`, each in a process and a folder of its own, and what came of them.

A run that is done is not made again, and one that was stopped goes on, so a benchmark of many runs can be ended and
started again. How long it took is known only of a run that one start brought to its end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fastddr import cli
from fastddr.__main__ import main as verb
from fastddr.config import load_preset
from fastddr.errors import UserError
from fastddr.meters import RATE, of_training
from fastddr.runs import RunFolder, continue_from, placed

ROOT = Path(__file__).parents[1]
#: Peak memory in `metrics.jsonl`: of the GPU where there is one, else of the process.
_MEMORY = ("memory/peak_allocated_gib", "memory/peak_rss_gib")
#: In a run's folder: how long it took, where one start brought it to its end.
_CLOCK = "seconds.json"


def launcher(ranks: int) -> list[str]:
    """Python's arguments before a script that so many ranks run.

    In full, since without a user's own settings `accelerate launch` takes all GPUs.
    """
    return [
        "-m", "accelerate.commands.launch", *["--multi_gpu"] * (ranks > 1), "--num_machines", "1", "--num_processes",
        str(ranks), "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip


def train(folder: Path, arguments: Sequence[str], ranks: int = 0) -> str | None:
    """Bring a run to its end; what went wrong, in one sentence, or None.

    By default all GPUs train it together; `ranks` is another number. What it says goes to FOLDER.log. One that is done
    with other settings, or of data that are named otherwise, is refused.
    """
    run = RunFolder(folder)
    if run.status().get("state") == "done":
        try:
            asked = cli.parse([*arguments, "--run-dir", str(folder)], "train.py", notes=False)
            began = load_preset(run.config)
            if placed(asked) != placed(began):
                return f"{folder} is done, and its photographs lay in {began.data}; give that, or another --folder."
            continue_from(asked, run, ranks or max(torch.cuda.device_count(), 1))
        except UserError as error:
            said, settings, _ = str(error).partition("; to go on as it began")
            return f"{said}; give another --folder." if settings else said
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    usual = ["-m", "accelerate.commands.launch"] if torch.cuda.device_count() > 1 else []
    script = str(ROOT / "fastddr" / "train.py")
    command = [sys.executable, *(launcher(ranks) if ranks else usual), script, *arguments, "--run-dir", str(folder)]
    whole = not folder.exists()
    began = time.perf_counter()
    with log.open("a", encoding="utf-8") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code == 0 and run.status().get("state") == "done":
        if whole:
            (folder / _CLOCK).write_text(json.dumps({"seconds": time.perf_counter() - began}) + "\n")
        return None
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line for line in said if line.startswith("fastddr: ")]
    return (ours or said or ["no message"])[-1].removeprefix("fastddr: ")


def evaluated(folder: Path, split: str, weights: str) -> dict[str, Any]:
    """Figures of a split under other weights than the report's, scored once and kept in the run's folder.

    Raises:
        UserError: they cannot be scored.
    """
    kept = folder / f"{split}-{weights}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    before = set((folder / "evaluations").glob("*"))
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as lines, redirect_stdout(lines):
        code = verb(["evaluate", str(folder), "--split", split, "--weights", weights])
    new = sorted(set((folder / "evaluations").glob("*")) - before)
    if code or not new:
        raise UserError(f"{folder}: its {weights} weights cannot be scored on {split}; see {folder.name}.log.")
    figures = json.loads((new[-1] / "metrics.json").read_text(encoding="utf-8"))[split]
    kept.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    return figures


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()]


def scored(folder: Path) -> dict[str, list[float | None]]:
    """Valid epoch by epoch: `epoch`, `qwk` (None where it is not defined), `loss`."""
    lines = [line for line in logged(folder) if "valid/loss" in line]
    return {"epoch": [line["epoch"] for line in lines]} | {
        key: [line[f"valid/{key}"] for line in lines] for key in ("qwk", "loss")
    }


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """What a run's report says, by split: under the best weights, and `valid_last` under the last."""
    return json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))


def best_is_last(folder: Path) -> bool:
    """Whether the last epoch was the best one."""
    checkpoints = RunFolder(folder).checkpoints
    return (checkpoints / "best").resolve() == (checkpoints / "last").resolve()


def costs(folder: Path) -> dict[str, float]:
    """`images_per_second` (of the median step), `peak_gib`, and `minutes` where they are known."""
    lines = logged(folder)
    rates = of_training(lines, RATE)
    found = {} if rates is None else {"images_per_second": rates.median}
    for key in _MEMORY:
        if peaks := [line[key] for line in lines if line.get(key) is not None]:
            found["peak_gib"] = max(peaks)
            break
    clock = folder / _CLOCK
    if clock.is_file():
        found["minutes"] = json.loads(clock.read_text())["seconds"] / 60
    return found
