"""A run's model under given weights, ready for logits: the one place where a model is built for inference.

`fastddr evaluate`, `predict` and `export` all take it from here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from torch import nn

from fastddr import checkpoints, meters, models, ranks, runtime
from fastddr.config import Config, from_mapping
from fastddr.config.strict import read_yaml
from fastddr.data.problems import one_line
from fastddr.errors import UserError
from fastddr.evaluation import grading, views
from fastddr.evaluation.metrics import SplitResult
from fastddr.inference.flags import Scoring, Weights
from fastddr.progress import terminal
from fastddr.runs import RunFolder, expanded


@dataclass(frozen=True)
class Restored:
    """A run's model under its best or last weights."""

    run: RunFolder
    config: Config
    """The run's, with what was asked for."""
    model: nn.Module
    """On the device, in evaluation mode: normalised images (b, 3, s, s) to logits (b, C), a regression's with its
    thresholds."""
    weights: str
    """Which they are, for a reader: "best (step 120, epoch 9)"."""
    fingerprint: str
    """Of the photographs that it was trained on."""

    @property
    def parameters(self) -> int:
        """How many numbers it was trained to have."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def averaged(self) -> nn.Module:
        """The model, or its mean over the views of the configuration."""
        return views.averaged(self.model, self.config.evaluation.tta)


def load(run: str | Path, weights: Weights = "best", device: str | torch.device = "cpu") -> nn.Module:
    """The trained model of a run, for a notebook: embeddings, Grad-CAM, or a training of one's own.

    In evaluation mode, in float32, on the device: images (b, 3, s, s), upright, normalised by the run's `augment.mean`
    and `augment.std`, of the side s = `image_size` of its config.yaml, to logits (b, C). The weights are the averaged
    ones where the run kept an average. Of a regression it is the model with its thresholds around it, and `.model`
    gives the value (b, 1).

    Args:
        run: its folder, like runs/NAME.
        weights: `best`, of the best epoch on valid, or `last`.
        device: where the model shall be, like "cuda".

    Raises:
        UserError: there is no such run, checkpoint or device, or the checkpoint is damaged.
    """
    run = expanded(run)
    if weights not in get_args(Weights):
        raise UserError(f"fastddr.load: there are no weights {weights!r}; take {' or '.join(get_args(Weights))}.")
    config = stored(run)
    config = replace(config, memory=replace(config.memory, checkpointing=False))  # a hook would be called twice
    try:
        place = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        said = one_line(error)[:120]
        raise UserError(f"fastddr.load: the device {str(device)!r} cannot be used ({said}); take another.") from None
    return restore(run, config, weights, place, say=lambda line: None, agreed=False).model


def stored(run: Path) -> Config:
    """The configuration that a run was trained with.

    Raises:
        UserError: there is no such run.
    """
    file = RunFolder(run).config
    if not file.is_file():
        raise UserError(f"{run}: there is no run here (no config.yaml); give the folder of one, like runs/NAME.")
    return from_mapping(read_yaml(file), str(file))


def settings(asked: Scoring) -> Config:
    """The run's configuration, with what is asked for.

    Raises:
        UserError: there is no such run, or a value that cannot be.
    """
    config = stored(asked.run)
    sizes = (asked.batch_size, config.evaluation.batch_size, config.micro_batch_size)
    held = next(size for size in sizes if size is not None)
    if held == "auto" or int(held) < 1:
        raise UserError(f"--batch-size {held}: give the number of photographs that a rank holds at once.")
    other: dict[str, Any] = {}
    if asked.loader is not None or config.loader == "replay":
        other["loader"] = asked.loader or "auto"
    return replace(
        config,
        **other,
        run_dir=None,
        batch_size=int(held) * ranks.world(),
        micro_batch_size=int(held),
        # This machine may have fewer cores than the one that trained; as many threads give the same bits on a CPU.
        threads=None if config.threads is None else min(config.threads, ranks.cores()),
        loading=replace(config.loading, threads=None),
        sync_batchnorm=False,  # scoring takes the stored statistics, on a CPU too
        memory=replace(config.memory, checkpointing=False),  # there is no backward pass
        evaluation=replace(
            config.evaluation,
            field=asked.window or config.evaluation.field,
            tta=asked.tta or config.evaluation.tta,
            batch_size=None,
        ),
        precision=asked.precision or _precision(config),
    )


def _precision(config: Config) -> Any:
    """As the run was trained; but float32 on a CPU, and on a card that only emulates bfloat16 or gets halves wrong."""
    if runtime.on_cpu():
        return "fp32"
    best, _ = runtime.choose_precision("auto", "", torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    # A run in float16 may be scored so on any card that can; one in bfloat16 may be too large in float16.
    cannot = best == "fp32" or (config.precision == "bf16" and best != "bf16")
    return "fp32" if cannot and config.precision in ("bf16", "fp16") else config.precision


def why_precision(asked: Scoring, config: Config) -> str:
    """The reason for the precision of `settings`."""
    if asked.precision is not None:
        return "--precision asked for it"
    trained = stored(asked.run).precision
    if config.precision == trained:
        return "the run was trained in it"
    return f"the run was trained in {trained}, which this device is slow or wrong in"


def check_finite(result: SplitResult, precision: str) -> None:
    """Raise `UserError` where the model's output is not finite: the largest of such logits is no grade."""
    bad = ~result.logits.isfinite().all(1)
    if bad.any():
        first = result.paths[int(bad.nonzero()[0])]
        raise UserError(
            f"the model's output is not finite for {int(bad.sum())} of {len(bad)} photographs in {precision}, {first} "
            f"the first; give {'--precision fp32, or ' * (precision != 'fp32')}other --weights."
        )


@contextmanager
def together(asked: Scoring) -> Iterator[None]:
    """Around the work of all ranks, which leave each other at its end.

    Within it a device whose memory is too small is a `UserError` with the way out, a lost rank `RankLost`.
    """

    def sentence() -> str:
        held = settings(asked).micro_batch_size
        return f"the memory here is too small for {held} photographs at once; give a smaller --batch-size than {held}."

    with ranks.watched(), meters.enough_memory(sentence):
        yield
        ranks.wait()
    ranks.leave()


def begin(asked: Scoring, config: Config) -> tuple[runtime.Runtime, Restored, Console]:
    """Where this runs, said with the reason for its precision; the model; and the terminal, where rank 0 alone speaks.

    Raises:
        UserError: as `runtime.start` and `restore`.
    """
    console = terminal(quiet=not runtime.join().is_main_process)
    began = runtime.start(config, precision_of=why_precision(asked, config))
    console.print(f"  device {began.device.type}, ranks: {began.world}")
    for decision in began.decisions:  # `accelerate launch` may have asked for another precision
        if decision.startswith(("precision", "accelerate launch")):
            console.print(f"  {decision}")
    return began, restore(asked.run, config, asked.weights, began.device, console.print), console


def restore(
    run: Path,
    config: Config,
    weights: Weights,
    device: torch.device,
    say: Callable[[str], None] = print,
    *,
    agreed: bool = True,
) -> Restored:
    """The model of a run, by its configuration (`stored` or `settings`); the averaged weights where it kept an average.

    `say` hears what to know of the model. `agreed`: all ranks call this, and must have read the same checkpoint.

    Raises:
        UserError: it has no such checkpoint, or one that cannot be used.
    """
    folder = RunFolder(run)
    path = folder.checkpoints / weights
    if not path.is_dir():
        raise UserError(f"{run}: it has no {weights} checkpoint yet; train it further, or name other --weights.")
    saved = checkpoints.load(path)
    if agreed:
        ranks.agree(
            lambda: json.dumps(saved.state["progress"]),
            f"{path}: another checkpoint became the {weights} one while it was read; give the same command again.",
        )
    model = models.from_config(config, say, device)
    checkpoints.load_weights(model, saved.weights, saved.path)
    progress = saved.state["progress"]
    return Restored(
        run=folder,
        config=config,
        model=grading.wrap(model, config, progress.get("grading")).to(device).eval(),
        weights=f"{weights} (step {progress['step']}, epoch {progress['epoch']})",
        fingerprint=saved.state["fingerprint"],
    )
