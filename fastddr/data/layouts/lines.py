"""Layouts whose label files have a line a photograph, `name grade`: DDR's official release, and GDRBench's copy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fastddr import files
from fastddr.data.grades import UNGRADABLE
from fastddr.data.layouts.common import (
    SPLITS,
    Entry,
    Fence,
    Index,
    Listing,
    Named,
    leave_out,
    patient_of,
    quoted,
)
from fastddr.data.problems import Problem, errors, one_line
from fastddr.errors import UserError

#: What no file's name is: a path, this folder or the one above, a NUL.
_NO_NAME = re.compile(r"[/\\\0]|^\.\.?$")
#: Of a grade: what has more is none, and Python makes no number of thousands.
_DIGITS = 20
#: What GDRBench calls its lists, and which split that is.
_BENCH_LISTS = {"train": "train", "crossval": "valid", "test": "test"}


def official(folder: Path, fence: Fence) -> Listing | None:
    """DDR as released: a folder and a label file for each split, lines `007-0004-000.jpg 0`."""
    if not any((folder / f"{split}.txt").is_file() for split in SPLITS):
        return None
    listing = Listing("official", folder, [])
    index, known = Index(folder, [split for split in SPLITS if (folder / split).is_dir()]), Named(listing)
    listing.notes.extend(index.notes)
    for split in SPLITS:
        label_file, named = folder / f"{split}.txt", set[str]()

        def locate(name: str, split: str = split) -> str | None:
            path = f"{split}/{name}"
            # With a backslash it is a path of Windows, but where a file in the folder is called so.
            return None if "/" in name or (path not in index.paths and _NO_NAME.search(name)) else path

        if label_file.is_file():
            if not (folder / split).is_dir():
                raise UserError(f"{folder}: the folder {split}/ of the photographs in {split}.txt is missing.")
            fence.check(folder, label_file.name)
            wanted = f"the name of a photograph in {split}/"
            named = _read(label_file, split, locate, wanted, listing, index, known)
            if not named:
                what = f"the split {split!r} is empty; its lines should be `name.jpg grade`"
                _refuse_empty(listing, label_file, what)
        elif split == "test":
            listing.notes.append("There is no test split (no test.txt), so nothing is scored on it.")
        else:
            raise UserError(f"{folder}: the label file {split}.txt is missing; the official layout has one a split.")
        _orphans(listing, index, named, {split}, label_file.name, split)
    known.judge()
    return listing


def gdrbench(folder: Path, fence: Fence) -> Listing | None:
    """GDRBench (Che et al., MICCAI 2023): `images/DDR/mild_npdr/x.jpg`, and `splits/DDR_train.txt` and `_crossval.txt`.

    `folder` is the one that holds `images/` and `splits/`, or `images/NAME` of one of its sets.
    """
    asked = None
    if folder.parent.name == "images" and (folder.parent.parent / "splits" / f"{folder.name}_train.txt").is_file():
        folder, asked = folder.parent.parent, folder.name
    if not (folder / "images").is_dir() or not (folder / "splits").is_dir():
        return None
    lists = files.listed(folder / "splits", "*_train.txt")
    sets = [file.name.removesuffix("_train.txt") for file in lists]
    there = [name for name in sets if (folder / "images" / name).is_dir()]
    if not there:
        return None
    listing = Listing("gdrbench", folder, [])
    chosen = asked or ("DDR" if "DDR" in there else there[0])
    if asked is None and len(there) > 1:
        if chosen != "DDR":
            raise UserError(
                f"{folder}: it holds {len(there)} sets ({', '.join(there)}); give one, as {folder}/images/{chosen}."
            )
        listing.notes.append(f"Of the sets in {folder.name}/images only DDR is read: {', '.join(there)} are there.")

    def locate(name: str) -> str | None:
        parts = name.split("/")
        bad = parts[0] != chosen or any(_NO_NAME.search(part) for part in parts)
        return None if bad else f"images/{name}"

    index, named, known = Index(folder, [f"images/{chosen}"]), set[str](), Named(listing)
    listing.notes.extend(index.notes)
    for ending, split in _BENCH_LISTS.items():
        label_file = folder / "splits" / f"{chosen}_{ending}.txt"
        if label_file.is_file():
            fence.check(folder, f"splits/{label_file.name}")
            wanted = f"a path in images/, like {chosen}/nodr/x.jpg"
            named |= _read(label_file, split, locate, wanted, listing, index, known)
        elif split == "test":
            listing.notes.append("There is no test split (GDRBench has none), so nothing is scored on it.")
    known.judge()
    if not named:
        what = f"the lists of {chosen} are empty; their lines should be `path grade`"
        _refuse_empty(listing, folder / "splits", what)
    homes = {path.rpartition("/")[0] for path in named}
    _orphans(listing, index, named, homes, "splits/", f"images/{chosen}")
    return listing


def _refuse_empty(listing: Listing, place: Path, what: str) -> None:
    """Raise `UserError`: nothing can be used, because the first line is wrong or because there is none."""
    wrong = errors(listing.problems)
    raise UserError(f"{wrong[0].sentence(listing.root)}." if wrong else f"{place}: {what}.")


def _orphans(listing: Listing, index: Index, named: set[str], homes: set[str], labels: str, place: str) -> None:
    """Photographs in these folders that no line names."""
    orphans = sorted(path for path in index.paths if path not in named and path.rpartition("/")[0] in homes)
    note = f"photographs in {place}/ have no line in {labels} and are left out"
    leave_out(listing, orphans, "orphan", f"it has no line in {labels}", note)


def _read(
    label_file: Path,
    split: str,
    locate: Callable[[str], str | None],
    wanted: str,
    listing: Listing,
    index: Index,
    known: Named,
) -> set[str]:
    """Add the entries of one label file, and what is wrong with its lines; the paths that it names."""
    label = label_file.relative_to(listing.root).as_posix()
    found: set[str] = set()

    def wrong(kind: str, number: int, reason: str) -> None:
        listing.problems.append(Problem(f"{label}, line {number}", kind, one_line(reason)))

    for number, line in _lines(label_file):
        # From the right: a name may hold spaces.
        parts = line.strip().rsplit(None, 1)
        if len(parts) < 2 or not parts[1].isdecimal() or len(parts[1]) > _DIGITS:
            wrong("label", number, f"{quoted(line.strip())!r} is not `name.jpg grade`")
            continue
        name, grade = parts[0], int(parts[1])
        path = locate(name)
        if path is None:
            wrong("label", number, f"{quoted(name)} is a path that is not read here: give {wanted}")
        elif grade > UNGRADABLE:
            wrong(
                "grade",
                number,
                f"grade {grade} of {quoted(name)} is not one of 0-4 (ICDR) or 5 (ungradable)",
            )
        else:
            path = index.beside(path)
            found.add(path)
            known.add(Entry(path, grade, split, patient_of(path), label, number, name))
    return found


def _lines(label_file: Path) -> Iterable[tuple[int, str]]:
    try:
        text = label_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label_file}: the label file cannot be read as text ({error}).") from None
    # Not splitlines: it takes a form feed or a Unicode separator in a name for the end of a line.
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
