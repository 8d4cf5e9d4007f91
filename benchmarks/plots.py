"""Pictures of benchmark results."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

#: By the `kind` of a row.
COLOURS = {"fastddr": "#1f6f8b", "store": "#7fb3c4", "peer": "#c8803a"}
_KINDS = {"fastddr": "fastddr", "store": "fastddr, a part of it alone", "peer": "peers"}
#: Colour and dashes of the limits, in the order in which they come.
_LINES = (
    ("#8a2be2", (0, (5, 2))),
    ("#444444", (0, (1, 1.2))),
    ("#b00020", (0, (6, 2, 1, 2))),
    ("#2e7d32", (0, (3, 1))),
)
_INK = "#444444"


def loaders(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Images a second of loaders as bars with 95 % intervals, a panel for each kind of photographs and policy.

    Args:
        rows: of `kind` fastddr, store, peer (a bar) or limit (a line); each with name, photographs, policy, median, low
            and high. Others are passed over, `replay` too, which lies far beyond all of these.
        title: of the whole picture.
        path: the PNG.
    """
    rows = [row for row in rows if row.get("kind") in (*COLOURS, "limit")]
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["photographs"], row["policy"]), []).append(row)
    counts = [sum(row["kind"] in COLOURS for row in panel) for panel in panels.values()]
    lines = list(dict.fromkeys(row["name"] for row in rows if row["kind"] == "limit"))
    kinds = [kind for kind in COLOURS if any(row["kind"] == kind for row in rows)]
    # Each bar has the same height in every panel.
    height = 0.30 * sum(counts) + 0.75 * len(counts) + 1.0 + 0.22 * (len(lines) + 1)
    figure = Figure(figsize=(8.2, height), dpi=150, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[n + 1 for n in counts])[:, 0]
    for axis, ((photographs, policy), panel) in zip(axes, panels.items(), strict=True):
        _panel(axis, panel, lines)
        axis.set_title(f"{photographs}, policy `{policy}`", loc="left", fontsize=9, fontweight="bold", color=_INK)
    everything = [row["median"] for row in rows]
    # Room on the right for the figures beside the longest bar.
    axes[-1].set_xlim(min(everything) / 2, max(everything) * 6)
    axes[-1].set_xlabel("images a second, logarithmic", color=_INK)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    handles = [axes[0].barh([0], [0], color=COLOURS[kind], label=_KINDS[kind]) for kind in kinds]
    handles += [
        axes[0].plot([], [], color=colour, linestyle=style, label=name)[0]
        for name, (colour, style) in zip(lines, itertools.cycle(_LINES), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower left", fontsize=8, frameon=False, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _panel(axis: Any, panel: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
    bars = sorted((row for row in panel if row["kind"] in COLOURS), key=lambda row: row["median"])
    for place, row in enumerate(bars):
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
    for row in panel:
        if row["kind"] == "limit":
            colour, style = _LINES[lines.index(row["name"]) % len(_LINES)]
            axis.axvline(row["median"], color=colour, linestyle=style, linewidth=1.3, zorder=3)
    axis.set_xscale("log")
    axis.set_ylim(-0.6, len(bars) - 0.4)
    axis.set_yticks(range(len(bars)), [row["name"] for row in bars], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", which="major", color="#dddddd", zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
