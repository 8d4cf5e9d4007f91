"""Label files for a prepared set: those of the source, with the outputs' names, and without what was left out.

Of a label file of which every line stays as it is, every byte stays as it is.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fastddr import files
from fastddr.data.layouts import Entry
from fastddr.data.layouts.common import folded
from fastddr.data.layouts.table import head_of
from fastddr.errors import UserError


class Kept(NamedTuple):
    """A photograph that the new labels name."""

    entry: Entry
    path: str
    """Of the output, relative to the root of the new set."""


def tokens(kept: Sequence[Kept]) -> dict[str, dict[int, tuple[str, str]]]:
    """What each line of each label file calls its photograph: (before, from now on), by label file and line.

    A name without an extension stays, and so do case and backslashes. A name that several outputs bear, in any case and
    with its extension or without (`a.jpg`, of `a.jpg.jpg` too), because of a new extension becomes exact: in a table a
    path.
    """
    alike = Counter(key for one in kept for key in _keys(one.path))
    renamed = {key for one in kept if one.path != one.entry.path for key in _keys(one.path)}
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for entry, path in kept:
        if not entry.label:
            continue
        token, name, new = entry.token, _name(entry.path), _name(path)
        whole, last = folded(token), folded(name)
        if name != new and (whole == last or whole.endswith((f"/{last}", f"\\{last}"))):
            old = os.path.splitext(name)[1]
            token = token[: len(token) - len(old)] + os.path.splitext(new)[1]
        if any(key in renamed and alike[key] > 1 for key in _keys(path)):
            folder, slash, _ = token.rpartition("/")
            token = path if entry.label.lower().endswith(".csv") else folder + slash + new
        found.setdefault(entry.label, {})[entry.line] = (entry.token, token)
    return found


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _keys(path: str) -> set[str]:
    """What a label may call a photograph, but for its folder."""
    name = _name(path)
    return {folded(name), folded(os.path.splitext(name)[0])}


def labels(root: Path, kept: Sequence[Kept], also: Sequence[str] = ()) -> dict[str, bytes]:
    """The content of each label file of the new set, by path relative to its root.

    Args:
        root: of the source.
        kept: what the labels shall name; all other lines go.
        also: label files to write though nothing in them is kept.

    Raises:
        UserError: a label file cannot be read, or was changed meanwhile.
    """
    of_file = {label: dict[int, tuple[str, str]]() for label in also} | tokens(kept)
    return {label: _rewritten(root / label, lines) for label, lines in sorted(of_file.items())}


def refuse_changed(root: Path, kept: Sequence[Kept], now: Iterable[Entry]) -> None:
    """Raise `UserError` where the label files say something else of a photograph by now: `labels` looks at names alone.

    Args:
        root: of the source.
        kept: as they were read before the work, with their splits.
        now: as they are read after it.
    """
    there = {entry.path: (entry.grade, entry.patient, entry.split) for entry in now}
    for entry, _ in kept:
        if entry.label and there.get(entry.path) != (entry.grade, entry.patient, entry.split):
            raise _changed(root / entry.label, entry.line)


def _rewritten(file: Path, lines: Mapping[int, tuple[str, str]]) -> bytes:
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: the label file cannot be read as text ({error}).") from None
    changed = _table(file, text, lines) if file.suffix.lower() == ".csv" else _lines(file, text, lines)
    return content if changed is None else changed.encode("utf-8")


def _lines(file: Path, text: str, lines: Mapping[int, tuple[str, str]]) -> str | None:
    """The lines of a text file that stay; None where all do, unchanged."""
    # Line breaks as Python's text mode takes them, which is how the lines were counted.
    pieces = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)
    found = []
    for number, piece in enumerate(pieces, 1):
        if number in lines:
            old, new = lines[number]
            if old not in piece:
                raise _changed(file, number)
            found.append(piece.replace(old, new, 1))
        elif not piece.removeprefix("\ufeff").strip():
            found.append(piece)
    if len(pieces) < max(lines, default=0):
        raise _changed(file, max(lines))
    return None if found == pieces else "".join(found)


def _table(file: Path, text: str, lines: Mapping[int, tuple[str, str]]) -> str | None:
    """The header and the rows of a table that stay, all columns as they are; None where all do, unchanged."""
    text = text.removeprefix("\ufeff")
    head = head_of(text)
    reader, key = csv.reader(io.StringIO(text, newline=""), delimiter=head.mark), head.key
    top = list(islice(reader, head.lines))
    rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not head.layout or not set(lines) <= {number for number, _ in rows}:
        raise _changed(file, 1)
    found = [*top]
    for number, row in rows:
        if number in lines:
            old, new = lines[number]
            if row[key].strip() != old.strip():
                raise _changed(file, number)
            found.append(row if new == old else [*row[:key], new, *row[key + 1 :]])
    if found == [*top, *(row for _, row in rows)]:
        return None
    return files.table(found, head.mark)


def _changed(file: Path, line: int) -> UserError:
    return UserError(f"{file}, line {line}: the label file was changed meanwhile; run again.")
