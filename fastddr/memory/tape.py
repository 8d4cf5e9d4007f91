"""A tape: which blocks of memory a training step takes and frees, in their order, for any batch size.

A block's size is affine in the number of photographs that are held at once: so many bytes, and so many more for each
photograph. So one tape answers every batch size by replaying it, and its peak, the largest of many affine sums, is
convex and never falls as the batch grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

#: What blocks are for, in the order in which they are shown.
KINDS = ("parameters", "averaged weights", "optimizer", "gradients", "images", "weight copies", "activations",
         "temporaries")  # fmt: skip
#: PyTorch's CUDA allocator gives out multiples of this many bytes (`kMinBlockSize`).
BLOCK = 512


def rounded(size: int) -> int:
    """Bytes that the allocator gives out for a request of `size` bytes."""
    return max(1, -(-size // BLOCK)) * BLOCK


class Moment(NamedTuple):
    """What is held after one event of a tape."""

    held: int
    """Bytes, each block rounded up."""
    kinds: dict[str, int]
    """The same by kind."""


@dataclass(frozen=True)
class Tape:
    """Blocks by number, and the events that take and free them."""

    kinds: list[str]
    """Of each block."""
    fixed: list[int]
    """Bytes of each block that do not depend on the batch."""
    each: list[int]
    """Bytes of each block for each photograph."""
    events: list[int]
    """n + 1 where block n is taken, -(n + 1) where it is freed."""
    begins: int
    """The event with which the step begins; before it come weights and moments."""
    flop: dict[str, int]
    """Of the step: multiplications and additions in products and convolutions, `fixed` and `each`."""
    moved: dict[str, int]
    """Of the step: bytes that its operations read and write, `fixed` and `each`."""

    def sizes(self, batch: int) -> list[int]:
        """Bytes of each block with `batch` photographs at once."""
        return [fixed + each * batch for fixed, each in zip(self.fixed, self.each, strict=True)]

    def peak(self, batch: int) -> Moment:
        """The moment in which most is held, with `batch` photographs at once.

        Raises:
            ValueError: `batch` is below 1.
        """
        if batch < 1:
            raise ValueError(f"a batch of {batch} photographs")
        sizes = [rounded(size) for size in self.sizes(batch)]
        held = most = place = 0
        for number, event in enumerate(self.events):
            held += sizes[event - 1] if event > 0 else -sizes[-event - 1]
            if held > most:
                most, place = held, number
        kinds = dict.fromkeys(KINDS, 0)
        for event in self.events[: place + 1]:
            block = abs(event) - 1
            kinds[self.kinds[block]] += sizes[block] if event > 0 else -sizes[block]
        return Moment(most, kinds)

    def course(self, batch: int) -> Iterator[dict[str, int]]:
        """Bytes by kind after each event of the step."""
        sizes = [rounded(size) for size in self.sizes(batch)]
        kinds = dict.fromkeys(KINDS, 0)
        for number, event in enumerate(self.events):
            block = abs(event) - 1
            kinds[self.kinds[block]] += sizes[block] if event > 0 else -sizes[block]
            if number >= self.begins:
                yield dict(kinds)

    def cost(self, batch: int) -> tuple[int, int]:
        """(FLOP, bytes moved) of one micro batch of `batch` photographs and its share of the update."""
        flop, moved = (found["fixed"] + found["each"] * batch for found in (self.flop, self.moved))
        return flop, moved
