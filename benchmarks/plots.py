"""Pictures of benchmark results; `plot.py` draws them from the files.

Blue is fastddr, or a change, and orange are the others, or the baseline, which the colour-blind tell apart and a
printer in grey too; lines differ in their dashes as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from PIL import Image

Row = Mapping[str, Any]
#: What the picture of each benchmark shows.
SHOWN = {
    "loader": "Images a second of loaders, and what the hardware allows",
    "train": "Images a second of whole training, and its ceiling",
    "train-kappa": "Kappa on valid by seconds of training",
    "step": "Images a second of the training step alone",
    "ablation": "Kappa and loss on valid by epoch",
    "cards": "The largest batch by the size of the card, as predicted",
}
#: By the `kind` of a row.
COLOURS = {"fastddr": "#1f6f8b", "store": "#7fb3c4", "peer": "#c8803a"}
_KINDS = {"fastddr": "fastddr", "store": "fastddr, a part of it alone", "peer": "others"}
#: Colour and dashes of the limits, in the order in which they come.
_LINES = (
    ("#8a2be2", (0, (5, 2))),
    ("#444444", (0, (1, 1.2))),
    ("#b00020", (0, (6, 2, 1, 2))),
    ("#2e7d32", (0, (3, 1))),
)
#: Colour (Okabe and Ito, 2008), dashes and marker of trainings.
_TRAININGS = (
    ("#0072B2", "-", "o"),
    ("#D55E00", (0, (5, 2)), "s"),
    ("#009E73", (0, (1, 1.2)), "^"),
    ("#CC79A7", (0, (6, 2, 1, 2)), "D"),
    ("#000000", (0, (3, 1)), "v"),
)
_INK = "#444444"
#: What makes a panel of training and of steps.
_CASE = ("model", "precision", "image_size", "batch_size")
#: Inches.
_WIDTH, _BAR, _HEADING = 8.2, 0.30, 0.75
#: The text of a PNG that says what it was drawn from.
_DIGEST = "Result"


def loaders(rows: Sequence[Row]) -> Figure:
    """Images a second of loaders as bars with 95 % intervals, a panel for each kind of photographs and policy.

    The axis is logarithmic, because a store and the memory are a hundred times as fast as a decoder.

    Args:
        rows: of `kind` fastddr, store, peer (a bar) or limit (a line); each with name, photographs, policy, median, low
            and high. Others are passed over, `replay` too, which lies far beyond all of these.
    """
    rows = [row for row in rows if row.get("kind") in (*COLOURS, "limit")]
    panels = _panels(rows, ("photographs", "policy"))
    lines = _styles(row["name"] for row in rows if row["kind"] == "limit")
    figure, axes = _figure([sum(row["kind"] in COLOURS for row in panel) for panel in panels.values()],
                           legend=len(lines) + 1, sharex=True)  # fmt: skip
    for axis, ((photographs, policy), panel) in zip(axes, panels.items(), strict=True):
        axis.set_xscale("log")
        _bars(axis, [row for row in panel if row["kind"] in COLOURS])
        for row in panel:
            if row["kind"] == "limit":
                _line(axis, row["median"], *lines[row["name"]])
        _title(axis, f"{photographs}, policy `{policy}`")
    everything = [row["median"] for row in rows]
    # Room on the right for the figures beside the longest bar.
    axes[-1].set_xlim(min(everything) / 2, max(everything) * 6)
    return _finish(figure, axes, rows, lines, "images a second, logarithmic")


def training(rows: Sequence[Row]) -> Figure:
    """Images a second of whole training as bars with 95 % intervals, and the `replay` ceiling as a line.

    A panel for each model, precision, size and batch, each with an axis of its own, which begins at 0. What failed has
    a place and no bar.

    Args:
        rows: of `kind` fastddr, peer (a bar) or ceiling (a line); others are passed over.
    """
    rows = [row for row in rows if row.get("kind") in ("fastddr", "peer", "ceiling")]
    panels = _panels(rows, _CASE)
    lines = _styles(map(_ceiling, (row for row in rows if row["kind"] == "ceiling")))
    figure, axes = _figure([sum(row["kind"] in COLOURS for row in panel) for panel in panels.values()],
                           legend=len(lines) + 1)  # fmt: skip
    for axis, (case, panel) in zip(axes, panels.items(), strict=True):
        _bars(axis, [row for row in panel if row["kind"] in COLOURS])
        for row in panel:
            if row["kind"] == "ceiling" and "failed" not in row:
                _line(axis, row["median"], *lines[_ceiling(row)])
                axis.axvspan(row["low"], row["high"], color="#dddddd", linewidth=0, zorder=0.5)
        axis.set_xlim(0, 1.35 * max((row["high"] for row in panel if "failed" not in row), default=1.0))
        _head(axis, case)
    return _finish(figure, axes, rows, lines, "images a second")


def steps(rows: Sequence[Row]) -> Figure:
    """Images a second of the training step alone as bars, from the fastest way to run a model down.

    A panel for each model, precision, size and batch; ours and timm's of the same settings share one.

    Args:
        rows: of `kind` step; others are passed over.
    """
    found = []
    for row in rows:
        if row.get("kind") == "step":
            owner, colon, model = row["model"].rpartition(":")
            name = row["name"].replace(row["model"], owner or "fastddr", 1)
            found.append({**row, "kind": "peer" if colon else "fastddr", "model": model, "name": name})
    panels = _panels(found, _CASE)
    figure, axes = _figure([len(panel) for panel in panels.values()], legend=2)
    for axis, (case, panel) in zip(axes, panels.items(), strict=True):
        _bars(axis, panel)
        axis.set_xlim(0, 1.35 * max(row["high"] for row in panel))
        _head(axis, case)
    return _finish(figure, axes, found, {}, "images a second")


def changes(rows: Sequence[Row]) -> Figure:
    """Kappa and loss of valid by epoch, a line of panels for each change, with the baseline's curves behind its own.

    Thick lines are medians over the seeds, thin ones the seeds.

    Args:
        rows: of `ablation.py`, each with `name`, `baseline`, and `curves`: `epoch`, `qwk` and `loss` of each seed. What
            failed is passed over.
    """
    rows = [row for row in rows if "failed" not in row]
    base = next(row for row in rows if row["baseline"])
    shown = [row for row in rows if not row["baseline"]] or [base]
    figure = Figure(figsize=(_WIDTH, 2.1 * len(shown) + 0.9), dpi=150, layout="constrained")
    grid = figure.subplots(len(shown), 2, sharex=True, sharey="col", squeeze=False)
    behind, before = (COLOURS["peer"], (0, (5, 2))), (COLOURS["fastddr"], "-")
    for axes, row in zip(grid, shown, strict=True):
        for axis, (key, word) in zip(axes, {"qwk": "kappa", "loss": "loss"}.items(), strict=True):
            _seeds(axis, base["curves"], key, *behind)
            if row is not base:
                _seeds(axis, row["curves"], key, *before)
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            _plain(axis, f"{row['name']}: {word} on valid")
    for axis in grid[-1]:
        axis.set_xlabel("epoch", color=_INK, fontsize=9)
    looks = {"baseline": behind} | ({} if shown[0] is base else {"the change": before})
    for name, (colour, dashes) in looks.items():
        grid[0, 0].plot([], [], color=colour, linestyle=dashes, label=f"{name}: median of {base['n']} seeds, and each")
    return _legend(figure, grid[0, 0].get_legend_handles_labels()[0])


def _seeds(axis: Any, curves: Sequence[Row], key: str, colour: str, dashes: Any) -> None:
    """Each seed thin, and the median of those that have the epoch."""
    found: dict[float, list[float]] = {}
    for curve in curves:
        points = [(epoch, value) for epoch, value in zip(curve["epoch"], curve[key], strict=True) if value is not None]
        axis.plot(*zip(*points, strict=True) if points else ([], []), color=colour, linewidth=0.7, alpha=0.5)
        for epoch, value in points:
            found.setdefault(epoch, []).append(value)
    middle = [(epoch, median(values)) for epoch, values in sorted(found.items())]
    axis.plot(
        *zip(*middle, strict=True) if middle else ([], []), color=colour, linestyle=dashes, linewidth=2.2, zorder=3
    )


def kappas(rows: Sequence[Row]) -> Figure:
    """Kappa on valid by seconds of training, a panel for each model, precision, size and batch.

    Each seed is a thin line that ends where its training ended. The thick line goes through the medians of seconds and
    kappa, epoch by epoch, as long as all seeds train.

    Args:
        rows: of `kappas.rows`; those with `curves` are drawn, and the `target_qwk` of all are lines.
    """
    panels = _panels((row for row in rows if row.get("kind") == "qwk"), _CASE)
    figure = Figure(figsize=(_WIDTH, 3.4 * len(panels) + 0.6), dpi=150, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (case, panel) in zip(axes, panels.items(), strict=True):
        drawn = [row for row in panel if "curves" in row]
        for row, (colour, dashes, marker) in zip(drawn, itertools.cycle(_TRAININGS), strict=False):
            for curve in row["curves"]:
                axis.plot(curve["seconds"], curve["qwk"], color=colour, linewidth=0.8, alpha=0.55)
                axis.plot(curve["seconds"][-1], curve["qwk"][-1], color=colour, marker=marker, markersize=4)
            epochs = range(min(len(curve["qwk"]) for curve in row["curves"]))
            middle = [[median(curve[key][epoch] for curve in row["curves"]) for epoch in epochs]
                      for key in ("seconds", "qwk")]  # fmt: skip
            label = f"{row['recipe']}: median of {len(row['curves'])} seeds while all train, and each"
            axis.plot(*middle, color=colour, linestyle=dashes, linewidth=2.2, label=label)
        for target in sorted({row["target_qwk"] for row in panel if "target_qwk" in row}):
            axis.axhline(target, color=_INK, linestyle=(0, (1, 1.2)), linewidth=1, zorder=1)
        axis.set_xlim(left=0)
        axis.set_ylabel("kappa", color=_INK, fontsize=9)
        _plain(axis, "")
        _head(axis, case)
    axes[-1].set_xlabel("seconds since the first batch was asked for", color=_INK, fontsize=9)
    return _legend(figure, axes[0].get_legend_handles_labels()[0], ncols=1)


def cards(rows: Sequence[Row]) -> Figure:
    """The largest batch by the size of the card, a panel for each size of image; both axes are logarithmic.

    Args:
        rows: of `cards.py`, each with `training`, `image_size`, `card_gib` and `median`. Where that is 0 there is no
            point.
    """
    sides = list(dict.fromkeys(row["image_size"] for row in rows))
    sizes = sorted({row["card_gib"] for row in rows})
    figure = Figure(figsize=(_WIDTH, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row["training"] for row in rows))
    for axis, side in zip(axes, sides, strict=True):
        for name, (colour, dashes, marker) in zip(names, itertools.cycle(_TRAININGS), strict=False):
            line = [row for row in rows if (row["training"], row["image_size"]) == (name, side) and row["median"]]
            axis.plot(
                [row["card_gib"] for row in line], [row["median"] for row in line], color=colour, linestyle=dashes,
                marker=marker, markersize=5, linewidth=1.6, label=name,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_xlabel("GiB of the card", color=_INK, fontsize=9)
        _plain(axis, f"images of {side} px")
    axes[0].set_ylabel("photographs at once", color=_INK, fontsize=9)
    return _legend(figure, axes[0].get_legend_handles_labels()[0])


def save(figure: Figure, title: str, path: Path, digest: str = "") -> Path:
    """The picture as a PNG under a title, which keeps the digest of the result that it shows."""
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={_DIGEST: digest} if digest else None)
    return path


def digest_of(path: Path) -> str | None:
    """Of the result that a picture was drawn from; None where there is no picture, or it does not say."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(_DIGEST)


def _ceiling(row: Row) -> str:
    return f"{row['name']}: the ceiling, with its interval in grey"


def _head(axis: Any, case: Sequence[Any]) -> None:
    model, precision, size, batch = case
    _title(axis, f"{model}, {precision}, {size} px, batches of {batch}")


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=9, fontweight="bold", color=_INK)


def _panels(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of some keys."""
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row[key] for key in keys), []).append(row)
    return panels


def _styles(names: Iterable[str]) -> dict[str, tuple[str, Any]]:
    return dict(zip(dict.fromkeys(names), itertools.cycle(_LINES), strict=False))


def _figure(bars: Sequence[int], *, legend: int, sharex: bool = False) -> tuple[Figure, list[Any]]:
    """A figure of panels one below the other, in which each bar has the same height; `legend` in lines."""
    axis = 1.0 if sharex else 0.45 + 0.3 * len(bars)
    height = _BAR * sum(bars) + _HEADING * len(bars) + axis + 0.22 * legend
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    axes = figure.subplots(len(bars), 1, sharex=sharex, squeeze=False, height_ratios=[count + 1 for count in bars])
    return figure, list(axes[:, 0])


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    """One below the other, the fastest on top; what failed at the bottom."""
    bars = sorted(rows, key=lambda row: row.get("median", 0.0))
    for place, row in enumerate(bars):
        if "failed" in row:
            axis.annotate("failed", (0, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=7.5)
            continue
        axis.barh(place, row["median"], height=0.72, color=COLOURS[row["kind"]], zorder=2)
        error = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
        axis.errorbar(row["median"], place, xerr=error, color="black", capsize=2.5, elinewidth=1, zorder=4)
        axis.annotate(
            f"{row['median']:,.0f}  ({row['low']:,.0f}–{row['high']:,.0f})",
            (row["high"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            # Over the lines of the limits.
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 1.0},
            zorder=5,
        )
    axis.set_ylim(-0.6, len(bars) - 0.4)
    axis.set_yticks(range(len(bars)), [row["name"] for row in bars], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.grid(axis="x", which="major", color="#dddddd", zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _line(axis: Any, value: float, colour: str, dashes: Any) -> None:
    # A white rim keeps it apart from a dark bar.
    rim = [Stroke(linewidth=3, foreground="white"), Normal()]
    axis.axvline(value, color=colour, linestyle=dashes, linewidth=1.3, zorder=3, path_effects=rim)


def _finish(
    figure: Figure, axes: Sequence[Any], rows: Sequence[Row], lines: Mapping[str, tuple[str, Any]], unit: str
) -> Figure:
    axes[-1].set_xlabel(unit, color=_INK, fontsize=9)
    kinds = [kind for kind in COLOURS if any(row["kind"] == kind for row in rows)]
    handles = [axes[0].barh([0], [0], color=COLOURS[kind], label=_KINDS[kind]) for kind in kinds]
    handles += [
        axes[0].plot([], [], color=colour, linestyle=dashes, label=name)[0] for name, (colour, dashes) in lines.items()
    ]
    return _legend(figure, handles)


def _plain(axis: Any, title: str) -> None:
    """The dress of an axis of lines."""
    _title(axis, title)
    axis.tick_params(labelsize=8)
    axis.grid(color="#dddddd", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, handles: Sequence[Any], ncols: int = 2) -> Figure:
    figure.legend(handles=handles, loc="outside lower left", fontsize=8, frameon=False, ncols=ncols)
    return figure
