"""In which form a data set lies on disk, and what its labels say: `find`.

official    DR_grading/{train,valid,test}/*.jpg and {train,valid,test}.txt
kaggle      DR_grading.csv (id_code,diagnosis) and DR_grading/DR_grading/*.jpg, without splits
gdrbench    images/DDR/{nodr,mild_npdr,...}/*.jpg and splits/DDR_{train,crossval}.txt
folders     {train,valid,test}/{0..4 or names}/*.jpg, or {0..4}/*.jpg
csv, ...    a label table, known by its header (`table.py`)
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastddr.data.grades import UNGRADABLE
from fastddr.data.layouts.common import (
    PHOTOGRAPHS,
    PREPARED,
    SPLITS,
    Entry,
    Fence,
    Listing,
    located,
    patient_in,
    subfolders,
)  # fmt: skip
from fastddr.data.layouts.folders import folders
from fastddr.data.layouts.lines import gdrbench, official
from fastddr.data.layouts.table import table, tables, unknown_header
from fastddr.errors import UserError
from fastddr.runs import RunFolder, expanded

__all__ = ["PHOTOGRAPHS", "SPLITS", "Entry", "Listing", "find"]

#: How far below the given folder a data set is looked for. Two above IDRiD's "B. Disease Grading", its tables are three
#: below.
_DEPTH = 3
#: Of so many folders in one each is a patient's, not a set.
_MANY = 100
#: Tables that are not read.
_SHEETS = (".xls", ".xlsx", ".ods", ".tsv")
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tar.gz", ".tgz")


def find(data: str | Path, follow_links: bool = False) -> Listing:
    """The listing of a data set: of its folder, of one above it, or of a label table.

    Args:
        follow_links: also read label files to which links lead out of the folder; a table that was given is read.

    Raises:
        UserError: no such place, no known layout, more than one, or labels that cannot be read.
    """
    try:
        there = expanded(data).exists()
    except OSError as error:  # a name too long, no right to look
        raise UserError(f"--data {data}: this folder cannot be opened ({error}).") from None
    if not there:
        raise UserError(f"--data {data}: there is no such folder; give the one that holds the photographs.")
    place = located(data)
    if place.is_file() and place.suffix.lower() == ".csv":
        return _whole(table(place), Fence(place.parent, follow_links))
    if not place.is_dir():
        packed = _packed([place.name])
        raise UserError(
            f"--data {data}: "
            + (f"{packed}, and give the folder." if packed else
               "this is a file; give the folder that holds the photographs, or a label table (.csv).")
        )  # fmt: skip
    level, fence = [place], Fence(place, follow_links)
    found: list[tuple[Path, Listing]] = []
    refused: list[tuple[Path, UserError]] = []
    for depth in range(_DEPTH + 1):
        look = _beside if found else _in
        found += [
            (folder, listing)
            for folder in level
            if (listing := look(folder, place, fence, refused, strict=depth == 0)) is not None
        ]
        if len(found) > 1:
            where = ", ".join(str(folder.relative_to(place)) for folder, _ in found)
            raise UserError(f"{place}: several data sets lie below it ({where}); give one of these folders.")
        level = list(_next(level, found[0][1].root if found else None))
    for folder, refusal in refused:
        # What looked like splits or grades was neither where a label file tells of what is in there.
        if not found or found[0][1].layout == "folders" or not _touch(folder, found[0][1].root):
            unread = _unread(place, fence)
            raise UserError(str(refusal) if unread is None else f"{str(refusal).removesuffix('.')}; {unread}.")
    if found:
        return _whole(found[0][1], fence)
    raise UserError(
        f"{place}: no known layout; expected DR_grading/ with train.txt, valid.txt and test.txt, a label table "
        "(DR_grading.csv, or a CSV with the header path,grade), or class folders like train/0/ or train/mild/"
        f"{_instead(place, fence)}."
    )


def _instead(folder: Path, fence: Fence) -> str:
    """What lies in a folder that holds no data set and may be the reason; empty where there is nothing to say."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f" (what is in it cannot be listed: {error.strerror})"
    packed = _packed(names)
    if packed:
        return f"; {packed}"
    unread = _unread(folder, fence)
    return "" if unread is None else f"; {unread}"


def _unread(top: Path, fence: Fence) -> str | None:
    """What to do with a table in a folder, or as far below it as a set is looked for, that is not read."""
    level = [top]
    for _ in range(_DEPTH + 1):
        for folder in level:
            for file, header in _unread_in(folder, top, fence):
                name = file.relative_to(top)
                if header is None:
                    return f"{name} is a table in another form: save it as CSV"
                return f"the header of {name} is {header}, which is none of those that are known (docs/data.md)"
        level = [one for folder in level for one in subfolders(folder) if not _is_run(one)]
    return None


def _unread_in(folder: Path, top: Path, fence: Fence) -> Iterator[tuple[Path, str | None]]:
    """The tables in a folder that are not read, with their header; None where that is not text."""
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:
        return
    for file in (folder / name for name in names if name.lower().endswith((".csv", *_SHEETS)) and name[0] not in ".~"):
        if fence.outside(top, file.relative_to(top).as_posix()) is None:
            header = unknown_header(file)
            if header is not None or file.suffix.lower() != ".csv":
                yield file, header


def _packed(names: Sequence[str]) -> str | None:
    """What to do with an archive among these names; None where there is none. DDR comes as ten parts of one."""
    parts = [name for name in names if re.search(r"\.zip\.\d+$", name.lower())]
    if parts:
        whole = parts[0].rpartition(".")[0]
        return f"{whole} lies there in parts: join them (`cat {whole}.0* > {whole}`) and unpack it"
    whole = next((name for name in names if name.lower().endswith(_ARCHIVES)), "")
    return f"{whole} is an archive: unpack it" if whole else None


def _in(
    folder: Path, top: Path, fence: Fence, refused: list[tuple[Path, UserError]], *, strict: bool
) -> Listing | None:
    """The set in a folder. Folders that look like classes and are none go to `refused`; then only labels count."""
    try:
        by_labels = official(folder, fence) or gdrbench(folder, fence) or tables(folder, top, fence)
        if by_labels is not None or refused:
            return by_labels
        try:
            found = folders(folder, strict=strict)
            if found is not None:
                _refuse_numbered(found, top, fence)
            return found
        except UserError as error:
            refused.append((folder, error))
            return None
    except PermissionError:
        if strict:
            raise
        return None  # a neighbour of the data set, like lost+found


def _refuse_numbered(listing: Listing, top: Path, fence: Fence) -> None:
    """Raise `UserError` where folders are numbered as grades, but not all of 0-4, beside a table that is not read.

    They may as well be parts, clinics, visits or patients, and the grades in the table.
    """
    names = {entry.path.partition("/")[0] for entry in listing.entries if entry.split is None}
    if not names or not all(name.isdigit() for name in names) or names >= set("01234"):
        return
    for home in {listing.root, listing.root.parent if listing.root != top else top}:
        for file, _ in _unread_in(home, top, fence):
            raise UserError(
                f"{listing.root}: its folders {', '.join(sorted(names))} may be grades or mere numbers, and "
                f"{file.name} beside them may hold the grades; make it a label table (path,grade), or move it away if "
                "the folders are the grades."
            )


def _touch(folder: Path, other: Path) -> bool:
    """Whether one of two folders lies in the other."""
    return folder.is_relative_to(other) or other.is_relative_to(folder)


def _beside(
    folder: Path, top: Path, fence: Fence, refused: list[tuple[Path, UserError]], *, strict: bool
) -> Listing | None:
    """As `_in`, where a set was found already: what cannot be read there is no second one."""
    try:
        return _in(folder, top, fence, list(refused), strict=strict)
    except UserError:
        return None


def _next(level: Sequence[Path], own: Path | None) -> Iterator[Path]:
    """The folders in those of a level that may be or hold a data set, or a second one: not in `own`, the first's.

    A run is none, though its manifest.csv is a table of labels. Beside a set that was found, what has more than `_MANY`
    folders is passed over: it has one for each patient, not for each set.
    """
    for folder in level:
        if own is not None and folder.is_relative_to(own):
            continue
        inside = subfolders(folder)
        if own is not None:
            real = own.resolve()
            inside = [] if len(inside) > _MANY else [one for one in inside if not one.resolve().is_relative_to(real)]
        yield from (one for one in inside if not _is_run(one))


def _is_run(folder: Path) -> bool:
    run = RunFolder(folder)
    return run.config.is_file() and run.manifest.is_file()


def _whole(listing: Listing, fence: Fence) -> Listing:
    """The listing with what `fastddr prepare` left out of it, and a note where its scale may begin at 1."""
    listing = _with_absent(listing, fence)
    grades = {entry.grade for entries in (listing.entries, listing.absent) for entry in entries}
    if 0 not in grades and (high := grades & {4, UNGRADABLE} - listing.in_words):
        listing.notes.append(
            f"No photograph is of grade 0 (no retinopathy), and some are of grade {max(high)}: if these labels begin "
            "at 1, each is one too high."
        )
    return listing


def _with_absent(listing: Listing, fence: Fence) -> Listing:
    """The listing of a prepared set, with what `fastddr prepare` left out of it."""
    for folder in (listing.root / PREPARED, listing.root.parent / PREPARED):
        file = folder / "absent.csv"
        if file.is_file():
            fence.check(folder.parent, f"{PREPARED}/absent.csv")
            with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
                reader = csv.DictReader(stream)
                try:
                    for row in reader:
                        patient = patient_in(row["patient"])
                        listing.absent.append(Entry(row["path"], int(row["grade"]), None, patient))
                except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
                    raise UserError(
                        f"{file}, line {reader.line_num}: this is not a row of path,grade,patient; restore the file, "
                        "or run `fastddr prepare` again."
                    ) from None
            break
    return listing
