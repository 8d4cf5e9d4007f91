"""A report made again from what lies beside it, without a model and without the photographs but for their pictures."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddr import reporting
from fastddr.data.problems import Problem
from fastddr.errors import UserError
from fastddr.evaluation.metrics import SplitResult
from fastddr.reporting import ABOUT, predictions


@dataclass(frozen=True)
class Stored:
    """What a report is made of."""

    about: dict[str, Any]
    """`facts`, `notes`, `weights` by split, `root` of the photographs, `temperature`, `run`: as about.json has them."""
    splits: dict[str, SplitResult]
    left_out: list[Problem]


def folder_of(place: Path) -> Path:
    """The folder of a report: that of a run, or of an evaluation, or the folder itself.

    Raises:
        UserError: there is no report.
    """
    for folder in (place / "report", place):
        if (folder / predictions.FILE).is_file():
            return folder
    if (place / "config.yaml").is_file():
        raise UserError(
            f"{place}: this run has no report yet; let it end (the same command with --run-dir {place}), or score its "
            f"checkpoint with `fastddr evaluate {place} --split valid`."
        )
    raise UserError(f"{place}: there is no run here; give the folder of one, like runs/NAME, or of an evaluation.")


def stored(folder: Path) -> Stored:
    """What lies in a report's folder.

    Raises:
        UserError: a file is missing or broken.
    """
    about = read_about(folder)
    splits = predictions.load(folder / predictions.FILE, about["weights"])
    last = folder / predictions.LAST_FILE
    if last.is_file():
        splits[predictions.LAST] = next(iter(predictions.load(last, about["weights"]).values()))
    left_out = []
    if (folder / "left_out.csv").is_file():
        with (folder / "left_out.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            left_out = [Problem(row["path"], row["kind"], row["reason"]) for row in csv.DictReader(stream)]
    return Stored(about, splits, left_out)


def read_about(folder: Path) -> dict[str, Any]:
    """about.json of a report.

    Raises:
        UserError: it is missing or broken.
    """
    file = folder / ABOUT
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not {"facts", "notes", "weights", "root", "run"} <= set(found):
            raise ValueError("keys are missing")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); score the run anew with `fastddr evaluate`.") from None
    return found


def write(place: Path, root: Path | None = None) -> Path:
    """Make the report of a run, or of an evaluation, again; the path of its report.md.

    `root` is where the photographs lie now, by default where they lay then.

    Raises:
        UserError: there is no report, or what it was made of is broken.
    """
    folder = folder_of(place)
    found = stored(folder)
    about = found.about
    order = ("train", "valid", "test", predictions.LAST, *found.splits)
    splits = {name: found.splits[name] for name in dict.fromkeys(order) if name in found.splits}
    where = root or (None if about["root"] is None else Path(about["root"]))
    # Only a run's own report shows the course of its training. A place like `.` has its name elsewhere.
    named = folder if folder.name == "report" else folder.resolve()
    run = named.parent if named.name == "report" else folder
    return reporting.write(
        run, splits, about["facts"], about["notes"], root=where, left_out=found.left_out, folder=folder,
        temperature=about.get("temperature"), fit=about.get("fit", True), title=about["run"], predicted=False,
    )  # fmt: skip
