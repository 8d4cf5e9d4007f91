"""What a training step costs at least: FLOP, bytes, and the time that these take at the limits of the hardware.

A multiplication and an addition are two FLOP. Forward and backward together are counted as three times the forward
pass: a layer's output, the gradient of its input and that of its weights take as many each. Only the first convolution
counts twice, because nobody asks for the gradient of the images. PyTorch's counter is asked about the forward pass
only: it counts the weight gradient of a depthwise convolution as if it were a full one, too much by a factor of the
width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

#: How often a ConvMixer layer's activation passes through memory in forward and backward, one reading or writing being
#: a pass: each operation by itself, or as torch.compile fuses them (BatchNorm's sums, GELU and the residual into few
#: kernels, convolutions by themselves).
PASSES = {"eager": 50, "compile": 33}


@dataclass(frozen=True)
class Mixer:
    """A ConvMixer's settings."""

    dim: int
    depth: int
    kernel: int
    patch: int

    def __str__(self) -> str:
        return f"ConvMixer {self.dim}/{self.depth} k{self.kernel} p{self.patch}"

    def activation(self, image_size: int) -> int:
        """Elements of an image's map: positions times width."""
        return (image_size // self.patch) ** 2 * self.dim

    def training(self, image_size: int) -> int:
        """FLOP of an image's forward and backward pass: forward, in the convolutions, they are d(2k²A + 2Nh²) + 6p²A.

        The head is left out.
        """
        elements = self.activation(image_size)
        layers = self.depth * (2 * self.kernel**2 * elements + 2 * elements * self.dim)
        patches = 6 * self.patch**2 * elements
        return 3 * layers + 2 * patches

    def moved(self, image_size: int, itemsize: int, *, compiled: bool) -> int:
        """Bytes that the layers of a training step read and write for an image, each pass counted as if no cache held
        anything; patches, head, weights and optimizer are left out."""
        passes = PASSES["compile" if compiled else "eager"]
        return passes * itemsize * self.activation(image_size) * self.depth


def training(model: nn.Module, image_size: int) -> int:
    """FLOP of one image's forward and backward pass: matrix products and convolutions, nothing else.

    PyTorch counts on a copy that has shapes and no values; the model is left as it is.

    Raises:
        ValueError: there is no convolution in it.
    """
    shapes = copy.deepcopy(model).to("meta")
    first = next((module for module in shapes.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError("a model without a convolution: what its images cost is not known")
    images = 0

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal images
        images += 2 * output.numel() * first.weight[0].numel()

    first.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # Two images and half the sum: BatchNorm refuses one image where the map is a single place.
        shapes(torch.empty(2, 3, image_size, image_size, device="meta"))
    return (3 * counter.get_total_flops() - images) // 2


def least_seconds(flop: float, moved: float, peak: float, bandwidth: float) -> float:
    """The roofline: the longer of the times for the FLOP at `peak` FLOP/s and for the bytes at `bandwidth` bytes/s."""
    return max(flop / peak, moved / bandwidth)
