"""When a run is asked to stop: by a signal, by a file, or by the clock. It then saves and ends, and can go on later.
The clock may also ask for a checkpoint alone.

SIGTERM is what schedulers and `kill` send, SIGINT is Ctrl-C, SIGHUP comes when the terminal is closed. Under
`accelerate launch` of several processes a signal to the launcher reaches the ranks more than once and not at the same
moment, and SLURM's warning signals do not reach them at all: hence the file, and the agreement among ranks on the step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastddr import ranks
from fastddr.errors import UserError

#: A second Ctrl-C stops at once; one that comes sooner after the first is the launcher's copy of it.
_COPIES = 1.0
#: Seconds between two looks at the file, which may lie on a slow file system.
_LOOK = 1.0
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}


class StopRequested(Exception):
    """Somebody wants the run to stop; the text says who."""


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Give signals handlers for a time; outside of the main thread, where Python forbids it, leave them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def deaf() -> AbstractContextManager[None]:
    """Ignore SIGTERM: a launcher that has seen another rank fail sends it while this one still saves why."""
    return _handling({signal.SIGTERM: signal.SIG_IGN})


class Stopping:
    """Listens for requests, and lets all ranks agree on the step at which they follow."""

    def __init__(
        self,
        file: Path,
        max_hours: float | None,
        save_every_minutes: float | None = None,
        *,
        rank: int,
        world: int,
        since: float | None = None,
    ) -> None:
        """To be made by all ranks; signals are heard within `listening` only.

        Args:
            file: rank 0 looks for it.
            max_hours: stop so many after `since`, None: never.
            save_every_minutes: by rank 0's clock a checkpoint is due so many after the last one, None: never.
            since: when the run's start began (`time.monotonic`), None: now.
        """
        self._file, self._rank, self._world = file, rank, world
        since = time.monotonic() if since is None else since
        self._ends = None if max_hours is None else since + 3600 * max_hours
        self._asked: str | None = None
        #: What ranks tell each other, by its place here; of several the last one counts, and the clock the least.
        self._clock, by_file = "" if max_hours is None else f"max_hours {max_hours:g}", f"the file {file.name}"
        self._reasons = (None, self._clock, by_file, *_NAMES.values())
        #: Whether this start has got further.
        self._further = False
        self._first_interrupt: float | None = None
        self._looked = 0.0
        self._save_every = None if save_every_minutes is None else 60 * save_every_minutes
        self._saved = time.monotonic()
        #: Whether the clock wants a checkpoint; the same on all ranks after `ask`, until one is `saved`.
        self.wanted = False
        self._pending: tuple[torch.Tensor, Any] | None = None

    def listening(self) -> AbstractContextManager[None]:
        """Take the signals of `_NAMES` as requests."""
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # under nohup
        return _handling({number: self._hear for number in _NAMES if number != signal.SIGHUP or not ignored})

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt > _COPIES:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or now
        if self._asked in (None, self._clock):
            self._asked = _NAMES[signal.Signals(number)]
            if self._rank == 0:
                # Past Python's streams, which may be in the midst of a line.
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, f"\n{self._asked}: the run saves a checkpoint and ends{again}\n".encode())

    def _reason(self) -> str | None:
        """Why this rank would stop; None if it would not."""
        now = time.monotonic()
        if self._asked is None and self._ends is not None and now >= self._ends:
            self._asked = self._clock
        if self._asked is None and self._rank == 0 and now - self._looked >= _LOOK:
            self._looked = now
            # A hiccup of a file system over the network is no request.
            with contextlib.suppress(OSError):
                if self._file.exists():
                    self._asked = self._reasons[2]
        return self._asked

    def heard(self) -> None:
        """Follow at once what this process itself was asked, where it cannot go on to the next step.

        Raises:
            StopRequested: it was asked to stop.
            KeyboardInterrupt: the same with several ranks, which can agree on nothing here, so the run ends at once.
        """
        if self._asked is not None:
            raise StopRequested(self._asked) if self._world == 1 else KeyboardInterrupt

    def saved(self) -> None:
        """A checkpoint was taken; the minutes to the next one count from here."""
        self._saved, self.wanted, self._further = time.monotonic(), False, True

    def ask(self) -> str | None:
        """Why the run is to stop, None if it is not; to be called by all ranks after each step, and the same on all.

        With several ranks the answer comes one call late: whoever waited for the ranks here would wait in every step.
        It comes over the CPU, and a rank that is lost is told so. In a wait for a GPU whose part in a collective never
        ends nothing could be told, so this comes before any.
        """
        self._further = True
        return self._agreed()

    def _agreed(self) -> str | None:
        reason = self._reason()
        due = self._rank == 0 and self._save_every is not None and time.monotonic() - self._saved >= self._save_every
        if due:
            self._saved = time.monotonic()  # asked for once
        if self._world == 1:
            self.wanted |= due
            return reason
        asked = torch.tensor([self._reasons.index(reason), due], dtype=torch.int32)
        highest = torch.distributed.ReduceOp.MAX
        before = self._pending
        # On the CPU also where the ranks train on GPUs: an answer from there would come behind all that is queued.
        self._pending = asked, torch.distributed.all_reduce(asked, op=highest, group=ranks.talk(), async_op=True)
        if before is None:
            return None
        answer, work = before
        work.wait()
        stop, save = answer.tolist()
        self.wanted |= bool(save)
        return self._reasons[stop]

    def arrived(self) -> None:
        """Wait until the ranks have said what they were asked last. To be called before a wait for a GPU: there a rank
        that is lost could not be told.
        """
        if self._pending is not None:
            self._pending[1].wait()

    def follow(self, reason: str | None) -> None:
        """Follow what `ask` said.

        Raises:
            StopRequested: there is a reason; on all ranks in the same call.
        """
        if reason is not None:
            self.settle()
            raise StopRequested(reason)

    def check(self) -> None:
        """`ask` where a split is scored, and follow it at once.

        Raises:
            StopRequested: there is a reason.
            UserError: it is the clock, and this start has got no further than the last; nor would the next.
        """
        reason = self._agreed()
        if reason is not None and reason == self._clock and not self._further:
            self.settle()
            raise UserError(
                f"{self._clock} is over before this start got any further: to prepare and to score a "
                "split take longer; give --max-hours more, and the same command goes on."
            )
        self.follow(reason)

    def settle(self) -> None:
        """Wait for the last answer, which nobody needs any more; to be called by all ranks when checks are over."""
        self.arrived()
        self._pending = None

    def followed(self) -> None:
        """The request was followed: take the file away, so that the next start is not stopped by it."""
        if self._rank == 0:
            self._file.unlink(missing_ok=True)
