"""The report's way: PIL in the workers of a `DataLoader`. The baseline, and the loader of machines without DALI."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastddr import ranks, sampling
from fastddr.data.photograph import DAMAGED, upright
from fastddr.errors import UserError
from fastddr.loaders.base import Loader, Requests, Task, keep_for_ever, unusable_photograph

#: Batches ahead for each worker; also PyTorch's default.
_AHEAD = 2


class _Item(NamedTuple):
    """All that a worker needs to know about one photograph."""

    file: str
    affine: Float[np.ndarray, "2 3"]
    colour: Float[np.ndarray, "3 4"]
    canvas_width: int
    canvas_height: int


class _Photographs(Dataset["Tensor | str"]):
    """Indexed by a batch of `_Item`s instead of numbers: what to do is worked out beforehand, in the main process."""

    def __init__(self, image_size: int, only_crops: bool) -> None:
        self.image_size = image_size
        self.only_crops = only_crops

    def __getitem__(self, items: list[_Item]) -> Tensor | str:
        """The images (b, h, w, 3), or why there are none: an error that leaves a worker comes as a traceback."""
        try:
            return torch.from_numpy(np.stack([render(item, self.image_size, self.only_crops) for item in items]))
        except UserError as error:
            return str(error)


class _Batches(Sampler[list[_Item]]):
    """Micro batches of items; set anew for every epoch."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.requests: Requests | None = None
        self.start = 0

    def __iter__(self) -> Iterator[list[_Item]]:
        requests = self.requests
        assert requests is not None
        for k in range(self.start, len(requests)):
            yield _items(self.files, requests, k)


def _items(files: Sequence[str], requests: Requests, k: int) -> list[_Item]:
    seen = requests.at(k)
    rows = zip(requests.id[k], seen.affine, seen.colour, seen.canvas_width, seen.canvas_height, strict=True)
    return [_Item(files[id_], affine, colour, int(width), int(height)) for id_, affine, colour, width, height in rows]


def render(item: _Item, size: int, only_crops: bool) -> Float[np.ndarray, "h w 3"]:
    """One photograph through its maps, by PIL: to the canvas (antialiased), warped (bilinear), coloured.

    Raises:
        UserError: the file cannot be decoded, or not be read now.
    """
    try:
        photograph = upright(item.file)
    except DAMAGED as error:
        raise unusable_photograph(item.file, error) from None
    pixels = _window(photograph, item, size) if only_crops else _warped(photograph, item, size)
    # Whole rows at a time: a loop over three channels for each pixel costs more than the arithmetic.
    rows = pixels.reshape(size, -1)
    shift = np.tile(item.colour[:, 3], size)
    if only_crops and not np.count_nonzero(item.colour[:, :3] - np.diag(np.diag(item.colour))):
        coloured = np.multiply(rows, np.tile(np.diag(item.colour), size), dtype=np.float32)
    else:
        coloured = (pixels.astype(np.float32, copy=False) @ item.colour[:, :3].T).reshape(size, -1)
    coloured += shift
    return coloured.reshape(size, size, 3)


def _window(photograph: Image.Image, item: _Item, size: int) -> UInt8[np.ndarray, "h w 3"]:
    crops = sampling.as_crops(item.affine[None], size)
    x, y = int(crops.x[0]), int(crops.y[0])
    window = _part(photograph, item, (x, y, x + size, y + size))
    if crops.hflip[0]:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if crops.vflip[0]:
        window = window.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return np.asarray(window)


def _warped(photograph: Image.Image, item: _Item, size: int) -> Float[np.ndarray, "h w 3"]:
    width, height = np.array([item.canvas_width]), np.array([item.canvas_height])
    left, top, right, bottom = sampling.boxes(item.affine[None], width, height, size)[0].tolist()
    part = _part(photograph, item, (left, top, right, bottom))
    # With a black frame, which PIL then repeats outside: by itself it would repeat the photograph's last pixel for
    # half a pixel, and not blend into the black.
    framed = part.crop((-1, -1, part.width + 1, part.height + 1))
    back = sampling.inverse(item.affine[None])[0]
    back[:, 2] += (1 - left, 1 - top)
    window = framed.transform((size, size), Image.Transform.AFFINE, tuple(back.ravel()), Image.Resampling.BILINEAR)
    pixels = np.asarray(window, dtype=np.float32)
    # PIL's warp cuts fractions off; half a level makes up for it on average. What is black stays so.
    return pixels + np.float32(0.5) * (pixels > 0)


def _part(photograph: Image.Image, item: _Item, box: tuple[int, int, int, int]) -> Image.Image:
    """A box (left, top, right, bottom) of the canvas."""
    width, height = item.canvas_width, item.canvas_height
    if photograph.size == (width, height):
        return photograph.crop(box)
    # Only the box is resampled, from where it lies in the photograph; PIL's filter reads past it.
    left, top, right, bottom = box
    scale_x, scale_y = photograph.width / width, photograph.height / height
    source = (
        left * scale_x,
        top * scale_y,
        min(right * scale_x, photograph.width),
        min(bottom * scale_y, photograph.height),
    )
    return photograph.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=source)


def _clean_processes() -> BaseContext:
    """Workers forked from a process that imports what they need and nothing else."""
    # Forked from this one they would inherit DALI's pipelines without their threads, and wait for ever where the
    # garbage collector ends one of those.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fastddr.loaders.forkserver"])
    return context


def _begin_worker(worker: int) -> None:
    """Let no worker outlive a parent that was killed, and none end by a signal that is meant for the parent."""
    # Of SIGTERM the parent's own counts: so it ends what is left of its workers when it ends itself. PyTorch's own
    # watch is of the process that forked the worker: here the forkserver, which lives as long as a worker.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    known = parent is not None and hasattr(signal, "sigwaitinfo")  # macOS has it not
    if known:
        # Who sent a signal is told to a thread that waits for it, and to no handler. Blocked before there is a thread,
        # and not ignored, or it would not be waited for.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks.end_with_parent()
    if not known:
        return

    def wait() -> None:
        assert parent is not None
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _refuse_small_shm(task: Task) -> None:
    """Raise UserError where /dev/shm, through which workers hand batches over, has no room for those on their way."""
    # Where it is full PyTorch loses the batch, and waits for it for ever.
    try:
        shm = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # another system, which hands them over otherwise
        return
    # Those that were asked for, and the two that the consumer holds: the one before and the next.
    batches = min(task.threads * (task.prefetch or _AHEAD) + 2, task.steps * task.accumulation)
    need = batches * task.micro_batch_size * 3 * task.image_size**2 * 4
    # All processes of the machine share it, and start together.
    free = shm.f_bavail * shm.f_frsize // ranks.local_world()
    if need > free:
        roomy = -(-2 * need * ranks.local_world() // 2**20)
        raise UserError(
            f"/dev/shm: {need / 2**20:.1f} MiB of batches are on their way through it at once with --loader "
            f"torchvision, and {free / 2**20:.1f} MiB are free for this process; make it larger (docker: --shm-size "
            f"{roomy}m or --ipc host), or lower --loading.threads or --loading.prefetch."
        )


class VisionLoader(Loader):
    """PIL and worker processes. `threads` is the number of workers; 0 decodes in the main process."""

    name = "torchvision"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.threads > 0:
            _refuse_small_shm(task)
        self._batches = _Batches()
        self._loader = DataLoader(
            _Photographs(task.image_size, task.only_crops),
            batch_size=None,
            sampler=self._batches,
            num_workers=task.threads,
            persistent_workers=task.threads > 0,
            prefetch_factor=task.prefetch or _AHEAD if task.threads > 0 else None,
            multiprocessing_context=_clean_processes() if task.threads > 0 else None,
            worker_init_fn=_begin_worker,
            pin_memory=task.device.type == "cuda",
            # Its own generator: the loader would otherwise draw from the global one, and change the run.
            generator=torch.Generator().manual_seed(0),
        )

    def _images(self, requests: Requests, start: int) -> Generator[Tensor, None, None]:
        self._batches.files = list(self.task.files)
        self._batches.requests, self._batches.start = requests, start
        for images in self._loader:
            if isinstance(images, str):
                raise UserError(images)
            yield images

    def close(self) -> None:
        """Ends the workers."""
        super().close()
        # The only public way to end persistent workers is to drop the loader.
        self.__dict__.pop("_loader", None)

    def abandon(self) -> None:
        """As `Loader.abandon`: a fork that lets go of the workers would end them in the process that they work for."""
        super().abandon()
        keep_for_ever(self.__dict__.pop("_loader", None))
