"""The second half of DALI's graph, for canvases that are decoded already."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from fastddr import sampling
from fastddr.loaders import dali
from fastddr.loaders.base import Requests, Task


class Finisher(dali.DaliLoader):
    """Warps, mirrors and colours boxes of canvases that are there already, by the same operators; on the CPU."""

    _source = staticmethod(dali.given_pixels)

    def __init__(self, task: Task, canvas: Callable[[int], UInt8[Tensor, "h w 3"]]) -> None:
        """`canvas`: the canvas of an id; it is looked at when a batch is fed, `depth` batches ahead."""
        width, height = sampling.canvas_size(task.widths, task.heights, task.canvas)
        super().__init__(replace(task, widths=width, heights=height))
        self._canvas = canvas
        self._ready: Iterator[int] = iter(())
        self._fed = -1
        # What is fed is not copied, so it has to stay until its batch is done.
        self._held: list[Any] = [None] * (dali._depth(task) + 1)

    def images(self, requests: Requests, start: int, ready: Iterator[int]) -> Generator[Tensor, None, None]:
        """As `_images`; each `next(ready)` makes sure of the canvases of a further micro batch."""
        self._ready, self._fed = ready, start - 1
        return self._images(requests, start)

    def windows(self, requests: Requests, k: int, out: UInt8[np.ndarray, "b h w 3"]) -> None:
        """Copies the windows of a micro batch into `out`, upside down where they shall be, but not mirrored."""
        self._gather(self._inputs(requests, k), requests.id[k], out)

    def _gather(self, inputs: dict[str, np.ndarray], ids: np.ndarray, out: UInt8[np.ndarray, "b h w 3"]) -> None:
        turned = inputs.pop("vflip").tolist() if "vflip" in inputs else [0] * len(ids)
        for (image, id_, (x, y), (width, height)), over in zip(self._boxes(inputs, ids, out), turned, strict=True):
            # Rows from below cost no more than rows from above.
            (image[::-1] if over else image)[...] = self._canvas(id_).numpy()[y : y + height, x : x + width]

    def _boxes(self, inputs: dict[str, np.ndarray], ids: np.ndarray, out: Any) -> Iterator[Any]:
        return zip(out, ids.tolist(), inputs["start"].tolist(), inputs["shape"].tolist(), strict=True)

    def _feed(self, requests: Requests, k: int) -> None:
        if k > self._fed:
            self._fed = next(self._ready)
        inputs = self._inputs(requests, k)
        pixels: Any
        if self.task.only_crops:
            size = self.task.image_size
            held = self._held.pop(0)
            pixels = np.empty((len(requests.id[k]), size, size, 3), dtype=np.uint8) if held is None else held
            self._gather(inputs, requests.id[k], pixels)
        else:
            self._held.pop(0)
            pixels = [
                np.ascontiguousarray(self._canvas(id_).numpy()[y : y + height, x : x + width])
                for _, id_, (x, y), (width, height) in self._boxes(inputs, requests.id[k], requests.id[k])
            ]
        self._held.append(pixels)
        self._pipeline.feed_input("pixels", pixels, layout="HWC")
        for name in inputs.keys() - {"start", "shape"}:
            self._pipeline.feed_input(name, inputs[name])
