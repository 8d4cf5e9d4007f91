"""A report made again from what lies beside it, without a model and without the photographs but for their pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddr import __version__, files, reporting
from fastddr.data.problems import Problem, one_line
from fastddr.errors import UserError
from fastddr.evaluation.metrics import SplitResult
from fastddr.reporting import ABOUT, predictions

#: What about.json holds.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "facts": dict, "notes": list, "weights": dict, "root": (str, type(None)), "run": str,
    "temperature": (float, int, type(None)), "fit": bool,
}  # fmt: skip


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


def run_of(folder: Path) -> Path:
    """The run whose own report lies in a folder; else the folder itself, as of an evaluation."""
    # A place like `.` has its name elsewhere.
    named = folder if folder.name == "report" else folder.resolve()
    return named.parent if named.name == "report" else folder


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
    return Stored(about, splits, _left_out(folder / "left_out.csv"))


def _left_out(file: Path) -> list[Problem]:
    """The photographs and labels that were not used; none where the file is not there."""
    if not file.is_file():
        return []
    found = []
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                found.append(Problem(row["path"], row["kind"], row["reason"] or ""))
        except KeyError:
            raise UserError(f"{file}: its columns are not path,kind,reason; score the run anew.") from None
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{file}, line {reader.line_num}: {one_line(error)} in fastddr {__version__}; make the report with the "
                "version that wrote it, or score the run anew."
            ) from None
    return found


def read_about(folder: Path) -> dict[str, Any]:
    """about.json of a report.

    Raises:
        UserError: it is missing or broken.
    """
    file = folder / ABOUT
    try:
        found = files.parse(file.read_bytes())
        for key, kinds in _KINDS.items():
            if key not in found or not isinstance(found[key], kinds):
                raise ValueError(f"{key!r} is missing or of another kind")
        if not all(isinstance(said, str) for said in found["weights"].values()):
            raise ValueError("'weights' holds what is no text")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); score the run anew with `fastddr evaluate`.") from None
    return found


def write(place: Path, root: Path | None = None, vector: str | None = None) -> Path:
    """Make the report of a run, or of an evaluation, again; the path of its report.md.

    `root` is where the photographs lie now, or the folder above, by default where they lay then; `vector` as in
    `reporting.write`.

    Raises:
        UserError: there is no report, what it was made of is broken, or none of the photographs lies below `root`.
    """
    folder = folder_of(place)
    found = stored(folder)
    about = found.about
    order = ("train", "valid", "test", predictions.LAST, *found.splits)
    splits = {name: found.splits[name] for name in dict.fromkeys(order) if name in found.splits}
    before = None if about["root"] is None else Path(about["root"])
    where = before if root is None else _found(root, before, splits.values())
    run = run_of(folder)  # only a run's own report shows the course of its training
    # The run may have another name by now; of what lies elsewhere the old one is all that is known.
    title = None if (run / "config.yaml").is_file() else about["run"]
    return reporting.write(
        run, splits, about["facts"], about["notes"], root=where, left_out=found.left_out, folder=folder,
        temperature=about["temperature"], fit=about["fit"], title=title, predicted=False,
        vector=vector,
    )  # fmt: skip


def _found(root: Path, before: Path | None, splits: Iterable[SplitResult]) -> Path:
    """Where the photographs lie: a folder, or in it the one that is named as theirs was before, like DR_grading."""
    paths = [path for split in splits for path in split.paths]
    for place in (root, root / (before.name if before else "")):
        if any((place / path).is_file() for path in paths):
            return place
    raise UserError(f"--data {root}: none of the report's photographs lies there; give the folder of {paths[0]}.")
