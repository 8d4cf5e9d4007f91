"""What all layouts share: an entry, a listing, and how splits and grades are spelled."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

from fastddr import files
from fastddr.data.grades import UNGRADABLE, UNKNOWN
from fastddr.data.problems import Problem, one_line
from fastddr.errors import PASSING, UserError
from fastddr.runs import expanded

SPLITS = ("train", "valid", "test")
#: Where `fastddr prepare` keeps its tables and sheets.
PREPARED = "prepared"
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
#: Names of splits and grades, spelled without case, spaces, dashes and underscores.
_SPLIT_NAMES = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid",
                "test": "test", "testing": "test"}  # fmt: skip
_GRADE_NAMES = {
    **{str(grade): grade for grade in range(UNGRADABLE + 1)},
    "nodr": 0, "no": 0, "none": 0, "normal": 0, "mild": 1, "mildnpdr": 1, "milddr": 1,
    "moderate": 2, "moderatenpdr": 2, "moderatedr": 2, "severe": 3, "severenpdr": 3, "severedr": 3,
    "pdr": 4, "proliferative": 4, "proliferativedr": 4, "proliferatedr": 4, "ungradable": 5,
}  # fmt: skip


#: Folders that a system puts beside photographs, in lower case.
_OF_SYSTEM = ("__macosx", "$recycle.bin", "system volume information", "@eadir", "lost+found")
#: The name of a photograph of EyePACS, which tells its patient. That of a copy may go on: `10_left-600`.
_EYE = re.compile(r"(\d+)_(?:left|right)(?![^\W_])", re.IGNORECASE)
#: Characters of a line of a label file that a sentence shows.
_QUOTED = 40
#: What stands in a column of patients where there is none, in lower case; with a # what a spreadsheet writes.
_NO_PATIENT = ("", "-", "na", "n/a", "nan", "none", "null", "unknown", "anon", "anonymous", "<na>", "#n/a", "#na",
               "#nv", "#name?", "#null!", "#num!", "#ref!", "#value!", "#div/0!")  # fmt: skip


class Entry(NamedTuple):
    """A photograph that a layout names; it may be missing on disk. A tuple, because there may be a million of them."""

    path: str
    """Relative to the listing's root, with forward slashes."""
    grade: int
    """0-5, or -1 where the label file gives none."""
    split: str | None = None
    """train, valid or test; None where the layout has no splits."""
    patient: str | None = None
    label: str = ""
    """The label file that names it, relative to the root; empty where its folder does."""
    line: int = 0
    """In the label file."""
    token: str = ""
    """What the label file calls it."""

    @property
    def where(self) -> str:
        """Label file and line, as the beginning of a reason."""
        return f"{self.label}, line {self.line}: " if self.label else ""


@dataclass(frozen=True)
class Listing:
    """What a layout says of a data set, before anybody has looked at a photograph."""

    layout: str
    """official, kaggle, gdrbench, folders, or what a label table's header says."""
    root: Path
    entries: list[Entry]
    problems: list[Problem] = field(default_factory=list)
    """Of the labels, and what has none."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the report."""
    absent: list[Entry] = field(default_factory=list)
    """Photographs that `fastddr prepare` left out of this set: they take part where splits are drawn."""
    in_words: set[int] = field(default_factory=set)
    """Grades that some labels say without a number: these begin at no number."""


def spelled(name: str) -> str:
    """A name without case and without all that is no letter or digit."""
    return "".join(c for c in name.lower() if c.isalnum())


def split_of(name: str) -> str | None:
    """The split that a folder's name, or a table's cell, says; else None."""
    return _SPLIT_NAMES.get(spelled(name))


def split_in(names: Sequence[str]) -> str | None:
    """The split that one of these names tells in one of its words ("a. Training Set"); None where none or two do."""
    words = {split_of(word) for name in names for word in re.split(r"[\W_\d]+|(?<=[a-z])(?=[A-Z])", name)} - {None}
    return words.pop() if len(words) == 1 else None


def grade_of(name: str) -> int | None:
    """The grade that a name says ("2", "Moderate NPDR", "Grade 2", "2_moderate"), else None."""
    # "-1" and "4+" are spelled like grades, and are none.
    if not re.fullmatch(r"[^\W_]+(?:[ _-]+[^\W_]+)*", name):
        return None
    if (grade := _GRADE_NAMES.get(spelled(name))) is not None:
        return grade
    match = re.fullmatch(r"(?:grade|class|level)?[\s_-]*([0-5])(?:[\s_-]+(\D+))?", name, re.IGNORECASE)
    if match is None:
        return None
    grade = int(match[1])
    # A name behind the number must say the same: a wrong grade would be worse than a refusal.
    return grade if match[2] is None or _GRADE_NAMES.get(spelled(match[2])) == grade else None


def patient_of(path: str) -> str | None:
    """The patient that a name of EyePACS tells (`10_left.jpeg`), for labels that say nothing of patients."""
    match = _EYE.match(path.rpartition("/")[2])
    return match[1] if match else None


def patient_in(cell: str) -> str | None:
    """The patient that a table's cell names, in one of the ways in which Unicode spells it, as files are `folded`."""
    said = unicodedata.normalize("NFC", cell.strip())
    # A column of numbers that ran through pandas beside an empty cell: 17 is "17.0". Other dots are part of an id.
    number = re.fullmatch(r"(\d+)\.0", said)
    return None if said.lower() in _NO_PATIENT else number[1] if number else said


def folded(name: str) -> str:
    """A name without case, and spelled in one of the ways in which Unicode spells it: macOS takes letters apart."""
    low = name.lower()
    return low if low.isascii() else unicodedata.normalize("NFC", low)


def located(data: str | Path) -> Path:
    """Where what the user gave really lies; but a label table that is a link is read where the link is."""
    place = expanded(data)
    own = place.parent.resolve() / place.name
    return own if own.suffix.lower() == ".csv" and own.is_file() else place.resolve()


class Fence:
    """Which files may be read: a set from elsewhere must not choose which files of this machine are read or told of."""

    def __init__(self, given: Path, follow_links: bool) -> None:
        """`given` is the folder that the user gave, or a table in it; with `follow_links` all are read."""
        self._open, real = follow_links, os.path.realpath(given.parent if given.is_file() else given)
        self._place: Callable[[str | Path, str], tuple[str, str]] = cache(partial(_place, real))

    def outside(self, root: str | Path, path: str) -> str | None:
        """Why a file of the set at `root` may not be read, as the middle of a sentence; None where it may.

        A link leads out of the set, and out of the folder above it that was given."""
        if self._open:
            return None
        folder, _, name = path.rpartition("/")
        real, fence = self._place(root, folder)
        if not f"{real}{os.sep}".startswith(fence):
            return f"its folder is a link that leads out of the data, to {real}"
        file = os.path.join(real, name)
        if os.path.islink(file) and not (target := os.path.realpath(file)).startswith(fence):
            return f"it is a link that leads out of the data, to {target}"
        return None

    def check(self, root: Path, label_file: str) -> None:
        """Raise `UserError` where a label file of the set at `root` may not be read."""
        why = self.outside(root, label_file)
        if why is not None:
            raise UserError(
                f"{root / label_file}: {why}; copy it into the set, or take such links with --follow-links."
            )


def _place(given: str, root: str | Path, folder: str) -> tuple[str, str]:
    """Where a folder of the set at `root` really lies, and the folder that it may not lie outside of."""
    own = os.path.realpath(root)
    # Where a part of a set is given, the set is the fence.
    fence = own if Path(given).is_relative_to(own) else given
    return os.path.realpath(os.path.join(root, folder)), fence.rstrip(os.sep) + os.sep


def is_photograph(name: str) -> bool:
    """By its name: a known extension, in any case, and not hidden."""
    return name.lower().endswith(PHOTOGRAPHS) and not name.startswith(".")


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted, without those that hold no data and what may not be read.

    Raises:
        OSError: it cannot be listed for another reason: what is not seen now would make another set of it.
    """
    try:
        with os.scandir(folder) as found:
            names = sorted(entry.name for entry in found if _is_folder(entry))
    except (PermissionError, FileNotFoundError):
        return []
    return [folder / name for name in names if not aside(str(folder), name)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link that leads to itself; its neighbours may be folders
        if error.errno in PASSING:
            raise
        return False


def aside(folder: str, name: str) -> bool:
    """Whether a folder holds no data: hidden, the system's, or where `fastddr prepare` keeps its tables and sheets."""
    if name.startswith(".") or name.lower() in _OF_SYSTEM:
        return True
    return name == PREPARED and os.path.isfile(os.path.join(folder, name, "settings.json"))


def folders_below(root: str, unlisted: Callable[[OSError], None] = files.unlisted) -> Iterator[tuple[str, list[str]]]:
    """Each folder below a folder that may hold data, through links too, with the sorted names of its files.

    `unlisted` hears of each that cannot be listed; without it that is an error.
    """
    seen: set[tuple[int, int]] = set()
    for folder, inside, names in os.walk(root, onerror=unlisted, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            inside[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = sorted(name for name in inside if not aside(folder, name))
        yield folder, sorted(names)


def walk(root: Path, notes: list[str], below: str = "") -> Iterator[str]:
    """Paths of all photographs in `folders_below` a folder of `root`; `notes` hear of each that may not be read."""

    def unlisted(error: OSError) -> None:
        if isinstance(error, PermissionError):
            notes.append(f"{error.filename}: this folder cannot be read ({error.strerror}) and is left out.")
        else:
            files.unlisted(error)

    for folder, names in folders_below(os.path.join(root, below), unlisted):
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        yield from (prefix + name for name in names if is_photograph(name))


class Index:
    """The photographs below some folders of a set, by path, by name, and by name without extension."""

    def __init__(self, root: Path, below: Iterable[str] = ("",)) -> None:
        self.notes: list[str] = []
        #: In the order of the walk, which decides what a sentence shows first.
        self.paths = dict.fromkeys(path for folder in below for path in walk(root, self.notes, folder)).keys()
        # What many photographs may mean is sought once: their table may name each of them so.
        self._several: dict[tuple[str, str | None], list[str]] = {}
        self._split_in = cache(lambda folder: split_in(folder.split("/")))

    @cached_property
    def by_name(self) -> Mapping[str, Sequence[str]]:
        """The paths of each name, with its extension and without."""
        found = defaultdict(list)
        for path in self.paths:
            name = path.rpartition("/")[2]
            for bare in (name, os.path.splitext(name)[0]):
                found[bare].append(path)
        return found

    @cached_property
    def _any_case(self) -> Mapping[str, Sequence[str]]:
        """As `by_name` and by path, `folded`: asked where nothing is written just so."""
        found = defaultdict(list)
        for path in self.paths:
            found[folded(path)].append(path)
        for bare, paths in self.by_name.items():
            found[folded(bare)] += paths
        return found

    def find(self, token: str, split: str | None) -> Sequence[str]:
        """The photographs that a token may mean: a path, else a name, else one of them as `folded`; where several bear
        it, those of the split."""
        if token in self.paths:
            return [token]
        named = self.by_name.get(token) or self._any_case.get(folded(token), [])
        if len(named) < 2:
            return named
        if (token, split) not in self._several:
            found = self._several.setdefault((token, None), sorted(set(named)))
            if len(found) > 1 and split is not None:
                found = [path for path in found if self._split_in(path.rpartition("/")[0]) == split] or found
            self._several[token, split] = found
        return self._several[token, split]

    def beside(self, path: str) -> str:
        """The path, or the only photograph in its folder that is spelled like it but for case and Unicode."""
        if path in self.paths:
            return path
        folder = path.rpartition("/")[0]
        same = [other for other in self._any_case.get(folded(path), []) if other.rpartition("/")[0] == folder]
        return same[0] if len(same) == 1 else path

    def near(self, path: str) -> str | None:
        """A photograph of the same name in another folder, or with another extension."""
        name = path.rpartition("/")[2]
        named = (self._any_case.get(folded(bare), []) for bare in (name, os.path.splitext(name)[0]))
        return next((paths[0] for paths in named if paths), None)


class Named:
    """What the labels of a listing have named so far, in whichever file: each photograph is an entry once."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._places: dict[str, int] = {}
        #: All entries of a photograph that is named more than once.
        self._again: dict[int, list[Entry]] = {}

    def add(self, entry: Entry) -> None:
        """Add an entry to the listing, where its photograph is new."""
        entries = self._listing.entries
        place = self._places.setdefault(entry.path, len(entries))
        if place == len(entries):
            entries.append(entry)
        else:
            self._again.setdefault(place, [entries[place]]).append(entry)

    def judge(self) -> None:
        """Say what is named more than once; to be called when all is added, so that the order decides on nothing.

        A photograph stays in the split that is held out furthest, and its lines of other splits are the errors: left
        out, they take nothing from the held-out photographs. Named there more than once, or with several grades, it is
        in doubt itself: where two photographs bear one name, the one that is missing would lend it its grade.
        """
        for place, named in self._again.items():
            furthest = max(_held_out(entry) for entry in named)
            first, *more = (entry for entry in named if _held_out(entry) == furthest)
            self._listing.entries[place] = first
            if other := next((entry for entry in named if entry.grade != first.grade), None):
                both = " and ".join(f"{_graded(one)} by {one.label}, line {one.line}" for one in (first, other))
                self._say(first.path, f"{first.token} is {both}{_or_missing(first, other)}")
                continue
            for entry in more:
                there = f"line {first.line}" if entry.label == first.label else f"{first.label}, line {first.line}"
                self._say(entry.path, f"{entry.label}, line {entry.line}: {entry.token} stands already in {there}")
            for entry in named:
                if _held_out(entry) < furthest:
                    self._say(
                        f"{entry.label}, line {entry.line}",
                        f"{entry.token} is in {first.split} too, by {first.label}, line {first.line}, and counts there"
                        f"{_or_missing(first, entry)}",
                    )

    def _say(self, path: str, reason: str) -> None:
        self._listing.problems.append(Problem(path, "doubled", one_line(reason)))


def _or_missing(one: Entry, other: Entry) -> str:
    """What else two lines of one photograph may mean: a table of each split, and names without the folders."""
    if one.label == other.label or "/" in one.token or "/" in other.token:
        return ""
    return ", or is one of two photographs of this name, of which the other is missing"


def _graded(entry: Entry) -> str:
    return "without a grade" if entry.grade == UNKNOWN else f"of grade {entry.grade}"


def _held_out(entry: Entry) -> int:
    """How far an entry's split is held out."""
    return SPLITS.index(entry.split or "train")


def quoted(text: str) -> str:
    """What a label file says, cut short for a sentence: a file that is none may hold anything."""
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…"


def leave_out(listing: Listing, paths: Sequence[str], kind: str, reason: str, note: str) -> None:
    """Give each of these photographs a problem, and all of them a note: `3 NOTE: a.jpg, b.jpg, c.jpg.`"""
    listing.problems.extend(Problem(path, kind, reason) for path in paths)
    if paths:
        listing.notes.append(f"{len(paths)} {note}: {some(paths)}.")


def some(names: Sequence[str]) -> str:
    """The first three, for a sentence."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
