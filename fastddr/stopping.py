"""When a run is asked to stop: by a signal, by a file, or by the clock. It then saves and ends, and can go on later.

SIGTERM is what schedulers and `kill` send, SIGINT is Ctrl-C. Under `accelerate launch` of several processes a signal to
the launcher reaches the ranks more than once and not at the same moment, and SLURM's warning signals do not reach them
at all: hence the file, and the agreement among ranks on the step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

#: A second Ctrl-C stops at once; one that comes sooner after the first is the launcher's copy of it.
_COPIES = 1.0
#: Seconds between two looks at the file, which may lie on a slow file system.
_LOOK = 1.0
#: About when the process began: this is imported at its start.
_BEGAN = time.monotonic()
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequested(Exception):
    """Somebody wants the run to stop; the text says who."""


class Stopping:
    """Listens for requests, and lets all ranks agree on the step at which they follow."""

    def __init__(self, file: Path, max_hours: float | None, *, rank: int, world: int) -> None:
        """To be made by all ranks; signals are heard within `listening` only.

        Args:
            file: rank 0 looks for it, and takes it away where it is left from earlier.
            max_hours: stop so many after the start of the process, None: never.
        """
        self._file, self._rank, self._world = file, rank, world
        self._ends = None if max_hours is None else _BEGAN + 3600 * max_hours
        self._max_hours = max_hours
        self._asked: str | None = None
        self._first_interrupt: float | None = None
        self._looked = 0.0
        self._pending: tuple[torch.Tensor, Any] | None = None
        # On the CPU also where the ranks train on GPUs: an answer from there would come behind all that is queued.
        self._group: Any = torch.distributed.new_group(backend="gloo") if world > 1 else None
        if rank == 0:
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as requests; outside of the main thread, where Python forbids it, leave them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in _NAMES}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None is a handler that was not set from Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt > _COPIES:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or now
        if self._asked is None:
            self._asked = _NAMES[signal.Signals(number)]
            if self._rank == 0:
                # Past Python's streams, which may be in the midst of a line.
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                os.write(2, f"\n{self._asked}: the run saves a checkpoint and ends{again}\n".encode())

    def _reason(self) -> str | None:
        """Why this rank would stop; None if it would not."""
        now = time.monotonic()
        if self._asked is None and self._ends is not None and now >= self._ends:
            self._asked = f"max_hours {self._max_hours:g}"
        if self._asked is None and self._rank == 0 and now - self._looked >= _LOOK:
            self._looked = now
            if self._file.exists():
                self._asked = f"the file {self._file.name}"
        return self._asked

    def check(self) -> None:
        """To be called by all ranks after each step.

        With several ranks the answer comes one call late: whoever waited for the ranks here would wait in every step.

        Raises:
            StopRequested: on all ranks in the same call.
        """
        reason = self._reason()
        if self._world == 1:
            if reason is not None:
                raise StopRequested(reason)
            return
        before, self._pending = self._pending, self._send(reason is not None)
        if before is not None:
            flag, work = before
            work.wait()
            if flag.item():
                self.settle()
                raise StopRequested(reason or "another rank was asked to stop")

    def _send(self, asked: bool) -> tuple[torch.Tensor, Any]:
        flag = torch.tensor(int(asked), dtype=torch.int32)
        highest = torch.distributed.ReduceOp.MAX
        return flag, torch.distributed.all_reduce(flag, op=highest, group=self._group, async_op=True)

    def settle(self) -> None:
        """Wait for the last answer, which nobody needs any more; to be called by all ranks when checks are over."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None

    def followed(self) -> None:
        """The request was followed: take the file away, so that the next start is not stopped by it."""
        if self._rank == 0:
            self._file.unlink(missing_ok=True)
