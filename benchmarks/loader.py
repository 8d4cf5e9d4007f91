"""Images a second of the loaders, side by side on the same photographs and the same cores.

    python benchmarks/loader.py                      # synthetic 512² JPEGs, quality 95, 4:2:0
    python benchmarks/loader.py --data DDR-dataset   # your own

The report's policy: a random 256 px window of a 512 px canvas, flips, normalisation. Each round runs every loader for
some seconds in turn; the first round warms up (page cache, pipelines, workers) and is not counted. `replay` gives one
finished batch again and again: what the rest of the loop costs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import torch
import tyro
from rich.console import Console

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data import manifest, synthetic
from fastddr.data.grades import UNGRADABLE
from fastddr.loaders import dali
from fastddr.progress import EpochBar
from fastddr.ranks import available_cores


@dataclass
class Options:
    """Compare the loaders."""

    data: Path | None = None
    """Folder of photographs; by default a synthetic set in the user's cache."""
    photographs: int | None = None
    """Size of the synthetic set; by default that of the quickstart."""
    size: int = 512
    """Side of the synthetic photographs in pixels."""
    image_size: int = 256
    """Side of the window."""
    canvas: int = 512
    """Short side of the canvas."""
    batch_size: int = 64
    """Photographs in a batch."""
    threads: int | None = None
    """Decoding threads or worker processes; by default the cores of this process."""
    policy: Literal["report", "fundus"] = "report"
    """`report`: window and flips. `fundus`: also rotation, scale and colour."""
    rounds: int = 9
    """Counted rounds."""
    seconds: float = 2.0
    """How long each loader runs in a round, at least."""
    out: Path | None = None
    """The JSON; by default results/loader_HARDWARE_DATE.json."""


POLICIES = {
    "report": AugmentConfig(),
    "fundus": AugmentConfig(rotate=180.0, scale=(0.87, 1.15), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
}


class Trial:
    """A loader that can be run for some seconds."""

    def __init__(self, name: str, task: loaders.Task, seconds: float) -> None:
        self.loader = loaders.build(name, task)
        self.seconds = seconds
        self.epoch = 0

    def __call__(self) -> float:
        """Images a second over whole epochs."""
        images, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < self.seconds:
            for batch in self.loader.epoch(self.epoch):
                images += len(batch.id)
            if self.loader.task.device.type == "cuda":
                torch.cuda.synchronize()
            self.epoch += 1
        return images / took


def _synthetic(options: Options, console: Console) -> Path:
    counts = synthetic.ddr_counts(options.photographs) if options.photographs else synthetic.default_counts()
    with EpochBar(console, "making the synthetic photographs, once", sum(map(sum, counts.values()))) as bar:
        return synthetic.ensure(counts, options.size, on_progress=lambda done, _: bar.update(done))


def main(options: Options) -> None:
    """Measure, print and write."""
    console = Console(soft_wrap=True)
    root = options.data or _synthetic(options, console)
    found = manifest.read(root)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cores = options.threads or available_cores()
    task = loaders.Task(
        files=found.files(),
        grades=found.grade,
        widths=found.width,
        heights=found.height,
        # All splits: nothing is learnt here, and longer epochs are nearer to a real set's.
        ids=np.flatnonzero(found.grade < UNGRADABLE),
        train=True,
        image_size=options.image_size,
        canvas=options.canvas,
        augment=POLICIES[options.policy],
        seed=0,
        batch_size=options.batch_size,
        device=device,
        threads=cores,
    )
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "dali": ("dali", {"threads": cores}),
        f"torchvision, {cores} workers": ("torchvision", {"threads": cores}),
        "torchvision, 0 workers": ("torchvision", {"threads": 0}),
        "replay": ("replay", {"threads": cores}),
    }
    if not dali.installed():
        console.print("NVIDIA DALI is not installed, so it is left out; see the README.")
        del settings["dali"]
    trials = {
        label: Trial(name, replace(task, **changes), options.seconds) for label, (name, changes) in settings.items()
    }
    console.print(f"{len(task.ids)} photographs, {cores} threads, {device}; {options.rounds} rounds …")
    harness.interleaved(trials, rounds=1)
    speeds = harness.interleaved(trials, options.rounds)
    for trial in trials.values():
        trial.loader.close()

    what = {
        "policy": options.policy,
        "image_size": options.image_size,
        "canvas": options.canvas,
        "batch_size": options.batch_size,
        "photographs": "synthetic, quality 95, 4:2:0" if options.data is None else options.data.name,
        "mean_kilobytes": round(float(found.size.mean()) / 1000, 1),
        "device": device.type,
    }
    rows: list[dict[str, Any]] = [
        {"name": label, **what, **settings[label][1], **harness.spread(values), "unit": "images/s"}
        for label, values in speeds.items()
    ]
    baseline = f"torchvision, {cores} workers"
    if "dali" in speeds:
        ratio = harness.ratio(speeds["dali"], speeds[baseline])
        rows.append({"name": f"dali / {baseline}", **what, **ratio, "unit": "×"})
    harness.show(f"Loaders: {options.image_size} px windows of a {options.canvas} px canvas, {options.policy}", rows)
    console.print(f"written to {harness.write('loader', rows, options.out)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
