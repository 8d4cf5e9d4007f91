"""The flags of the verbs about a run, each as its module's `main` takes them. Nothing here loads PyTorch, so that
`--help` and a wrong flag answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastddr.config.sections import Field, Views

Weights = Literal["best", "last"]
#: What is exported (`formats`).
Format = Literal["onnx", "torch-export", "safetensors"]


@dataclass(frozen=True)
class Scoring:
    """The flags that `evaluate` and `predict` share."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    weights: Weights = "best"
    """Of the best epoch by kappa on valid, then loss, or of the last one."""
    tta: Views | None = None
    """Test-time augmentation: the mean over `flips` (4), over flips and quarter turns (`dihedral`, 8), or `none`;
    by default as in the run's report."""
    window: Field | None = None
    """The centre window of the canvas, all of its short side, or the mean of the probabilities over nine windows of the
    canvas; by default as the run was validated."""
    batch_size: int | None = None
    """Photographs a rank holds at once (windows, with --window multi); by default what the run held."""
    loader: Literal["auto", "dali", "torchvision"] | None = None
    """By default the run's."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """By default the run's on a GPU that can, else fp32."""


@dataclass(frozen=True)
class Evaluate(Scoring):
    """Score a run's weights, and write a report into RUN/evaluations/.

    Several GPUs share the work: `accelerate launch -m fastddr evaluate RUN`.
    """

    split: Literal["train", "valid", "test", "all"] | None = None
    """Which photographs; by default test, and all of other data that have no test split of their own. Every scoring of
    test is noted in RUN/test_scorings.jsonl."""
    data: str | None = None
    """Other photographs than the run's, in any layout; by default those that it was trained on."""
    on_bad: Literal["raise", "exclude"] = "raise"
    """With --data, a photograph or label that cannot be used: stop, or leave it out and say so. Of the run's own what
    the run left out stays out."""
    exclude: str | None = None
    """List of photographs to leave out; by default what the run left out, and none with --data."""
    follow_links: bool = False
    """Also read photographs to which links lead out of the data folder."""


@dataclass(frozen=True)
class Predict(Scoring):
    """Grade photographs without labels by a run's weights, into a table.

    Raw photographs get the preparation that the run was trained with. Exit code 0 = all are graded, 1 = some cannot be
    used (the table says which and why), 2 = a mistake in the command. Several GPUs share the work:
    `accelerate launch -m fastddr predict RUN PHOTOS...`.
    """

    photographs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PHOTOS...")] = ()
    """Files, folders (with all below), globs, and lists (.csv with a column `path`)."""
    out: Path = Path("grades.csv")
    """The table."""
    overwrite: bool = False
    """Write over a table that is there already."""
    explain: Path | None = None
    """Also write, into this folder, each photograph's window beside a heat map of what speaks for its grade."""
    preparation: str = "auto"
    """`auto`: as the run's photographs were prepared. `none`, or the side of masters in pixels, where the run does not
    say it."""


@dataclass(frozen=True)
class Export:
    """Write a run's model as a file: ONNX, torch.export, or weights alone; with a model card beside it.

    The file is read back and must give the run's own probabilities on real photographs, or it is not kept.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    format: Format = "onnx"
    """`onnx` and `torch-export` take uint8 canvases, with windows and normalisation inside; `safetensors` is the
    weights alone."""
    out: Path | None = None
    """New folder for it; by default RUN/exports/FORMAT."""
    overwrite: bool = False
    """Put it in the place of an earlier export."""
    weights: Weights = "best"
    """Of the best epoch by kappa on valid, then loss, or of the last one."""
    window: Field | None = None
    """What of the canvas is graded, as in `evaluate`; by default as the run was validated."""
    photographs: Path | None = None
    """Folder of photographs to check it on; by default the valid split of the run's data."""
    count: int = 64
    """How many of them, spread over all; 0 = all."""


@dataclass(frozen=True)
class Compare:
    """Compare runs on the photographs of one split: figures with 95 % intervals, and paired differences to the first.

    Reads what the runs, or evaluations of theirs, have predicted already; nothing is scored.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of runs, or of evaluations (RUN/evaluations/NAME); the others are compared with the first."""
    split: str = "valid"
    """Of which split. Choose between models by valid; test is for the one that was chosen."""
    common: bool = False
    """Compare on the photographs that all of them scored, where they are not the same."""
    out: Path | None = None
    """Also write this: .md for a table, .json for the figures."""


@dataclass(frozen=True)
class Report:
    """Make the report of a run again, from its predictions and its metrics.jsonl; nothing is scored.

    For a newer fastddr's tables and pictures. The predictions stay as they are.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or an evaluation's (RUN/evaluations/NAME)."""
    data: Path | None = None
    """Where the photographs lie now, for the picture of the worst mistakes; by default where they lay then."""
    vector: Literal["pdf", "svg"] | None = None
    """Draw curves and matrices in this form as well, for print."""
