"""Whether the device's JPEG decoder gives Pillow's pixels, and how fast it is: the first thing to know of a new card.

    python benchmarks/decode.py

Windows and whole photographs, of both encodings, through the `dali` loader, in processes of their own: a decoder that
crashes on this card is a row, and not the end. On a GPU also the two ways that training does not take: to decode the
region alone, and on the card's JPEG engines. Differences are in grey levels of 255; GPU decoders round their transform
in their own way, so a card is not bit for bit Pillow, as the CPU is.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import tyro
from rich.console import Console

#: More than this anywhere is no rounding: a wrong window, wrong chroma or wrong colours.
MOST_LEVELS = 16.0


@dataclass
class Options:
    """Compare the decoder with Pillow."""

    photographs: int = 256
    """Of the synthetic set."""
    batch_size: int = 32
    """Photographs in a batch."""
    rounds: int = 5
    """Epochs that are timed, at least 5."""
    compared: int = 64
    """Photographs that are compared with Pillow."""
    limit: float = 120.0
    """Seconds that one trial may take."""
    out: Path | None = None
    """The JSON; by default results/decode_HARDWARE_DATE.json."""
    wandb: bool = False
    """Also keep the figures as a W&B run of job type `benchmark`."""


#: Ways to decode on a GPU besides that of training.
REGIONS, ENGINES = "the region alone", "JPEG engines"


def trial(root: str, side: int, way: str, batch_size: int, rounds: int, compared: int) -> dict[str, Any]:
    """Differences and images a second of windows of `side` pixels; in a process of its own.

    `way`: as training does it, or `REGIONS` or `ENGINES`.

    Raises:
        UserError: DALI is not installed, or a photograph cannot be decoded.
    """
    import torch
    from PIL import Image

    from fastddr import loaders, sampling
    from fastddr.config.sections import IMAGENET_MEAN, IMAGENET_STD, POLICIES
    from fastddr.data import manifest
    from fastddr.ranks import available_cores

    found = manifest.read(root)
    task = loaders.Task(
        files=found.files(), grades=found.grade, widths=found.width, heights=found.height, ids=found.ids("train"),
        train=True, image_size=side, canvas=int(found.width.min()), augment=POLICIES["none"], seed=0,
        batch_size=batch_size, threads=available_cores(), regions="always" if way == REGIONS else "auto",
        jpeg_engines=way == ENGINES,
        device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
    )  # fmt: skip
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    loader = loaders.build("dali", task)
    worst, total, count, seen = 0.0, 0.0, 0, 0
    requests = task.requests(0)
    for k, batch in enumerate(loader.epoch(0)):
        if seen >= compared:
            break
        crops = sampling.as_crops(requests.affine[k], side)
        assert crops is not None, "the policy is windows alone"
        for place, image in enumerate(batch.image.float().cpu().numpy()):
            left, top = int(crops.x[place]), int(crops.y[place])
            with Image.open(task.files[int(batch.id[place])]) as photograph:
                window = photograph.convert("RGB").crop((left, top, left + side, top + side))
                wanted = np.asarray(window, dtype=np.float64).transpose(2, 0, 1)
            difference = np.abs(255 * (image * std + mean) - wanted)
            worst, total, count = max(worst, float(difference.max())), total + difference.sum(), count + wanted.size
            seen += 1
    rates = []
    for epoch in range(rounds + 1):
        began, images = time.perf_counter(), 0
        for batch in loader.epoch(epoch):
            images += len(batch.image)
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(images / (time.perf_counter() - began))
    loader.close()
    # The first epoch warms up.
    return {"largest": worst, "mean": total / count, "compared": seen, "rates": rates[1:]}


def main(options: Options) -> None:
    """Compare, print and write."""
    import sources
    import torch

    console = Console(soft_wrap=True)
    harness.begin()
    kinds = sources.roots(None, tuple(sources.NAMES), options.photographs, 512, console)
    rows: list[dict[str, Any]] = []
    ways = ("", REGIONS, ENGINES) if torch.cuda.is_available() else ("",)
    for (photographs, root), side, way in itertools.product(kinds, (256, 512), ways):
        name = ", ".join(filter(None, ("window" if side == 256 else "whole", photographs, way)))
        about = {"name": name, "photographs": photographs, "image_size": side, "batch_size": options.batch_size}
        about |= {"kind": "not trained with"} if way else {}
        given = [str(root), side, way, options.batch_size, max(options.rounds, 5), options.compared]
        command = [sys.executable, __file__, "--child", json.dumps(given)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
        except subprocess.TimeoutExpired:
            rows.append(about | {"failed": f"no answer within {options.limit:.0f} s"})
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows.append(about | {"failed": f"exit code {done.returncode}: {last}"})
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        rates = found.pop("rates")
        found = {f"{key}_levels" if key != "compared" else key: value for key, value in found.items()}
        rows.append(about | harness.spread(rates) | {"unit": "images/s"} | found)
        if found["largest_levels"] > MOST_LEVELS and not way:
            console.print(f"{name}: differs from Pillow by {found['largest_levels']:.0f} levels of 255; do not train "
                          "on it, and see the diagnosis in docs/benchmarks.md.")  # fmt: skip
    shown = [
        {key: f"{value:.3g}" if key.endswith("_levels") else value for key, value in row.items()}
        for row in rows if "failed" not in row
    ]  # fmt: skip
    if shown:
        harness.show("The dali loader against Pillow", shown, ["largest_levels", "mean_levels"])
    for row in rows:
        if "failed" in row:
            console.print(f"{row['name']}: {row['failed']}", highlight=False, markup=False)
    console.print(f"written to {harness.write('decode', rows, options.out, wandb=options.wandb)}")


if __name__ == "__main__":
    # As Ctrl-C: a trial must not outlive this.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(trial(*json.loads(sys.argv[2]))))
    else:
        main(tyro.cli(Options))
