"""What can be wrong with a data set, or merely worth knowing: each kind with one verdict, which training obeys.

An *error* is a photograph or a label that cannot be used, or that would make a figure untrue. Training stops at it, or
leaves it out and lists it in the report (`--on-bad`). A *note* changes nothing.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastddr import files
from fastddr.errors import UserError
from fastddr.runs import expanded

Severity = Literal["error", "note"]

#: Kind of each error: what to do about it.
ERRORS = {
    "missing": "restore it or remove its label",
    "broken-link": "restore what it points at or remove its label",
    "outside": "copy what it points at into the set, or take such links with --follow-links",
    "unreadable": "give yourself the right to read it",
    "unreadable-now": "give the same command again, or where that does not help, restore it from a copy",
    "empty": "fetch it again",
    "truncated": "fetch it again",
    "corrupt": "fetch it again",
    "junk": "fetch it again",
    "text": "fetch it again",
    "html": "fetch it again: it was a failed download",
    "format": "save it as an RGB JPEG, PNG or TIFF",
    "dimensions": "replace it",
    "16-bit": "save it with 8 bits a channel",
    "encoding": "rename it",
    "label": "mend the label file",
    "grade": "mend the label file",
    "doubled": "remove one of the two",
    "ambiguous": "keep one of the files, or give its path in the label file",
    "picture-in-two-splits": "keep it in one split",
    "patient-in-two-splits": "keep each patient in one split",
}
#: Errors of a whole set and not of a photograph: no reason to leave one out where nothing is trained.
LEAKS = ("picture-in-two-splits", "patient-in-two-splits")
#: Kind of each note: what it means.
NOTES = {
    "greyscale": "greyscale; read as grey RGB",
    "cmyk": "CMYK; converted to RGB",
    "turned": "EXIF orientation; read upright",
    "progressive": "progressive JPEG; slower to decode, and not by a GPU's JPEG engine",
    "extension": "the file's name says another format; read by its content",
    "name": "space, control or non-ASCII character in the name",
    "duplicate": "the same pixels as another photograph of its split",
    "same-name": "the same file name in two splits",
    "orphan": "a photograph without a label; left out",
    "other-file": "not a photograph by its name; left out",
    "excluded": "left out by --exclude",
    "unlabelled": "no grade in the label file; left out",
}


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong or worth knowing."""

    path: str
    """Of the photograph, relative to the set's folder; of label file and line, where no photograph is meant."""
    kind: str
    """A key of `ERRORS` or `NOTES`."""
    reason: str
    """What was found, as the middle of a sentence."""

    def __post_init__(self) -> None:
        if self.kind not in ERRORS and self.kind not in NOTES:
            raise ValueError(f"there is no kind of problem {self.kind!r}")

    @property
    def severity(self) -> Severity:
        """Whether the photograph can be used."""
        return "error" if self.kind in ERRORS else "note"

    def sentence(self, root: Path) -> str:
        """What, where and what to do, without the full stop."""
        return f"{root / self.path}: {self.reason}; {ERRORS.get(self.kind, NOTES.get(self.kind))}"


#: What Markdown takes for its own; a star or an underscore only where it may begin or end something.
_MARKUP = re.compile(r"[\\`\[\]<>|]|\*(?=\S)|(?<=\S)\*|(?<![^\W_])_|_(?![^\W_])")


def one_line(text: object) -> str:
    """A text that can be printed, without line breaks: a file's name, or what a decoder says, may hold anything.

    What cannot be printed, as what moves a terminal's cursor or turns its lines round, is a question mark.
    """
    words = " ".join(str(text).encode("utf-8", "replace").decode().split())
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def in_markdown(text: object) -> str:
    """One line that breaks no table and is shown as it stands: names and reasons are of whoever made the data."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def errors(problems: Iterable[Problem]) -> list[Problem]:
    """Those that cannot be used."""
    return [problem for problem in problems if problem.severity == "error"]


def refuse(problems: Sequence[Problem], root: Path, command: str) -> None:
    """Raise `UserError` if one of the problems is an error: the first, and how many more there are.

    `command`: as of `Survey`.
    """
    bad = errors(problems)
    if not bad:
        return
    more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
    said = f"{bad[0].sentence(root)}{more}, or leave out what is bad with --on-bad exclude"
    raise UserError(one_line(f"{said}; `{lister(command)}` lists all."))


def lister(command: str) -> str:
    """The command that lists every error of a set; without a list `fastddr check` shows the first of each kind.

    `command`: as of `Survey`.
    """
    names = itertools.chain(["bad.csv"], (f"bad-{number}.csv" for number in itertools.count(2)))
    return f"{command} --fix-list {next(name for name in names if not os.path.lexists(name))}"


def write_list(problems: Iterable[Problem]) -> str:
    """The problems as CSV that `read_list` and `--exclude` take: `path,kind,reason`, sorted."""
    rows = [[p.path, p.kind, p.reason] for p in sorted(problems)]
    return files.table([["path", "kind", "reason"], *rows], quoted=True)


def refuse_list(file: Path) -> None:
    """Raise `UserError` where anything is there already: a list may have rows of the user's own."""
    if file.exists():
        raise UserError(f"--fix-list {file}: it is there already; give a new name for the list, or remove it.")


def rows_of(file: str | Path, name: str) -> tuple[list[list[str]], int | None]:
    """The rows of a list of photographs below its header, and the column of paths: that which is called `path`, however
    it is written and separated; None without a header. Errors call the file by this name.

    Raises:
        UserError: it is no CSV, or cannot be read.
    """
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            mark = next((mark for mark in (",", ";", "\t") if mark in first), ",")
            headed = any(_is_path(cell.replace('"', "")) for cell in first.split(mark))
            if not headed:
                # Rows of a list of ours are in quotes; of a list that is just paths a line is one, with its commas.
                mark = "," if '"' in first else "\x1f"
            # Spaces after the marks of the header are after those of the rows too.
            found = csv.reader(stream, delimiter=mark, skipinitialspace=headed and f"{mark} " in first, strict=True)
            rows = [row for row in found if row]
    except (OSError, csv.Error) as error:
        raise UserError(
            f"{name}: this list cannot be read ({one_line(error)}); give a CSV with a column path."
        ) from None
    if any("\0" in cell for row in rows for cell in row):
        raise UserError(f"{name}: it holds NULs, as in UTF-16; save the list as CSV in UTF-8.")
    column = next((k for k, cell in enumerate(rows[0]) if _is_path(cell)), None) if rows else None
    return rows if column is None else rows[1:], column


def _is_path(cell: str) -> bool:
    return cell.strip().casefold() == "path"


def read_list(file: str | Path) -> frozenset[str]:
    """The paths of a list for `--exclude`: CSV with a column `path`, or just a path a line.

    Raises:
        UserError: the file cannot be read as such.
    """
    rows, named = rows_of(expanded(file), f"--exclude {file}")
    column = named or 0
    short = next((number for number, row in enumerate(rows, 1) if len(row) <= column), None)
    if short is not None:
        raise UserError(f"--exclude {file}: row {short} has no path.")
    return frozenset(row[column] for row in rows if row[column])
