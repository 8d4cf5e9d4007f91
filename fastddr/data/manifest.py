"""What is on disk: the photographs of a data set, with grade, split and size, and one fingerprint of them all.

Two layouts are known so far: the official release of DDR (a folder and a label file for each split, lines
`name.jpg grade`) and class folders (`train/0/*.jpg`, or names of grades). Whatever is wrong, missing or doubled
is an error that names file and line; what is merely left out is a note that the report shows.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image, UnidentifiedImageError
from platformdirs import user_cache_dir

from fastddr.data.grades import ICDR, UNGRADABLE
from fastddr.errors import UserError

SPLITS = ("train", "valid", "test")
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
#: Folder names of splits and grades, spelled without case, spaces, dashes and underscores.
_SPLIT_FOLDERS = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid",
                  "test": "test", "testing": "test"}  # fmt: skip
_GRADE_FOLDERS = {
    **{str(grade): grade for grade in range(6)},
    "nodr": 0, "no": 0, "none": 0, "normal": 0, "mild": 1, "mildnpdr": 1, "milddr": 1,
    "moderate": 2, "moderatenpdr": 2, "moderatedr": 2, "severe": 3, "severenpdr": 3, "severedr": 3,
    "pdr": 4, "proliferative": 4, "proliferativedr": 4, "proliferatedr": 4, "ungradable": 5,
}  # fmt: skip
#: EXIF orientations (tag 0x0112) that turn a photograph on its side.
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class Manifest:
    """The photographs of a data set. A photograph's id is its row."""

    root: Path
    """Folder that `path` is relative to."""
    path: tuple[str, ...]
    """File of each photograph, relative, with forward slashes."""
    grade: Int[np.ndarray, " n"]
    """0-4 (ICDR), 5 = ungradable."""
    split: tuple[str, ...]
    """train, valid or test."""
    width: Int[np.ndarray, " n"]
    """Pixels, of the upright photograph (EXIF applied)."""
    height: Int[np.ndarray, " n"]
    size: Int[np.ndarray, " n"]
    """Bytes of each file."""
    notes: tuple[str, ...]
    """What was left out, and why, for the report."""

    def __len__(self) -> int:
        return len(self.path)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (relative path, bytes, grade, split) of all photographs, in hex."""
        rows = sorted(zip(self.path, self.size.tolist(), self.grade.tolist(), self.split, strict=True))
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def files(self) -> list[str]:
        """Absolute path of each photograph."""
        return [os.path.join(self.root, path) for path in self.path]

    def ids(self, split: str) -> Int[np.ndarray, " m"]:
        """Ids of the gradable photographs of a split.

        Raises:
            UserError: there are none.
        """
        found = np.flatnonzero((np.array(self.split) == split) & (self.grade < UNGRADABLE))
        if not len(found):
            raise UserError(f"{self.root}: the split {split!r} has no gradable photograph; add some to it.")
        return found

    def has(self, split: str) -> bool:
        """Whether the split holds a gradable photograph."""
        return bool(((np.array(self.split) == split) & (self.grade < UNGRADABLE)).any())

    def counts(self) -> dict[str, list[int]]:
        """Photographs of each grade 0-5, by split."""
        splits = np.array(self.split)
        return {
            split: np.bincount(self.grade[splits == split], minlength=UNGRADABLE + 1).tolist()
            for split in SPLITS
            if split in self.split
        }

    def to_csv(self) -> str:
        """All rows as CSV, behind a comment line with the fingerprint."""
        text = io.StringIO()
        text.write(f"# fingerprint: {self.fingerprint}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "path", "split", "grade", "width", "height", "bytes"])
        columns = (self.path, self.split, self.grade, self.width, self.height, self.size)
        writer.writerows([row, *map(str, values)] for row, values in enumerate(zip(*columns, strict=True)))
        return text.getvalue()


@dataclass(frozen=True)
class _Entry:
    path: str
    grade: int
    split: str


def read(data: str | Path, on_progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of a folder: DDR-dataset, DR_grading, or class folders.

    Args:
        data: the folder.
        on_progress: called with (headers read, photographs) now and then.

    Raises:
        UserError: no such folder, no known layout, an empty split, or a wrong, missing or doubled entry.
    """
    try:
        root = Path(data).expanduser()
        there = root.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a user that is none, no right to look
        raise UserError(f"--data {data}: this folder cannot be opened ({error}).") from None
    if not there:
        raise UserError(f"--data {data}: there is no such folder; give the one that holds the photographs.")
    if not root.is_dir():
        raise UserError(f"--data {data}: this is a file; give the folder that holds the photographs.")
    root = root.resolve()
    for folder in (root, root / "DR_grading"):
        if any((folder / f"{split}.txt").is_file() for split in SPLITS):
            entries, notes = _official(folder)
            break
    else:
        folder = root
        entries, notes = _class_folders(root)
    # By split and name: ids, and with them a run's windows, must not depend on the order of lines in a file.
    entries.sort(key=lambda entry: (SPLITS.index(entry.split), entry.path))
    ungradable = [sum(e.grade == UNGRADABLE and e.split == split for e in entries) for split in SPLITS]
    if any(ungradable):
        each = ", ".join(f"{n} in {split}" for n, split in zip(ungradable, SPLITS, strict=True) if n)
        notes.append(f"{sum(ungradable)} ungradable photographs (grade 5) are counted but left out: {each}.")
    if "test" in {e.split for e in entries} and all(e.grade == UNGRADABLE for e in entries if e.split == "test"):
        notes.append("The test split holds no gradable photograph, so nothing is scored on it.")
    sizes = _headers(folder, [entry.path for entry in entries], on_progress)
    return Manifest(
        root=folder,
        path=tuple(entry.path for entry in entries),
        grade=np.array([entry.grade for entry in entries], dtype=np.int64),
        split=tuple(entry.split for entry in entries),
        size=np.array([size for size, _, _ in sizes], dtype=np.int64),
        width=np.array([width for _, width, _ in sizes], dtype=np.int64),
        height=np.array([height for _, _, height in sizes], dtype=np.int64),
        notes=tuple(notes),
    )


def _photographs(folder: Path) -> list[str]:
    with os.scandir(folder) as found:
        return sorted(e.name for e in found if e.name.lower().endswith(PHOTOGRAPHS) and not e.name.startswith("."))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _official(folder: Path) -> tuple[list[_Entry], list[str]]:
    entries: list[_Entry] = []
    notes: list[str] = []
    for split in SPLITS:
        label_file = folder / f"{split}.txt"
        if not label_file.is_file():
            if split == "test":
                notes.append("There is no test split (no test.txt), so nothing is scored on it.")
                continue
            raise UserError(f"{folder}: the label file {split}.txt is missing; the official layout has one a split.")
        if not (folder / split).is_dir():
            raise UserError(f"{folder}: the folder {split}/ of the photographs in {split}.txt is missing.")
        there = set(_photographs(folder / split))
        lines: dict[str, int] = {}
        for number, name, grade in _label_lines(label_file):
            place = f"{label_file}, line {number}"
            if "/" in name or "\\" in name or name in (".", ".."):
                raise UserError(f"{place}: {name} is a path; give the name of a photograph in {split}/.")
            if name in lines:
                raise UserError(f"{place}: {name} stands already in line {lines[name]}; remove one of the two.")
            if name not in there and not (folder / split / name).is_file():
                raise UserError(f"{place}: there is no photograph {split}/{name}; restore it or remove the line.")
            lines[name] = number
            entries.append(_Entry(f"{split}/{name}", grade, split))
        if not lines:
            raise UserError(f"{label_file}: the split {split!r} is empty; its lines should be `name.jpg grade`.")
        orphans = sorted(there - lines.keys())
        if orphans:
            notes.append(
                f"{len(orphans)} photographs in {split}/ have no line in {split}.txt and are left out: "
                f"{_some(orphans)}."
            )
    return entries, notes


def _label_lines(label_file: Path) -> Iterable[tuple[int, str, int]]:
    try:
        text = label_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label_file}: the label file cannot be read as text ({error}).") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        # From the right: a name may hold spaces.
        name, _, grade = line.strip().replace("\t", " ").rpartition(" ")
        if not name or not grade.isdecimal():
            raise UserError(f"{label_file}, line {number}: {line.strip()!r} is not `name.jpg grade`.")
        if int(grade) > UNGRADABLE:
            raise UserError(
                f"{label_file}, line {number}: grade {grade} of {name.strip()} is not one of 0-4 (ICDR) or "
                "5 (ungradable)."
            )
        yield number, name.strip(), int(grade)


def _spelled(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _grade_of_folder(name: str) -> int | None:
    """The grade that a class folder's name says ("2", "Moderate NPDR", "Grade 2", "2_moderate"), else None."""
    if (grade := _GRADE_FOLDERS.get(_spelled(name))) is not None:
        return grade
    match = re.fullmatch(r"(?:grade|class|level)?[\s_-]*([0-5])(?:[\s_-]+(\D+))?", name, re.IGNORECASE)
    if match is None:
        return None
    grade = int(match[1])
    # A name behind the number must say the same: a wrong grade would be worse than a refusal.
    return grade if match[2] is None or _GRADE_FOLDERS.get(_spelled(match[2])) == grade else None


def _class_folders(root: Path) -> tuple[list[_Entry], list[str]]:
    folders = sorted(e for e in root.iterdir() if e.is_dir())
    splits: dict[str, Path] = {}
    for folder in folders:
        split = _SPLIT_FOLDERS.get(_spelled(folder.name))
        if split and split in splits:
            raise UserError(f"{root}: both {splits[split].name}/ and {folder.name}/ are the split {split!r}; keep one.")
        if split:
            splits[split] = folder
    if not splits:
        raise UserError(
            f"{root}: no known layout; expected DR_grading/ with train.txt, valid.txt and test.txt, "
            "or class folders like train/0/ or train/mild/."
        )
    entries: list[_Entry] = []
    notes: list[str] = []
    for split in SPLITS:
        if split not in splits:
            if split == "test":
                notes.append("There is no test split (no folder test/), so nothing is scored on it.")
                continue
            raise UserError(
                f"{root}: the split {split!r} is missing; expected a folder {split}/ with one folder a grade."
            )
        before = len(entries)
        loose = _photographs(splits[split])
        if loose:
            notes.append(
                f"{len(loose)} photographs lie in {splits[split].name}/ beside the class folders and are left out: "
                f"{_some(loose)}."
            )
        for folder in sorted(e for e in splits[split].iterdir() if e.is_dir() and not e.name.startswith(".")):
            grade = _grade_of_folder(folder.name)
            if grade is None:
                raise UserError(
                    f"{folder}: this class folder is no grade; name it 0-4, 5 (ungradable), or by its ICDR name: "
                    f"{', '.join(ICDR)}."
                )
            relative = folder.relative_to(root).as_posix()
            if below := [e.name for e in sorted(folder.iterdir()) if e.is_dir() and not e.name.startswith(".")]:
                notes.append(f"Folders below {relative}/ are not read and left out: {_some(below)}.")
            photographs = _photographs(folder)
            with os.scandir(folder) as found:
                other = {e.name for e in found if e.is_file() and not e.name.startswith(".")} - set(photographs)
            if other:
                notes.append(
                    f"{len(other)} files in {relative}/ are not {', '.join(PHOTOGRAPHS)} and are left out: "
                    f"{_some(sorted(other))}."
                )
            entries.extend(_Entry(f"{relative}/{name}", grade, split) for name in photographs)
        if len(entries) == before:
            raise UserError(
                f"{splits[split]}: the split {split!r} is empty; it should hold class folders with photographs."
            )
    return entries, notes


# ---------------------------------------------------------------------------------------------- headers


def _header(path: Path, relative: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow turns a TIFF by itself, and its size is that of the upright picture already.
            sideways = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        empty = path.is_file() and path.stat().st_size == 0
        reason = "is empty" if empty else f"is not a photograph that can be opened ({error})"
        raise UserError(f"{path}: the file {reason}; replace it, or take {relative} out of the set.") from None
    return (height, width) if sideways else (width, height)


def _headers(
    folder: Path, relative: Sequence[str], on_progress: Callable[[int, int], None] | None
) -> list[tuple[int, int, int]]:
    """(bytes, width, height) of each file, from a cache where size and time of change are the same."""
    cache_file = _cache_folder() / "headers" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    try:
        cached = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cached = {}  # no cache yet, or a broken one: it is made anew

    def one(name: str) -> tuple[int, int, int, int]:
        path = folder / name
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: this photograph cannot be read ({error.strerror}); restore it.") from None
        known = cached.get(name)
        if known and known[:2] == [status.st_size, status.st_mtime_ns]:
            return status.st_size, status.st_mtime_ns, known[2], known[3]
        return status.st_size, status.st_mtime_ns, *_header(path, name)

    rows = []
    with ThreadPoolExecutor(8) as pool:
        for row in pool.map(one, relative):
            rows.append(row)
            if on_progress and (len(rows) % 256 == 0 or len(rows) == len(relative)):
                on_progress(len(rows), len(relative))
    fresh = {name: list(row) for name, row in zip(relative, rows, strict=True)}
    if fresh != cached:
        _write_cache(cache_file, json.dumps(fresh, ensure_ascii=False))
    return [(size, width, height) for size, _, width, height in rows]


def _cache_folder() -> Path:
    return Path(os.environ.get("FASTDDR_CACHE") or user_cache_dir("fastddr"))


def _write_cache(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        # Without a cache every start reads the headers again: slower, but right.
        temporary.unlink(missing_ok=True)
