"""The pictures of a report, each as the bytes of a PNG.

Drawn through Matplotlib's object interface on the Agg canvas: no window, no pyplot, no figure left open.
Colours are Okabe and Ito's (2008), which stay apart for colour-blind eyes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageOps

from fastddr.data.grades import ICDR
from fastddr.data.photograph import small
from fastddr.data.problems import one_line
from fastddr.evaluation import metrics
from fastddr.reporting.tables import SQUARED, Figures, cell, names, title

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
TRAIN, VALID = ORANGE, BLUE
DPI = 150
#: Half of zlib's default effort: photographs are packed in half the time and take a sixth more.
PACKED = {"compress_level": 3}
#: Tiles of worst.png: columns, rows, and the side of a photograph in pixels.
COLUMNS, ROWS, TILE = 4, 3, 320

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so a report looks alike everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


def has_curves(logged: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the lines of metrics.jsonl hold anything that `curves` draws."""
    return any(len(_points(logged, key)[0]) for keys in _panels(logged, {}).values() for key in keys)


def curves(
    logged: Sequence[Mapping[str, Any]],
    best_epoch: int | None,
    measured: Mapping[str, str] | None = None,
    kind: str = "png",
) -> bytes:
    """Loss, accuracy and kappa of train and valid by epoch; the epoch whose weights are the best is marked.

    With ungradable as a class macro F1 as well, which decides there. `measured` says of what the figures are
    (`tables.measured`).
    """
    of = measured or {}
    panels, best = _panels(logged, of), _best(logged, best_epoch)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4 * len(panels), 3.9), layout="constrained")
        for axes, (label, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for key in keys:
                split = key.partition("/")[0]
                said = textwrap.fill(f"{split}, {of[key]}", 26) if key in of else split
                _line(axes, *_points(logged, key), TRAIN if split == "train" else VALID, said)
            axes.set(title=label, xlabel="Epoch")
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
            if "valid/accuracy" in keys:
                axes.yaxis.set_major_formatter(PercentFormatter(1))  # as many decimals as tell the ticks apart
            if best is not None and axes.lines:
                decided, value = best
                axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
                if decided in keys:
                    said = f"best: {cell(value, per_cent=decided == 'valid/accuracy')}, epoch {best_epoch}"
                    axes.plot(best_epoch, value, "o", color=VALID, markersize=6, label=said)
            if axes.lines:
                axes.legend(loc="best")
        return drawn(figure, kind)


def confusion(found: Mapping[str, Figures], kind: str = "png") -> bytes:
    """Confusion matrices side by side: counts, and per cent of the row, rows = truth; colour = row share."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 6.3 * len(found), 6.0), layout="constrained")
        row = figure.subplots(1, len(found), squeeze=False)[0]
        images = [_matrix(axes, split, values) for axes, (split, values) in zip(row, found.items(), strict=True)]
        bar = figure.colorbar(images[-1], ax=figure.axes, shrink=0.7, aspect=30, pad=0.02)
        bar.set_label("Share of the row (recall on the diagonal)")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)
        return drawn(figure, kind)


def reliability(
    splits: Mapping[str, metrics.SplitResult],
    found: Mapping[str, Figures],
    temperature: float | None = None,
    kind: str = "png",
) -> bytes:
    """Accuracy against confidence in bins, and how many photographs lie in each; on the line = calibrated.

    `found` are the figures of the splits. With a temperature also what it makes of it.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.4 + 5.0 * len(splits), 5.6), layout="constrained")
        grid = figure.subplots(2, len(splits), sharex=True, squeeze=False, height_ratios=[3.4, 1])
        for (top, bottom), (name, split) in zip(grid.T, splits.items(), strict=True):
            _calibration(top, bottom, name, split, found[name]["ece"], temperature)
        return drawn(figure, kind)


def mistakes(split: metrics.SplitResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that were graded wrongly, the worst first; what was predicted of each row, and its probability.

    Farthest from the truth first, and among those the most confident. "Ungradable" is no grade, and nearest to all.
    """
    probabilities = split.logits.detach().cpu().double().softmax(1).numpy()
    predicted, grades = split.logits.argmax(1).numpy(), split.grades.numpy()
    confidence = probabilities.max(1, initial=0)
    distance = np.abs(predicted.astype(int) - grades.astype(int))
    distance[(distance > 0) & (np.maximum(predicted, grades) >= len(ICDR))] = 1
    wrong = np.flatnonzero(distance)
    return wrong[np.lexsort((-confidence[wrong], -distance[wrong]))], predicted, confidence


def worst(name: str, split: metrics.SplitResult, root: Path | None = None) -> bytes:
    """The worst mistakes: farthest from the truth first, and among those the most confident."""
    order, predicted, confidence = mistakes(split)
    grades, wrong, order = split.grades.numpy(), order, order[: COLUMNS * ROWS]
    labels = names(split.logits.shape[1])
    with mpl.rc_context(STYLE):
        rows = max(1, -(-len(order) // COLUMNS))
        figure = Figure(figsize=(12, 0.8 + 3.5 * rows if len(order) else 1.2), layout="constrained")
        count = f"{len(order)} of {len(wrong):,}" if len(wrong) > len(order) else str(len(wrong))
        heading = f"The worst mistakes on {title(name)}: {count}" if len(wrong) else f"No mistakes on {title(name)}"
        figure.suptitle(heading, x=0.01, ha="left", weight="bold", size=13)
        tiles: Sequence[Axes] = list(figure.subplots(rows, COLUMNS, squeeze=False).flat) if len(order) else []
        for axes in tiles:
            axes.set_axis_off()
        for axes, row in zip(tiles, order, strict=False):
            photo = small((root or Path()) / split.paths[row], TILE)
            tile = ImageOps.pad(photo or Image.new("RGB", (1, 1), (225, 225, 225)), (TILE, TILE))
            axes.imshow(np.asarray(tile), interpolation="nearest")
            if photo is None:
                axes.text(TILE / 2, TILE / 2, "cannot be opened", color=GREY, ha="center", va="center")
            axes.set_title(
                f"truth: {grades[row]} {labels[grades[row]]}\n"
                f"predicted: {predicted[row]} {labels[predicted[row]]}, {confidence[row]:.0%}",
                size=9,
                weight="normal",
                pad=5,
            )
            name = _middle(one_line(Path(split.paths[row]).name), 40)
            axes.text(0, TILE + 8, name, size=7, color=GREY, va="top", parse_math=False)  # a $ is a $
        with warnings.catch_warnings():
            # Letters that the font lacks are drawn as boxes.
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
            return drawn(figure)


def _matrix(axes: Axes, split: str, values: Figures) -> Any:
    counts = np.array(values["confusion_matrix"])
    totals = counts.sum(1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    small = len(counts) > 6
    for (row, column), count in np.ndenumerate(counts):
        colour = _ink(image.to_rgba(share)[row, column])
        weight = "bold" if row == column else "normal"
        size = 8 if small else 12
        axes.text(column, row - 0.1, f"{count:,}", ha="center", va="center", color=colour, size=size, weight=weight)
        percent = f"{share[row, column]:.1%}" if totals[row, 0] else "–"
        axes.text(column, row + 0.2, percent, ha="center", va="center", color=colour, size=size - 3.5)
    labels = [_two_lines(f"{grade} {name}") for grade, name in enumerate(names(len(counts)))]
    axes.set_xticks(range(len(counts)), labels, size=8.5)
    axes.set_yticks(
        range(len(counts)),
        [f"{label}\nn = {n:,}" for label, n in zip(labels, totals[:, 0], strict=True)],
        size=8.5,
    )
    axes.set(xlabel="Predicted", ylabel="Truth")
    score = f"accuracy {cell(values['accuracy'])}, kappa {cell(values['qwk'], per_cent=False)}"
    axes.set_title(f"{title(split)}: {score}")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _calibration(
    top: Axes, bottom: Axes, name: str, split: metrics.SplitResult, ece: float | None, temperature: float | None
) -> None:
    bins = metrics.reliability(split.logits, split.grades)
    count = np.array(bins["count"])
    filled = count > 0
    confidence = np.array(bins["confidence"], dtype=float)[filled]
    accuracy = np.array(bins["accuracy"], dtype=float)[filled]
    top.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
    top.vlines(confidence, accuracy, confidence, color=ORANGE, alpha=0.35, linewidth=6, label="gap")
    top.plot(confidence, accuracy, "o-", color=BLUE, markersize=5, label=title(name))
    if temperature is not None:
        cooled = metrics.reliability(split.logits / temperature, split.grades)
        pairs = [(c, a) for c, a in zip(cooled["confidence"], cooled["accuracy"], strict=True) if c is not None]
        label = f"at temperature {temperature:.2f}"
        top.plot(*zip(*pairs, strict=True), "s--", color=GREEN, markersize=4, linewidth=1.2, label=label)
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="Accuracy")
    top.set_title(f"{title(name)}: calibration error {cell(ece)}")
    top.legend(loc="best")
    edges = np.linspace(0, 1, metrics.BINS + 1)
    bottom.bar(edges[:-1], count, width=1 / metrics.BINS, align="edge", color=BLUE, alpha=0.75, edgecolor="white")
    bottom.set(xlabel="Confidence (probability of the predicted grade)", ylabel="Photographs")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axes in (top, bottom):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _panels(logged: Sequence[Mapping[str, Any]], of: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The headings of the curves, and which keys of metrics.jsonl are drawn in one panel."""

    def both(name: str) -> tuple[str, ...]:
        return f"train/{name}", f"valid/{name}"

    loss = {"Loss": both("loss")}
    if of.get("train/loss") == SQUARED:  # no axis has squared grades and nats
        loss = {"Loss of train": ("train/loss",), "Loss of valid": ("valid/loss",)}
    scores = {"Quadratic-weighted kappa": both("qwk")}
    if _ungradable(logged):
        scores["Macro F1"] = both("macro_f1")
    return loss | {"Accuracy": both("accuracy")} | scores


def _ungradable(logged: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ungradable is a class."""
    return any(f"valid/recall_{len(ICDR)}" in line for line in logged)


def _line(axes: Axes, epochs: np.ndarray, values: np.ndarray, since: np.ndarray, colour: str, label: str) -> None:
    """A curve; one with many points an epoch is drawn faint, with its mean by epoch over it."""
    if not len(epochs):
        return
    marks = np.unique(np.ceil(epochs))
    if len(epochs) > 2 * len(marks) and len(marks) > 1:
        axes.plot(epochs, values, color=colour, alpha=0.25, linewidth=0.8)
        epochs, values = _by_epoch(epochs, values, since)
    marker = "o" if len(epochs) <= 25 else None
    axes.plot(epochs, values, color=colour, label=label, marker=marker, markersize=3.5)


def _by_epoch(epochs: np.ndarray, values: np.ndarray, since: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The epochs, and the mean of each: a line counts by the steps since the one before, fewer at a save or a stop."""
    whole = np.ceil(epochs)
    steps = since + 1e-9  # two lines may be of one step
    marks = np.unique(whole)
    return marks, np.array([np.average(values[whole == mark], weights=steps[whole == mark]) for mark in marks])


def _points(logged: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs and values of all lines that hold a number under a key, and the share of an epoch that each is of.

    A line whose figure is undefined has its own share. Somebody else may have written lines too.
    """
    found, before = [], 0.0
    for line in logged:
        epoch, value = line.get("epoch"), line.get(key)
        if isinstance(epoch, int | float) and key in line and (value is None or isinstance(value, int | float)):
            if value is not None:
                found.append((epoch, value, epoch - before))
            before = epoch
    epochs, values, since = np.array(found, dtype=float).reshape(-1, 3).T
    return epochs, values, since


def _best(logged: Sequence[Mapping[str, Any]], epoch: int | None) -> tuple[str, float] | None:
    """By which figure an epoch is the best (`metrics.deciding`), and its value; None where that is not known."""
    for key in ("valid/macro_f1" if _ungradable(logged) else "valid/qwk", "valid/accuracy"):
        epochs, values, _ = _points(logged, key)
        if epoch in epochs:
            return key, float(values[epochs == epoch][-1])
    return None


def _ink(background: np.ndarray) -> str:
    """Black or white, whichever has more contrast on an RGB(A) colour (WCAG 2 relative luminance)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def _two_lines(text: str) -> str:
    """A label broken before its last word, where it is long."""
    return "\n".join(text.rsplit(" ", 1)) if len(text) > 8 else text


def _middle(text: str, length: int) -> str:
    """The text, its middle left out where it is too long: both ends of a file name tell."""
    half = length // 2 - 1
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def drawn(figure: Figure, kind: str = "png") -> bytes:
    """A picture as a file of this kind, the same bytes each time: "png", or "pdf" or "svg" for print."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    if engine is not None and figure.axes:
        # Here, because a figure that still has its engine when it is saved is drawn twice.
        figure.set_dpi(DPI)
        engine.execute(figure)
        figure.set_layout_engine(None)
    if kind == "png":
        figure.savefig(stream, format=kind, dpi=DPI, metadata={"Software": None}, pil_kwargs=PACKED)
    else:
        # Without the time at which it was drawn; letters stay letters, of fonts that printers take.
        with mpl.rc_context({"svg.hashsalt": "fastddr", "pdf.fonttype": 42}):
            figure.savefig(stream, format=kind, metadata={"CreationDate" if kind == "pdf" else "Date": None})
    return stream.getvalue()
