"""What a run is trained on: the photographs of a data set that can be used, and one fingerprint of them all."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from fastddr import files
from fastddr.collector import no_collector
from fastddr.config import SplitConfig
from fastddr.data import masters, survey, workers
from fastddr.data.grades import UNGRADABLE
from fastddr.data.layouts import SPLITS, Entry
from fastddr.data.problems import LEAKS, NOTES, Problem, errors, one_line, refuse
from fastddr.data.splits import UNUSED
from fastddr.data.survey import Progress, Survey
from fastddr.errors import UserError

__all__ = ["SPLITS", "Manifest", "fingerprint_in", "named", "of", "read", "rows", "splits_by_name"]

#: What the first line of `Manifest.to_csv` begins with.
_FINGERPRINT = "# fingerprint: "


def _bytes(file: str) -> int | None:
    """Of a file; None where it cannot be looked at."""
    try:
        return os.stat(file).st_size
    except OSError:
        return None


@dataclass(frozen=True)
class Manifest:
    """The photographs of a data set. A photograph's id is its row."""

    root: Path
    """Folder that `path` is relative to."""
    path: tuple[str, ...]
    """File of each photograph, relative, with forward slashes."""
    grade: Int[np.ndarray, " n"]
    """0-4 (ICDR), 5 = ungradable, -1 = unknown."""
    split: tuple[str, ...]
    """train, valid or test."""
    width: Int[np.ndarray, " n"]
    """Pixels, of the upright photograph (EXIF applied)."""
    height: Int[np.ndarray, " n"]
    size: Int[np.ndarray, " n"]
    """Bytes of each file."""
    patient: tuple[str, ...]
    """Of each photograph, "" where it is not known."""
    notes: tuple[str, ...]
    """What was done and left out, and why, for the report."""
    layout: str = "official"
    """In which form the set lies on disk."""
    left_out: tuple[Problem, ...] = ()
    """Each photograph and label that was left out because it could not be used, or by `--exclude`."""
    grades: int = UNGRADABLE
    """How many grades are classes: 5, or 6 where ungradable is one."""
    test_drawn: bool = False
    """Whether the test split was drawn by chance: the set has none of its own."""

    def __len__(self) -> int:
        return len(self.path)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (relative path, bytes, grade, split) of all photographs, in hex."""
        rows = zip(self.path, self.size.tolist(), self.grade.tolist(), self.split, strict=True)
        return survey.fingerprint(rows)

    def files(self) -> list[str]:
        """Absolute path of each photograph."""
        return [os.path.join(self.root, path) for path in self.path]

    def changed(self, ids: Int[np.ndarray, " m"] | None = None) -> list[str]:
        """Paths of those photographs, of these ids or of all, that have other bytes by now, or cannot be looked at.

        Each file is asked for once. Another content of as many bytes is not seen.
        """
        rows = range(len(self)) if ids is None else ids.tolist()
        sizes = workers.asked(_bytes, (os.path.join(self.root, self.path[row]) for row in rows))
        return [self.path[row] for row, size in zip(rows, sizes, strict=True) if size != self.size[row]]

    def _used(self, split: str) -> Int[np.ndarray, " m"]:
        return np.flatnonzero((np.array(self.split) == split) & (self.grade >= 0) & (self.grade < self.grades))

    def ids(self, split: str) -> Int[np.ndarray, " m"]:
        """Ids of the photographs of a split that are trained on or scored.

        Raises:
            UserError: there are none.
        """
        found = self._used(split)
        if not len(found):
            raise UserError(f"{self.root}: the split {split!r} has no gradable photograph; add some to it.")
        return found

    def has(self, split: str) -> bool:
        """Whether the split holds a photograph that is trained on or scored."""
        return len(self._used(split)) > 0

    @property
    def patients(self) -> tuple[str, ...] | None:
        """`patient`; None where none is known."""
        return self.patient if any(self.patient) else None

    def counts(self) -> dict[str, list[int]]:
        """Photographs of each grade 0-5, by split."""
        splits = np.array(self.split)
        return {
            split: np.bincount(self.grade[(splits == split) & (self.grade >= 0)], minlength=UNGRADABLE + 1).tolist()
            for split in SPLITS
            if split in self.split
        }

    def to_csv(self) -> str:
        """All rows as CSV, behind comment lines with the fingerprint and with how the photographs were prepared."""
        head = f"{_FINGERPRINT}{self.fingerprint}\n{masters.line(masters.of_folder(self.root))}\n"
        numbers = [values.tolist() for values in (self.grade, self.width, self.height, self.size)]
        rows = zip(range(len(self)), self.path, self.split, *numbers, self.patient, strict=True)
        return head + files.table([("id", "path", "split", "grade", "width", "height", "bytes", "patient"), *rows])


def read(
    data: str | Path,
    on_progress: Progress | None = None,
    *,
    splitting: SplitConfig | None = None,
    exclude: frozenset[str] = frozenset(),
    on_bad: Literal["raise", "exclude"] = "raise",
    ungradable: Literal["exclude", "class"] = "exclude",
) -> Manifest:
    """The manifest of a data set, by its labels, its headers and what is known of it: `survey.take`, then `of`, where
    arguments and errors stand."""
    return of(survey.take(data, splitting, exclude, on_progress), on_bad, ungradable)


@no_collector()
def of(
    seen: Survey,
    on_bad: Literal["raise", "exclude"] = "raise",
    ungradable: Literal["exclude", "class"] = "exclude",
    *,
    trained_on: str | None = None,
) -> Manifest:
    """The manifest of what a survey found usable.

    Args:
        on_bad: what to do about a photograph or a label that cannot be used.
        ungradable: whether photographs of grade 5 are left out or a class.
        trained_on: where the photographs are only scored, the fingerprint of those that the run was trained on. They
            may be of one split alone then. What leaks between splits of other photographs is no error: nothing was
            trained on these. The run's own are known by being those that were usable when it was trained.

    Raises:
        UserError: with `on_bad="raise"` the first photograph or label that is not, and how many more there are; or a
            split is missing.
    """
    trains, problems = trained_on is None, seen.problems()
    entries, leaks = _usable(seen, problems), list[Problem]()
    if not trains:
        others = [problem for problem in problems if problem.kind not in LEAKS]
        # The run's own, whether or not their leaks were known when it was trained.
        own = {replace(seen, entries=usable).fingerprint for usable in (entries, _usable(seen, others))}
        if trained_on not in own:
            leaks, problems = [problem for problem in problems if problem.kind in LEAKS], others
            entries = _usable(seen, problems)
    if on_bad == "raise":
        refuse(problems, seen.root, seen.command)
    bad = errors(problems)
    if not entries:
        raise UserError(f"{seen.root}: none of its photographs can be used; `{seen.command}` tells why.")
    for needed in ("train", "valid") if trains else ():
        if all(entry.split != needed for entry in entries):
            named = " and ".join(split for split in SPLITS if any(entry.split == split for entry in entries))
            raise UserError(f"{seen.root}: the split {needed!r} is missing; the photographs are in {named} alone.")
    # Where photographs are only scored, the settings of splits are those of a run, which nobody gave.
    notes = [note for note in seen.notes if trains or note != UNUSED]
    if leaks:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(p.kind for p in leaks).items()))
        notes.append(
            f"{len({p.path for p in leaks})} photographs share their picture or patient with another split ({kinds}): "
            "nothing is trained on them here, so they stay."
        )
    if bad:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(p.kind for p in bad).items()))
        notes.append(f"{len(bad)} photographs or labels cannot be used and are left out ({kinds}); they are listed.")
    known = Counter(p.kind for p in problems if p.severity == "note" and p.kind not in _SAID)
    if known:
        listed = "; ".join(f"{count} × {kind} ({NOTES[kind]})" for kind, count in sorted(known.items()))
        notes.append(f"Worth knowing of the photographs: {listed}.")
    grades = np.array([entry.grade for entry in entries], dtype=np.int64)
    split = tuple(entry.split or "" for entry in entries)
    notes += _of_ungradable(grades, split, ungradable, trains)
    classes = UNGRADABLE + (ungradable == "class")
    # Where all of it was left out it is missing as well.
    tested = any(entry.split == "test" for entry in (*seen.entries, *seen.absent))
    if tested and not any(entry.split == "test" and 0 <= entry.grade < classes for entry in entries):
        notes.append("The test split holds no gradable photograph, so nothing is scored on it.")
    records = [seen.records[entry.path] for entry in entries]
    return Manifest(
        root=seen.root,
        path=tuple(entry.path for entry in entries),
        grade=grades,
        split=split,
        width=np.array([record.width for record in records], dtype=np.int64),
        height=np.array([record.height for record in records], dtype=np.int64),
        size=np.array([record.size for record in records], dtype=np.int64),
        patient=tuple(entry.patient or "" for entry in entries),
        notes=tuple(map(one_line, notes)),
        layout=seen.layout,
        left_out=(*bad, *seen.excluded),
        grades=classes,
        test_drawn=seen.test_drawn,
    )


def _usable(seen: Survey, problems: Sequence[Problem]) -> list[Entry]:
    bad = survey.bad_paths(problems)
    return [entry for entry in seen.entries if entry.path not in bad]


def fingerprint_in(file: Path) -> str:
    """The fingerprint that a file of `Manifest.to_csv` tells; empty where it tells none."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline(len(_FINGERPRINT) + 100)
    return first.removeprefix(_FINGERPRINT).strip() if first.startswith(_FINGERPRINT) else ""


def named(path: str, grade: int | str, *, folders: bool = False) -> tuple[str, str]:
    """A photograph by its name, without extension, and its grade, which its copy in another form has too; with
    `folders`, or else without them."""
    return os.path.splitext(path if folders else path.rpartition("/")[2])[0], str(grade)


def splits_by_name(file: Path) -> dict[tuple[str, str], str]:
    """The split of each photograph of a file of `Manifest.to_csv` as `named`, those that are named alike with folders.

    Empty where there is no such file.
    """
    photographs = [(row.get("path") or "", row.get("grade") or "", row.get("split") or "") for row in rows(file)]
    bearers = Counter(named(path, grade)[0] for path, grade, _ in photographs)
    return {named(path, grade, folders=bearers[named(path, grade)[0]] > 1): split for path, grade, split in photographs}


def rows(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a file of `Manifest.to_csv`; none where there is no such file."""
    if file.is_file():
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            yield from csv.DictReader(dropwhile(lambda line: line.startswith("#"), lines))


#: Kinds of notes that the notes of the layout say already.
_SAID = ("orphan", "other-file", "unlabelled", "excluded")


def _of_ungradable(grades: np.ndarray, split: tuple[str, ...], ungradable: str, trains: bool) -> list[str]:
    counted = {name: int(((grades == UNGRADABLE) & (np.array(split) == name)).sum()) for name in SPLITS}
    total = sum(counted.values())
    each = ", ".join(f"{n} in {name}" for name, n in counted.items() if n)
    if ungradable == "class":
        if trains and not counted["train"]:
            raise UserError("--ungradable class: the training split holds no ungradable photograph (grade 5) to learn.")
        return [
            f"Six classes: {total} ungradable photographs (grade 5) are the sixth: {each or 'none'}. Kappa is "
            "of the photographs that truth and prediction both grade; one that is called ungradable counts as referred."
        ]
    if not total:
        return []
    return [f"{total} ungradable photographs (grade 5) are counted but left out: {each}."]
