"""The plain CNN that the 2022 report compares with: convolution, ReLU and pooling, then one linear layer."""

from __future__ import annotations

from itertools import pairwise

from einops.layers.torch import Rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastddr.errors import UserError
from fastddr.models.levers import Blocks


class CNN(nn.Module):
    """`blocks` packages (3×3 convolution, ReLU, 2×2 max pooling), then one linear layer on the whole map.

    A package halves the map's sides, rounding down, and doubles its channels, from `width` on. The linear
    layer sees every place, so the image size is fixed: at 256 pixels and two blocks of width 32 and 64 it
    holds 64·64·64 weights a class.
    """

    def __init__(self, blocks: int, width: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.image_size = image_size
        channels = [3, *(width << block for block in range(blocks))]
        self.packages = Blocks(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
                for before, after in pairwise(channels)
            )
        )
        self.flatten = Rearrange("b d h w -> b (d h w)")
        self.fc = nn.Linear(channels[-1] * (image_size >> blocks) ** 2, num_classes)

    def forward(self, image: Float[Tensor, "b c height width"]) -> Float[Tensor, "b classes"]:
        """Normalised images to logits; UserError where they are not `image_size` pixels square."""
        if image.shape[2:] != (self.image_size, self.image_size):
            raise UserError(
                f"the CNN takes images of {self.image_size}×{self.image_size} only and got "
                f"{image.shape[2]}×{image.shape[3]}: set image_size to {self.image_size}, or train it anew."
            )
        return self.fc(self.flatten(self.packages(image)))


def cnn(*, num_classes: int, image_size: int, blocks: int = 2, width: int = 32) -> CNN:
    """A CNN whose map does not shrink to nothing; else UserError."""
    most = image_size.bit_length() - 1
    if blocks > most:
        raise UserError(
            f"model 'cnn' cannot have blocks={blocks} with images of {image_size}×{image_size}, "
            + (
                f"since each block halves the map: set blocks to {most} or less."
                if most
                else "which are too small for any block: set image_size to 2 or more."
            )
        )
    return CNN(blocks, width, image_size, num_classes)
