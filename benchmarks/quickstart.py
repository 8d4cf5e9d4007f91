"""How long the README's first command takes, and how well its model grades: one run a seed, as a user types it.

    python benchmarks/quickstart.py --seeds 3

The synthetic set is made anew for every seed, in an empty cache, and counted in. A score on synthetic photographs says
nothing about real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import script

from fastddr.errors import UserError

ROOT = Path(__file__).parents[1]


@dataclass
class Options(script.Output):
    """Time the quickstart."""

    seeds: int = 3
    """How many runs."""


def timed(seed: int, found: dict[str, list[float]]) -> None:
    """Run the command once, and put what it took and what its model came to behind the figures of earlier seeds."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "fastddr" / "train.py")]
        environment = os.environ | {"FASTDDR_CACHE": f"{folder}/cache", "WANDB_MODE": "offline"}
        began = time.perf_counter()
        arguments = ["--seed", str(seed), "--run-dir", "run"]
        subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        found.setdefault("whole command", []).append(time.perf_counter() - began)
        figures = json.loads(Path(folder, "run/report/metrics.json").read_text())
        for split in ("valid", "test"):
            for key in ("qwk", "accuracy"):
                found.setdefault(f"{split} {key}", []).append(figures[split][key])


def main(options: Options) -> None:
    """Run, print and write.

    Raises:
        UserError: no run is asked for.
    """
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: give it at least 1 run.")
    found: dict[str, list[float]] = {}
    harness.begin()
    rows: list[dict[str, Any]] = []
    with harness.writing("quickstart", rows, options.out, wandb=options.wandb):
        for seed in range(options.seeds):
            timed(seed, found)
            rows[:] = [
                {"name": name, "preset": "quickstart", "seeds": list(range(seed + 1)), **harness.spread(values)}
                | {"unit": "s" if name == "whole command" else ""}
                for name, values in found.items()
            ]
            harness.say(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.3g}" for name, values in found.items()))
        harness.show("The quickstart, synthetic set included", rows)


if __name__ == "__main__":
    script.run(main, Options)
