"""`fastddr evaluate RUN`: a run's weights on any split, or on other data, with a report of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from fastddr import checkpoints, models, ranks, reporting, runtime
from fastddr.config import Config, from_mapping, read_yaml
from fastddr.data import manifest, source
from fastddr.data.manifest import Manifest
from fastddr.errors import EXIT_USER_ERROR, UserError
from fastddr.evaluation import grading
from fastddr.evaluation.evaluate import score
from fastddr.evaluation.metrics import SplitResult, figures
from fastddr.evaluation.views import Averaged, Views
from fastddr.loaders.run import scoring
from fastddr.reporting.facts import facts
from fastddr.runs import RunFolder, claim
from fastddr.runtime import Runtime


@dataclass(frozen=True)
class Evaluate:
    """Score a run's weights, and write a report into RUN/evaluations/.

    Several GPUs share the work: `accelerate launch -m fastddr evaluate RUN`.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    split: Literal["train", "valid", "test", "all"] = "test"
    """Which photographs. Every scoring of test is noted in RUN/test_scorings.jsonl."""
    data: str | None = None
    """Other photographs than the run's, in any layout; by default those that it was trained on."""
    weights: Literal["best", "last"] = "best"
    """Of the epoch with the highest kappa on valid, or of the last one."""
    tta: Views = "none"
    """Test-time augmentation: the mean over `flips` (4 views) or over flips and quarter turns (`dihedral`, 8)."""
    field: Literal["center", "full"] | None = None
    """The centre window of the canvas, or all of its short side; by default as the run was validated."""
    batch_size: int | None = None
    """Photographs a rank holds at once; by default what the run held."""
    loader: Literal["dali", "torchvision"] | None = None
    """By default the run's."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """By default the run's on a GPU, fp32 on a CPU."""
    on_bad: Literal["raise", "exclude"] = "raise"
    """A photograph or label that cannot be used: stop, or leave it out and say so."""
    exclude: str | None = None
    """List of photographs to leave out; by default what the run left out."""
    follow_links: bool = False
    """Also read photographs to which links lead out of the data folder."""


def settings(asked: Evaluate) -> Config:
    """The run's configuration, with what is asked for.

    Raises:
        UserError: there is no such run, or a value that cannot be.
    """
    file = RunFolder(asked.run).config
    if not file.is_file():
        raise UserError(f"{asked.run}: there is no run here (no config.yaml); give the folder of one, like runs/NAME.")
    config = from_mapping(read_yaml(file), str(file))
    sizes = (asked.batch_size, config.evaluation.batch_size, config.micro_batch_size)
    held = next(size for size in sizes if size is not None)
    if held == "auto" or int(held) < 1:
        raise UserError(f"--batch-size {held}: give the number of photographs that a rank holds at once.")
    other: dict[str, Any] = {"run_dir": None, "deterministic": config.deterministic}
    if asked.data is not None:
        other |= {"data": asked.data, "exclude": None}
    if asked.exclude is not None:
        other["exclude"] = asked.exclude
    if asked.loader is not None or config.loader == "replay":
        other["loader"] = asked.loader or "auto"
    field = asked.field or config.evaluation.field
    return replace(
        config,
        **other,
        on_bad="exclude" if "exclude" in (asked.on_bad, config.on_bad) and asked.data is None else asked.on_bad,
        follow_links=asked.follow_links or config.follow_links,
        batch_size=int(held) * ranks.world(),
        micro_batch_size=int(held),
        evaluation=replace(config.evaluation, field=field, batch_size=None),
        precision=asked.precision or ("fp32" if runtime.on_cpu() else config.precision),
    )


def evaluate(asked: Evaluate) -> Path | None:
    """Score, print, and write; the folder that was written, None on all ranks but the first.

    Raises:
        UserError: the run, its data or its weights cannot be used.
    """
    config, state = settings(asked), runtime.join()
    console = Console(quiet=not state.is_main_process, highlight=False, markup=False, soft_wrap=True)
    run, began = RunFolder(asked.run), runtime.start(config)
    console.print(f"  device {began.device.type}, precision {began.precision}, ranks: {began.world}")
    saved = checkpoints.load(_checkpoint(run, asked.weights))
    found = source.open_data(config, console)
    if asked.data is None and found.fingerprint != saved.state["fingerprint"]:
        raise UserError(
            f"{found.root}: these are not the photographs that {asked.run} was trained on (compare {run.manifest}); "
            "restore them, or name them with --data."
        )
    model = models.from_config(config, console.print).to(began.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checkpoints.load_weights(model, saved.model if saved.ema is None else saved.ema, saved.path)
    progress = saved.state["progress"]
    weights = f"{asked.weights} (step {progress['step']}, epoch {progress['epoch']})"
    weights += "" if asked.tta == "none" else f", {asked.tta} averaged"
    loader = scoring(config, found, began, _ids(found, asked.split), lambda line: console.print(f"  {line}"))
    try:
        model = grading.wrap(model, config, progress.get("grading"))
        scored = model if asked.tta == "none" else Averaged(model, asked.tta)
        result = score(began.accelerator, scored, loader, paths=found.path, weights=weights)
    finally:
        loader.close()
    if not began.is_main:
        return None
    return _write(asked, config, run, found, began, result, parameters, console)


def _checkpoint(run: RunFolder, weights: str) -> Path:
    path = run.checkpoints / weights
    if not path.is_dir():
        raise UserError(f"{run.path}: it has no {weights} checkpoint yet; train it further, or name other --weights.")
    return path


def _ids(found: Manifest, split: str) -> np.ndarray:
    """Ids of a split, or of all.

    Raises:
        UserError: there are none.
    """
    if split != "all":
        return found.ids(split)
    return np.sort(np.concatenate([found.ids(name) for name in manifest.SPLITS if found.has(name)]))


def _write(
    asked: Evaluate,
    config: Config,
    run: RunFolder,
    found: Manifest,
    began: Runtime,
    result: SplitResult,
    parameters: int,
    console: Console,
) -> Path:
    label = "-".join([asked.split, asked.weights, *([] if asked.tta == "none" else [asked.tta])])
    place = claim(run.path / "evaluations" / f"{label}-{datetime.now():%Y%m%d-%H%M%S}", named=False)
    values = figures(result.logits, result.grades)
    if asked.split in ("test", "all") and found.has("test"):
        shown = {key: values[key] for key in ("loss", "accuracy", "qwk")}
        run.append_test_scoring(
            {"by": "evaluate", "weights": result.weights, "split": asked.split, "n": values["n"], **shown,
             "fingerprint": found.fingerprint}
        )  # fmt: skip
    about = facts(config, found, began, parameters, [])
    reporting.write(
        place, {asked.split: result}, about, found.notes, root=found.root, left_out=found.left_out, folder=place
    )
    reporting.summary(place, tensorboard=False, console=console, folder=place)
    return place


def main(arguments: Sequence[str]) -> int:
    """Run the verb; its exit code."""
    asked = tyro.cli(Evaluate, args=list(arguments), prog="fastddr evaluate")
    try:
        with ranks.watched():
            evaluate(asked)
            ranks.join()
    except UserError as error:
        print(f"fastddr: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.filename is None:
            raise
        print(f"fastddr: {error.filename}: {error.strerror}; give a place that can be used.", file=sys.stderr)
        return EXIT_USER_ERROR
    except ranks.RankLost as error:
        print(f"fastddr: {error}", file=sys.stderr)
        return 1
    return 0
