"""What `fastddr plan` says: one training by kind of memory, or a table of models for a card."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastddr import cli
from fastddr.config import MODELS, Config, load_preset
from fastddr.errors import UserError
from fastddr.memory import allowances, cards, planning
from fastddr.memory.asked import Plan
from fastddr.memory.predicting import GIB, Case, Prediction, gib, predict, tape_of, usable
from fastddr.memory.tape import KINDS
from fastddr.memory.tracing import Inexact
from fastddr.progress import terminal
from fastddr.runtime import divide_batch

#: Sides of images in the table, where none is asked for.
SIZES = (256, 512)
#: Cheapest changes that are told.
_WAYS = 2
#: By how much a card's memory may differ from what is asked about, and the card be that one.
_ALIKE = 0.1
#: No card has so many GiB, TB/s or TFLOP/s.
_ABSURD = 1_000_000
#: Okabe and Ito's colours, which the colour-blind tell apart; hatches tell them apart in grey.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_HATCHES = ("", "//", "", "\\\\", "", "..", "", "xx")
#: The variable that says which cards CUDA sees.
_CARDS = "CUDA_VISIBLE_DEVICES"
#: What a picture says of its maker; by it a picture is known again.
_MAKER = "fastddr plan"


def run(asked: Plan, flags: list[str]) -> int:
    """Answer, and return the exit code.

    Raises:
        UserError: a flag that cannot be, in one sentence.
    """
    if asked.calibrate:
        if flags:
            raise UserError(f"--calibrate measures this machine's GPU and asks of no training; leave out {flags[0]}.")
        found, path = allowances.calibrate()
        sys.stdout.write(f"context {gib(found.context)}, workspaces {gib(found.workspaces)}; kept in {path}\n")
        return 0
    card = None if asked.card is None else cards.known(asked.card)
    here = _here()
    vram = asked.vram if asked.vram is not None else None if card is None else card.memory
    if vram is None and here is not None:
        device, vram = here
        card = next((one for one in cards.CARDS.values() if one.device == device), None)
    if vram is None:
        raise UserError(
            "fastddr plan needs the card's memory: --vram 8 (GiB), or --card NAME; PyTorch sees no GPU here."
        )
    if asked.gpus < 1:
        raise UserError(f"--gpus {asked.gpus}: it must be above 0.")
    for flag, number in (("--vram", vram), ("--tbps", asked.tbps), ("--tflops", asked.tflops)):
        if number is not None and not 0 < number < _ABSURD:  # NaN is in no range
            raise UserError(f"{flag} {number:g}: it must be above 0 and below {_ABSURD:,}.")
    # What was measured here is of this card alone, and another may be asked about.
    same = here is not None and abs(here[1] - vram) <= _ALIKE * vram and (card is None or card.device == here[0])
    allowance = allowances.load(here[0] if here is not None and same else None)
    with _without_card():
        limit = usable(vram, allowance)
        if asked.plot is not None and asked.plot.is_file() and not _ours(asked.plot):
            raise UserError(f"--plot {asked.plot}: this file is no picture of `fastddr plan`; give a new name.")
        if any(flag.partition("=")[0] in ("--model", "--preset") for flag in flags):
            config = configured(flags, asked.depth)
            try:
                return _question(asked, config, vram, limit, allowance)
            except Inexact as problem:
                raise UserError(
                    f"--model {config.model}: its memory cannot be predicted ({problem}); train it with a small "
                    "--micro-batch-size, and see in the report what it took."
                ) from problem
        for flag, value in (("--plot", asked.plot), ("--depth", asked.depth)):
            if value is not None:
                raise UserError(f"{flag} is of one training: name it with --model or --preset.")
        return _table(asked, flags, card, vram, limit, allowance)


@contextmanager
def _without_card() -> Iterator[None]:
    """Hide the card, unless it is in use: every step of an optimizer, also that of a trace, would take memory of it."""
    import torch

    before = os.environ.get(_CARDS)
    if not torch.cuda.is_initialized():
        os.environ[_CARDS] = ""
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_CARDS, None)
        else:
            os.environ[_CARDS] = before


def _ours(file: Path) -> bool:
    """Whether a file is empty or a picture of this verb, which a new one may replace."""
    start = file.read_bytes()[:4096]
    return not start or (start.startswith(b"\x89PNG") and f"tEXtSoftware\0{_MAKER}".encode() in start)


def _here() -> tuple[str, float] | None:
    """Name and GiB of this machine's first card; to ask for them begins CUDA, which is left to a fork."""
    import torch

    if torch.cuda.is_initialized() or not torch.backends.cuda.is_built():
        return _first_card()
    try:
        # Of later Pythons: the threads beside are PyTorch's, and at rest.
        quiet = warnings.catch_warnings(action="ignore", category=DeprecationWarning)
        with quiet, ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            return pool.submit(_first_card).result()
    except (OSError, ImportError, BrokenProcessPool):  # no further process, or one that its driver ends
        return None  # what was measured of the card is a better answer than what is declared; it is not needed for one
    except RuntimeError as problem:
        if "forked subprocess" not in str(problem):
            return None  # a card that cannot be asked now
        return _first_card()  # this process has counted its cards, after which PyTorch refuses CUDA to its forks


def _first_card() -> tuple[str, float] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / GIB


def configured(flags: Sequence[str], depth: int | None = None, model: str | None = None) -> Config:
    """The training that flags ask for: by default the model's report preset, in the precision that a GPU would take.

    A canvas that is smaller than the image, and was not asked for, is made as large; `fastddr train` refuses that and
    says so. With `model` it is a line of the table, whose flags are each of some of its models.
    """
    flags, notes = list(flags), model is None
    model = model or cli.last_value(flags, "--model")
    if cli.last_value(flags, "--preset") is None and model in MODELS:
        flags = ["--preset", f"report-{model}", *flags]
    size = cli.last_value(flags, "--image-size")
    base = load_preset(cli.last_value(flags, "--preset") or Config.preset)
    asked = cli.last_value(flags, "--canvas") is not None
    if not asked and size is not None and size.isdigit() and int(size) > base.canvas:
        flags += ["--canvas", size]
    if depth is not None:
        model = model or base.model
        if model not in MODELS:
            raise UserError(f"--depth is of {', '.join(MODELS)}, and the model is {model}; leave it out.")
        flags += ["--cnn.blocks" if model == "cnn" else f"--{model}.depth", str(depth)]
    config = cli.parse(flags, "fastddr plan", notes=notes)
    return replace(config, precision="bf16") if config.precision == "auto" else config


def _case(asked: Plan, config: Config) -> Case:
    micro, _ = divide_batch(config.batch_size, config.micro_batch_size, asked.gpus)
    return Case(config, micro, asked.gpus)


def _question(asked: Plan, config: Config, vram: float, limit: int, allowance: allowances.Allowance) -> int:
    case = _case(asked, config)
    found = predict(case, allowance)
    fits = found.total <= limit
    ways: list[planning.Way] = []
    for way in planning.ways(case, limit, allowance) if not fits else ():
        ways.append(way)
        if len(ways) == _WAYS:
            break
    if asked.plot is not None:
        course(case, asked.plot)
    if asked.as_json:
        json.dump(
            {"fits": fits, "vram_gib": vram, "total": found.total, "limit": limit, "kinds": found.kinds,
             "binding": found.binding, "estimated": found.estimated, "allowance": asdict(allowance),
             "ways": [{"flags": way.flags, "costs": way.costs, "total": way.total} for way in ways]},
            sys.stdout, indent=1,
        )  # fmt: skip
        print()
        return 0
    console = terminal()
    settings = ", ".join(f"{key} {value}" for key, value in config.model_settings.items())
    name = f"{config.model} ({settings})" if settings else config.model
    console.print(
        f"{name}, {config.image_size} px of a canvas of {config.canvas}, {config.precision}, "
        f"{case.micro} photographs at once of a global batch of {config.batch_size} on {asked.gpus} GPU(s)"
    )
    console.print(_kinds(found))
    verdict = "fits" if fits else "does not fit"
    console.print(
        f"{verdict}: {gib(found.total)} of the {gib(limit)} that may be used of {vram:.4g} GiB; "
        f"{'most' if fits else 'what binds'}: {found.binding}"
    )
    if found.estimated:
        console.print("compiled steps are estimated: four maps a layer are kept where eager mode keeps six")
    for number, way in enumerate(ways):
        head = "cheapest change" if number == 0 else "or"
        console.print(f"{head}: {way.flags}  ({gib(way.total)}; {way.costs})")
    if config.micro_batch_size == "auto" and any(way.flags.startswith("--micro-batch-size") for way in ways):
        console.print("on a GPU --micro-batch-size auto, the default, takes by itself the micro batch that fits")
    if not fits and not ways:
        console.print("no single change makes it fit: take a smaller model or a larger card")
    console.print(f"context, workspaces and decoder: {allowance.source}")
    return 0


def _kinds(found: Prediction) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for kind, size in found.kinds.items():
        if size:
            table.add_row(f"  {kind}", gib(size))
    return table


def lines(
    asked: Plan, flags: list[str], card: cards.Card | None, limit: int, allowance: allowances.Allowance
) -> list[planning.Line]:
    """The table's lines."""
    size, canvas = cli.last_value(flags, "--image-size"), cli.last_value(flags, "--canvas")
    # No larger than a canvas that is asked for; one that is no number is refused with the other flags.
    most = max(1, int(canvas)) if canvas is not None and canvas.isdigit() else max(SIZES)
    sides = tuple(dict.fromkeys(min(side, most) for side in SIZES))
    if size is not None:
        sides = (cli.parse(["--image-size", size, "--canvas", size], "fastddr plan").image_size,)
    asked_for = [
        configured(["--image-size", str(side), *flags, "--model", model], None, model)
        for model in MODELS
        for side in sides
    ]
    found = []
    for config in asked_for:
        bandwidth = asked.tbps * 1e12 if asked.tbps else None if card is None else card.bandwidth
        peak = None if card is None else card.single if config.precision == "fp32" else card.half
        peak = asked.tflops * 1e12 if asked.tflops else peak
        found.append(planning.line(Case(config, 1, asked.gpus), limit, allowance, bandwidth, peak))
    return found


def _table(
    asked: Plan,
    flags: list[str],
    card: cards.Card | None,
    vram: float,
    limit: int,
    allowance: allowances.Allowance,
) -> int:
    found = lines(asked, flags, card, limit, allowance)
    if asked.as_json:
        json.dump([asdict(line) for line in found], sys.stdout, indent=1)
        print()
        return 0
    table = Table(title=f"{vram:.4g} GiB a card, {asked.gpus} GPU(s), {gib(limit)} of each used", title_justify="left")
    for heading in ("model", "image of canvas", "most at once", "micro batch", "accumulated", "store", "peak",
                    "images/s at most"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("model", "store") else "right")
    for line in found:
        rate = "" if line.rate is None else f"{asked.gpus * line.rate:,.0f}"
        cells = [str(line.micro), str(line.accumulation), line.store] if line.micro else ["does not fit", "", ""]
        table.add_row(
            line.model, f"{line.image_size} of {line.canvas}", str(line.largest), *cells, gib(line.total), rate
        )
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 130)
    console.print(table)
    if any(line.rate is None for line in found):
        console.print("images/s: the card's limits are not known; give --card NAME, or --tbps and --tflops.")
    console.print(f"context, workspaces and decoder: {allowance.source}")
    return 0


def course(case: Case, path: Path, title: str | None = None) -> None:
    """Draw the memory of one step, by kind, over its events: takings and freeings in their order, not time."""
    from matplotlib.figure import Figure  # a second, which only those wait for that ask for a picture

    tape = tape_of(case)
    moments = list(tape.course(case.micro))
    layers: list[Any] = [[moment[kind] / GIB for moment in moments] for kind in KINDS]
    used = [place for place, layer in enumerate(layers) if max(layer, default=0) > 0]
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axis = figure.subplots()
    for fill, place in zip(
        axis.stackplot(range(len(moments)), *(layers[place] for place in used),
                       colors=[_COLOURS[place] for place in used], labels=[KINDS[place] for place in used]),
        used, strict=True,
    ):  # fmt: skip
        fill.set_hatch(_HATCHES[place])
        fill.set_edgecolor("white")
        fill.set_linewidth(0)
    config = case.config
    axis.set_title(
        title or f"{config.model}, {config.image_size} px, {config.precision}, {case.micro} photographs: one step",
        loc="left", fontsize=10,
    )  # fmt: skip
    axis.set_xlabel("blocks taken and freed, in their order", fontsize=9)
    axis.set_ylabel("GiB", fontsize=9)
    axis.set_xlim(0, max(1, len(moments) - 1))
    axis.set_ylim(0)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": _MAKER})
