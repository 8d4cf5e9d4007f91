"""What a run measures of itself: waiting, throughput, memory, versions."""

from __future__ import annotations

import math
import platform
import resource
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

import accelerate
import torch

import fastddr

T = TypeVar("T")


class Waited(Generic[T]):
    """An iterator that adds up the seconds for which `next` kept the host waiting."""

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches
        self.waited = 0.0

    def __iter__(self) -> Waited[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - began


class Window:
    """Means over the steps since the last log line."""

    def __init__(self, now: float) -> None:
        self._total = torch.zeros(3, dtype=torch.float64)
        self._began, self._waited = now, 0.0
        self.rate: float | None = None
        self.wait_share: float | None = None

    def close(self, total: torch.Tensor, waited: float, now: float) -> tuple[float, float]:
        """(mean loss, accuracy) of the photographs since the last call, NaN without any; sets `rate`, `wait_share`."""
        loss, correct, count = (total - self._total).tolist()
        seconds = now - self._began
        self.rate, self.wait_share = count / seconds, (waited - self._waited) / seconds
        self._total, self._began, self._waited = total, now, waited
        return (loss / count, correct / count) if count else (math.nan, math.nan)


MEMORY = {
    "memory/peak_allocated_gib": "Peak GPU memory, allocated",
    "memory/peak_reserved_gib": "Peak GPU memory, reserved",
    "memory/peak_rss_gib": "Peak memory of the process",
}


def memory(device: torch.device) -> dict[str, float]:
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    found = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        found["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return found


def versions() -> dict[str, str]:
    return {
        "fastddr": fastddr.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }
