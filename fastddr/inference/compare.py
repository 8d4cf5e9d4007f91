"""`fastddr compare RUN RUN ...`: runs side by side on the same photographs, and how sure their differences are; and how
much those of them differ that have another training seed alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastddr.config import flatten, may_change
from fastddr.config.strict import read_yaml
from fastddr.data import output
from fastddr.errors import UserError
from fastddr.evaluation import bootstrap
from fastddr.evaluation.metrics import SplitResult, figures
from fastddr.inference.flags import Compare
from fastddr.progress import EpochBar
from fastddr.reporting import again, tables

#: Splits that hold photographs of valid.
_FITTED = ("valid", "valid_last", "all")
#: Besides what a resume may change: what follows from the machine, and changes a figure's last digits at most.
_OF_THE_MACHINE = {"loader", "threads", "micro_batch_size", "deterministic"}
#: Facts of a report that say how it scored, which an evaluation may do otherwise than its run.
_FINGERPRINT = "Fingerprint of the data"
_SCORED = ("Window", "Precision", _FINGERPRINT)
#: What is compared: label, place in the figures, and whether it is read in per cent.
COLUMNS = (
    ("accuracy", ("accuracy",), True),
    ("kappa (QWK)", ("qwk",), False),
    ("macro F1", ("macro_f1",), False),
    ("balanced acc.", ("balanced_accuracy",), True),
    ("AUC", ("auc",), False),
    ("referable AUC", ("referable", "auc"), False),
    ("calibration err.", ("ece",), True),
)


@dataclass(frozen=True)
class Compared:
    """One run's figures, and its differences to the first run's (None for the first)."""

    name: str
    weights: str
    found: dict[str, Any]
    ci: dict[str, Any]
    differences: dict[str, Any] | None
    recipe: tuple[str, int] | None = None
    """All but the seed, and the seed (`recipe`)."""
    fingerprint: str | None = None
    """Of the data that were scored; None where the report does not tell it."""
    fit: bool = True
    """Whether what is fitted to valid was fitted to these photographs: they are the run's own."""


def compare(asked: Compare) -> list[Compared]:
    """The runs in their order.

    Raises:
        UserError: fewer than two runs, or they did not score the same photographs.
    """
    if len(asked.runs) < 2:
        raise UserError("fastddr compare: give at least two runs, like runs/A runs/B.")
    if asked.out is not None and asked.out.suffix not in (".md", ".json"):
        raise UserError(f"--out {asked.out}: write to a .md or a .json.")
    if asked.out is not None:
        _refuse_there(asked.out)
        output.check_place(asked.out)
    reports = [again.stored(again.folder_of(place)) for place in asked.runs]
    splits = [_split(place, report, asked.split) for place, report in zip(asked.runs, reports, strict=True)]
    names = _names(asked.runs)
    rows = _rows(splits, names, asked.common)
    grades = splits[0].grades[rows[0]]
    # Of the first run that names some of these photographs: older runs do not.
    known = (
        [split.patients[row] for row in order.tolist()]
        for split, order in zip(splits, rows, strict=True) if split.patients is not None
    )  # fmt: skip
    patients = next((named for named in known if any(named)), None)
    compared: list[Compared] = []
    first: bootstrap.Sampled | None = None
    with EpochBar(Console(stderr=True), "drawing samples of runs", len(splits)) as bar:
        for name, place, report, split, order in zip(names, asked.runs, reports, splits, rows, strict=True):
            logits = split.logits[order]
            values = figures(logits, grades)
            drawn = bootstrap.sampled(logits, grades, patients=patients)
            ci = bootstrap.intervals(logits, grades, values, patients=patients, drawn=drawn)
            differences = None if first is None else bootstrap.differences(first, drawn)
            first = drawn if first is None else first
            facts = report.about["facts"]
            known_as = recipe(place, split.weights, facts)
            scored = facts.get(_FINGERPRINT)
            fit = report.about["fit"]
            compared.append(Compared(name, split.weights, values, ci, differences, known_as, scored, fit))
            bar.update(len(compared), total=len(splits))
    return compared


def _names(places: Sequence[Path]) -> list[str]:
    """The runs' names, with the evaluation's where it is one, and with as many parents as tell them apart."""
    paths = [place.resolve() for place in places]
    least = [2 if path.parent.name == "evaluations" else 1 for path in paths]
    ways = [
        (*path.parent.parent.parts, path.name) if n == 2 else path.parts for path, n in zip(paths, least, strict=True)
    ]
    found = []
    for way, n in zip(ways, least, strict=True):
        others = [other for other in ways if other != way]
        while any(other[-n:] == way[-n:] for other in others):
            n += 1
        found.append("/".join(way[-n:]))
    return found


def _split(place: Path, report: again.Stored, split: str) -> SplitResult:
    found = report.splits
    if split not in found:
        raise UserError(
            f"{place}: it has no predictions of {split}, only of {', '.join(found)}; name one with --split."
        )
    return found[split]


def _rows(splits: Sequence[SplitResult], names: Sequence[str], common: bool) -> list[torch.Tensor]:
    """Which rows of each split, so that all have the same photographs in the same order.

    Raises:
        UserError: they do not, or their truth differs.
    """
    where = [{key: row for row, key in enumerate(keys)} for keys in _keys(splits)]
    shared = set(where[0]).intersection(*where[1:])
    for name, rows in zip(names, where, strict=True):
        if len(rows) > len(shared) and not common:
            raise UserError(
                f"{name}: {len(rows) - len(shared)} of its {len(rows)} photographs were not scored by all of the runs; "
                "name runs of the same data and split, or compare on what they share with --common."
            )
    if not shared:
        raise UserError(f"{', '.join(names)}: these runs scored no photograph in common.")
    if len({split.logits.shape[1] for split in splits}) > 1:
        raise UserError(f"{', '.join(names)}: these models do not tell apart as many grades; compare like with like.")
    keys = sorted(shared, key=lambda key: splits[0].paths[where[0][key]])
    orders = [torch.tensor([rows[key] for key in keys]) for rows in where]
    for name, split, order in zip(names, splits, orders, strict=True):
        differ = (split.grades[order] != splits[0].grades[orders[0]]).nonzero()
        if len(differ):
            path = split.paths[int(order[differ[0]])]
            raise UserError(
                f"{name}: the grade of {path} is another than in {names[0]} ({len(differ)} such photographs); "
                "score both on the same labels."
            )
    return orders


def _keys(splits: Sequence[SplitResult]) -> list[Sequence[str]]:
    """What photographs are the same by: paths without extension, which `fastddr prepare` may change; where that would
    be the same of two, whole paths."""
    bare = [[os.path.splitext(path)[0] for path in split.paths] for split in splits]
    alone = all(len(set(names)) == len(names) for names in bare)
    return [names if alone else split.paths for names, split in zip(bare, splits, strict=True)]


def table(compared: Sequence[Compared]) -> list[list[str]]:
    """Head and rows: each run's figures, the differences of each to the first, and means of those of other seeds."""
    body = [["", *(label for label, *_ in COLUMNS)]]
    for one in compared:
        cells = [tables.cell(tables.at(one.found, keys), tables.at(one.ci, keys), pct) for _, keys, pct in COLUMNS]
        body.append([one.name, *cells])
    for one in compared[1:]:
        assert one.differences is not None
        cells = []
        for _, keys, per_cent in COLUMNS:
            first, here = tables.at(compared[0].found, keys), tables.at(one.found, keys)
            drawn = tables.at(one.differences, keys)
            interval = None if first is None or here is None or drawn is None else bootstrap.interval(drawn)
            cells.append(_signed(None if first is None or here is None else here - first, interval, per_cent))
        body.append([f"{one.name} − {compared[0].name}", *cells])
    for group in _seeds(compared):
        label = f"mean ± SD of {', '.join(one.name for one in group)}"
        body.append([label, *(_mean(spread([tables.at(one.found, keys) for one in group]), pct)
                              for _, keys, pct in COLUMNS)])  # fmt: skip
    return body


def _seeds(compared: Sequence[Compared]) -> list[list[Compared]]:
    return [[compared[place] for place in group] for group in groups([one.recipe for one in compared])]


def _mean(spread: tuple[float, float] | None, per_cent: bool) -> str:
    """ "76.2 ± 0.4 %", or "0.757 ± 0.004"."""
    if spread is None:
        return "–"
    mean, deviation = spread
    return f"{100 * mean:.1f} ± {100 * deviation:.1f} %" if per_cent else f"{mean:.3f} ± {deviation:.3f}"


def _signed(value: float | None, interval: Sequence[float] | None, per_cent: bool) -> str:
    """ "+1.2 (+0.3 to +2.1) *", in points of per cent or plain; the star where 0 lies outside."""
    if value is None:
        return "–"
    scale, digits = (100, 1) if per_cent else (1, 3)
    if interval is None:
        return f"{value * scale:+.{digits}f}"
    low, high = (bound * scale for bound in interval)
    star = " *" if low > 0 or high < 0 else ""
    return f"{value * scale:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){star}"


def legend(compared: Sequence[Compared], split: str) -> str:
    """What the table needs to be understood."""
    fitted = split in _FITTED and any(one.fit for one in compared)
    return (
        f"{compared[0].found['n']:,} photographs{tables.of_patients(compared[0].ci)} of {split}; "
        + "; ".join(f"{one.name}: {one.weights}" for one in compared)
        + ". In brackets 95 % intervals over the photographs, those of differences by a paired bootstrap; * marks "
        "differences whose interval leaves out 0. With several comparisons some stars are chance, and none speaks of "
        "another training seed. "
        + ("± is the standard deviation over training seeds, all else alike. " * bool(_seeds(compared)))
        + ("On valid a regression has the advantage that its thresholds are fitted there. " * fitted)
        + _unlike(compared)
        + tables.DISCLAIMER
    )


def _unlike(compared: Sequence[Compared]) -> str:
    """The sentence about runs that scored other files than the first, as of a set as it came and prepared."""
    first = compared[0].fingerprint
    others = [one.name for one in compared if first and one.fingerprint and one.fingerprint != first]
    if not others:
        return ""
    return (
        f"The data of {', '.join(others)} have another fingerprint than those of {compared[0].name} (files, grades or "
        "splits): the photographs are the same by name and grade alone, and their files may differ. "
    )


def as_json(compared: Sequence[Compared], split: str) -> dict[str, Any]:
    """Figures, intervals and intervals of the differences, by run."""
    runs = []
    for one in compared:
        difference = None
        if one.differences is not None:
            difference = {
                ".".join(keys): bootstrap.interval(values)
                for _, keys, *_ in COLUMNS
                if (values := tables.at(one.differences, keys)) is not None
            }
        runs.append({"run": one.name, "weights": one.weights, **one.found, "ci": one.ci, "difference_ci": difference})
    over = [
        {
            "runs": [one.name for one in group],
            "seeds": [one.recipe[1] for one in group if one.recipe is not None],
            "mean_and_sd": {
                ".".join(keys): spread([tables.at(one.found, keys) for one in group]) for _, keys, _ in COLUMNS
            },
        }
        for group in _seeds(compared)
    ]
    return {"split": split, "first": compared[0].name, "runs": runs, "seeds": over}


def show(compared: Sequence[Compared], body: Sequence[Sequence[str]], split: str) -> None:
    """Print the table of `table`, turned, so that many figures fit into a narrow terminal: a column a run.

    Where they do not, names are broken and figures never: the table is wider than the terminal then.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    shown.add_column("", min_width=max(map(len, body[0])))
    for row in body[1:]:
        shown.add_column(row[0], justify="right", overflow="fold", min_width=max(map(len, row[1:])))
    for index, label in enumerate(body[0][1:], 1):
        shown.add_row(label, *(row[index] for row in body[1:]))
    console.print(shown, crop=False)
    console.print(f"\n{legend(compared, split)}", style="dim")


# ------------------------------------------------------------------------------------------------ seeds


def recipe(place: Path, weights: str, facts: Mapping[str, Any]) -> tuple[str, int] | None:
    """What a run trained, its photographs, which of its weights were scored and how, as a sum; and its seed.

    None where the folder of the run is not there, as of a report that was copied alone.

    Args:
        place: the folder of a run, of its report, or of an evaluation.
        weights: what they are called; their step is no part of the recipe.
        facts: of the report (`reporting.facts`).

    Raises:
        UserError: its config.yaml is broken.
    """
    run = next((folder for folder in (place, *place.resolve().parents[:2]) if (folder / "config.yaml").is_file()), None)
    if run is None or not (run / "manifest.csv").is_file():
        return None
    settings = flatten(read_yaml(run / "config.yaml"))
    seed = settings.pop("seed", None)
    kept = {key: value for key, value in settings.items() if key not in _OF_THE_MACHINE and not may_change(key)}
    photographs = hashlib.sha256((run / "manifest.csv").read_bytes()).hexdigest()
    scored = [re.sub(r" \(.*?\)", "", weights), *(facts.get(label) for label in _SCORED)]
    text = json.dumps([kept, photographs, scored], sort_keys=True, default=str)
    return None if not isinstance(seed, int) else (hashlib.sha256(text.encode()).hexdigest(), seed)


def groups(recipes: Sequence[tuple[str, int] | None]) -> list[list[int]]:
    """Places of runs that have one recipe and each another seed, two or more; of a seed that comes again the first."""
    found: dict[str, dict[int, int]] = {}
    for place, known in enumerate(recipes):
        if known is not None:
            found.setdefault(known[0], {}).setdefault(known[1], place)
    return [list(seeds.values()) for seeds in found.values() if len(seeds) > 1]


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (n − 1) over seeds; None where a run has no such figure."""
    known = [value for value in values if value is not None]
    return (statistics.fmean(known), statistics.stdev(known)) if len(known) == len(values) else None


def _refuse_there(out: Path) -> None:
    if out.exists():
        raise UserError(f"--out {out}: it is there already; give another name, or remove it.")


def main(asked: Compare) -> int:
    """Run the verb; its exit code."""
    compared = compare(asked)
    body = table(compared)
    if asked.out is not None:
        if asked.out.suffix == ".json":
            text = json.dumps(as_json(compared, asked.split), indent=1, allow_nan=False) + "\n"
        else:
            text = f"{tables.table(body[0], body[1:])}\n\n{legend(compared, asked.split)}\n"
        _refuse_there(asked.out)  # since it was looked at another command may have written it
        # A link stays one.
        output.put(asked.out.resolve(), text.encode())
    show(compared, body, asked.split)
    return 0
