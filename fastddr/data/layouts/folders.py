"""Class folders: `train/0/*.jpg`, or names of grades; also `0/*.jpg` alone, a set without splits."""

from __future__ import annotations

import os
from pathlib import Path

from fastddr.data.grades import ICDR
from fastddr.data.layouts.common import (
    PHOTOGRAPHS,
    SPLITS,
    Entry,
    Listing,
    grade_of,
    is_photograph,
    leave_out,
    patient_of,
    split_of,
    subfolders,
    walk,
)  # fmt: skip
from fastddr.data.problems import Problem
from fastddr.errors import UserError


def folders(root: Path, *, strict: bool) -> Listing | None:
    """The listing of class folders, None where there are none.

    `strict` takes folders that are named as splits for class folders whatever they hold, so that a misspelt grade is
    told: right where the user pointed at them, wrong where they were come across.
    """
    below = subfolders(root)
    splits: dict[str, Path] = {}
    for folder in below:
        split = split_of(folder.name)
        if split and split in splits:
            if not strict:
                return None
            raise UserError(f"{root}: both {splits[split].name}/ and {folder.name}/ are the split {split!r}; keep one.")
        if split:
            splits[split] = folder
    if not splits:
        return _without_splits(root, below)
    if not strict and not any(grade_of(e.name) is not None for f in splits.values() for e in subfolders(f)):
        return None
    listing = Listing("folders", root, [])
    for split in SPLITS:
        if split not in splits:
            if split == "test":
                listing.notes.append("There is no test split (no folder test/), so nothing is scored on it.")
            continue
        before = len(listing.entries)
        for folder in subfolders(splits[split]):
            _class_folder(listing, folder, split)
        if len(listing.entries) == before:
            raise UserError(
                f"{splits[split]}: the split {split!r} is empty; it should hold class folders with photographs."
            )
    _orphans(listing)
    return listing


def _without_splits(root: Path, below: list[Path]) -> Listing | None:
    graded = [folder for folder in below if grade_of(folder.name) is not None]
    if len({grade_of(folder.name) for folder in graded}) < 2:
        return None
    listing = Listing("folders", root, [])
    for folder in below:
        # Beside grades, a folder that is none is a misspelt one as likely as not.
        _class_folder(listing, folder, None)
    _orphans(listing)
    return listing if listing.entries else None


def _orphans(listing: Listing) -> None:
    """Photographs below the root that lie in no class folder."""
    named = {entry.path for entry in listing.entries}
    orphans = sorted(path for path in walk(listing.root, listing.notes) if path not in named)
    nowhere = "in no class folder of a split"
    leave_out(listing, orphans, "orphan", f"it lies {nowhere}", f"photographs lie {nowhere} and are left out")


def _class_folder(listing: Listing, folder: Path, split: str | None) -> None:
    grade = grade_of(folder.name)
    if grade is None:
        raise UserError(
            f"{folder}: this class folder is no grade; name it 0-4, 5 (ungradable), or by its ICDR name: "
            f"{', '.join(ICDR)}."
        )
    if not any(map(str.isdigit, folder.name)):
        listing.in_words.add(grade)
    relative = folder.relative_to(listing.root).as_posix()
    try:
        with os.scandir(folder) as found:
            # A link to nothing, or to itself, is no file, but it was meant to be one.
            names = sorted(e.name for e in found if (e.is_symlink() or e.is_file()) and not e.name.startswith("."))
    except PermissionError as error:  # of another one, as of a server that is away, nobody knows what is in it
        listing.problems.append(Problem(relative, "unreadable", f"this folder cannot be read ({error.strerror})"))
        return
    other = [f"{relative}/{name}" for name in names if not is_photograph(name)]
    no_photograph = f"is not {', '.join(PHOTOGRAPHS)}"
    note = f"files in {relative}/ are left out, each of which {no_photograph}"
    leave_out(listing, other, "other-file", f"it {no_photograph}", note)
    listing.entries.extend(
        Entry(f"{relative}/{name}", grade, split, patient_of(name)) for name in names if is_photograph(name)
    )
