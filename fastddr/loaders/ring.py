"""Pinned slots on the host, each with a buffer on the GPU, used in turn: copies that overlap with the computation."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


class Slot:
    """One piece of pinned memory and its twin on the GPU."""

    def __init__(self) -> None:
        self.host = torch.empty(0, dtype=torch.uint8)
        self.device = torch.empty(0, dtype=torch.uint8)
        self.sent = torch.cuda.Event()
        self.used = torch.cuda.Event()


class Ring:
    """Slots in turn. The host waits only where it is a whole ring ahead of the copies."""

    def __init__(self, device: torch.device, slots: int = 3) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots = [Slot() for _ in range(slots)]
        self._next = 0

    @contextmanager
    def slot(self, size: int) -> Generator[Slot, None, None]:
        """A slot of at least `size` bytes: its host memory may be written in the block, and then be sent.

        What reads the sent bytes must be queued on the current stream before the block ends.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.sent.synchronize()
        if len(slot.host) < size:
            # Some more than asked for, since boxes of warps differ in size from batch to batch.
            room = size + size // 8
            slot.host = torch.empty(room, dtype=torch.uint8, pin_memory=True)
            slot.device = torch.empty(room, dtype=torch.uint8, device=self._device)
            # The new memory may still be in use by what was queued before on the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            yield slot
        finally:
            slot.used.record(torch.cuda.current_stream(self._device))

    def send(self, slot: Slot, size: int) -> Tensor:
        """The first `size` bytes of the slot on the GPU; the current stream waits for them, the host does not."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.used)
            slot.device[:size].copy_(slot.host[:size], non_blocking=True)
            slot.sent.record(self._stream)
        torch.cuda.current_stream(self._device).wait_event(slot.sent)
        return slot.device[:size]
