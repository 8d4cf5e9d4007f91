"""Which photographs are masters of `fastddr prepare`, and masters of single photographs, in the cache folder.

A run's manifest.csv says how its photographs were prepared. What it predicts later gets the same, so that its answer is
the one that it gives on the masters.

    CACHE/masters/v1-512-jpeg/KEY.jpg   KEY: of the source's path, size and time of change
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

from fastddr import files, ranks
from fastddr.data import cache, crop, photograph
from fastddr.data.crop import Format, Recipe
from fastddr.data.layouts.common import PREPARED
from fastddr.data.photograph import BadPhotograph
from fastddr.data.workers import each
from fastddr.errors import UserError

_LINE = "# prepared: "


class Made(NamedTuple):
    """What became of a photograph: its master, or the kind and reason of a fault."""

    file: str
    master: str
    kind: str = ""
    reason: str = ""


# ------------------------------------------------------------------------------------------------ which are masters


def of_folder(folder: Path) -> Recipe | None:
    """How the photographs of this folder were prepared; None where they were not. A folder within a set is of the set.

    Raises:
        UserError: what `fastddr prepare` wrote there cannot be read.
    """
    for above in (folder, *folder.parents):
        file = above / PREPARED / "settings.json"
        if file.is_file():
            return _recipe(file, file.read_bytes())
    return None


def line(recipe: Recipe | None) -> str:
    """The line of manifest.csv that says how the photographs of a run were prepared."""
    told = recipe and {"prepare": recipe.version, "size": recipe.size, "format": recipe.format}
    return _LINE + json.dumps(told)


def of_run(manifest: Path) -> Recipe | None:
    """How a run's photographs were prepared, by its manifest.csv.

    Raises:
        UserError: it is gone, or does not tell.
    """
    try:
        with manifest.open("rb") as stream:
            for text in stream:
                if not text.startswith(b"#"):
                    break
                if text.startswith(_LINE.encode()):
                    said = text.removeprefix(_LINE.encode())
                    return None if said.strip() == b"null" else _recipe(manifest, said)
    except FileNotFoundError:
        pass  # it does not tell either
    raise UserError(
        f"{manifest}: it does not say whether the photographs were prepared; say it with --preparation none, or with "
        "--preparation 512 for masters of that size."
    )


def _recipe(file: Path, text: bytes) -> Recipe:
    try:
        facts = files.parse(text)
        recipe = Recipe(facts["size"], facts["format"], facts["prepare"])
        # A run may be somebody else's: its format becomes part of a path, and its size memory.
        if not type(recipe.version) is type(recipe.size) is int or recipe.format not in get_args(Format):
            raise ValueError
    except (ValueError, KeyError, TypeError, UserError):
        raise UserError(f"{file}: what it says of `fastddr prepare` cannot be read; restore it.") from None
    return recipe


# ------------------------------------------------------------------------------------------------ new ones


def make(
    files: Sequence[str], recipe: Recipe, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Made]:
    """The master of each photograph, made where the cache has none; on all ranks of a job the same call.

    Where a master lies is each machine's own; which photographs have one is the same on all ranks.

    Args:
        files: absolute paths of photographs.
        recipe: what masters are made with.
        on_progress: called with (done, total) of this rank's part.

    Raises:
        UserError: they cannot be written; or the recipe is of another version of `fastddr prepare`.
    """
    if recipe.version != crop.VERSION:
        raise UserError(
            f"the run's photographs were prepared by version {recipe.version} of `fastddr prepare`, and this is "
            f"version {crop.VERSION}, which gives other pixels; install the fastddr of that run, or say "
            "--preparation none."
        )
    folder = cache.folder() / "masters" / f"v{recipe.version}-{recipe.size}-{recipe.format}"
    # Each machine needs all of them: which photographs fall to a rank is not known here.
    mine = list(files[ranks.local_rank() :: ranks.local_world()])

    def made() -> list[Made]:
        folder.mkdir(parents=True, exist_ok=True)
        found: list[Made] = []
        for one in _made(mine, folder, recipe):
            found.append(one)
            if on_progress is not None:
                on_progress(len(found), len(mine))
        return found

    everywhere = ranks.gather([(ranks.machine(), one) for one in ranks.on_all(made)])
    # Each machine's own last: its cache may lie elsewhere.
    own_last = sorted(everywhere, key=lambda there: there[0] == ranks.machine())
    # What one machine cannot use none uses: a file may go meanwhile, and all must count the same photographs.
    return {one.file: one for _, one in own_last} | {one.file: one for _, one in everywhere if one.kind}


def _made(files: Sequence[str], folder: Path, recipe: Recipe) -> Iterator[Made]:
    one = partial(_one, folder=str(folder), recipe=recipe)
    workers = min(ranks.cores(), max(1, len(files) // 64))
    with each(one, files, workers, lost=f"{folder}: a process that prepared photographs") as made:
        yield from made


def _one(file: str, folder: str, recipe: Recipe) -> Made:
    try:
        about = photograph.about(file)  # it may be gone since it was looked at first
    except BadPhotograph as bad:
        return Made(file, "", bad.kind, bad.reason)
    named = os.fsencode(f"{os.path.realpath(file)}\0{about.st_size}\0{about.st_mtime_ns}")
    key = hashlib.sha256(named).hexdigest()[:32]
    target = os.path.join(folder, f"{key}.{'jpg' if recipe.format == 'jpeg' else 'png'}")
    # Whole, since it was renamed (but where the power failed then), and made of a photograph that decoded to its end.
    if os.path.exists(target) and os.path.getsize(target):
        return Made(file, target)
    try:
        content = crop.master(file, recipe, whole=False).content
    except BadPhotograph as bad:
        return Made(file, "", bad.kind, bad.reason)
    part = None
    try:
        # A name that no other process has, of this machine or of another one with the same cache.
        handle, part = tempfile.mkstemp(prefix=f"{key}.", suffix=crop.PART, dir=folder)
        with open(handle, "wb") as stream:
            stream.write(content)
            cache.share(handle, about)
        os.replace(part, target)
    except OSError as error:
        if part is not None:
            with suppress(FileNotFoundError):
                os.unlink(part)
        raise crop.cannot_write(target, error) from None
    return Made(file, target)
