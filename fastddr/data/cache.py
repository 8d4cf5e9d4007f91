"""What is known of each file of a data set, kept between runs, file by file.

A record counts as long as the file's size and time of change are the same. So one new photograph is looked at alone,
and a repaired one is looked at again: finer than the fingerprint of the whole set, which one file changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_dir

from fastddr import files
from fastddr.errors import UserError

#: Of the records. Raise it with every change of what they say: older ones are then made anew.
_VERSION = 4


class Record(NamedTuple):
    """What is known of one file."""

    size: int
    """Bytes."""
    changed: int
    """Time of change, in ns since 1970."""
    width: int = 0
    """Of the upright photograph; 0 where the header cannot be read."""
    height: int = 0
    format: str = ""
    sampling: str = ""
    traits: str = ""
    """Kinds of notes, with commas between."""
    kind: str = ""
    """Kind of the error, empty where none is known."""
    reason: str = ""
    digest: str = ""
    """Hash of the pixels; empty where the photograph was never decoded."""

    @property
    def decoded(self) -> bool:
        """Whether there is nothing left to find out."""
        return bool(self.digest or self.kind)


_TYPES = tuple(map(type, Record(0, 0)))


def folder() -> Path:
    """The folder of all caches: $FASTDDR_CACHE, else the user's."""
    chosen = os.environ.get("FASTDDR_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else Path(user_cache_dir("fastddr"))
    except RuntimeError:  # no HOME, and a user without an entry of their own, as in a container
        raise UserError("there is no home folder for fastddr's cache; set FASTDDR_CACHE or HOME to a folder.") from None


def keep(path: Path, text: str) -> None:
    """Write a file of the cache: whoever reads it meanwhile finds the old one or the new one, and no half.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.put(path, text.encode("utf-8", "surrogateescape"))


def share(handle: int, like: os.stat_result) -> None:
    """Give an open file the rights of the photographs it is made of: who may not read those may not read it."""
    with suppress(OSError):  # who is not in that group cannot give the file to it
        os.fchown(handle, -1, like.st_gid)
    others = like.st_mode & 0o006
    # Another group has no more right to it than anybody.
    group = like.st_mode & 0o060 if os.fstat(handle).st_gid == like.st_gid else others << 3
    with suppress(OSError):  # not every file system has rights
        os.fchmod(handle, 0o600 | group | others)


def _file(root: Path) -> Path:
    return folder() / "photographs" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.json"


def load(root: Path) -> dict[str, Record]:
    """The records of the photographs below a folder, by relative path; empty where there are none."""
    try:
        stored = json.loads(_file(root).read_text(encoding="utf-8", errors="surrogateescape"))
        if stored["version"] != _VERSION:
            return {}
        rows = zip(*(stored[column] for column in Record._fields), strict=True)
        named = zip(stored["path"], map(Record._make, rows), strict=True)
        return {path: record for path, record in named if _can_be(record)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # no cache yet, or a broken one: it is made anew


def _can_be(record: Record) -> bool:
    """Whether a photograph may have such a record: one that was written over is looked at anew."""
    if tuple(map(type, record)) != _TYPES:
        return False
    return bool(record.kind) or (record.width > 0 and record.height > 0)


def store(root: Path, records: Mapping[str, Record]) -> str | None:
    """Keep the records; those of photographs that are not named are forgotten. Says why they could not be kept."""
    # By column: a list a field is read twice as fast as a list a photograph.
    columns = dict(zip(Record._fields, zip(*records.values(), strict=True), strict=True)) if records else {}
    whole = {"version": _VERSION, "root": str(root), "path": list(records), **columns}
    text = json.dumps(whole, ensure_ascii=False)
    try:
        keep(_file(root), text)
    except OSError as error:  # without a cache every start looks at the photographs again: slower, but right
        return f"{_file(root)}: {error.strerror}"
    return None
