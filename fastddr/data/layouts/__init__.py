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
from fastddr.runs import RunFolder

__all__ = ["PHOTOGRAPHS", "SPLITS", "Entry", "Listing", "find"]

#: How far below the given folder a data set is looked for. Two above IDRiD's "B. Disease Grading", its tables are three
#: below.
_DEPTH = 3
#: Of so many folders in one each is a patient's, not a set.
_MANY = 100
#: The folders of DDR's release that hold no grades.
_LESIONS = {"lesion_segmentation", "lesion_detection"}
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tar.gz", ".tgz")


def find(data: str | Path, follow_links: bool = False) -> Listing:
    """The listing of a data set: of its folder, of one above it, or of a label table.

    Args:
        follow_links: also read label files to which links lead out of the folder; a table that was given is read.

    Raises:
        UserError: no such place, no known layout, more than one, or labels that cannot be read.
    """
    try:
        place = Path(data).expanduser()
        there = place.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a user that is none, no right to look
        raise UserError(f"--data {data}: this folder cannot be opened ({error}).") from None
    if not there:
        raise UserError(f"--data {data}: there is no such folder; give the one that holds the photographs.")
    place = located(data)
    if place.is_file() and place.suffix.lower() == ".csv":
        return _with_absent(table(place), Fence(place.parent, follow_links))
    if not place.is_dir():
        packed = _packed([place.name])
        raise UserError(
            f"--data {data}: "
            + (f"{packed}, and give the folder." if packed else
               "this is a file; give the folder that holds the photographs, or a label table (.csv).")
        )  # fmt: skip
    level, fence = [place], Fence(place, follow_links)
    found: list[tuple[Path, Listing]] = []
    for depth in range(_DEPTH + 1):
        look = _beside if found else _in
        found += [
            (folder, listing)
            for folder in level
            if (listing := look(folder, place, fence, strict=depth == 0)) is not None
        ]
        if len(found) > 1:
            where = ", ".join(str(folder.relative_to(place)) for folder, _ in found)
            raise UserError(f"{place}: several data sets lie below it ({where}); give one of these folders.")
        level = list(_next(level, found[0][1].root if found else None))
    if found:
        return _with_absent(found[0][1], fence)
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
    if _LESIONS & {folder.name, *names}:
        return "; this is DDR's part with lesions, and the photographs with grades are in its DR_grading"
    inside = [name for name in names if fence.holds(folder / name, folder)]
    headers = [(name, header) for name in inside if (header := unknown_header(folder / name)) is not None]
    if headers:
        name, header = headers[0]
        return f"; the header of {name} is {header}, which is none of those that are known (docs/data.md)"
    if any(name.lower().endswith(PHOTOGRAPHS) for name in names):
        return "; photographs lie in it, and no labels beside them"
    return ""


def _packed(names: Sequence[str]) -> str | None:
    """What to do with an archive among these names; None where there is none. DDR comes as ten parts of one."""
    parts = [name for name in names if re.search(r"\.zip\.\d+$", name.lower())]
    if parts:
        whole = parts[0].rpartition(".")[0]
        return f"{whole} lies there in parts: join them (`cat {whole}.0* > {whole}`) and unpack it"
    whole = next((name for name in names if name.lower().endswith(_ARCHIVES)), "")
    return f"{whole} is an archive: unpack it" if whole else None


def _in(folder: Path, top: Path, fence: Fence, *, strict: bool) -> Listing | None:
    try:
        by_labels = official(folder, fence) or gdrbench(folder, fence) or tables(folder, top, fence)
        return by_labels or folders(folder, strict=strict)
    except PermissionError:
        if strict:
            raise
        return None  # a neighbour of the data set, like lost+found


def _beside(folder: Path, top: Path, fence: Fence, *, strict: bool) -> Listing | None:
    """As `_in`, where a set was found already: what cannot be read there is no second one."""
    try:
        return _in(folder, top, fence, strict=strict)
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


def _with_absent(listing: Listing, fence: Fence) -> Listing:
    """The listing of a prepared set, with what `fastddr prepare` left out of it."""
    for folder in (listing.root / PREPARED, listing.root.parent / PREPARED):
        file = folder / "absent.csv"
        if file.is_file():
            fence.check(file, folder.parent)
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
