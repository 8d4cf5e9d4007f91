"""Tables and pictures of `report.py`, `ablation.py`, `seeds.py`, `memory.py` and `cards.py`, from their rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from wording import number, table

from fastddr.reporting.plots import STYLE

Row = Mapping[str, Any]
#: Okabe and Ito (2008); and dashes, which tell arms apart in grey print.
_LINES = (
    ("#0072B2", "-"), ("#D55E00", (0, (5, 2))), ("#009E73", (0, (1, 1.2))), ("#000000", (0, (6, 2, 1, 2))),
)  # fmt: skip
FEW = 500


def percent(share: float | None) -> str:
    """`76.2 %`; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


# -------------------------------------------------------------------------------------------------------- report.py


def accuracies(rows: Sequence[Row]) -> str:
    """Accuracy by split, at the best epoch on valid and at the last; the report's beside it where the rows have it."""
    published = any(row.get("published") for row in rows)
    splits = ("train", "valid", "test")
    keys = {split: split for split in splits}
    keys |= {f"{split}, last": f"{split}_last" for split in splits if any(row.get(f"{split}_last") for row in rows)}
    lines = []
    for row in rows:
        cells = [percent((row.get(key) or {}).get("accuracy")) for key in keys.values()]
        theirs = row.get("published", {})
        cells += [f"{theirs[split]:g} %" if split in theirs else "" for split in splits if published]
        lines.append([row["name"], *cells])
    return table(["", *keys, *(f"the report's {split}" for split in splits if published)], lines)


def details(rows: Sequence[Row]) -> str:
    """Test in other figures, and what the training cost."""
    classes = max(len(row["test"]["recall"]) for row in rows)
    headings = ["test, best epoch", "QWK", *(f"recall {grade}" for grade in range(classes))]
    lines = [[row["name"], or_dash(row["test"]["qwk"]), *map(percent, row["test"]["recall"])] for row in rows]
    return table(headings, lines)


def expenses(rows: Sequence[Row]) -> str:
    """Speed, time and memory of each training."""
    headings = ["", "parameters", "epochs", "best epoch", "images/s", "minutes", "peak memory, GiB"]
    lines = [
        [row["name"], f"{row['parameters']:,}", str(row["epochs"]), str(row["best_epoch"]),
         *(or_dash(row.get(key)) for key in ("images_per_second", "minutes", "peak_gib"))]
        for row in rows
    ]  # fmt: skip
    return table(headings, lines)


def sentences(rows: Sequence[Row]) -> list[str]:
    """What a reader of the tables must know."""
    row = rows[0]
    what = "DDR whole" if row["whole_ddr"] else f"the data `{row['data']}`, which is not DDR whole"
    said = [
        f"Trained on {what}: {row['counts']['train']:,} photographs of train, {row['counts']['valid']:,} of valid, "
        f"{row['counts']['test']:,} of test; seed {row['seed']}. Train is scored by a pass in evaluation, under the "
        "same weights as valid and test. The best epoch is the one of the highest kappa on valid, and of equal ones "
        "that of the lowest loss."
    ]
    if not row["whole_ddr"]:
        said.append(
            "The figures of the 2022 report are of DDR and cannot be compared with these, so they are left out."
        )
    else:
        said.append(
            "The report's figures are of its last epoch; its about 70 % before augmentation stands with the plain "
            "ConvMixer. Its settings are not known in full (the presets' headers say which are our assumptions)."
        )
    said += [f"Pretraining: {row['pretraining']}."] if row.get("pretraining") else []
    return said


def curves(found: Mapping[str, Mapping[str, Sequence[Row]]]) -> bytes:
    """Loss and accuracy by epoch of each family, a column each: thin lines train, thick ones valid (not test).

    Args:
        found: by family and by arm, the lines of its metrics.jsonl.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 4.6 * len(found), 7.4), layout="constrained")
        grid = figure.subplots(2, len(found), squeeze=False, sharex="col")
        for column, (family, arms) in zip(grid.T, found.items(), strict=True):
            for axes, key in zip(column, ("loss", "accuracy"), strict=True):
                for (colour, dashes), (arm, lines) in zip(_LINES, arms.items(), strict=False):
                    for split, width, alpha in (("train", 1.0, 0.55), ("valid", 2.2, 1.0)):
                        points = _by_epoch(lines, f"{split}/{key}")
                        axes.plot(
                            *zip(*points, strict=True) if points else ([], []), color=colour, linestyle=dashes,
                            linewidth=width, alpha=alpha, label=arm if split == "valid" else None, marker=".",
                            markersize=4 if split == "valid" else 0,
                        )  # fmt: skip
                axes.set(title=f"{family}: {key}", xlabel="Epoch" if key == "accuracy" else None)
                axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
            column[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            column[1].set_ylim(0, 1)
            # What explodes in one arm must not flatten the others.
            seen = [
                y for lines in arms.values() for key in ("train", "valid") for _, y in _by_epoch(lines, f"{key}/loss")
            ]
            if seen:
                column[0].set_ylim(0, min(max(seen), 3.0) * 1.05)
            column[0].legend(loc="best", fontsize=9)
        kinds = [
            Line2D([], [], color="#333333", linewidth=width, alpha=alpha) for width, alpha in ((1.0, 0.55), (2.2, 1))
        ]
        figure.legend(kinds, ["train, while training", "valid (not test)"], loc="outside lower center", ncols=2)
        stream = io.BytesIO()
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
        return stream.getvalue()


def _by_epoch(lines: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """Means over each epoch, at its end."""
    found: dict[int, list[float]] = {}
    for line in lines:
        if line.get(key) is not None:
            # A line stands at the end of its window; epoch 1.0 ends epoch 1.
            found.setdefault(max(1, int(-(-line["epoch"] // 1))), []).append(line[key])
    return [(float(epoch), sum(values) / len(values)) for epoch, values in sorted(found.items())]


# ------------------------------------------------------------------------------------------------------ ablation.py


def changes(rows: Sequence[Row]) -> str:
    """Kappa and accuracy on valid, the difference of kappa to the baseline seed by seed, and minutes."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["name"], f"`{row['flags']}`", "failed", "", "", ""])
            continue
        apart = row["difference"]
        low, high = (f"{row['difference'][key]:+.3f}" for key in ("low", "high"))
        lines.append([
            row["name"], f"`{row['flags']}`" if row["flags"] else "",
            f"{row['median']:.3f} ({row['low']:.3f}-{row['high']:.3f})",
            "" if row["baseline"] else f"{apart['median']:+.3f} ({low} to {high})",
            percent(row["accuracy"]["median"]), or_dash(row.get("minutes")),
        ])  # fmt: skip
    return table(["", "flags", "QWK on valid", "to the baseline", "accuracy on valid", "minutes a run"], lines, left=2)


def caution(photographs: int) -> str:
    """What so many validation photographs can tell."""
    half = 98 / photographs**0.5
    said = f"{photographs:,} photographs of valid tell an accuracy of 50 % to ±{half:.1f} points (95 % interval)"
    return f"{said}: they decide nothing, and this only shows that it runs." if photographs < FEW else f"{said}."


# --------------------------------------------------------------------------------------------------------- seeds.py


#: What of valid `seeds.py` compares, and how it is called.
COMPARED = {"loss": "loss", "qwk": "kappa"}


def ranks(rows: Sequence[Row]) -> str:
    """Loss and kappa on valid by number of ranks, and how far two numbers of ranks and two seeds are apart."""
    base, *others = rows
    headings = [""]
    for name in COMPARED.values():
        headings += [f"{name} on valid", f"to {base['name']}", "apart"]
    lines = [[base["name"]], [f"{base['name']}, another seed"], *([row["name"]] for row in others)]
    for key in COMPARED:
        lines[0] += [_spread(base["spreads"][key]), "", ""]
        lines[1] += ["", "", _spread(others[0]["seeds_apart"][key])]
        for line, row in zip(lines[2:], others, strict=True):
            line += [_spread(row["spreads"][key]), _spread(row["difference"][key], "+"), _spread(row["apart"][key])]
    return table(headings, lines)


def _spread(found: Row, sign: str = "") -> str:
    low, high = (f"{found[key]:{sign}.3f}" for key in ("low", "high"))
    return f"{found['median']:{sign}.3f} ({low} to {high})"


def between_ranks(rows: Sequence[Row]) -> str:
    """How the table is to be read, and what it says."""
    base, *others = rows
    flags = f" with `{base['flags']}`" if base["flags"] else ""
    said = (
        f"{base['n']} seeds of `{base['preset']}`{flags}, scored after the last epoch on the {base['valid']} "
        f"photographs of valid; medians with 95 % intervals. `to {base['name']}` is the difference, taken seed by "
        "seed. `apart` is its size without the sign; for another seed it is taken between any two seeds."
    )
    for row in others:
        for key, name in COMPARED.items():
            pairs = list(zip(row["values"][key], base["values"][key], strict=True))
            higher = sum(one > other for one, other in pairs)
            apart, seeds = row["apart"][key], row["seeds_apart"][key]
            further = "further" if apart["low"] > seeds["high"] else "no further"
            said += (
                f" The {name} of {row['name']} is {further} from that of {base['name']} than another seed's, as far as "
                f"the intervals can tell, and higher in {higher} of {len(pairs)} seeds."
            )
    return said


# ---------------------------------------------------------------------------------------------- memory.py, cards.py


def cards(rows: Sequence[Row]) -> str:
    """Predicted photographs at once: a line for each training and size of image, a column for each card."""
    sizes = list(dict.fromkeys(row["card_gib"] for row in rows))
    lines: dict[tuple[str, int], dict[float, str]] = {}
    for row in rows:
        lines.setdefault((row["training"], row["image_size"]), {})[row["card_gib"]] = f"{row['median']:,}"
    return table(
        ["photographs at once", "px", *(f"{size:g} GiB" for size in sizes)],
        [[name, str(side), *(cells[size] for size in sizes)] for (name, side), cells in lines.items()],
    )


def peaks(rows: Sequence[Row]) -> list[str]:
    """Tables of measured and predicted peaks, and of the largest batch and crop on emulated cards."""
    texts = []
    found = [row for row in rows if row.get("kind") == "memory" and "failed" not in row]
    if found:
        lines = [
            [row["name"], row["witness"], f"{number(1024 * row['median'])}", number(1024 * row["predicted_gib"]),
             f"{100 * row['error']:+z.1f} %"]
            for row in found
        ]  # fmt: skip
        texts.append(table(["", "held against", "measured, MiB", "predicted, MiB", "error"], lines, left=2))
    wrong = [row for row in rows if row.get("kind") == "error"]
    if wrong:
        told = []
        for row in wrong:
            what, _, where = row["name"].partition(": ")  # `median error of the prediction`, `worst error: net 4`
            told.append(f"{what.partition(' ')[0]} {row['median']:.1f} %{f' ({where})' if where else ''}")
        texts.append(f"Error of the prediction over these {wrong[0]['configurations']}: {', '.join(told)}.")
    largest = [row for row in rows if row.get("kind") == "largest" and "failed" not in row]
    if largest:
        lines = [
            [row["name"].removeprefix("largest "), f"{row['median']:g} {row['unit']}", f"{row['predicted']:g}",
             "–" if row["share"] is None else f"{100 * row['share']:.0f} %"]
            for row in largest
        ]  # fmt: skip
        texts.append(table(["largest", "that trains", "predicted", "of it"], lines))
    failed = [row for row in rows if "failed" in row]
    texts += [f"Without a figure: {row['name']}: {row['failed']}" for row in failed]
    return texts
