"""Whole canvases without DALI: Pillow in threads. With it: `dali_decoder.Canvases`."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import numpy as np
import PIL
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from fastddr import sampling
from fastddr.data import workers
from fastddr.data.photograph import DAMAGED, upright
from fastddr.loaders import dali_decoder
from fastddr.loaders.base import Task, unusable_photograph


def decoder(task: Task) -> str:
    """What decodes here, with its version: canvases of another decoder may differ in the last levels."""
    return dali_decoder.named(task) if dali_decoder.installed() else f"pillow {PIL.__version__}"


def build(task: Task, together: int) -> dali_decoder.Canvases | PillowCanvases:
    """The decoder of this machine. `together`: how many photographs are decoded at once."""
    return dali_decoder.Canvases(task, together) if dali_decoder.installed() else PillowCanvases(task, together)


class PillowCanvases:
    """Pillow in as many threads as the task has; it lets go of Python's lock while it decodes and scales."""

    def __init__(self, task: Task, together: int) -> None:
        self._task = task
        self._together = together
        # For the card itself: a copy from pageable memory would wait for all the training that is queued. PyTorch keeps
        # pinned memory until the copy is done, and uses it again.
        self._pinned = task.device.type == "cuda" and task.store in ("vram", "none")
        self._width, self._height = sampling.canvas_size(task.widths, task.heights, task.canvas)

    def walk(self, ids: Int[np.ndarray, " n"]) -> Generator[list[tuple[int, Tensor]], None, None]:
        """Yields (id, canvas (height, width, 3)) of some photographs at a time, in the host's memory.

        Raises:
            UserError: a photograph that cannot be decoded, by name.
        """
        wanted: list[int] = ids.tolist()
        with (
            ThreadPoolExecutor(max(1, self._task.threads)) as pool,
            closing(workers.threaded(pool, self._canvas, wanted, ahead=2 * self._together)) as made,
        ):
            for start in range(0, len(wanted), self._together):
                chunk = wanted[start : start + self._together]
                yield list(zip(chunk, islice(made, len(chunk)), strict=True))

    def _canvas(self, id_: int) -> Tensor:
        file = self._task.files[id_]
        try:
            photograph = upright(file)
        except DAMAGED as error:
            raise unusable_photograph(file, error) from None
        size = (int(self._width[id_]), int(self._height[id_]))
        if photograph.size != size:
            photograph = photograph.resize(size, Image.Resampling.BILINEAR)
        canvas = torch.from_numpy(np.array(photograph))
        return canvas.pin_memory() if self._pinned else canvas
