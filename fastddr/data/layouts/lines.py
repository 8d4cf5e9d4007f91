"""Layouts whose label files have a line a photograph, `name grade`: DDR's official release, and GDRBench's copy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from fastddr import files
from fastddr.data.grades import UNGRADABLE
from fastddr.data.layouts.common import (
    SPLITS,
    Entry,
    Fence,
    Listing,
    Named,
    Names,
    is_photograph,
    patient_of,
    quoted,
    some,
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
    listing, names = Listing("official", folder, []), Names(folder)
    known = Named(listing)
    for split in SPLITS:
        label_file = folder / f"{split}.txt"
        if not label_file.is_file():
            if split == "test":
                listing.notes.append("There is no test split (no test.txt), so nothing is scored on it.")
                _orphans(listing, names, split, set(), label_file.name)
                continue
            raise UserError(f"{folder}: the label file {split}.txt is missing; the official layout has one a split.")
        if not (folder / split).is_dir():
            raise UserError(f"{folder}: the folder {split}/ of the photographs in {split}.txt is missing.")

        def locate(name: str, split: str = split) -> str | None:
            return None if _NO_NAME.search(name) else f"{split}/{name}"

        wanted = f"the name of a photograph in {split}/"
        fence.check(label_file, folder)
        named = _read(label_file, split, locate, wanted, listing, names, known)
        if not named:
            _refuse_empty(listing, label_file, f"the split {split!r} is empty; its lines should be `name.jpg grade`")
        _orphans(listing, names, split, {path.rpartition("/")[2] for path in named}, f"{split}.txt")
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
    listing, names = Listing("gdrbench", folder, []), Names(folder)
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

    named, known = set[str](), Named(listing)
    for ending, split in _BENCH_LISTS.items():
        label_file = folder / "splits" / f"{chosen}_{ending}.txt"
        if label_file.is_file():
            fence.check(label_file, folder)
            wanted = f"a path in images/, like {chosen}/nodr/x.jpg"
            named |= _read(label_file, split, locate, wanted, listing, names, known)
        elif split == "test":
            listing.notes.append("There is no test split (GDRBench has none), so nothing is scored on it.")
    known.judge()
    if not named:
        what = f"the lists of {chosen} are empty; their lines should be `path grade`"
        _refuse_empty(listing, folder / "splits", what)
    homes: dict[str, set[str]] = defaultdict(set)
    for path in named:
        home, _, name = path.rpartition("/")
        homes[home].add(name)
    for home, inside in sorted(homes.items()):
        if (folder / home).is_dir():
            _orphans(listing, names, home, inside, "splits/")
    return listing


def _refuse_empty(listing: Listing, place: Path, what: str) -> None:
    """Raise `UserError`: nothing can be used, because the first line is wrong or because there is none."""
    wrong = errors(listing.problems)
    raise UserError(f"{wrong[0].sentence(listing.root)}." if wrong else f"{place}: {what}.")


def _orphans(listing: Listing, names: Names, folder: str, named: set[str], labels: str) -> None:
    orphans = sorted(name for name in names.of(folder) - named if is_photograph(name))
    listing.problems.extend(Problem(f"{folder}/{name}", "orphan", f"it has no line in {labels}") for name in orphans)
    if orphans:
        listing.notes.append(
            f"{len(orphans)} photographs in {folder}/ have no line in {labels} and are left out: {some(orphans)}."
        )


def _read(
    label_file: Path,
    split: str,
    locate: Callable[[str], str | None],
    wanted: str,
    listing: Listing,
    names: Names,
    known: Named,
) -> set[str]:
    """Add the entries of one label file, and what is wrong with its lines; the paths that it names."""
    label = label_file.relative_to(listing.root).as_posix()
    found: set[str] = set()
    here = names.of(split) if listing.layout == "official" else frozenset()

    def wrong(kind: str, number: int, reason: str) -> None:
        listing.problems.append(Problem(f"{label}, line {number}", kind, one_line(reason)))

    for number, line in _lines(label_file):
        # From the right: a name may hold spaces.
        parts = line.strip().rsplit(None, 1)
        if len(parts) < 2 or not parts[1].isdecimal() or len(parts[1]) > _DIGITS:
            wrong("label", number, f"{quoted(line.strip())!r} is not `name.jpg grade`")
            continue
        name, grade = parts[0], int(parts[1])
        path: str | None = f"{split}/{name}"
        # What stands in the split's folder is no path; else it is looked at more closely.
        if name not in here and (path := locate(name)) is not None:
            path = names.path(path)
        if path is None:
            wrong("label", number, f"{quoted(name)} is a path that is not read here: give {wanted}")
        elif grade > UNGRADABLE:
            wrong(
                "grade",
                number,
                f"grade {grade} of {quoted(name)} is not one of 0-4 (ICDR) or 5 (ungradable)",
            )
        else:
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
