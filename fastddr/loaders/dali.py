"""NVIDIA DALI: files read, decoded, warped and normalised in C++ or on the GPU.

Python hands over a batch's paths and maps and receives a finished batch. The graph is one chain, and the policy, never
a photograph, says which links it has:

1. Read the file and decode the region of it that the image is made of.
2. Resize the region to its pixels of the canvas, unless every photograph is its own canvas.
3. Mirror it, where every map is a window; else warp it.
4. Colour: the normalisation alone, or a matrix for each photograph.

`device_id=None` runs the chain on the CPU, where PyTorch may normalise what comes out of it (`normaliser`).
"""

from __future__ import annotations

import atexit
import os
import sys
from collections import deque
from collections.abc import Callable, Generator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddr import sampling
from fastddr.errors import UserError
from fastddr.loaders import dali_decoder
from fastddr.loaders.base import Loader, Requests, Seen, Task, close_all, keep_for_ever
from fastddr.loaders.normaliser import Normaliser

#: Steps whose use of their batches may still be queued on a GPU when the next one is asked for; not measured.
_QUEUED = 2


class DaliLoader(Loader):
    """Streams photographs through a DALI pipeline."""

    name = "dali"
    #: What makes the pixels, as `_build` has it.
    _source: Callable[[Task], Any] | None = None

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if not dali_decoder.installed():
            raise UserError(
                "--loader dali: NVIDIA DALI is not installed; `pip install nvidia-dali-cuda130` (Linux only), or "
                "choose --loader torchvision."
            )
        dali_decoder.check_driver(task)
        self._paths = dali_decoder.paths_of(task)
        self._pipeline: Any = None
        # Of a whole block at once, which each batch then takes its rows of.
        self._of_block = lru_cache(maxsize=2)(partial(_inputs, task))
        self._normaliser: Normaliser | None = None
        if _normalised_after(task, self._source):
            self._normaliser = Normaliser(task.augment, task.threads)

    def _images(self, requests: Requests, start: int) -> Generator[Tensor, None, None]:
        depth, wanted = _depth(self.task), len(requests) - start
        sent = received = 0
        used: deque[torch.cuda.Event] = deque()
        try:
            while received < wanted:
                if self._pipeline is None:
                    self._pipeline = self._build()
                    # DALI's very first run fills the whole queue, so it wants as many inputs; where the epoch
                    # is shorter than the queue, its last batch stands in, and is thrown away below.
                    for k in range(depth):
                        self._feed(requests, start + min(k, wanted - 1))
                    self._pipeline.schedule_run()
                    sent = depth
                while sent < min(received + depth, wanted):
                    self._feed(requests, start + sent)
                    self._pipeline.schedule_run()
                    sent += 1
                image = self._receive(requests, start + received)
                received += 1
                yield image
                self._hold_back(used)
        except GeneratorExit:
            pass
        except BaseException:
            # Ctrl-C may come in the midst of a call to the pipeline, so it is not known what that holds.
            self._pipeline = None
            raise
        # What is still on its way must not turn up in the next epoch.
        while self._pipeline is not None and received < sent:
            received += 1
            try:
                self._pipeline.outputs()
            except RuntimeError:
                # Nobody wants this batch, so nobody need hear of it; the pipeline is built anew when needed.
                self._pipeline = None

    def _hold_back(self, used: deque[torch.cuda.Event]) -> None:
        """On a GPU: let the host run ahead by so many batches alone."""
        # DALI frees what PyTorch has dropped once the card has done all that was queued by then: the more is queued,
        # the more dead batches lie on the card.
        if self.task.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.task.device))
            used.append(event)
            # In steps, of which training itself lets no more be queued: within one it would wait here, and take that
            # for waiting for data.
            if len(used) > _QUEUED * self.task.accumulation:
                used.popleft().synchronize()

    def _build(self) -> Any:
        return _build(self.task, self._source)

    def _feed(self, requests: Requests, k: int) -> None:
        # One array for a whole batch: as a list the paths would take several times as long.
        self._pipeline.feed_input("path", self._paths[requests.id[k]])
        for name, values in self._inputs(requests, k).items():
            self._pipeline.feed_input(name, values)

    def _inputs(self, requests: Requests, k: int) -> dict[str, np.ndarray]:
        """What the graph wants to know about micro batch `k`."""
        seen, own = requests.block(k)
        return {name: values[own] for name, values in self._of_block(seen).items()}

    def _receive(self, requests: Requests, k: int) -> Tensor:
        stream = torch.cuda.current_stream(self.task.device) if self.task.device.type == "cuda" else None
        try:
            (output,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            # The pipeline cannot go on after an error.
            self._pipeline = None
            found = dali_decoder.explained(error, requests.id[k].tolist(), self.task)
            if found is error:
                raise
            raise found from error
        # DALI's dynamic executor hands the buffer over for good: it is freed some time after the tensor, never reused.
        images = torch.from_dlpack(output.as_tensor())
        return images if self._normaliser is None else self._normaliser(images)

    def close(self) -> None:
        """Frees the pipeline, its threads and its buffers."""
        super().close()
        if self._pipeline is not None:
            self._pipeline = None
            dali_decoder.give_back(self.task)

    def abandon(self) -> None:
        """As `Loader.abandon`: nothing is received from the pipeline any more, and it is never ended."""
        super().abandon()
        keep_for_ever(self._pipeline)
        self._pipeline = None


def _abandon_pipelines() -> None:
    """In a process forked from one that has pipelines, a loader's or a store's: they are never ended."""
    # A fork has them without their threads, and ending one would wait for those for ever: also at the very end, when
    # DALI ends all pipelines that it knows.
    module = sys.modules.get("nvidia.dali.pipeline")
    if module is not None:
        known = module.Pipeline._pipes
        for weak in list(known):
            keep_for_ever(weak())
        known.clear()


os.register_at_fork(after_in_child=_abandon_pipelines)


def _depth(task: Task) -> int:
    """Batches on their way. With 1 nothing is decoded while a batch is computed on."""
    # On the CPU 2, 3 and 4 are equally fast, and each batch more costs its memory. A GPU waits for nobody: a third
    # batch is there where one was slow to read (not measured).
    return task.prefetch or (3 if task.device.type == "cuda" else 2)


def _inputs(task: Task, seen: Seen) -> dict[str, np.ndarray]:
    """What the graph wants to know about photographs, besides their paths, one row for each."""
    inputs: dict[str, np.ndarray] = {}
    affine = seen.affine
    if task.only_crops:
        crops = sampling.as_crops(affine, task.image_size)
        corner = np.stack([crops.x, crops.y], axis=1)
        box = np.concatenate([corner, corner + task.image_size], axis=1)
        if _mirrors(task):
            inputs |= {"hflip": crops.hflip.astype(np.int32), "vflip": crops.vflip.astype(np.int32)}
    else:
        box = sampling.boxes(affine, seen.canvas_width, seen.canvas_height, task.image_size)
        back = sampling.inverse(affine)
        back[:, :, 2] -= box[:, :2]
        if task.device.type != "cuda":
            # As a projective map, that `_warp` may take OpenCV's.
            back = np.concatenate([back, np.broadcast_to([0.0, 0.0, 1.0], (len(back), 1, 3))], axis=1)
        inputs["back"] = back.astype(np.float32)
    start, end = box[:, :2], box[:, 2:]
    if not task.canvas_is_source:
        inputs["size"] = (end - start)[:, ::-1].astype(np.float32)
        source = np.stack([seen.source_width, seen.source_height], axis=1)
        scale = source / np.stack([seen.canvas_width, seen.canvas_height], axis=1)
        low, high = start * scale, end * scale
        # How far the antialiasing filter reads, and one pixel for rounding.
        reach = np.maximum(scale, 1) + 1
        start = np.maximum(np.floor(low - reach), 0).astype(np.int64)
        end = np.minimum(np.ceil(high + reach), source).astype(np.int64)
        # Within the region, and as (y, x): so DALI's resize has it.
        inputs["roi_start"] = (low - start)[:, ::-1].astype(np.float32)
        inputs["roi_end"] = (high - start)[:, ::-1].astype(np.float32)
    inputs |= {"start": start.astype(np.int32), "shape": (end - start).astype(np.int32)}
    if not task.only_normalises:
        inputs["colour"] = seen.colour.astype(np.float32)
    return inputs


def _mirrors(task: Task) -> bool:
    """Whether windows may come mirrored."""
    return task.train and (task.augment.hflip or task.augment.vflip)


def _normalised_after(task: Task, source: Callable[[Task], Any] | None) -> bool:
    """Whether images leave the pipeline before they are normalised, on a CPU."""
    # Windows of canvases that are there already (a `source`) do not: they keep the thread that asks for them busy, and
    # DALI's threads have little else to do.
    alone = task.device.type == "cpu" and task.only_normalises
    return alone and (source is None or not task.only_crops)


def _build(task: Task, source: Callable[[Task], Any] | None) -> Any:
    """The pipeline. `source` makes the operator that gives it pixels; with None they are read and decoded."""
    # Larger buffers come from DALI's own pool instead of `malloc`, which would give them back to the system and fetch
    # them anew, page by page, for each batch. Read when DALI first allocates.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")
    pipeline = dali_decoder.pipeline(task, task.micro_batch_size, _depth(task))
    # As the interpreter ends DALI ends its pipelines. After its import, and so called before that: the loaders.
    atexit.unregister(close_all)
    atexit.register(close_all)
    with pipeline:
        normalise = task.only_normalises and not _normalised_after(task, source)
        pixels = (source or _decoded)(task)
        pipeline.set_outputs(_graph(task, pixels, upright=source is None, normalise=normalise))
    return dali_decoder.built(pipeline)


def _external(name: str, dtype: str, ndim: int, **settings: Any) -> Any:
    from nvidia.dali import fn, types

    return fn.external_source(name=name, dtype=getattr(types, dtype), ndim=ndim, **settings)


def _decoded(task: Task) -> Any:
    """The part of each photograph that its image needs, read and decoded."""
    from nvidia.dali import fn, types

    encoded = dali_decoder.read(_external("path", "UINT8", 1))
    settings = dali_decoder.decoding(task)
    region = {"start": _external("start", "INT32", 1), "shape": _external("shape", "INT32", 1), "axis_names": "WH"}
    if dali_decoder.by_region(task):
        return fn.decoders.image_slice(encoded, output_type=types.RGB, **region, **settings)
    return fn.slice(fn.decoders.image(encoded, output_type=types.RGB, **settings), **region)


def given_pixels(task: Task) -> Any:
    """The same, from the host's memory, upside down where it shall be."""
    return _external("pixels", "UINT8", 3, layout="HWC", no_copy=True)


def _graph(task: Task, pixels: Any, *, upright: bool, normalise: bool) -> Any:
    """From pixels and maps to normalised images (h, w, 3): float16 where that is the training dtype, else float32.

    `upright`: windows that shall be upside down are not so yet. `normalise`: that is all that is done to colours; where
    the policy does no more and this is False, the images are of levels 0-255, windows as uint8.
    """
    from nvidia.dali import fn, types

    if not task.canvas_is_source:
        pixels = fn.resize(
            pixels,
            size=_external("size", "FLOAT", 1),
            roi_start=_external("roi_start", "FLOAT", 1),
            roi_end=_external("roi_end", "FLOAT", 1),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
    mirror: dict[str, Any] = {}
    if not task.only_crops:
        pixels = _warp(pixels, _external("back", "FLOAT", 2), task)
    elif _mirrors(task):
        left_right = _external("hflip", "INT32", 0)
        upside_down = _external("vflip", "INT32", 0) if upright else 0
        if normalise:
            # To normalise mirrors left to right without a pass of its own.
            mirror = {"mirror": left_right}
            left_right = 0
        if upright or not mirror:
            pixels = fn.flip(pixels, horizontal=left_right, vertical=upside_down)
    if normalise:
        mean, std = ([255 * value for value in values] for values in (task.augment.mean, task.augment.std))
        # DALI has no bfloat16: that is cast from float32, on the device.
        dtype = types.FLOAT16 if task.dtype == torch.float16 else types.FLOAT
        return fn.crop_mirror_normalize(pixels, mean=mean, std=std, dtype=dtype, output_layout="HWC", **mirror)
    if task.only_normalises:
        return pixels
    return fn.coord_transform(pixels, MT=_external("colour", "FLOAT", 2), dtype=types.FLOAT)


def _warp(pixels: Any, back: Any, task: Task) -> Any:
    """The box of a canvas through its map, bilinear, blending into black outside; in float32, so not rounded again."""
    from nvidia.dali import fn, types

    settings = {"size": [task.image_size] * 2, "interp_type": types.INTERP_LINEAR, "inverse_map": True}
    if task.device.type == "cuda":
        return fn.warp_affine(pixels, matrix=back, fill_value=0, dtype=types.FLOAT, **settings)
    # On the CPU OpenCV's projective warp: much faster than DALI's affine one, and nearer to the exact value, since that
    # one adds up its coordinates along a row.
    pixels = fn.cast(pixels, dtype=types.FLOAT)
    settings |= {"border_mode": "constant", "fill_value": [0.0, 0.0, 0.0], "pixel_origin": "corner"}
    return fn.experimental.warp_perspective(pixels, matrix=back, **settings)
