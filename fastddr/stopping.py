"""When a run is asked to stop: by a signal, by a file, or by the clock. It then saves and ends, and can go on later.

SIGTERM is what schedulers and `kill` send, SIGINT is Ctrl-C. Under `accelerate launch` of several processes a signal to
the launcher reaches the ranks more than once and not at the same moment, and SLURM's warning signals do not reach them
at all: hence the file, and the agreement among ranks on the step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

#: A second Ctrl-C stops at once; one that comes sooner after the first is the launcher's copy of it.
_COPIES = 1.0
#: Seconds between two looks at the file, which may lie on a slow file system.
_LOOK = 1.0
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequested(Exception):
    """Somebody wants the run to stop; the text says who."""


class Stopping:
    """Listens for requests, and lets all ranks agree on the step at which they follow."""

    def __init__(
        self,
        file: Path,
        max_hours: float | None,
        device: torch.device,
        *,
        rank: int,
        world: int,
        say: Callable[[str], None],
    ) -> None:
        """Begin to count the hours; signals are heard within `listening` only.

        Args:
            file: rank 0 looks for it, and takes it away where it is left from earlier.
            max_hours: stop after so many, None: never.
            device: where the ranks' collectives run.
            say: told once, as soon as a signal has come.
        """
        self._file, self._device, self._rank, self._world, self._say = file, device, rank, world, say
        self._ends = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._max_hours = max_hours
        self._asked: str | None = None
        self._first_interrupt: float | None = None
        self._looked = 0.0
        self._pending: tuple[torch.Tensor, object] | None = None
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
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt > _COPIES:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or now
        if self._asked is None:
            self._asked = _NAMES[signal.Signals(number)]
            self._say(f"{self._asked}: a checkpoint is saved after this step, and the run ends; "
                      "Ctrl-C again stops at once")  # fmt: skip

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
            work.wait()  # type: ignore[attr-defined]
            if flag.item():
                self._pending[1].wait()  # type: ignore[attr-defined]  # no rank leaves the group in the midst of it
                self._pending = None
                raise StopRequested(reason or "another rank was asked to stop")

    def _send(self, asked: bool) -> tuple[torch.Tensor, object]:
        # Filled on the device: a copy from the host would wait for all that is queued there.
        flag = torch.full((), int(asked), dtype=torch.int32, device=self._device)
        return flag, torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, async_op=True)

    def settle(self) -> None:
        """Wait for the last answer, which nobody needs any more; to be called by all ranks when checks are over."""
        if self._pending is not None:
            self._pending[1].wait()  # type: ignore[attr-defined]
            self._pending = None

    def followed(self) -> None:
        """The request was followed: take the file away, so that the next start is not stopped by it."""
        if self._rank == 0:
            self._file.unlink(missing_ok=True)
