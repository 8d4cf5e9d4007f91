"""The contract that all loaders keep: what a batch is, what is asked for, and how an epoch is walked.

A loader is told everything by a `Task` and adds nothing to it: ids, windows, mirrors and colours come from
`fastddr.sampling`, so that all loaders give the same pixels. It keeps Accelerate's contract for data loaders
(`DataLoaderStateMixin`) and does not go through `accelerator.prepare`.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from fastddr import sampling
from fastddr.config import AugmentConfig
from fastddr.data.photograph import DAMAGED
from fastddr.errors import UserError

#: Where the resident loader keeps decoded photographs.
StoreName = Literal["auto", "vram", "ram", "mmap", "none"]
#: Photographs whose maps are worked out at once, about. Fewer cost more each, more hold up a batch for longer: these
#: some milliseconds.
_TOGETHER = 2048


@dataclass(frozen=True)
class Batch:
    """What a model is given, on the device."""

    image: Float[Tensor, "b 3 h w"]
    """Normalised, channels_last; float32, or the autocast dtype on a GPU."""
    grade: Int[Tensor, " b"]
    id: Int[Tensor, " b"]
    """Row of the manifest."""
    valid: Bool[Tensor, " b"]
    """False for padding at the tail of an evaluation."""


@dataclass(frozen=True, eq=False)
class Seen:
    """How n photographs are seen."""

    affine: Float[np.ndarray, "n 2 3"]
    """Canvas to image, in pixels."""
    colour: Float[np.ndarray, "n 3 4"]
    """(R, G, B, 1) in 0-255 to normalised values."""
    source_width: Int[np.ndarray, " n"]
    """Of the upright photograph, in pixels."""
    source_height: Int[np.ndarray, " n"]
    canvas_width: Int[np.ndarray, " n"]
    canvas_height: Int[np.ndarray, " n"]

    def __getitem__(self, some: slice) -> Seen:
        return Seen(*(getattr(self, part.name)[some] for part in fields(self)))


class Requests:
    """What one rank needs in one epoch, cut into m micro batches of b photographs: who comes when, and seen how.

    How they are seen is worked out for a block of micro batches when one of it is asked for. So the first batch of an
    epoch does not wait for the maps of a million photographs, nor a resumed one for those before it.
    """

    def __init__(
        self, id: Int[np.ndarray, "m b"], valid: Bool[np.ndarray, "m b"], see: Callable[[slice], Seen]
    ) -> None:
        """`see`: how photographs are seen, by their places among all m * b."""
        self.id, self.valid = id, valid
        self._batch = id.shape[1]
        self._size = max(1, _TOGETHER // self._batch)
        rows = self._size * self._batch
        # Two, because a loader that works ahead is in the next one before all is done with the last.
        self._block = lru_cache(maxsize=2)(lambda number: see(slice(number * rows, (number + 1) * rows)))

    def __len__(self) -> int:
        return len(self.id)

    def block(self, k: int) -> tuple[Seen, slice]:
        """The block of micro batch `k`, and which of its photographs are `k`'s."""
        number, place = divmod(range(len(self))[k], self._size)
        return self._block(number), slice(place * self._batch, (place + 1) * self._batch)

    def at(self, k: int) -> Seen:
        """How the photographs of micro batch `k` are seen."""
        seen, own = self.block(k)
        return seen[own]


@dataclass(frozen=True)
class Task:
    """Which photographs to load, how they are seen, and which part of them falls to this rank."""

    files: Sequence[str]
    """File of each id."""
    grades: Int[np.ndarray, " n"]
    widths: Int[np.ndarray, " n"]
    heights: Int[np.ndarray, " n"]
    ids: Int[np.ndarray, " k"]
    """The photographs to load."""
    train: bool
    """Shuffled, augmented, without the last partial batch; else in order, plain, padded at the tail."""
    image_size: int
    canvas: int
    augment: AugmentConfig
    seed: int
    batch_size: int
    """The global batch."""
    multi: bool = False
    """Evaluation gives nine windows of each photograph, one after the other, instead of the middle one."""
    accumulation: int = 1
    """Micro batches that make one rank's part of a global batch."""
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = 1
    prefetch: int | None = None
    """Batches on their way; None: what the loader knows to be best."""
    regions: Literal["auto", "always", "never"] = "auto"
    """Whether only the part of a photograph is decoded that its window needs."""
    jpeg_engines: bool = False
    """Whether a GPU's JPEG engines decode."""
    store: StoreName = "auto"
    """Where the resident loader keeps decoded photographs."""
    budget: int | None = None
    """Most bytes that it may keep; None: a part of what is free."""

    def __post_init__(self) -> None:
        if self.train and len(self.ids) < self.batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is larger than the {len(self.ids)} training photographs, so there "
                "would be no step; lower it."
            )
        if len(self.ids) == 0:
            raise UserError("a loader was asked for no photograph at all; give it the ids of at least one.")
        short = int(np.minimum(self.widths[self.ids], self.heights[self.ids]).min())
        if short < 1:
            raise UserError(f"a photograph of {short} pixels a side cannot be loaded.")

    @property
    def micro_batch_size(self) -> int:
        """Photographs in a batch of this rank."""
        return self.batch_size // (self.world * self.accumulation)

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return len(self.ids) // self.batch_size if self.train else -(-len(self.ids) * self.views // self.batch_size)

    @property
    def views(self) -> int:
        """Windows of each photograph in an epoch."""
        return len(sampling.NINE) if self.multi else 1

    @cached_property
    def only_crops(self) -> bool:
        """Whether every map is a window of the canvas, perhaps mirrored."""
        return not self.train or sampling.only_crops(self.augment)

    @cached_property
    def only_normalises(self) -> bool:
        """Whether the colour map is the same for all photographs."""
        return not self.train or sampling.only_normalises(self.augment)

    @cached_property
    def canvas_is_source(self) -> bool:
        """Whether every photograph already has the size of its canvas, so that none is scaled."""
        return bool((np.minimum(self.widths[self.ids], self.heights[self.ids]) == self.canvas).all())

    def requests(self, epoch: int) -> Requests:
        """Everything that this rank loads in an epoch. A pure function of the task and the epoch."""
        ids = sampling.order(self.ids, self.seed, epoch) if self.train else np.repeat(self.ids, self.views)
        cut = {"rank": self.rank, "world": self.world, "accumulation": self.accumulation}
        place, valid = sampling.schedule(np.arange(len(ids)), self.batch_size, **cut, pad=not self.train)
        rows = sampling.numbers(len(self.files), self.seed, epoch) if self.train else None
        flat = place.reshape(-1)

        def see(some: slice) -> Seen:
            of = ids[flat[some]]
            width, height = self.widths[of], self.heights[of]
            canvas = sampling.canvas_size(width, height, self.canvas)
            if rows is not None:
                maps = sampling.training_maps(rows[of], *canvas, self.image_size, self.augment)
            else:
                window = sampling.NINE[flat[some] % self.views] if self.multi else None
                maps = sampling.evaluation_maps(*canvas, self.image_size, self.augment, window)
            return Seen(maps.affine, maps.colour, width, height, *canvas)

        return Requests(ids[place], valid, see)


class Loader(DataLoaderStateMixin, ABC):
    """Batches of one rank, epoch by epoch.

    `len(loader)` is the number of micro batches in an epoch. Leaving an epoch early, beginning another before
    one has ended (the older then raises `RuntimeError` at its next batch) and `close()` are safe at any time.
    """

    name = ""

    def __init__(self, task: Task) -> None:
        self.task = task
        # What Accelerate reads: the photographs, the global batch and whether its last, partial one is dropped.
        self.gradient_state = GradientState()
        self.dataset: Sequence[int] = task.ids.tolist()
        self.total_batch_size = task.batch_size
        self._drop_last = task.train
        self._running: Generator[Tensor, None, None] | None = None
        self._closed = False
        _alive.add(self)

    def __len__(self) -> int:
        return self.task.steps * self.task.accumulation

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from an optimizer step of it onwards.

        Raises:
            UserError: a photograph that cannot be decoded, by name.
        """
        if self._closed:
            raise RuntimeError(f"the {self.name} loader is closed")
        self._stop()  # at once: whoever asks for this epoch is done with the one before
        return self._walk(epoch, start_step * self.task.accumulation)

    @property
    def kept(self) -> float | None:
        """Share of the photographs that are decoded and kept; None where none are."""
        return None

    def close(self) -> None:
        """Let go of threads, processes and buffers. Safe to call again."""
        self._stop()
        self._closed = True

    def abandon(self) -> None:
        """In a process forked from the one that made this loader: closed, without ending what the other still uses."""
        self._running, self._closed = None, True

    @abstractmethod
    def _images(self, requests: Requests, start: int) -> Generator[Tensor, None, None]:
        """Yields the images of the micro batches from `start` on: (b, h, w, 3) normalised, on the device."""

    def _walk(self, epoch: int, start: int) -> Iterator[Batch]:
        # It begins at its first batch, and by then another epoch may have begun, or the loader be closed.
        if self._closed:
            raise RuntimeError(f"the {self.name} loader is closed")
        self._stop()
        requests = self.task.requests(epoch)
        images = self._running = self._images(requests, start)
        self.begin()
        try:
            for k in range(start, len(requests)):
                image = next(images)
                self.end_of_dataloader = k == len(requests) - 1
                yield self._batch(image, requests, k)
                if self._running is not images:
                    raise RuntimeError(f"a newer epoch of this {self.name} loader has begun, or it was closed")
        finally:
            if self._running is images:
                self._stop()

    def _batch(self, image: Tensor, requests: Requests, k: int) -> Batch:
        device = self.task.device
        return Batch(
            # First to the device, then to the dtype: in one call the cast would be made on the host.
            image=image.to(device, non_blocking=True).to(self.task.dtype).permute(0, 3, 1, 2),
            grade=sent(self.task.grades[requests.id[k]], device),
            id=sent(requests.id[k], device),
            valid=sent(requests.valid[k], device),
        )

    def _stop(self) -> None:
        if self._running is not None:
            images, self._running = self._running, None
            self.end()
            images.close()


#: The loaders of this process that somebody holds.
_alive: weakref.WeakSet[Loader] = weakref.WeakSet()


def close_all() -> None:
    """Close every loader that somebody holds."""
    for loader in list(_alive):
        loader.close()


def _abandon_all() -> None:
    for loader in list(_alive):
        loader.abandon()


os.register_at_fork(after_in_child=_abandon_all)


def keep_for_ever(thing: object) -> None:
    """Nothing in this process will end it: it gets a reference that nobody holds."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device, without the host waiting for it."""
    here = torch.from_numpy(np.ascontiguousarray(values))
    # Pinned, because a copy from pageable memory may wait for all that was queued before it. PyTorch keeps the pinned
    # memory until the copy is done, and uses it again.
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def unusable_photograph(file: str, error: Exception) -> UserError:
    """What to raise where a photograph gave one of `DAMAGED`: it cannot be decoded, or only not be read now."""
    if isinstance(error, OSError) and error.errno is not None:  # the system's; the decoder's have none
        return UserError(
            f"{file}: this photograph cannot be read now ({error.strerror}), which says nothing of what it holds; "
            "give the same command again, or where that does not help, mend the disk or the rights."
        )
    why = " ".join(str(error).split())
    return UserError(f"{file} ({why}): this photograph cannot be decoded; replace it or take it out of the set.")


def first_unusable(files: Sequence[str]) -> UserError | None:
    """What to raise of the first of these files that PIL cannot decode; None if it can decode them all."""
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
        except DAMAGED as error:
            return unusable_photograph(file, error)
    return None
