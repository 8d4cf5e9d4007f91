"""Files that may lie in a folder of somebody else's: read as what they claim to be or refused, and written anew;
and tables of names that may hold anything."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What in a folder has a name like this, hidden ones too, sorted; nothing where there is no such folder.

    `Path.glob` and `os.walk` take a folder that cannot be listed for an empty one.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if fnmatchcase(name, pattern)]


def unlisted(error: OSError) -> None:
    """`onerror` of `os.walk`: raise what it met, but where a folder went away meanwhile."""
    if not isinstance(error, FileNotFoundError):
        raise error


def end(path: Path) -> str | None:
    """Where a path leads, through links; None where it leads to nothing. Raises OSError where nobody can tell."""
    try:
        return os.path.realpath(path, strict=True)
    except FileNotFoundError:
        return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError that names no file, as those of reading and writing do not, names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def parse(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none, with what is wrong as its text.
    """
    try:
        found: Any = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} and no object")
    return found


def table(rows: Iterable[Sequence[Any]], delimiter: str = ",", *, quoted: bool = False) -> str:
    """Rows as CSV with "\\n" at their ends; `quoted`: with all cells in quotes.

    Python before 3.13 leaves a lone carriage return in a name bare, which ends the row for whoever reads it: then all
    cells are quoted.
    """
    rows = list(rows)
    text = io.StringIO()
    writer = csv.writer(
        text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    )
    writer.writerows(rows)
    if not quoted and "\r" in text.getvalue():
        return table(rows, delimiter, quoted=True)
    return text.getvalue()


def put(path: Path, content: bytes, *, sync: bool = False, ending: str = ".part") -> None:
    """Write a file as a whole or not at all, with the rights of the one that it replaces.

    It is written beside under a name that nobody can know before, and only if nothing is there: not through a link.

    Args:
        sync: wait until the disk has it.
        ending: of the name beside, which a kill leaves behind.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    # Cut, since with more behind it a long name may be too long.
    beside = path.with_name(f".{path.name[:40]}.{uuid4().hex[:8]}{ending}")
    stream = beside.open("xb")  # closed below
    try:
        with naming(path), stream:
            with suppress(OSError):  # there is none yet; and not every file system has rights
                before = os.lstat(path)
                if stat.S_ISREG(before.st_mode):
                    os.fchmod(stream.fileno(), before.st_mode & 0o777)
            stream.write(content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
