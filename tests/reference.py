"""What every loader is measured by: plain, slow and obviously right, in NumPy and PIL.

A loader that is to be compared belongs in `REAL`, which all tests of loaders share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from tests_support import task

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data import manifest
from fastddr.loaders import dali_decoder
from fastddr.loaders.base import Requests

needs_dali = pytest.mark.skipif(not dali_decoder.installed(), reason="NVIDIA DALI is not installed (Linux only)")
#: The loaders that make pixels. All of them must agree with `reference`.
REAL: list[Any] = [pytest.param("dali", marks=needs_dali), "resident", "torchvision"]

#: No augmentation, the report's, and one that turns, scales and colours.
POLICIES = {
    "none": AugmentConfig(hflip=False, vflip=False),
    "report": AugmentConfig(),
    "fundus": AugmentConfig(rotate=180, scale=(0.87, 1.15), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
}
#: Grey levels by which a loader may be off where nothing is scaled.
EXACT = 0.02
#: What scaling to the canvas adds: each of PIL's two passes rounds to whole levels, others round once.
SCALED = 1.01
#: Grey levels by which a card's JPEG decoder may be off libjpeg's: at worst, and on average. One that computed IDCT and
#: colours in floats, without an error, would be off by 3 and 0.42, since libjpeg rounds in between. Twice the one is
#: let pass, and half as much again of the other. Without fancy upsampling it would be 22. Not measured on a card yet.
DECODED, DECODED_MEAN = 6.01, 0.6


def canvas(file: str, width: int, height: int) -> Float[np.ndarray, "height width 3"]:
    """The photograph upright and scaled, rounded to whole levels as loaders keep it."""
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    if upright.size != (width, height):
        # Antialiased: PIL's bilinear filter grows with the reduction.
        upright = upright.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(upright, dtype=np.float64)


def seen_at(affine: Float[np.ndarray, "2 3"], image_size: int) -> Float[np.ndarray, "h w 2"]:
    """The point (x, y) of the canvas that each pixel's middle shows."""
    middles = np.arange(image_size) + 0.5
    x, y = np.meshgrid(middles, middles)
    there = np.stack([x, y], axis=-1) - affine[:, 2]
    return there @ np.linalg.inv(affine[:, :2]).T


def reference(
    file: str,
    affine: Float[np.ndarray, "2 3"],
    colour: Float[np.ndarray, "3 4"],
    canvas_width: int,
    canvas_height: int,
    image_size: int,
) -> Float[np.ndarray, "h w 3"]:
    """The image that these maps make of a photograph, normalised: bilinear, blending into black around the canvas."""
    pixels = np.pad(canvas(file, canvas_width, canvas_height), ((1, 1), (1, 1), (0, 0)))
    # In the padded canvas, and counted from the middle of its first pixel.
    x, y = np.moveaxis(seen_at(affine, image_size) + 0.5, -1, 0)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    window = np.zeros((image_size, image_size, 3))
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        weight = (1 - np.abs(x - column)) * (1 - np.abs(y - row))
        # The padding is black, and so is everything beyond it.
        near = pixels[np.clip(row, 0, canvas_height + 1), np.clip(column, 0, canvas_width + 1)]
        window += weight[..., None] * near
    return window @ colour[:, :3].T.astype(np.float64) + colour[:, 3]


class Compared(NamedTuple):
    """An image beside its reference."""

    id: int
    levels: Float[np.ndarray, "h w 3"]
    """Difference in grey levels (of 255) before the colour map, so that its contrast does not stretch it."""
    inside: Float[np.ndarray, "h w"]
    """How far within its canvas each pixel lies, in canvas pixels; negative: outside, where the image is black."""


def compared(batch: loaders.Batch, task: loaders.Task, requests: Requests, k: int) -> Iterator[Compared]:
    """Every image of micro batch k with its reference."""
    seen = requests.at(k)
    for b, image in enumerate(batch.image.permute(0, 2, 3, 1).double().cpu().numpy()):
        size = (int(seen.canvas_width[b]), int(seen.canvas_height[b]))
        id_, affine, colour = int(requests.id[k, b]), seen.affine[b], seen.colour[b].astype(np.float64)
        expected = reference(task.files[id_], affine, colour, *size, task.image_size)
        point = seen_at(affine, task.image_size)
        inside = np.minimum(point, np.array(size) - point).min(axis=-1)
        yield Compared(id_, (image - expected) @ np.linalg.inv(colour[:, :3]).T, inside)


def furthest(
    name: str, data: str, canvas: int, augment: dict[str, Any], dtype: str, batch_size: int, device: str = "cuda:0",
    **changes: Any,
) -> tuple[float, float]:  # fmt: skip
    """Largest and mean difference in grey levels, over all photographs of train, of a loader's images on a device.

    Args:
        data, augment, dtype: as JSON has them, which has no tuples.
        changes: settings of the task.
    """
    found = manifest.read(Path(data))
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in augment.items()}
    wanted = task(found, canvas=canvas, batch_size=batch_size, augment=AugmentConfig(**chosen), threads=2)
    wanted = replace(wanted, device=torch.device(device), dtype=getattr(torch, dtype), **changes)
    loader = loaders.build(name, wanted)
    most, total, count, seen = 0.0, 0.0, 0, []
    for k, batch in enumerate(loader.epoch()):
        assert {part.device.type for part in (batch.image, batch.grade, batch.valid)} == {wanted.device.type}
        assert batch.image.dtype == wanted.dtype
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        for image in compared(batch, wanted, wanted.requests(0), k):
            levels = np.abs(image.levels)
            # At the very edge of a scaled canvas filters are cut off differently.
            within = levels if wanted.canvas_is_source else levels[np.abs(image.inside) > 1.5]
            most, total, count = max(most, within.max()), total + within.sum(), count + within.size
            seen.append(image.id)
    loader.close()
    # An epoch leaves out the last partial batch.
    assert sorted(seen) == sorted(wanted.ids.tolist()), f"{len(seen)} of {len(wanted.ids)} photographs were compared"
    return float(most), float(total / count)
