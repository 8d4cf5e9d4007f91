"""Images a second of `fastddr predict` beside the plain way: Pillow, torchvision's transforms and a loop.

    python benchmarks/predict.py                                    # synthetic 512² JPEGs, the quickstart's model
    python benchmarks/predict.py --data photos --run runs/NAME      # your own photographs and run

Both grade the same photographs in one process that has loaded everything. `predict` also decodes each photograph once
more to see that it is whole, and writes its table; the plain way does neither. Every way has one turn a round;
intervals are those of the median over the rounds, ratios are taken round by round. Photographs are taken as they are,
so nothing is prepared. Both show the model the same pixels, but for rounding: upright, the canvas and the window of the
run; and both run it in the run's precision.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import script
import sources
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import v2

from fastddr.config import Config, load_preset
from fastddr.data import photos, synthetic
from fastddr.errors import UserError
from fastddr.inference import flags, predict, restore
from fastddr.ranks import available_cores
from fastddr.runtime import DTYPES, on_cpu
from fastddr.trainer import Trainer


@dataclass
class Options(script.Output):
    """Compare `fastddr predict` with a plain loop."""

    data: Path | None = None
    """Folder of photographs; by default synthetic ones, in the user's cache."""
    run: Path | None = None
    """Folder of a run; by default the quickstart's model, trained for one epoch on a few photographs."""
    photographs: int = 240
    """How many are graded in a turn, at most."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Photographs that are graded together."""
    rounds: int = 5
    """Turns of each way, at least 5."""


def trained(folder: Path) -> Path:
    """A run of the quickstart's model, of one epoch."""
    few = synthetic.generate(folder / "few", counts=synthetic.ddr_counts(72), size=128)
    config = replace(load_preset("quickstart"), data=str(few), run_dir=str(folder / "run"), epochs=1, batch_size=16)
    config = replace(config, tracking=replace(config.tracking, wandb=False, tensorboard=False))
    with contextlib.redirect_stdout(io.StringIO()), Trainer(config) as trainer:
        trainer.fit()
    return folder / "run"


def ours(run: Path, files: Sequence[str], batch_size: int, out: Path) -> Callable[[], float]:
    """Images a second of `fastddr predict`, from the command's parsed flags to the written table."""
    asked = flags.Predict(
        run=run, photographs=tuple(files), out=out, overwrite=True, batch_size=batch_size, preparation="none"
    )

    def turn() -> float:
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            answer = predict.predict(asked)
        for photo in answer.photos:
            if photo.kind:
                raise UserError(f"{photo.path}: {photo.reason}; remove it, or give another --data.")
        return len(files) / (time.perf_counter() - began)

    return turn


@torch.inference_mode()
def graded(model: nn.Module, config: Config, files: Sequence[str], batch_size: int) -> torch.Tensor:
    """The loop that everybody writes first, in the run's precision: probabilities of the grades, (n, C).

    Raises:
        UserError: the run shows nine windows of a photograph, which this loop does not.
    """
    if config.evaluation.field == "multi":
        raise UserError("the plain loop shows the model one window of a photograph, and this run nine; take another.")
    device = next(model.parameters()).device
    see = v2.Compose(
        [
            v2.Resize(config.image_size if config.evaluation.field == "full" else config.canvas, antialias=True),
            v2.CenterCrop(config.image_size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.augment.mean, config.augment.std),
        ]
    )
    answers = []
    for start in range(0, len(files), batch_size):
        files_ = files[start : start + batch_size]
        images = [see(ImageOps.exif_transpose(Image.open(file)).convert("RGB")) for file in files_]
        with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
            logits = model(torch.stack(images).to(device))
        answers.append(logits.float().softmax(1).cpu())
    return torch.cat(answers) if answers else torch.empty(0, config.num_classes)


def plain(model: nn.Module, config: Config, files: Sequence[str], batch_size: int) -> Callable[[], float]:
    """Images a second of that loop."""

    def turn() -> float:
        began = time.perf_counter()
        assert len(graded(model, config, files, batch_size)) == len(files)
        return len(files) / (time.perf_counter() - began)

    return turn


def main(options: Options) -> None:
    """Measure, print and write.

    Raises:
        UserError: too few rounds, or a run that the plain loop cannot follow.
    """
    harness.begin(options.rounds)
    rows: list[dict[str, Any]] = []
    speeds: dict[str, list[float]] = {}
    with (
        harness.writing("predict", rows, options.out, wandb=options.wandb),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        [(kind, root)] = sources.roots(options.data, ("95-420",), None)
        found = photos.find([str(root)]).paths
        files = found[:: max(1, len(found) // options.photographs)][: options.photographs]
        run = options.run or trained(Path(folder))
        device = torch.device("cpu" if on_cpu() else "cuda")
        restored = restore.restore(run, restore.settings(flags.Scoring(run=run)), "best", device, lambda line: None)
        config, model = restored.config, restored.averaged
        graded(model, config, [], 1)  # what it refuses is told before anything is measured
        trials: dict[str, Callable[[], float]] = {}
        for size in options.batch_sizes:
            trials[f"fastddr predict, {_batches(size)}"] = ours(run, files, size, Path(folder, "grades.csv"))
            trials[f"plain loop, {_batches(size)}"] = plain(model, config, files, size)
        for turn in trials.values():  # once before it counts: caches, buffers, DALI's pools
            turn()
        about: dict[str, Any] = {
            "photographs": kind, "graded": len(files), "model": config.model, "image_size": config.image_size,
            "canvas": config.canvas, "threads": available_cores(), "device": device.type,
        }  # fmt: skip
        try:
            harness.interleaved(
                trials, options.rounds, lambda k: harness.say(f"  round {k} of {options.rounds}"), found=speeds
            )
        finally:
            # Also where it is stopped; else all rounds are whole.
            for name, values in harness.whole_rounds(speeds).items():
                rows.append({"name": name, **about, **harness.spread(values), "unit": "images/s"})
        for size in options.batch_sizes:
            ours_, other = (f"{way}, {_batches(size)}" for way in ("fastddr predict", "plain loop"))
            ratio = harness.ratio(speeds[ours_], speeds[other])
            rows.append({"name": f"{ours_} / plain loop", "kind": "ratio", **about, **ratio, "unit": "×"})
        harness.show("Grading photographs", rows)


def _batches(size: int) -> str:
    return "one at a time" if size == 1 else f"batches of {size}"


if __name__ == "__main__":
    script.run(main, Options)
