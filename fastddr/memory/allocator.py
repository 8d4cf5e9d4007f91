"""PyTorch's caching allocator of a CUDA device, replayed: what it reserves for the blocks of a tape.

It reserves segments from the driver and cuts blocks from them; a freed block joins its free neighbours and waits for
the next request that it fits. So it holds more than it has given out: segments come in sizes of their own, and free
pieces may be too small. Rules and numbers are those of `c10/cuda/CUDACachingAllocator.cpp` with its default settings:
requests of up to 1 MiB come from segments of 2 MiB, those below 10 MiB from segments of 20 MiB, larger ones from
segments of their own, in multiples of 2 MiB. The smallest free block that fits is taken, and cut where 512 bytes
(small) or more than 1 MiB (large) would be left over. Where a limit is reached, segments that are free as a whole go
back to the driver.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from fastddr.memory.tape import Tape, rounded

MIB = 2**20
#: Most that counts as small, and size of the segments that it comes from.
_SMALL, _SMALL_SEGMENT = MIB, 2 * MIB
#: From here on a request has a segment of its own; below it segments have this size; and the step of own segments.
_LARGE, _LARGE_SEGMENT, _ROUND = 10 * MIB, 20 * MIB, 2 * MIB


@dataclass(eq=False, slots=True)
class _Piece:
    size: int
    segment: int
    start: int
    """Its first byte within the segment."""
    small: bool
    free: bool = True
    before: _Piece | None = None
    after: _Piece | None = None


@dataclass
class Allocator:
    """A device's allocator, on numbers."""

    limit: int | None = None
    """Bytes that it may reserve; None: any."""
    reserved: int = 0
    most: int = 0
    """The most that was reserved at any time."""
    allocated: int = 0
    """Bytes given out, as PyTorch counts them: with what was too little to cut off."""
    peak: int = 0
    """The most that was given out."""
    _free: dict[bool, list[tuple[int, int, int, _Piece]]] = field(default_factory=lambda: {True: [], False: []})
    _segments: int = 0

    def take(self, size: int) -> _Piece | None:
        """A block; None where even what is given back to the driver leaves no room within the limit."""
        size = rounded(size)
        small = size <= _SMALL
        pool = self._free[small]
        place = bisect_left(pool, (size,))
        if place < len(pool):
            piece = pool.pop(place)[3]
        else:
            segment = _SMALL_SEGMENT if small else _LARGE_SEGMENT if size < _LARGE else -(-size // _ROUND) * _ROUND
            if self.limit is not None and self.reserved + segment > self.limit:
                self._give_back()
                if self.reserved + segment > self.limit:
                    return None
            self._segments += 1
            self.reserved += segment
            self.most = max(self.most, self.reserved)
            piece = _Piece(segment, self._segments, 0, small)
        rest = piece.size - size
        if rest >= 512 if small else rest > _SMALL:
            tail = _Piece(rest, piece.segment, piece.start + size, small, True, piece, piece.after)
            if piece.after is not None:
                piece.after.before = tail
            piece.after, piece.size = tail, size
            self._keep(tail)
        piece.free = False
        self.allocated += piece.size
        self.peak = max(self.peak, self.allocated)
        return piece

    def free(self, piece: _Piece) -> None:
        """Give a block back; it joins its free neighbours."""
        piece.free = True
        self.allocated -= piece.size
        for neighbour in (piece.before, piece.after):
            if neighbour is not None and neighbour.free:
                self._drop(neighbour)
                first, second = (neighbour, piece) if neighbour is piece.before else (piece, neighbour)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                piece = first
        self._keep(piece)

    def _keep(self, piece: _Piece) -> None:
        # Older segments first among equals; the driver's addresses are not known. No two pieces have one place, so the
        # order never looks at the pieces themselves.
        insort(self._free[piece.small], (piece.size, piece.segment, piece.start, piece))

    def _drop(self, piece: _Piece) -> None:
        pool = self._free[piece.small]
        place = bisect_left(pool, (piece.size, piece.segment, piece.start))
        assert pool[place][3] is piece
        pool.pop(place)

    def _give_back(self) -> None:
        for small, pool in self._free.items():
            whole = [entry for entry in pool if entry[3].before is None and entry[3].after is None]
            self._free[small] = [entry for entry in pool if entry not in whole]
            self.reserved -= sum(entry[0] for entry in whole)


def replay(tape: Tape, batch: int, limit: int | None = None) -> Allocator | None:
    """The allocator after the step of a tape with `batch` photographs at once; None where the limit is too small.

    Its `peak` is the step's alone, and not that of what comes before it.
    """
    allocator = Allocator(limit)
    sizes = tape.sizes(batch)
    taken: dict[int, _Piece] = {}
    for number, event in enumerate(tape.events):
        if number == tape.begins:
            allocator.peak = allocator.allocated
        if event > 0:
            piece = allocator.take(sizes[event - 1])
            if piece is None:
                return None
            taken[event] = piece
        else:
            allocator.free(taken.pop(-event))
    return allocator
