"""The folder that `prepare` writes: what is in it, what is finished, and how it changes without ever looking whole
before it is.

While it is unfinished the label files are away and the photographs lie in a hidden folder, so that no layout finds a
part of a set and takes it for all of it: class folders need no labels.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from fastddr import files
from fastddr.data import crop
from fastddr.data.crop import Row
from fastddr.data.layouts import Entry
from fastddr.data.problems import Problem, write_list
from fastddr.errors import UserError

#: The folder of tables and sheets, and the one of photographs that are not all done yet.
FOLDER, UNFINISHED = "prepared", ".unfinished"
#: The table of what is left out.
_ABSENT = "absent.csv"


class Output:
    """OUT; to be opened first."""

    def __init__(self, out: Path, inner: str) -> None:
        self.out, self.folder, self.hidden = out, out / FOLDER, out / UNFINISHED
        self.inner = inner
        """Where in OUT the root of the new set is, with a slash at the end; or empty."""
        self.settings = self.folder / "settings.json"
        self.known: dict[str, list[Row]] = {}
        """What was written down, by output: several rows where a photograph was made more than once."""
        self.clean = False
        """Whether it is finished, and nothing of it has changed since."""
        self._lock: TextIO | None = None

    # -------------------------------------------------------------------------------------- before the work

    def open(self, identity: Mapping[str, Any]) -> None:
        """Make it, or see that it is one of ours with the same settings, and read what is done.

        It is then this process's alone, until `close`.

        Raises:
            UserError: it is neither; or another process is at it; or something in it leads out of it.
            OSError: it cannot be listed: what lies in it might be written over.
        """
        try:
            there = self.facts()
            different = [key for key in identity if there[key] != identity[key]]
        except FileNotFoundError:
            # A run that was killed at once left an empty folder, or a hidden file in it.
            if any(path != self.folder for path in (*files.listed(self.out), *files.listed(self.folder, "[!.]*"))):
                raise UserError(
                    f"{self.out}: it is not empty and not made by `fastddr prepare`; give a new folder."
                ) from None
            self._refuse_links()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            if not self.settings.is_file():
                put(self.settings, _json(identity))
                return
            # Another process was faster, and has ended.
            self.close()
            self.open(identity)
            return
        except NotADirectoryError:
            raise UserError(f"{self.out}: this is a file; give a new folder.") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.settings}: it cannot be read; remove {self.out} and run again.") from None
        if different:
            key = different[0]
            raise UserError(
                f"{self.out}: it was prepared with {key} {there[key]}, not {identity[key]}; give another folder, or "
                "remove this one."
            )
        self._refuse_links()
        self._hold()
        self.known = self._rows()
        self.clean = not self.hidden.exists() and not self._journals()

    def _hold(self) -> None:
        """Take it for this process. Not where the file system knows no locks, or nothing may be written."""
        try:
            # It stays, empty: a second run changes nothing in OUT.
            stream = self._lock = (self.folder / ".lock").open("a", encoding="utf-8")
        except OSError:  # what must be written says it
            return
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{self.out}: another `fastddr prepare` is at this folder; wait until it has ended, or give "
                    "another folder."
                ) from None

    def close(self) -> None:
        """Let others have it. Safe to call again."""
        if self._lock is not None:
            self._lock.close()

    def facts(self) -> dict[str, Any]:
        """Settings, label files, and how many photographs are on the sheets.

        Raises:
            UserError: a label file lies outside of OUT.
        """
        found = files.parse(self.settings.read_bytes())
        for label in found.get("labels", []):
            self._refuse_outside(label)
        return found

    def _refuse_outside(self, path: str) -> None:
        """Somebody else may have made this folder, and what its tables name is moved and deleted."""
        if os.path.isabs(path) or "\0" in path or ".." in path.split("/"):
            raise UserError(f"{self.out}: its tables name files outside of it; give another folder.")

    def _refuse_links(self) -> None:
        """Nothing of ours in OUT is a link: what is moved, written and deleted beyond one would lie elsewhere."""
        for folder, inside, names in os.walk(self.out, onerror=files.unlisted):
            names = names if folder == str(self.folder) else []
            if link := next((path for n in inside + names if os.path.islink(path := os.path.join(folder, n))), None):
                raise UserError(
                    f"{link}: `fastddr prepare` makes no links in {self.out}; remove it, or give another folder."
                )

    def home(self, path: str) -> str:
        """Where an output is until all is done, relative to OUT."""
        path = self.inner + path
        # Files beside the label table are found only by way of it, which is written last.
        return f"{UNFINISHED}/{path}" if "/" in path else path

    def row(self, path: str, source: str, source_bytes: int) -> Row | None:
        """What was written down of an output that is there, and made of its source as it is."""
        rows = self.known.get(path)
        if rows:
            for place in (self.home(path), self.inner + path):
                try:
                    size = os.stat(self.out / place).st_size
                except OSError:
                    continue
                wanted = (source, source_bytes, size)
                return next((row for row in rows if (row.source, row.source_bytes, row.bytes) == wanted), None)
        return None

    def hide(self) -> None:
        """Take the labels away, and the photographs out of sight: from now on it is unfinished."""
        self.clean = False
        self.hidden.mkdir(exist_ok=True)
        self.remove_labels(keep=())
        for top in sorted({path.split("/")[0] for path in map(self.inner.__add__, self.known) if "/" in path}):
            if (self.out / top).exists():
                if (self.hidden / top).exists():
                    _move(self.hidden / top, self.out / top)
                os.replace(self.out / top, self.hidden / top)

    # -------------------------------------------------------------------------------------- after the work

    def remove_labels(self, keep: Iterable[str]) -> None:
        """Remove the label files that were written earlier, but for these."""
        for label in set(self.facts().get("labels", [])) - set(keep):
            (self.out / self.inner / label).unlink(missing_ok=True)

    def remove(self, paths: Iterable[str]) -> int:
        """Remove outputs that were written earlier; how many there were."""
        count = 0
        for path in sorted(paths):
            for place in (self.home(path), self.inner + path):
                file = self.out / place
                if file.exists():
                    file.unlink()
                    count += 1
        return count

    def write_tables(
        self, rows: Sequence[Row], bad: Sequence[Problem], absent: Sequence[Entry], facts: Mapping[str, Any]
    ) -> None:
        """Fold the journals into one table, and list what is bad and what is left out."""
        self._table("prepared.csv", files.table([Row._fields, *rows]))
        self._table("excluded.csv", write_list(bad) if bad else "")
        self._table(_ABSENT, _of_absent(absent) if absent else "")
        for journal in self._journals():
            journal.unlink()
        put(self.settings, _json(facts))

    def finish(self, labels: Mapping[str, bytes]) -> None:
        """The photographs back in sight, and last of all the labels: from now on it is finished."""
        # What a process that was killed was writing, and folders that are empty without it.
        for place in {self.out, self.folder, *((self.out / self.inner / label).parent for label in labels)}:
            for part in files.listed(place, f".*{crop.PART}"):
                part.unlink()
        for folder, _, names in os.walk(self.hidden, topdown=False, onerror=files.unlisted):
            for name in names:
                if name.startswith(".") and name.endswith(crop.PART):
                    os.unlink(os.path.join(folder, name))
            if folder != str(self.hidden) and not os.listdir(folder):
                os.rmdir(folder)
        if self.hidden.exists():
            for top in sorted(os.listdir(self.hidden)):
                _move(self.hidden / top, self.out / top)
        for label, content in labels.items():
            (self.out / self.inner / label).parent.mkdir(parents=True, exist_ok=True)
            put(self.out / self.inner / label, content)
        if self.hidden.exists():
            shutil.rmtree(self.hidden)

    # -------------------------------------------------------------------------------------- what is written down

    def _table(self, name: str, text: str) -> None:
        """Write a table; without text there is none."""
        if text:
            put(self.folder / name, text.encode("utf-8", "surrogateescape"))
        else:
            (self.folder / name).unlink(missing_ok=True)

    def _journals(self) -> list[Path]:
        return files.listed(self.folder, "journal-*.jsonl")

    def _rows(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for journal in self._journals():
            for row in crop.rows_of(journal.read_bytes().split(b"\n")):
                self._refuse_outside(row.path)
                found.setdefault(row.path, []).append(row)
        try:
            text = (self.folder / "prepared.csv").read_bytes().decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return found
        try:
            _, *rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        except (ValueError, csv.Error):
            return found
        for cells in rows:
            try:
                path, source, *numbers = cells[:7]
                source_bytes, size, left, top, side = map(int, numbers)
                row = Row(path, source, source_bytes, size, left, top, side, *cells[7:])
            except (ValueError, TypeError):
                # Torn or written over: it counts as not made, as in a journal.
                continue
            self._refuse_outside(path)
            found.setdefault(path, []).append(row)
        return found


def _move(source: Path, target: Path) -> None:
    """Rename; where both are folders, file by file. Of two runs at once, one may have left both behind."""
    if source.is_dir() and target.is_dir():
        for name in os.listdir(source):
            _move(source / name, target / name)
        os.rmdir(source)
    else:
        os.replace(source, target)


def _of_absent(entries: Sequence[Entry]) -> str:
    """What is left out, as `layouts.find` reads it."""
    rows = [[entry.path, entry.grade, entry.patient or ""] for entry in entries]
    return files.table([["path", "grade", "patient"], *rows], quoted=True)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def followed(out: Path, flag: str = "--out") -> Path:
    """Where the path of a flag leads, so that a link stays one. Raises `UserError` where it leads to itself."""
    try:
        place = out.resolve()
    except (OSError, RuntimeError):  # before Python 3.13, which gives the link itself
        place = out
    if place.is_symlink():
        raise UserError(f"{flag} {out}: this link leads to itself; give another place.")
    return place


def check_place(out: Path, flag: str = "--out") -> None:
    """Raise `UserError` where the file of a flag cannot be put; before the work, which would be for nothing.

    A link is followed, as by whoever writes there.
    """
    folder = followed(out, flag).parent
    if not folder.is_dir():
        raise UserError(f"{flag} {out}: its folder is not there; make it first.")
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {out}: nothing can be written there ({error.strerror}); give a place.") from None


def put(path: Path, content: bytes) -> None:
    """Write a small file at once or not at all; one that holds the same is left as it is.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    try:
        files.put(path, content, ending=crop.PART)
    except OSError as error:
        raise crop.cannot_write(path, error) from None
