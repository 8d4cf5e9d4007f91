"""The clock: CUDA events on a GPU, the processor's own on a CPU."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

#: Cycles of a GPU, about 100 µs at 2 GHz: what Python takes to send one operation, if the host is not slow.
_SENT = 2 * 10**5
#: So many times as long where it is.
_SLOW = 10
#: So many calls, of a few kernels each, can wait for a GPU; to send more the host would wait for it.
_QUEUED = 128


class Clock:
    """Times work on a device."""

    def __init__(self, device: torch.device, *, queued: bool = False) -> None:
        """`queued`: for calls that a GPU ends sooner than Python sends the next. It sleeps until all are sent, so that
        its own time is measured, and not Python's."""
        self.device = device
        self.queued = queued and device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """Seconds that one of so many calls takes, from the first one's start to the last one's end on the device."""
        self.synchronize()
        if self.device.type == "cuda":
            took, early = self._on_card(work, times, _SENT)
            return self._on_card(work, times, _SLOW * _SENT)[0] if early and self.queued else took
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    def _on_card(self, work: Callable[[], object], times: int, sent: int) -> tuple[float, bool]:
        """As `seconds`, and whether the first call began before the last one was sent."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.queued:
            torch.cuda._sleep(sent * times)
        start.record()
        for _ in range(times):
            work()
        end.record()
        early = start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times, early

    def repeats(self, work: Callable[[], object], least: float, warm: int = 3) -> tuple[int, float]:
        """(Calls that last `least` seconds together, seconds of one), after a warm-up of so many calls.

        Of a queue no more calls than fit into it, however short they are.
        It ends early where a call is longer than `least` seconds: what is slow only at first matters little there.
        """
        took = math.inf
        for _ in range(warm):
            took = min(took, self.seconds(work))
            if took > least:
                break
        took = min(self.seconds(work), self.seconds(work)) if took <= least else self.seconds(work)
        times = max(1, math.ceil(least / max(took, 1e-7)))
        return min(times, _QUEUED) if self.queued else times, took


def in_turn(calls: Sequence[Callable[[], object]], held: deque[object]) -> Callable[[], object]:
    """One call of the first, then of the second, …, and from the beginning again.

    Results go into `held`: until they fall out of it none is written where another one lies, which a cache still has.
    Its length is how many that are; operations that take turns may share one.
    """
    following = itertools.cycle(calls)

    def call() -> object:
        result = next(following)()
        held.append(result)
        return result

    return call


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: a GPU's L2, a CPU's as Linux tells it; 0 where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [file.read_text().strip() for file in files]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1:] in "KM"), default=0)
