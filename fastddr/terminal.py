"""Where the commands write what they say: a terminal, a pipe or a file, any of which may be poor or gone."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Unheard(io.FileIO):
    """A stream whose reader may go away: what it cannot take is lost, and nothing ends by it."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def any_terminal() -> None:
    """What the terminal cannot show, as in a language setting without UTF-8, becomes `?` and ends nothing; a stream
    that was closed at the start takes all."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Open for as long as the process lives.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def to_nobody() -> None:
    """Go on where nobody listens any more: the terminal was closed, `tee` has ended, the disk of the log is full.

    For training and what else has all its figures in files, and outlives those who look on.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # a notebook's, a test's, or closed at the start
            continue
        stream.flush()
        raw = _Unheard(stream.fileno(), "w", closefd=False)
        # What PYTHONUNBUFFERED asks for stays so.
        buffer = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(
            buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        ))  # fmt: skip


def all_said() -> bool:
    """Whether what was said is written down, at the end of a command; that a disk is full is told."""
    try:
        print(end="", flush=True)
    except OSError as error:
        _throw_away([1])
        if error.errno != errno.EPIPE:
            print(f"fastddr: what is said above could not be written: {error.strerror}.", file=sys.stderr)
        return False
    return True


def unread() -> bool:
    """Whether nobody reads the output any more, as after `| head`; what is left of it is then thrown away."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # errors are always told
    gone = [descriptor for descriptor, _ in poll.poll(0)]
    _throw_away(gone)
    return bool(gone)


def _throw_away(descriptors: Sequence[int]) -> None:
    """What Python still holds for these and writes when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
