"""The normalisation of a batch on a CPU, by PyTorch.

DALI's `crop_mirror_normalize` computes a value at a time where the channels stay last, PyTorch several; where windows
are only cut, that is much of the time.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fastddr.config import AugmentConfig

#: So many values PyTorch computes in the thread that asks: of more its own threads take a share each and then wait for
#: more by spinning, on the cores that decode.
_ALONE = 32_767
#: Threads that decode as many photographs as one alone can normalise, about (an estimate). For more of them PyTorch's
#: threads help.
_FEW = 8
#: Buffers that are kept: of the batch that is made, the one in use, and the one before.
_KEPT = 3


class Normaliser:
    """From levels 0-255 to normalised values, the same map for all photographs."""

    def __init__(self, augment: AugmentConfig, threads: int) -> None:
        """`threads`: those that decode."""
        # Rounded where DALI rounds, so that its bits come out.
        self._mean = np.array([255 * value for value in augment.mean], dtype=np.float32)
        self._inverse = 1 / np.array([255 * value for value in augment.std], dtype=np.float32)
        self._alone = threads <= _FEW
        self._free: list[Tensor] = []

    def __call__(self, pixels: UInt8[Tensor, "b h w 3"] | Float[Tensor, "b h w 3"]) -> Float[Tensor, "b h w 3"]:
        """What is of float32 already is written over."""
        there = pixels.dtype == torch.float32
        out = pixels if there else self._lent(pixels.shape)
        row = pixels.shape[2] * 3
        mean, inverse = (torch.from_numpy(np.tile(values, pixels.shape[2])) for values in (self._mean, self._inverse))
        rows = max(1, _ALONE // row) if self._alone else pixels.numel() // row
        for given, made in zip(pixels.view(-1, row).split(rows), out.view(-1, row).split(rows), strict=True):
            if not there:
                made.copy_(given)
            made.sub_(mean).mul_(inverse)
        return out

    def _lent(self, shape: torch.Size) -> Float[Tensor, "b h w 3"]:
        """A buffer that nobody uses any more: one from the system costs as much as the normalisation, page by page."""
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.shape != shape:
            buffer = torch.empty(shape)
        # It comes back when the memory of the tensor is let go of, and so not before all views of it are.
        lent = buffer.numpy()[:]
        weakref.finalize(lent, self._back, buffer)
        return torch.from_numpy(lent)

    def _back(self, buffer: Tensor) -> None:
        if len(self._free) < _KEPT:
            self._free.append(buffer)
