"""Photographs without labels: found by name, folder, glob or list, each checked, and prepared where it shall be.

Nothing here ends at a photograph that cannot be used: it stays in the list, with its reason.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastddr import ranks
from fastddr.data import masters, photograph, workers
from fastddr.data.crop import Recipe
from fastddr.data.grades import UNKNOWN
from fastddr.data.layouts.common import PHOTOGRAPHS, aside, folders_below
from fastddr.data.manifest import Manifest
from fastddr.data.photograph import BadPhotograph
from fastddr.data.problems import rows_of
from fastddr.errors import UserError

#: How the names of heat maps end, which `predict --explain` may put below the photographs.
HEAT = ".heat.png"
#: Called with (what is done, done, total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """What the user named."""

    paths: tuple[str, ...]
    """Each photograph once, as a path of the user's: the file named, or folder and name."""
    notes: tuple[str, ...] = ()
    """Sentences about what was passed over."""


class Photo(NamedTuple):
    """One photograph, ready for a loader, or with the reason why it is not."""

    path: str
    """As `Found` has it."""
    file: str = ""
    """What is loaded: the photograph, or its master in the cache."""
    width: int = 0
    """Of what is loaded, upright."""
    height: int = 0
    kind: str = ""
    """Of the fault (a key of `problems.ERRORS`, or `changed`); empty where the photograph can be used."""
    reason: str = ""
    seen: tuple[int, int] | None = None
    """As `photograph.status` had it before it was checked; None of a master in the cache, which nobody changes."""


# ------------------------------------------------------------------------------------------------ finding


def find(named: Sequence[str]) -> Found:
    """The photographs of these files, folders (with all below), globs and lists (.csv), in this order.

    A list has a column `path`, or a path a line; relative ones are below the list's folder. Hidden files are passed
    over, and in folders and globs what is no photograph by its name, and heat maps.

    Raises:
        UserError: there is nothing of that name, a list cannot be read, or there is no photograph at all.
        OSError: a folder cannot be listed: the table must not lack its photographs in silence.
    """
    paths: dict[str, str] = {}
    doubled = others = maps = 0
    for name in named:
        for path, wanted in _of(name):
            if not wanted and not path.lower().endswith(PHOTOGRAPHS):
                others += 1
            elif not wanted and path.lower().endswith(HEAT):
                maps += 1
            elif (key := os.path.abspath(path)) in paths:
                doubled += 1
            else:
                paths[key] = path
    if not paths:
        raise UserError(f"{', '.join(named)}: there is no photograph here ({', '.join(PHOTOGRAPHS)}); name others.")
    notes = [f"{others} files are passed over: no photographs by their names."] if others else []
    notes += [f"{maps} heat maps of --explain (*{HEAT}) are passed over."] if maps else []
    notes += [f"{doubled} photographs were named twice and count once."] if doubled else []
    return Found(tuple(paths.values()), tuple(notes))


def _of(name: str) -> Iterator[tuple[str, bool]]:
    """(Path, whether it was named by itself) of all that one argument means."""
    if os.path.isdir(name):
        yield from ((path, False) for path in _below(name))
    elif name.lower().endswith(".csv"):
        lists = [name] if os.path.lexists(name) else _matching(name)
        yield from ((path, True) for file in lists or [name] for path in _listed(file))
    elif os.path.lexists(name):
        yield name, True
    elif found := _matching(name):
        for path in found:
            yield from ((inner, False) for inner in (_below(path) if os.path.isdir(path) else [path]))
    else:
        raise UserError(f"{name}: there is no such photograph, folder or list; correct its name.")


def _matching(pattern: str) -> list[str]:
    """What a glob means, sorted, but what lies `aside` of what it names itself; a folder that cannot be listed is an
    error, and not one where nothing matches."""
    above, name = os.path.split(pattern)
    if glob.has_magic(name):
        for folder in _matching(above) if glob.has_magic(above) else [above or "."]:
            if os.path.isdir(folder):
                os.listdir(folder)
    named = pattern
    while glob.has_magic(named):
        named = os.path.dirname(named)
    return sorted(path for path in glob.glob(pattern, recursive=True) if not _aside(path, named, pattern.split(os.sep)))


def _aside(path: str, named: str, asked: Sequence[str]) -> bool:
    """Whether a path lies in a folder, or is one, that is `aside`; of what was `named` itself, or is `asked` for by its
    own name, nothing is asked."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    while len(folder) > len(named):
        above, name = os.path.split(folder)
        if name not in asked and aside(above, name):
            return True
        folder = os.path.dirname(folder)
    return False


def _below(folder: str) -> Iterator[str]:
    """Files in `folders_below` a folder, but hidden ones."""
    for above, names in folders_below(folder):
        yield from (os.path.join(above, name) for name in names if not name.startswith("."))


def _listed(file: str) -> Iterator[str]:
    rows, named = rows_of(file, file)
    column = named or 0
    first = rows[0] if rows else [""]
    table = len(first) > 1 or "," in first[0]
    if named is None and table and not first[0].lower().endswith(PHOTOGRAPHS):
        raise UserError(f"{file}: none of its columns is called path; call that of the photographs so.")
    for number, row in enumerate(rows, 1 if named is None else 2):
        if len(row) <= column or not row[column]:
            raise UserError(f"{file}: its row {number} has no path; mend it.")
        yield os.path.join(os.path.dirname(file), row[column])


# ------------------------------------------------------------------------------------------------ making ready


def ready(
    paths: Sequence[str], recipe: Recipe | None, on_progress: Progress, *, given: bool = False
) -> tuple[list[Photo], list[str]]:
    """Each photograph as it is loaded, in this order, and sentences about what was prepared; by all ranks of a job.

    Args:
        paths: of `find`.
        recipe: how the run's photographs were prepared, None where they were not. What is a master already, by the
            folder that it lies in, is not prepared again.
        on_progress: hears how far it is.
        given: whether the user chose the recipe, and not the run.

    Raises:
        UserError: masters cannot be made here.
    """
    folders = {folder: masters.of_folder(Path(folder).resolve()) for folder in {os.path.dirname(p) for p in paths}}
    kinds = {path: folders[os.path.dirname(path)] for path in paths}
    raw = [path for path in paths if kinds[path] is None] if recipe else []
    prepared = set(raw)
    photos = {photo.path: photo for photo in _sound([p for p in paths if p not in prepared], on_progress)}
    if recipe is not None and raw:
        photos |= {photo.path: photo for photo in _prepared(raw, recipe, on_progress)}
    made = sum(not photos[path].kind for path in raw)
    return [photos[path] for path in paths], _said(recipe, made, [kind for kind in kinds.values() if kind], given)


def _said(recipe: Recipe | None, prepared: int, there: Sequence[Recipe], given: bool) -> list[str]:
    found = []
    if recipe is None:
        why = "as was asked for" if given else "the run was trained on photographs as they are"
        found.append(f"no preparation: {why}")
        if there and not given:
            found.append(f"note: {len(there)} of these are masters of `fastddr prepare`, unlike what it was trained on")
        return found
    if prepared:
        why = "as was asked for" if given else "as the run's were"
        found.append(f"preparation: {prepared:,} photographs cropped to the retina ({recipe}), {why}")
    if there:
        found.append(f"no preparation of {len(there):,} photographs: they are masters of `fastddr prepare` already")
    if different := sum(kind != recipe for kind in there):
        whose = "what was asked for, which is" if given else "the run's, which are"
        found.append(f"note: {different:,} of these were made otherwise than {whose} {recipe}")
    return found


def _sound(paths: Sequence[str], on_progress: Progress) -> list[Photo]:
    """Each photograph as it is, decoded once to see that it is whole: the ranks share them."""
    mine, done = ranks.share(paths), []
    with photograph.strict_sizes(), ThreadPoolExecutor(ranks.cores()) as pool:
        for photo in workers.threaded(pool, _checked, mine):
            done.append(photo)
            on_progress("checking photographs", len(done), len(mine))
    return ranks.gather(done)


def _checked(path: str) -> Photo:
    file = os.path.abspath(path)
    try:
        seen = photograph.status(file)
        header = photograph.sound(file)
    except BadPhotograph as bad:
        return Photo(path, kind=bad.kind, reason=bad.reason)
    return Photo(path, file, header.width, header.height, seen=seen)


def again(listed: Sequence[Photo]) -> list[Photo]:
    """The same photographs, and those that were changed or removed since they were checked with that as their fault.

    A loader takes the part of a photograph that its size then was: of a larger one it would be another, in silence.
    """
    return workers.asked(_again, listed)


def _again(photo: Photo) -> Photo:
    if photo.kind or photo.seen is None:
        return photo
    try:
        if photograph.status(photo.file) == photo.seen:
            return photo
    except BadPhotograph as bad:
        return photo._replace(kind=bad.kind, reason=bad.reason)
    return photo._replace(kind="changed", reason="it was changed while it was graded; give the command again")


def _prepared(paths: Sequence[str], recipe: Recipe, on_progress: Progress) -> Iterator[Photo]:
    files = [os.path.abspath(path) for path in paths]
    made = masters.make(files, recipe, lambda done, total: on_progress("preparing photographs", done, total))
    for file, path in zip(files, paths, strict=True):
        one = made[file]
        yield Photo(path, one.master, recipe.size, recipe.size, one.kind, one.reason)


def as_manifest(usable: Sequence[Photo]) -> Manifest:
    """Photographs as loaders take them: without grades, each its own row."""
    return Manifest(
        root=Path.cwd(),
        path=tuple(photo.file for photo in usable),
        grade=np.full(len(usable), UNKNOWN, dtype=np.int64),
        split=("test",) * len(usable),
        width=np.array([photo.width for photo in usable], dtype=np.int64),
        height=np.array([photo.height for photo in usable], dtype=np.int64),
        size=np.zeros(len(usable), dtype=np.int64),
        patient=("",) * len(usable),
        notes=(),
        layout="files",
    )
