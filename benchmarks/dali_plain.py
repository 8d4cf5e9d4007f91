"""DALI by itself, as a peer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peer import Peer
from torch import Tensor

from fastddr import sampling
from fastddr.loaders import Task, dali_decoder


class DaliPlain(Peer):
    """DALI's stock operators and its own iterator, as NVIDIA's example for ImageNet has them, on a GPU or the CPU.

    `readers.file`, `decoders.image_random_crop`, `resize`, `crop_mirror_normalize`, `DALIClassificationIterator`.

    The decoder draws a part of a photograph by its share of the area, and `resize` makes a window of it; there is no
    canvas. Nearest to ours are squares of the share that our window has, on the mean of the photographs. Where these
    are all of the canvas's size, and the policy does not scale, such a square is our window; `resize`, which would
    only compute each pixel again, is left out there. Elsewhere other scales come about, by how long a photograph is.
    For policies that turn and colour there are `rotate` and `color_twist`.

    It shuffles within the reader's buffer of 1024 files. An epoch's last batch is filled from the next epoch, so that
    nothing is decoded that does not count.
    """

    name = "dali-plain"
    options = ("workers", "prefetch")

    @classmethod
    def missing(cls, task: Task) -> str | None:
        return None if dali_decoder.installed() else "NVIDIA DALI is not installed; see the README"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from nvidia.dali import Pipeline
        from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

        pipeline = Pipeline(
            task.batch_size, max(1, task.threads), dali_decoder.device_id(task), prefetch_queue_depth=self.prefetch
        )
        with pipeline:
            pipeline.set_outputs(*self._graph())
        self.iterator: Any = DALIClassificationIterator(
            pipeline, reader_name="photographs", last_batch_policy=LastBatchPolicy.FILL, auto_reset=True
        )

    def _graph(self) -> tuple[Any, Any]:
        """Normalised images (3, h, w), and grades."""
        from nvidia.dali import fn, types

        task, augment = self.task, self.task.augment
        encoded, grades = fn.readers.file(
            files=self.files,
            labels=[int(task.grades[id_]) for id_ in task.ids],
            random_shuffle=True,
            name="photographs",
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="cpu" if task.device.type == "cpu" else "mixed",
            output_type=types.RGB,
            random_area=self._area(),
            random_aspect_ratio=[1.0, 1.0],
        )
        if not self._comes_in_size():
            images = fn.resize(images, size=[task.image_size] * 2)
        if augment.rotate:
            angle = fn.random.uniform(range=[-augment.rotate, augment.rotate])
            images = fn.rotate(images, angle=angle, keep_size=True, fill_value=0)
        if augment.vflip:
            images = fn.flip(images, horizontal=0, vertical=fn.random.coin_flip())
        if not task.only_normalises:
            jitter = {
                name: fn.random.uniform(range=[1 - most, 1 + most])
                for name in ("brightness", "contrast", "saturation")
                if (most := getattr(augment, name))
            }
            hue = fn.random.uniform(range=[-360 * augment.hue, 360 * augment.hue])  # in degrees
            images = fn.color_twist(images, hue=hue, **jitter)
        mean, std = ([255 * value for value in values] for values in (augment.mean, augment.std))
        mirror = fn.random.coin_flip() if augment.hflip else 0
        images = fn.crop_mirror_normalize(images, mean=mean, std=std, mirror=mirror, dtype=types.FLOAT)
        return images, grades if task.device.type == "cpu" else grades.gpu()

    def _area(self) -> list[float]:
        """Least and largest share of a photograph's area that a window has, at the ends of the policy's scale."""
        task = self.task
        width, height = sampling.canvas_size(task.widths[task.ids], task.heights[task.ids], task.canvas)
        share = float((task.image_size**2 / (width * height)).mean())
        low, high = task.augment.scale
        return [min(share / high**2, 1.0), min(share / low**2, 1.0)]

    def _comes_in_size(self) -> bool:
        """Whether each part that is decoded already has the size of the window."""
        task = self.task
        sizes = set(zip(task.widths[task.ids].tolist(), task.heights[task.ids].tolist(), strict=True))
        return task.canvas_is_source and len(sizes) == 1 and task.augment.scale == (1.0, 1.0)

    def batches(self) -> Iterator[Tensor]:
        while True:
            for (found,) in self.iterator:
                yield found["data"]

    def close(self) -> None:
        self.iterator = None  # and with it the pipeline, whose threads end
