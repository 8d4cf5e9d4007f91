"""A disk that fills up, or a kill, at the n-th thing that a save does to the disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fastddr import checkpoints

#: What a save asks of the system, besides writing files (`checkpoints._write`).
_CALLS = ("mkdir", "fsync", "rename", "replace", "symlink")


class Hazard:
    """Counts what is done to the disk; at the n-th time, or from then on, something happens."""

    def __init__(self, at: int, then: Callable[[], None]) -> None:
        """At call number `at`, from 1, `then` is called in its place; it raises or never returns."""
        self._at, self._then = at, then
        #: Calls so far.
        self.calls = 0

    def _pass(self) -> None:
        self.calls += 1
        if self.calls >= self._at:
            self._then()

    @contextmanager
    def present(self) -> Iterator[Hazard]:
        """While it lasts."""
        write = checkpoints._write

        def half_written(file: Any, pieces: Any) -> dict[str, Any]:
            content = b"".join(pieces)
            try:
                self._pass()
            except BaseException:
                file.write_bytes(content[: len(content) // 2])
                raise
            return write(file, [content])

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*arguments: Any, **more: Any) -> Any:
                self._pass()
                return call(*arguments, **more)

            return counting

        with mock.patch.object(checkpoints, "_write", half_written):
            patches = [mock.patch.object(os, name, counted(getattr(os, name))) for name in _CALLS]
            for patch in patches:
                patch.start()
            try:
                yield self
            finally:
                for patch in patches:
                    patch.stop()


def full(file: str | None = None) -> None:
    """What the system answers where a disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)


def die() -> None:
    """What no process survives."""
    os.kill(os.getpid(), signal.SIGKILL)


def each(save: Callable[[], object], then: Callable[[], None], *, check: Callable[[int], None]) -> int:
    """Save again and again, each time in a process of its own and with the hazard one call later; the calls of a save.

    Args:
        save: one save; whatever OSError it raises is what the hazard made.
        then: `full` or `die`.
        check: called after each, with the number of the call.
    """
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            with Hazard(number, then).present() as hazard:
                try:
                    save()
                except OSError:
                    os._exit(1)
            os._exit(0 if hazard.calls < number else 1)
        _, status = os.waitpid(child, 0)
        check(number)
        if status == 0:
            return number - 1
