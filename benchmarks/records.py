"""Which steps a run's records have: `metrics.jsonl`, and the copies of it at W&B, offline, and TensorBoard."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: A line of figures is known by one that it always has.
KINDS = ("train/loss", "valid/loss", "final/valid_loss")

#: (step, kind) of each line, in the order in which they stand.
Steps = list[tuple[int, str]]


def steps_logged(run: Path) -> Steps:
    """Those of metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], _kind(line)) for line in lines]


def steps_of_wandb(run: Path) -> Steps:
    """Those of all offline parts at W&B, the oldest first, as they would be uploaded."""
    found = []
    for part in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records = [json.loads(line) for line in printed.splitlines()]
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        found += [(row["step"], _kind(row)) for row in rows if any(kind in row for kind in KINDS)]
    return found


def steps_of_tensorboard(run: Path) -> Steps:
    """Those that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else it says that it hides what a resume writes again
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = [(event.step, kind) for kind in KINDS for event in read.Scalars(kind)]
    # Each kind is a curve of its own there; the order of the kinds within a step is theirs.
    return sorted(found, key=lambda each: (each[0], KINDS.index(each[1])))


def _kind(line: Mapping[str, Any]) -> str:
    """Which of `KINDS` a line is."""
    (kind,) = [kind for kind in KINDS if kind in line]
    return kind
