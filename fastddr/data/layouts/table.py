"""Label tables: a CSV with a row a photograph, known by its header.

path,grade[,split][,patient]      ours
id_code,diagnosis                 the Kaggle copy of DDR; APTOS 2019
image,level                       EyePACS (Kaggle 2015)
Image name,Retinopathy grade      IDRiD; Messidor, whose grades are no ICDR ones
image_id,adjudicated_dr_grade     Messidor-2 (adjudicated_gradable 0 = ungradable)
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fastddr.data.grades import UNGRADABLE, UNKNOWN
from fastddr.data.layouts.common import (
    Entry,
    Fence,
    Index,
    Listing,
    Named,
    grade_of,
    leave_out,
    patient_in,
    patient_of,
    quoted,
    some,
    spelled,
    split_in,
    split_of,
)  # fmt: skip
from fastddr.data.problems import Problem, one_line
from fastddr.errors import PASSING, UserError

#: (column of the name, column of the grade), spelled, and what such a table is called.
_HEADERS = {
    ("path", "grade"): "csv",
    ("idcode", "diagnosis"): "aptos",
    ("image", "level"): "eyepacs",
    ("imagename", "retinopathygrade"): "idrid",
    ("imageid", "adjudicateddrgrade"): "messidor2",
}
#: Only Messidor's own table has this column, spelled.
_OF_MESSIDOR = "ophthalmologicdepartment"
#: Columns of which a table may have one, spelled; each of these sets means one thing.
_PATIENT, _GRADABLE = ("patient", "patientid"), "adjudicatedgradable"
#: What stands in the column that says which photographs could be graded, in lower case; an empty cell says nothing.
_CAN_BE_GRADED = {"": True, "1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
#: In a folder's name this is grade 0; in a cell it may as well be what a program writes where there is nothing.
_NOTHING = ("no", "none")
#: The way out where tables lie apart from their photographs, and one must be chosen.
_COPY = "copy {} into the folder above its photographs, and give that copy as --data FILE.csv"
#: A competition's example of a submission has the header of the labels and made-up grades.
_NOT_LABELS = "samplesubmission"


class Head(NamedTuple):
    """The header of a table."""

    text: str
    cells: list[str]
    """Spelled."""
    mark: str
    """What separates cells."""
    lines: int
    """How many it takes: with the line `sep=;` above it, by which Excel knows what separates cells, two."""
    layout: str
    """What a label table with this header is called; empty where it is none."""
    key: int
    """The columns that name and grade the photographs of a label table; else -1."""
    grade: int

    def column(self, *names: str) -> int | None:
        """That of the first of these names that there is."""
        return next((self.cells.index(name) for name in names if name in self.cells), None)


@dataclass(frozen=True)
class _Table:
    file: Path
    head: Head
    rows: list[tuple[int, list[str]]]
    """Line in the file, cells."""


def tables(folder: Path, top: Path, fence: Fence) -> Listing | None:
    """The listing of the label tables in a folder; None where there are none.

    The photographs are looked for below the folder, else below the folders above it, up to `top`: IDRiD keeps its
    tables beside its photographs.
    """
    files = [folder / name for name in sorted(os.listdir(folder)) if name.lower().endswith(".csv")]
    read = (_read(file, fence) for file in files if _NOT_LABELS not in spelled(file.stem))
    found = [one for one in read if one is not None]
    return _listing(found, folder, top) if found else None


def table(file: Path) -> Listing:
    """The listing of one label table that the user pointed at.

    Raises:
        UserError: its header is not one of those that are known.
    """
    found = _read(file)
    if found is None:
        raise UserError(
            f"{file}: this is no label table; its header should be path,grade[,split][,patient], and is "
            f"{unknown_header(file) or 'empty'}."
        )
    return _listing([found], file.parent, file.parent, given=True)


def unknown_header(file: Path) -> str | None:
    """The header of a CSV that is no label table, cut short; None where it is one, or no CSV, or cannot be read."""
    try:
        if file.suffix.lower() != ".csv" or not file.is_file():
            return None
        head = head_of(_begin(file))
        return None if head.layout else one_line(head.text.strip()[:120]) or None
    except (OSError, csv.Error):
        return None


def head_of(text: str) -> Head:
    """The header of a table, of which two lines suffice, by what separates its cells: that by which it is known, else a
    comma, a semicolon, a tab."""
    # A line break may be a lone carriage return: some programs write tables so still.
    first, second = [*re.split(r"\r\n|\r|\n", text, maxsplit=2), ""][:2]
    header, lines = (second, 2) if re.fullmatch(r"\"?sep=.\"?", first, re.IGNORECASE) else (first, 1)
    found = [_head(header, lines, mark) for mark in (",", ";", "\t") if mark in header] or [_head(header, lines, ",")]
    return next((head for head in found if head.layout), found[0])


def _head(header: str, lines: int, mark: str) -> Head:
    cells = [spelled(cell) for cell in next(csv.reader([header], delimiter=mark), [])]
    # What a model said, as `predict` and reports write it, is no truth.
    known = None if "p0" in cells else next((pair for pair in _HEADERS if set(pair) <= set(cells)), None)
    if known is None:
        return Head(header, cells, mark, lines, "", -1, -1)
    return Head(header, cells, mark, lines, _HEADERS[known], *map(cells.index, known))


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column] if column is not None and column < len(row) else ""


def _begin(file: Path) -> str:
    """The first two lines of a file, or as much of them as may be a header."""
    with file.open("rb") as raw:
        return b"".join(raw.readline(1 << 16) for _ in range(2)).decode("utf-8-sig", "replace")


def _read(file: Path, fence: Fence | None = None) -> _Table | None:
    """The table in a file, None where it is no label table. With a fence it was come across, and lies within; then one
    that cannot be read is none."""
    try:
        if not file.is_file():  # whoever opens a pipe waits for ever
            return None
        head = head_of(_begin(file))
        if not head.layout:
            return None
        if fence is not None:
            fence.check(file.parent, file.name)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=head.mark, strict=True)
            for _ in range(head.lines - 1):
                next(reader)
            _refuse_twice(file, head, next(reader))
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        if fence is not None and error.errno not in PASSING:
            return None
        raise UserError(f"{file}: this table cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: this table cannot be read ({one_line(error)}); save it as UTF-8.") from None
    except csv.Error as error:
        raise UserError(f"{file}: this table cannot be read ({one_line(error)}); save it as CSV anew.") from None
    if head.layout == "aptos" and spelled(file.stem) == "drgrading":
        head = head._replace(layout="kaggle")
    return _Table(file, head, rows)


def _refuse_twice(file: Path, head: Head, header: Sequence[str]) -> None:
    """Raise `UserError` where two columns mean the same: which of them is right nobody can tell."""
    for meaning in ((head.cells[head.key],), (head.cells[head.grade],), ("split",), _PATIENT, (_GRADABLE,)):
        same = [cell.strip() for cell in header if spelled(cell) in meaning]
        if len(same) > 1:
            raise UserError(
                f"{file}: its columns {' and '.join(same)} would both be read as one thing (case and spaces do not "
                "count); keep the right one, and rename or remove the other."
            )


def _splits_of_files(found: Sequence[_Table], beside: bool) -> list[str | None]:
    """The split that each table stands for, by its name, where there are several.

    `beside`: whether photographs that they name lie in their folder, so that one of them can be given alone.
    """
    if len(found) == 1:
        return [None]
    # EyePACS published the grades of its test photographs later, with a column that tells the leaderboard.
    splits = ["test" if "usage" in t.head.cells else split_in([t.file.stem]) for t in found]
    if None in splits or len(set(splits)) < len(splits):
        names = ", ".join(t.file.name for t in found)
        alone = "give one as --data FILE.csv" if beside else _COPY.format("one")
        raise UserError(
            f"{found[0].file.parent}: several label tables ({names}), and their names do not tell which is which "
            f"split; {alone}, or name them train, valid and test."
        )
    return splits


def _listing(found: Sequence[_Table], folder: Path, top: Path, *, given: bool = False) -> Listing:
    """`given`: whether the user pointed at the table, whose photographs then lie below its own folder."""
    tokens = [_cell(row, t.head.key).strip().replace("\\", "/") for t in found for _, row in t.rows[:50]]
    root, index = folder, Index(folder)
    while not (there := any(index.find(token, None) for token in tokens)) and root != top:
        root = root.parent
        index = Index(root)
    splits = _splits_of_files(found, there and root == folder)
    listing = Listing(found[0].head.layout, root, [])
    listing.notes.extend(index.notes)
    known, doubts = Named(listing), list[Sequence[str]]()
    for one, split in zip(found, splits, strict=True):
        doubts += _add(one, split, index, listing, known)
        if _OF_MESSIDOR in one.head.cells:
            listing.notes.append(
                f"{one.file.name} is Messidor's, and its grades are on Messidor's own scale of 0-3, where 3 holds "
                "proliferative retinopathy too: they are not ICDR grades, and scores on them compare with none on such."
            )
    known.judge()
    labels = ", ".join(t.file.name for t in found)
    _refuse_elsewhere(listing, index, doubts, labels, given)
    if not listing.entries and not listing.problems:
        raise UserError(f"{found[0].file}: this label table is empty; it should have a row a photograph.")
    named = {entry.path for entry in listing.entries} | {problem.path for problem in listing.problems}
    homes = {os.path.dirname(entry.path) for entry in listing.entries}
    rest = sorted(index.paths - named)
    orphans = [path for path in rest if os.path.dirname(path) in homes]
    no_row = f"no row in {labels}"
    leave_out(listing, orphans, "orphan", f"it has {no_row}", f"photographs have {no_row} and are left out")
    # A competition's test set, as likely as one that was meant to be read: counted, and none listed.
    if len(rest) > len(orphans):
        away = sorted({os.path.dirname(path) for path in rest} - homes)
        listing.notes.append(
            f"{len(rest) - len(orphans)} photographs lie in folders of which {labels} names none, and are not read: "
            f"{some([f'{folder}/' if folder else str(root) for folder in away])}."
        )
    unknown = [entry.path for entry in listing.entries if entry.grade == UNKNOWN]
    note = f"photographs have no grade in {labels} and are left out"
    leave_out(listing, unknown, "unlabelled", "its grade is empty", note)
    return listing


def _refuse_elsewhere(
    listing: Listing, index: Index, doubts: Sequence[Sequence[str]], labels: str, given: bool
) -> None:
    """Raise `UserError` where no row finds its photograph: they lie elsewhere, or all in the same several folders."""
    entries = listing.entries
    if entries and not doubts and not any(_is_there(entry, listing.root, index) for entry in entries):
        near = ((entry.token, path) for entry in entries if (path := index.near(entry.path)) is not None)
        token, path = next(near, ("", ""))
        # The folder above may hold other tables, and is refused for them.
        way_out = _COPY.format(labels) if given else "give the folder that holds both the table and its photographs"
        raise UserError(
            f"{listing.root}: none of the {len(entries)} photographs that {labels} names lies in it or below it; "
            + (f"{quoted(token)} is not there, but {path} is: mend the names in the table." if path else
               f"{way_out}, or restore them.")
        )  # fmt: skip
    if doubts and not entries:
        # All photographs may bear one name: its rows have one list, and no more homes are sought than `some` shows.
        unlike = {id(paths): paths for paths in doubts}.values()
        shared = set.intersection(*({os.path.dirname(path) for path in paths} for paths in unlike))
        alone = (home for home in sorted(shared - {""}) if all(_below(home, paths) == 1 for paths in unlike))
        homes = list(islice(alone, 4))
        if homes:
            raise UserError(
                f"{listing.root}: each photograph that {labels} names lies in several folders ({some(homes)}); put "
                "the table into the right one, and give that folder as --data."
            )


def _is_there(entry: Entry, root: Path, index: Index) -> bool:
    """Whether anything bears its name: a broken link, or what is no photograph by its name, has an error of its own."""
    return entry.path in index.paths or os.path.lexists(root / entry.path)


def _below(folder: str, paths: Sequence[str]) -> int:
    return sum(path.startswith(f"{folder}/") for path in paths)


def _add(found: _Table, split: str | None, index: Index, listing: Listing, known: Named) -> list[Sequence[str]]:
    """Add the entries of a table, and what is wrong with its rows; of each that may mean several photographs: these."""
    doubts: list[Sequence[str]] = []
    label = found.file.relative_to(listing.root).as_posix()
    head = found.head
    split_column, patient_column, gradable_column = head.column("split"), head.column(*_PATIENT), head.column(_GRADABLE)
    for line, row in found.rows:

        def wrong(kind: str, reason: str, line: int = line) -> None:
            listing.problems.append(Problem(f"{label}, line {line}", kind, one_line(reason)))

        if any(more.strip() for more in row[len(head.cells) :]):
            # Its cells stand under the wrong headings, the grade perhaps too.
            wrong("label", f"it has {len(row)} cells under {len(head.cells)} headings: put a cell that holds "
                  "what separates cells, as a comma, in quotes")  # fmt: skip
            continue
        # Not stripped: a name may begin or end in a space, and is looked for as it stands first.
        token = _cell(row, head.key)
        token = token if token in index.paths or token in index.by_name else token.strip()
        if not token or "\0" in token:
            wrong("label", "the name of the photograph is empty" if not token else "a name cannot hold a NUL")
            continue
        # Written on Windows.
        named = token if token in index.paths else token.replace("\\", "/")
        if os.path.isabs(named) or ".." in named.split("/"):
            wrong("label", f"{quoted(token)} leads out of the folder of the table: give a path below it")
            continue
        # `./a.jpg` is `a.jpg`; a name in whose folder it stands just so is left as it is.
        named = named if named in index.paths else posixpath.normpath(named)
        # A cell that ran through pandas beside an empty one is "2.0".
        text, can = (re.sub(r"(?<=\d)\.0+$", "", _cell(row, at).strip()) for at in (head.grade, gradable_column))
        if can.lower() not in _CAN_BE_GRADED:
            wrong("grade", f"{quoted(can)!r} does not say whether {quoted(token)} could be graded: 1, or 0 for no")
            continue
        if text.lower() in _NOTHING:
            wrong("grade", f"grade {text!r} of {quoted(token)} may mean that there is none: say 0, or leave it empty")
            continue
        grade = grade_of(text) if text not in ("", str(UNKNOWN)) else UNKNOWN
        if not _CAN_BE_GRADED[can.lower()]:
            grade = UNGRADABLE
        if grade is None:
            wrong("grade", f"grade {quoted(text)!r} of {quoted(token)} is not one of 0-4 (ICDR) or 5 (ungradable)")
            continue
        if not any(map(str.isdigit, text)) or not _CAN_BE_GRADED[can.lower()]:
            listing.in_words.add(grade)
        said = _cell(row, split_column).strip()
        own = split_of(said) if said else split
        if said and own is None:
            wrong("label", f"the split {quoted(said)!r} of {quoted(token)} is not train, valid or test")
            continue
        candidates = index.find(named, own)
        if len(candidates) > 1:
            doubts.append(candidates)
            wrong("ambiguous", f"{quoted(token)} may be {some(candidates)}")
            continue
        path = candidates[0] if candidates else named
        # Where a table tells patients, a number in a name may mean another one.
        patient = patient_of(path) if patient_column is None else patient_in(_cell(row, patient_column))
        known.add(Entry(path, grade, own, patient, label, line, token))
    return doubts
