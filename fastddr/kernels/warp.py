"""Gather, warp, colour and cast in one pass: from uint8 photographs in memory to a normalised batch.

`warp` is the one entry; on a GPU it runs `_warp_triton`, elsewhere `warp_reference`, which says in plain PyTorch what
the kernel computes. A test holds the two together.
"""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

#: Output pixels of one program of the kernel.
_BLOCK = 256


def triton_lacks() -> str | None:
    """What Triton lacks to run here, without which a GPU would have only the slow way; None where it lacks nothing.

    It builds a small piece of C, its way to the driver, when it first runs a kernel.
    """
    if find_spec("triton") is None:
        return "Triton, which comes with PyTorch for CUDA on Linux"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler for Triton (gcc or clang)"
    # As Triton looks for it: Debian's own scheme names a folder below /usr/local.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not os.path.isfile(os.path.join(sysconfig.get_paths(scheme)["include"], "Python.h")):
        return "the header files of Python for Triton (python3-dev)"
    return None


@cache
def fails(device: torch.device) -> str | None:
    """Why the kernel does not run on this GPU, which is tried once; None if it does.

    Raises:
        torch.OutOfMemoryError: the card is full just now, which says nothing of the kernel.
    """
    lacks = triton_lacks()
    if lacks is not None:
        return f"this machine lacks {lacks}"
    try:
        warp(
            torch.zeros(3, dtype=torch.uint8, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.ones(1, 2, dtype=torch.int32, device=device),
            torch.zeros(1, 2, 3, device=device),
            torch.zeros(1, 3, 4, device=device),
            image_size=1,
        )
    except torch.OutOfMemoryError:
        raise
    # Triton looks for a driver and a compiler, and runs both; whatever goes wrong there, photographs can be streamed.
    except Exception as error:  # noqa: BLE001
        return f"Triton cannot run here ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return None


def warp(
    pixels: UInt8[Tensor, " n"],
    offset: Int[Tensor, " b"],
    size: Int[Tensor, "b 2"],
    inverse: Float[Tensor, "b 2 3"],
    colour: Float[Tensor, "b 3 4"],
    image_size: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b h w 3"]:
    """Bilinear windows of photographs that lie one behind the other in memory, coloured.

    Args:
        pixels: all photographs, each (height, width, 3) without gaps.
        offset: where each of the b photographs begins in `pixels`; int64.
        size: its width and height in pixels; int32.
        inverse: the map from image to photograph coordinates, pixel i covering [i, i + 1).
        colour: the map from (R, G, B, 1) in 0-255 to the values of the batch.
        image_size: side of the images, h = w.
        dtype: of the batch.

    Returns:
        The images. What lies outside a photograph is black before the colour map, and blends in over half a pixel.
    """
    if pixels.device.type == "cuda":
        return _warp_triton(pixels, offset, size, inverse, colour, image_size, dtype)
    return warp_reference(pixels, offset, size, inverse, colour, image_size, dtype)


def warp_reference(
    pixels: UInt8[Tensor, " n"],
    offset: Int[Tensor, " b"],
    size: Int[Tensor, "b 2"],
    inverse: Float[Tensor, "b 2 3"],
    colour: Float[Tensor, "b 3 4"],
    image_size: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b h w 3"]:
    """What `warp` computes, photograph by photograph with `grid_sample`."""
    photographs = [
        pixels[begin : begin + width * height * 3].view(height, width, 3)
        for begin, (width, height) in zip(offset.tolist(), size.tolist(), strict=True)
    ]
    return coloured(sampled(photographs, inverse, image_size), colour).to(dtype)


def sampled(
    photographs: Sequence[UInt8[Tensor, "_ _ 3"]], inverse: Float[Tensor, "b 2 3"], image_size: int
) -> Float[Tensor, "b h w 3"]:
    """The bilinear windows of `warp` before the colour map, 0-255. The photographs may be views."""
    images = torch.empty(len(photographs), image_size, image_size, 3, device=inverse.device)
    for image, photograph, back in zip(images, photographs, inverse, strict=True):
        height, width, _ = photograph.shape
        # grid_sample counts from -1 to 1 over the photograph, whose own measure is pixels.
        unit = 2 / torch.tensor([[width], [height]], dtype=torch.float32, device=back.device)
        grid = F.affine_grid(_from_unit(back * unit, image_size), [1, 3, image_size, image_size], align_corners=False)
        planes = photograph.permute(2, 0, 1)[None].float()
        seen = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        image.copy_(seen[0].permute(1, 2, 0))
    return images


def coloured(images: Float[Tensor, "b h w 3"], colour: Float[Tensor, "b 3 4"]) -> Float[Tensor, "b h w 3"]:
    """Each image through its colour map. May write into `images`."""
    count, height, width, _ = images.shape
    if (colour == colour[0]).all() and not (colour[0, :, :3] - colour[0, :, :3].diagonal().diag()).any():
        # The normalisation alone. Row by row: a last axis of 3 would be too short for vector instructions.
        rows = images.view(count, height, width * 3)
        shift, scale = colour[0, :, 3].repeat(width), colour[0, :, :3].diagonal().repeat(width)
        return torch.addcmul(shift, rows, scale, out=rows).view(images.shape)
    # Eight pixels at a time, by a block-diagonal matrix: a product with 3 columns is slower than one with 24.
    together = math.gcd(height * width, 8)
    mix = torch.zeros(count, together, 3, together, 3, device=images.device)
    for place in range(together):
        mix[:, place, :, place, :] = colour[:, :, :3].transpose(1, 2)
    shift = colour[:, None, :, 3].repeat(1, 1, together)
    rows = images.view(count, -1, together * 3)
    return torch.baddbmm(shift, rows, mix.view(count, together * 3, together * 3)).view(images.shape)


def _from_unit(back: Tensor, image_size: int) -> Tensor:
    """The map from (-1, 1) over the image, as `affine_grid` wants it, given the one from pixels to (0, 2)."""
    half = image_size / 2
    offset = back[:, :2].sum(dim=1, keepdim=True) * half + back[:, 2:] - 1
    return torch.cat([back[:, :2] * half, offset], dim=1)[None]


def _warp_triton(
    pixels: Tensor,
    offset: Tensor,
    size: Tensor,
    inverse: Tensor,
    colour: Tensor,
    image_size: int,
    dtype: torch.dtype,
) -> Tensor:
    # At its first use: Triton is only where PyTorch has CUDA, and its import takes a while.
    from fastddr.kernels.warp_triton import warp_kernel

    count = len(offset)
    images = torch.empty(count, image_size, image_size, 3, dtype=dtype, device=pixels.device)
    blocks = -(-image_size * image_size // _BLOCK)
    arguments = (pixels, offset, size.contiguous(), inverse.contiguous(), colour.contiguous(), images, image_size)
    # Triton takes the current card, wherever its arguments lie.
    with torch.cuda.device_of(pixels):
        # The photographs of a batch lie on the second axis of the grid, which CUDA limits to 65,535.
        warp_kernel[(blocks, count)](*arguments, BLOCK=_BLOCK)
    return images
