"""NVIDIA DALI: files read, decoded, warped and normalised in C++ or on the GPU. The only room that imports it.

Python hands over a batch's paths and maps and receives a finished batch. Two graphs: where every map is a window
of the canvas, perhaps mirrored, only the window is made (and only the window decoded, where the photograph is its
own canvas); else the canvas is made and warped. `device_id=None` runs the same graph on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddr import sampling
from fastddr.errors import UserError
from fastddr.loaders.base import Loader, Requests, Task, name_unreadable


def installed() -> bool:
    """Whether DALI can be imported.

    Raises:
        UserError: two builds are installed over each other.
    """
    builds = sorted(
        {
            str(distribution.metadata["Name"])
            for distribution in importlib.metadata.distributions()
            if str(distribution.metadata["Name"]).replace("_", "-").startswith("nvidia-dali-cuda")
        }
    )
    if len(builds) > 1:
        raise UserError(
            f"{' and '.join(builds)} are both installed and overwrite each other's files in nvidia/dali; "
            f"run `pip uninstall -y {' '.join(builds)}`, then install the one for your CUDA."
        )
    return bool(builds)


class DaliLoader(Loader):
    """Streams photographs through a DALI pipeline."""

    name = "dali"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if not installed():
            raise UserError(
                "--loader dali: NVIDIA DALI is not installed; `pip install nvidia-dali-cuda130` (Linux only), or "
                "choose --loader torchvision."
            )
        # Paths as bytes, ready to be handed over: no encoding in the loop.
        self._paths = [np.frombuffer(os.fsencode(file), dtype=np.uint8) for file in task.files]
        self._pipeline: Any = None

    def _images(self, requests: Requests, start: int) -> Generator[Tensor, None, None]:
        depth, wanted = self.task.prefetch, len(requests) - start
        sent = received = 0
        try:
            while received < wanted:
                if self._pipeline is None:
                    self._pipeline = _build(self.task)
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
        finally:
            # What is still on its way must not turn up in the next epoch.
            while self._pipeline is not None and received < sent:
                received += 1
                try:
                    self._pipeline.outputs()
                except RuntimeError:
                    # Nobody wants this batch, so nobody need hear of it; the pipeline is built anew when needed.
                    self._pipeline = None

    def _feed(self, requests: Requests, k: int) -> None:
        feed = self._pipeline.feed_input
        feed("path", [self._paths[id_] for id_ in requests.id[k]])
        if self.task.only_crops:
            crops = sampling.as_crops(requests.affine[k], self.task.image_size)
            assert crops is not None, "the policy said that every map is a window"
            start = np.stack([crops.x, crops.y], axis=1)
            if self.task.canvas_is_source:
                feed("start", start.astype(np.int32))
            else:
                # Where the window lies in the photograph: (y, x), as DALI's resize has it.
                scale = np.stack(
                    [
                        requests.source_height[k] / requests.canvas_height[k],
                        requests.source_width[k] / requests.canvas_width[k],
                    ],
                    axis=1,
                )
                feed("roi_start", (start[:, ::-1] * scale).astype(np.float32))
                feed("roi_end", ((start[:, ::-1] + self.task.image_size) * scale).astype(np.float32))
            feed("hflip", crops.hflip.astype(np.int32))
            feed("vflip", crops.vflip.astype(np.int32))
        else:
            feed("canvas", np.stack([requests.canvas_height[k], requests.canvas_width[k]], axis=1).astype(np.float32))
            linear = np.linalg.inv(requests.affine[k, :, :, :2])
            inverse = np.concatenate([linear, -linear @ requests.affine[k, :, :, 2:]], axis=2)
            feed("inverse", inverse.astype(np.float32))
        if not self.task.only_normalises:
            feed("colour", requests.colour[k].astype(np.float32))

    def _receive(self, requests: Requests, k: int) -> Tensor:
        stream = torch.cuda.current_stream(self.task.device) if self.task.device.type == "cuda" else None
        try:
            (output,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            # The pipeline cannot go on after an error, and its message does not always name the file.
            self._pipeline = None
            bad = name_unreadable([self.task.files[id_] for id_ in requests.id[k]])
            if bad is None:
                raise
            raise UserError(
                f"{bad}: this photograph cannot be decoded; replace it or take it out of the set."
            ) from error
        # DALI's dynamic executor hands the buffer over for good: it is freed with the tensor, never reused.
        return torch.from_dlpack(output.as_tensor())

    def close(self) -> None:
        """Frees the pipeline, its threads and its buffers."""
        super().close()
        self._pipeline = None


def _build(task: Task) -> Any:
    from nvidia.dali import Pipeline

    gpu = task.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=task.micro_batch_size,
        num_threads=max(1, task.threads),
        device_id=(task.device.index or 0) if gpu else None,
        prefetch_queue_depth=task.prefetch,
        exec_dynamic=True,
        seed=0,  # nothing in the graph is random
    )
    with pipeline:
        pipeline.set_outputs(_graph(task))
    pipeline.build()
    return pipeline


def _graph(task: Task) -> Any:
    """From paths and maps to normalised windows (h, w, 3) in float32."""
    from nvidia.dali import fn, types

    def given(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    size = task.image_size
    # libjpeg smooths the upsampled chroma; without this the GPU decoder would give other pixels.
    decoding = {
        "device": "mixed" if task.device.type == "cuda" else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
    }
    resampling = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    encoded = fn.io.file.read(given("path", types.UINT8, 1))
    if task.only_crops:
        if task.canvas_is_source:
            start = given("start", types.INT32, 1)
            window = fn.decoders.image_slice(encoded, start=start, shape=[size, size], axis_names="WH", **decoding)
        else:
            window = fn.resize(
                fn.decoders.image(encoded, **decoding),
                size=[size, size],
                roi_start=given("roi_start", types.FLOAT, 1),
                roi_end=given("roi_end", types.FLOAT, 1),
                **resampling,
            )
        window = fn.flip(window, horizontal=given("hflip", types.INT32, 0), vertical=given("vflip", types.INT32, 0))
    else:
        canvas = fn.resize(fn.decoders.image(encoded, **decoding), size=given("canvas", types.FLOAT, 1), **resampling)
        window = fn.warp_affine(
            canvas,
            matrix=given("inverse", types.FLOAT, 2),
            size=[size, size],
            fill_value=0,
            interp_type=types.INTERP_LINEAR,
            inverse_map=True,
        )
    if task.only_normalises:
        mean, std = ([255 * value for value in values] for values in (task.augment.mean, task.augment.std))
        return fn.crop_mirror_normalize(window, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC")
    return fn.coord_transform(window, MT=given("colour", types.FLOAT, 2), dtype=types.FLOAT)
