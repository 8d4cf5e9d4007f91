"""The flags of `fastddr plan` itself; nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Plan:
    """Predict the GPU memory of a training, without a GPU; all flags of `fastddr train` are taken too.

    With --model or --preset: does this training fit, what takes the memory, and the cheapest change that makes it fit.
    Without: a table of all models. Where no --preset is named, convmixer, cnn and resnet take their report preset, and
    timm:NAME takes quickstart.
    """

    vram: float | None = None
    """The card's memory, in GiB; where --card is not given either, that of this machine's first GPU."""
    depth: int | None = None
    """Short for --convmixer.depth, --resnet.depth or --cnn.blocks."""
    card: str | None = None
    """Name of a card whose limits are known, for its memory and for images a second."""
    tbps: float | None = None
    """Memory bandwidth of the card in TB/s, for images a second."""
    tflops: float | None = None
    """Peak of the card in TFLOP/s at the training's precision, for images a second."""
    gpus: int = 1
    """Ranks that share the global batch, each with such a card."""
    calibrate: bool = False
    """Measure this machine's GPU: its context and workspaces, which no trace sees."""
    plot: Path | None = None
    """Also draw the memory over one step, by kind, into this PNG."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of text."""
