"""Photographs decoded once and kept: each epoch then only gathers, warps and colours.

The first epoch decodes what it meets, in its own order and ahead of the batches, so that the first step waits for the
batches on their way and not for the set. Whole canvases are kept (uint8), so a window is as good in every epoch.

On a GPU one kernel (`kernels.warp`) makes a batch from the store: straight from the GPU's own memory, or from boxes
that are gathered on the host into a ring of pinned slots and copied by a stream of their own while the model computes.
On a CPU windows are copied slice by slice (advanced indexing would be many times slower), and DALI mirrors, warps
and colours them; without DALI PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastddr import sampling
from fastddr.errors import UserError
from fastddr.kernels import warp as kernels
from fastddr.loaders import canvases, dali_decoder, stores
from fastddr.loaders.base import Loader, Requests, Task, sent
from fastddr.loaders.choosing import settled
from fastddr.loaders.finisher import Finisher
from fastddr.loaders.ring import Ring

#: Photographs that are decoded at once while the store is filled.
_TOGETHER = 32


class ResidentLoader(Loader):
    """Keeps decoded photographs in VRAM, RAM or a file. `task.store` says where; `auto` takes the first that fits."""

    name = "resident"

    def __init__(self, task: Task, say: Callable[[str], None] | None = None) -> None:
        """`say` is told, once an epoch, what had to be decoded again.

        Raises:
            UserError: the photographs do not fit where they shall be kept, or Triton does not run on a GPU.
        """
        if task.store == "auto":
            task = replace(task, store=settled("resident", task).store)
        super().__init__(task)
        wrong = kernels.fails(task.device) if task.device.type == "cuda" else None
        if wrong is not None:
            raise UserError(f"--loader resident: {wrong}; mend that, or for a new run take --loader dali.")
        self._say = say or (lambda line: None)
        self._canvases = canvases.build(task, min(_TOGETHER, task.micro_batch_size))
        self._store = stores.build(task, canvases.decoder(task))
        # On a CPU DALI finishes batches in its own threads. PyTorch's would wait for each other after each photograph,
        # which is slow where anything else uses the cores.
        self._finisher: Finisher | None = None
        if task.device.type == "cpu" and dali_decoder.installed():
            self._finisher = Finisher(self.task, self._store.get)
        # By type: on several ranks Accelerate calls the CPU cpu:0.
        host = task.device.type != self._store.device.type
        self._ring = Ring(task.device) if host else None
        # What the card has decoded for the host's memory is waited for. On a stream of its own, that the host waits for
        # nothing else: not for all the training that is queued.
        self._decoding = torch.cuda.Stream(task.device) if host else None

    def _images(self, requests: Requests, start: int) -> Generator[Tensor, None, None]:
        filled = self._filled(requests, start)
        if self._finisher is not None:
            try:
                yield from self._finisher.images(requests, start, filled)
            finally:
                filled.close()
            return
        for k in filled:
            if self.task.device.type == "cuda":
                yield self._on_gpu(requests, k)
            else:
                images = self._windows(requests, k).float() if self.task.only_crops else self._warped(requests, k)
                yield kernels.coloured(images, torch.from_numpy(requests.at(k).colour.astype(np.float32)))

    def raw_windows(self, epoch: int = 0) -> Iterator[UInt8[Tensor, "b h w 3"]]:
        """The uint8 windows of an epoch on the host, as they are gathered: upside down where they shall be, but neither
        mirrored left to right nor coloured nor sent.

        The store alone, for benchmarks. Each batch is written over by the next.

        Raises:
            ValueError: a policy that does more than to cut and mirror windows, or DALI is not installed.
        """
        if not self.task.only_crops or self._finisher is None:
            raise ValueError("there are windows only on a CPU with DALI, and where every map is one")
        requests, size = self.task.requests(epoch), self.task.image_size
        out = np.empty((self.task.micro_batch_size, size, size, 3), dtype=np.uint8)
        for k in self._filled(requests, 0):
            self._finisher.windows(requests, k, out)
            yield torch.from_numpy(out)

    def _filled(self, requests: Requests, start: int) -> Generator[int, None, None]:
        """The micro batches from `start` on, each as soon as all of its photographs are in the store."""
        store = self._store
        order = requests.id[start:].reshape(-1)
        _, first = np.unique(order, return_index=True)
        order = order[np.sort(first)]
        decoded = self._canvases.walk(order[store.missing(order)])
        again: list[int] = []
        try:
            for k in range(start, len(requests)):
                ids = requests.id[k]
                damaged = store.damaged(ids)
                if damaged:
                    again += damaged
                    self._fill(self._canvases.walk(np.array(damaged)))
                while store.missing(ids).any():
                    if not self._fill(decoded, chunks=1):
                        raise RuntimeError(f"photographs {ids[store.missing(ids)]} were not decoded")
                yield k
                # A photograph's windows, or the padding behind the last one, may go on in the next batch.
                store.release(ids, wanted=requests.id[k + 1 : k + 2].ravel().tolist())
        finally:
            decoded.close()
            # The last batch's, and what was decoded ahead of a loop that was left.
            store.release(order)
            if again:
                self._say(
                    f"{getattr(store, 'path', 'the store')}: {len(again)} photographs were not as they had been "
                    "written, and were decoded again."
                )

    def _fill(self, decoded: Generator[list[tuple[int, Tensor]], None, None], chunks: int | None = None) -> int:
        """Put what comes next, or all of it, into the store; how many photographs that were."""
        count = 0
        with nullcontext() if self._decoding is None else torch.cuda.stream(self._decoding):
            for made in islice(decoded, chunks):
                for id_, canvas in made:
                    self._store.put(id_, canvas)
                count += len(made)
        return count

    @property
    def kept(self) -> float | None:
        """Share of the task's photographs that are in the store; None where it keeps none."""
        if isinstance(self._store, stores.Transient) or self._closed:
            return None
        return 1 - float(self._store.missing(self.task.ids).mean())

    # ------------------------------------------------------------------------------------------ on a CPU

    def _windows(self, requests: Requests, k: int) -> UInt8[Tensor, "b h w 3"]:
        size = self.task.image_size
        crops = sampling.as_crops(requests.at(k).affine, size)
        images = torch.empty(len(requests.id[k]), size, size, 3, dtype=torch.uint8)
        for image, id_, x, y, hflip, vflip in zip(
            images, requests.id[k].tolist(), crops.x, crops.y, crops.hflip, crops.vflip, strict=True
        ):
            window = self._store.get(id_)[y : y + size, x : x + size]
            mirrored = [axis for axis, on in ((0, vflip), (1, hflip)) if on]
            image.copy_(window.flip(mirrored) if mirrored else window)
        return images

    def _warped(self, requests: Requests, k: int) -> Float[Tensor, "b h w 3"]:
        boxes, back = self._boxes(requests, k)
        views = [
            self._store.get(id_)[top:bottom, left:right]
            for id_, (left, top, right, bottom) in zip(requests.id[k].tolist(), boxes.tolist(), strict=True)
        ]
        return kernels.sampled(views, torch.from_numpy(back.astype(np.float32)), self.task.image_size)

    # ------------------------------------------------------------------------------------------ on a GPU

    def _on_gpu(self, requests: Requests, k: int) -> Float[Tensor, "b h w 3"]:
        store, ids, seen = self._store, requests.id[k], requests.at(k)
        if self._ring is None:
            size = np.stack([store.place.width[ids], store.place.height[ids]], axis=1)
            back = sampling.inverse(seen.affine)
            if isinstance(store, stores.Transient):
                pixels = torch.cat([store.get(id_).reshape(-1) for id_ in ids.tolist()])
                return self._kernel(pixels, _ends(size) - size.prod(axis=1) * 3, size, back, seen.colour)
            return self._kernel(store.pixels, store.place.offset[ids], size, back, seen.colour)
        boxes, back = self._boxes(requests, k)
        size = boxes[:, 2:] - boxes[:, :2]
        ends = _ends(size)
        offset = ends - size.prod(axis=1) * 3
        with self._ring.slot(int(ends[-1])) as slot:
            self._gather(ids, boxes, slot.host)
            return self._kernel(self._ring.send(slot, int(ends[-1])), offset, size, back, seen.colour)

    def _gather(self, ids: Int[np.ndarray, " b"], boxes: Int[np.ndarray, "b 4"], host: UInt8[Tensor, " n"]) -> None:
        """Write these boxes of the photographs into the host's memory, one behind the other."""
        begin = 0
        for id_, (left, top, right, bottom) in zip(ids.tolist(), boxes.tolist(), strict=True):
            box = self._store.get(id_)[top:bottom, left:right]
            host[begin : begin + box.numel()].view(box.shape).copy_(box)
            begin += box.numel()

    def _kernel(
        self, pixels: Tensor, offset: np.ndarray, size: np.ndarray, back: np.ndarray, colour: np.ndarray
    ) -> Tensor:
        task = self.task
        return kernels.warp(
            pixels,
            sent(offset.astype(np.int64), task.device),
            sent(size.astype(np.int32), task.device),
            sent(back.astype(np.float32), task.device),
            sent(colour.astype(np.float32), task.device),
            task.image_size,
            task.dtype,
        )

    def _boxes(self, requests: Requests, k: int) -> tuple[Int[np.ndarray, "b 4"], Float[np.ndarray, "b 2 3"]]:
        """The box of each canvas that its image needs, and the map from the image into that box."""
        seen = requests.at(k)
        boxes = sampling.boxes(seen.affine, seen.canvas_width, seen.canvas_height, self.task.image_size)
        back = sampling.inverse(seen.affine)
        back[:, :, 2] -= boxes[:, :2]
        return boxes, back

    def close(self) -> None:
        """Frees the photographs; a file stays for the next run."""
        super().close()
        if self._finisher is not None:
            self._finisher.close()
        self._store.close()
        self._ring = None


def _ends(size: Int[np.ndarray, "b 2"]) -> Int[np.ndarray, " b"]:
    """Where each of these boxes, of width and height, ends if they lie one behind the other."""
    return np.cumsum(size.prod(axis=1) * 3)
