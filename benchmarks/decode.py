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
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import harness
import numpy as np
import script

#: More than this anywhere is no rounding: a wrong window, wrong chroma or wrong colours.
MOST_LEVELS = 16.0


@dataclass
class Options(script.Output):
    """Compare the decoder with Pillow."""

    photographs: int = 256
    """Of the synthetic set."""
    encodings: tuple[Literal["95-420", "100-444"], ...] = ("95-420", "100-444")
    """Of the synthetic photographs: JPEG quality and chroma."""
    ways: tuple[Literal["training", "regions", "engines"], ...] = ("training", "regions", "engines")
    """Of decoding: as training does it, and on a GPU also the region alone, and on the card's JPEG engines."""
    batch_size: int = 32
    """Photographs in a batch."""
    rounds: int = 5
    """Epochs that are timed, at least 5."""
    compared: int = 64
    """Photographs that are compared with Pillow."""
    batches: int | None = None
    """Batches of an epoch, the set repeated; by default 32 on a GPU, whose queue would otherwise be most of it, and 16
    on a CPU."""
    limit: float = 60.0
    """Seconds that one trial may take."""


#: Ways to decode on a GPU besides that of training.
REGIONS, ENGINES = "the region alone", "JPEG engines"
_WAYS = {"training": "", "regions": REGIONS, "engines": ENGINES}


def trial(root: str, side: int, way: str, batch_size: int, rounds: int, compared: int, batches: int) -> dict[str, Any]:
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
    # Each repetition is a photograph of its own.
    ids = np.resize(found.ids("train"), batches * batch_size)
    files = found.files()
    task = loaders.Task(
        files=[files[id_] for id_ in ids], grades=found.grade[ids], widths=found.width[ids], heights=found.height[ids],
        ids=np.arange(len(ids)), train=True, image_size=side, canvas=int(found.width.min()), seed=0,
        augment=POLICIES["none"], batch_size=batch_size, threads=available_cores(),
        regions="always" if way == REGIONS else "auto",
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
        crops = sampling.as_crops(requests.at(k).affine, side)
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
    return {"largest_levels": worst, "mean_levels": total / count, "compared": seen, "rates": rates[1:]}


def main(options: Options) -> None:
    """Compare, print and write."""
    import sources
    import torch

    from fastddr.loaders import dali_decoder

    harness.begin()
    rows: list[dict[str, Any]] = []
    gpu = torch.cuda.is_available()
    batches = options.batches or (32 if gpu else 16)
    ways = [_WAYS[way] for way in options.ways if gpu or way == "training"]
    if not dali_decoder.installed():
        ways = []
        rows.append({"name": "DALI's decoder", "kind": "absent", "failed": "NVIDIA DALI is not installed"})
        report(rows[-1])
    # A suite wants to know that the decoder fails.
    with harness.writing("decode", rows, options.out, wandb=options.wandb, failures=True):
        kinds = sources.roots(None, options.encodings, options.photographs) if ways else []
        # First the way that training takes.
        for way, (photographs, root), side in itertools.product(ways, kinds, (256, 512)):
            about = described(photographs, side, way, options.batch_size, batches)
            given = [str(root), side, way, options.batch_size, max(options.rounds, 5), options.compared, batches]
            rows.append(about | in_process(given, options.limit))
            report(rows[-1])
        shown = [
            {key: f"{value:.3g}" if key.endswith("_levels") else value for key, value in row.items()}
            for row in rows if "failed" not in row
        ]  # fmt: skip
        if shown:
            harness.show("The dali loader against Pillow", shown, ["largest_levels", "mean_levels"])


def described(photographs: str, side: int, way: str, batch_size: int, batches: int) -> dict[str, Any]:
    """What a row says of its trial."""
    name = ", ".join(filter(None, ("window" if side == 256 else "whole", photographs, way)))
    about = {"name": name, "photographs": photographs, "image_size": side, "batch_size": batch_size, "batches": batches}
    return about | ({"kind": "not trained with"} if way else {})


def in_process(given: Sequence[Any], limit: float) -> dict[str, Any]:
    """A trial in a process of its own, as what its row says; `failed` with the reason where it did not go through."""
    command = [sys.executable, __file__, "--child", json.dumps(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {done.returncode}: {last}"}
    found = json.loads(done.stdout.splitlines()[-1])
    return harness.spread(found.pop("rates")) | {"unit": "images/s"} | found


def report(row: Mapping[str, Any]) -> None:
    """Say what is wrong with a trial."""
    if "failed" in row:
        harness.say(f"{row['name']}: {row['failed']}")
    elif row["largest_levels"] > MOST_LEVELS and "kind" not in row:
        harness.say(f"{row['name']}: differs from Pillow by {row['largest_levels']:.0f} levels of 255; do not train "
                    "on it, and see the diagnosis in docs/benchmarks.md.")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        harness.end_with_parent()
        print(json.dumps(trial(*json.loads(sys.argv[2]))))
        sys.exit(0)
    script.run(main, Options)
