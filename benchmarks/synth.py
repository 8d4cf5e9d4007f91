"""Photographs a second of the synthetic generator, on all cores of this process and on one.

    python benchmarks/synth.py
    python benchmarks/synth.py --size 1024

Each round makes the set in a temporary folder, as `fastddr synth` does, once on all cores and once on one; the first
round warms up and is not counted. A rate is for all from no folder to the finished set: the start of the worker
processes is in it. The set has DDR's proportions of grades: where more eyes are ill, photographs take
longer.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import script

from fastddr.data import synthetic

# Worker processes import this file again: what loads PyTorch is imported in `main`.


@dataclass
class Options(script.Output):
    """Time the generator of synthetic photographs."""

    photographs: int = 480
    """How many a round makes on all cores; on one core, that by the number of cores."""
    size: int = 512
    """Side of the photographs in pixels."""
    rounds: int = 7
    """Counted rounds."""


class Trial:
    """One making of the set."""

    def __init__(self, options: Options, workers: int, total: int) -> None:
        self.size, self.workers = options.size, workers
        self.counts = synthetic.ddr_counts(total)

    def __call__(self) -> float:
        """Photographs a second."""
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            synthetic.generate(Path(folder) / "set", counts=self.counts, size=self.size, workers=self.workers)
            took = time.perf_counter() - began
        return sum(map(sum, self.counts.values())) / took


def main(options: Options) -> None:
    """Measure, print and write.

    Raises:
        UserError: too few rounds.
    """
    import harness

    from fastddr.ranks import available_cores

    harness.begin(options.rounds)
    cores = available_cores()
    trials = {f"{cores} cores": Trial(options, cores, options.photographs)} if cores > 1 else {}
    trials["1 core"] = Trial(options, 1, max(options.photographs // cores, 36))
    harness.say(f"{options.photographs} photographs of {options.size}², {cores} cores; {options.rounds} rounds …")
    what = {"size": options.size, "counts": "ddr", "quality": 95, "version": synthetic.VERSION}
    rows: list[dict[str, Any]] = []
    speeds: dict[str, list[float]] = {}
    with harness.writing("synth", rows, options.out, wandb=options.wandb):
        harness.interleaved(trials, rounds=1)
        try:
            harness.interleaved(trials, options.rounds, found=speeds)
        finally:
            # Also where it is stopped; else all rounds are whole.
            speeds = harness.whole_rounds(speeds)
            rows += [
                {
                    "name": label,
                    "workers": trials[label].workers,
                    "photographs": sum(map(sum, trials[label].counts.values())),
                    **what,
                    **harness.spread(values),
                    "unit": "photographs/s",
                }
                for label, values in speeds.items()
            ]
        if cores > 1:
            ratio = harness.ratio(speeds[f"{cores} cores"], speeds["1 core"])
            rows.append({"name": f"{cores} cores / 1 core", **what, **ratio, "unit": "×"})
        harness.show(f"Synthetic photographs of {options.size}²", rows)


if __name__ == "__main__":
    script.run(main, Options)
