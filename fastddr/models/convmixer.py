"""ConvMixer: patches, then depthwise and pointwise convolutions of one width, then the mean.

Source: Trockman and Kolter, "Patches Are All You Need?" (2022), section 2: equations 1-3 and figure 2.

Shape suffixes, in einops patterns and comments:
    b       photographs
    c       colours, 3
    p1 p2   rows and columns of one patch, each `patch_size` pixels
    h w     rows and columns of the map: the image's, divided by `patch_size` and rounded down
    d       channels of the map, `dim`
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Reduce
from jaxtyping import Float
from torch import Tensor, nn

from fastddr.errors import UserError
from fastddr.models.levers import Blocks

#: The paper's is GELU; its 768/32 is with ReLU.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class PatchEmbedding(nn.Conv2d):
    """One linear map, the same for each patch (equation 1, before its activation).

    It is a convolution whose stride is its kernel, and keeps a convolution's parameters: weight (d, c, p1,
    p2) and bias (d). As there, rows and columns beyond the last whole patch are not seen. Written as one
    matrix product it gives channels_last by itself; "p1 p2 c" in this order reads channels_last images and
    weights as they lie in memory.
    """

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__(3, dim, kernel_size=patch_size, stride=patch_size)
        self.patch_size = patch_size

    def forward(self, image: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d h w"]:
        """Images of any size of at least one patch to maps; UserError where they are smaller."""
        p = self.patch_size
        height, width = image.shape[2] // p * p, image.shape[3] // p * p
        if not height or not width:
            raise UserError(
                f"a {image.shape[2]}×{image.shape[3]} image holds no {p}×{p} patch of the ConvMixer's: "
                "give it larger images, or train with a smaller patch_size."
            )
        pixels = rearrange(image[:, :, :height, :width], "b c (h p1) (w p2) -> b h w (p1 p2 c)", p1=p, p2=p)
        weight = rearrange(self.weight, "d c p1 p2 -> d (p1 p2 c)")
        return rearrange(F.linear(pixels, weight, self.bias), "b h w d -> b d h w")


class ConvMixerLayer(nn.Module):
    """Mix places, then channels (equations 2 and 3); activation first, then BatchNorm.

    mixed = map + BatchNorm(GELU(depthwise(map)));  map = BatchNorm(GELU(pointwise(mixed)))
    """

    def __init__(self, dim: int, kernel_size: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.depthwise_norm = nn.BatchNorm2d(dim)
        self.pointwise = nn.Conv2d(dim, dim, kernel_size=1)
        self.pointwise_norm = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Maps to maps of the same shape."""
        x = x + self.depthwise_norm(self.activation(self.depthwise(x)))
        return self.pointwise_norm(self.activation(self.pointwise(x)))


class ConvMixer(nn.Module):
    """`depth` layers on patches of `patch_size` pixels, then the mean over the map and one linear layer.

    The weights start as PyTorch starts them, as the paper's do. Images may be of any size of at least one
    patch; where a side is no multiple of `patch_size`, the rest at the right and bottom edge is not seen.
    """

    def __init__(
        self, dim: int, depth: int, kernel_size: int, patch_size: int, num_classes: int, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.patches = PatchEmbedding(dim, patch_size)
        self.patches_norm = nn.BatchNorm2d(dim)
        self.layers = Blocks(*(ConvMixerLayer(dim, kernel_size, activation) for _ in range(depth)))
        self.pool = Reduce("b d h w -> b d", "mean")
        self.head = nn.Linear(dim, num_classes)

    def forward(self, image: Float[Tensor, "b c height width"]) -> Float[Tensor, "b classes"]:
        """Normalised images to logits."""
        x = self.patches_norm(self.activation(self.patches(image)))
        return self.head(self.pool(self.layers(x)))


#: Where the modules of the paper's code and of timm's stand in theirs: in the whole, and in a layer.
_OUTSIDE = {"0": "patches", "2": "patches_norm", "stem.0": "patches", "stem.2": "patches_norm"}
_LAYER = re.compile(r"(blocks\.)?(\d+)\.(0\.fn\.0|0\.fn\.2|1|3)")
_WITHIN = {"0.fn.0": "depthwise", "0.fn.2": "depthwise_norm", "1": "pointwise", "3": "pointwise_norm"}


def our_name(name: str) -> str:
    """What a tensor of a ConvMixer of the paper's code (locuslab/convmixer) or of timm's is called here.

    The paper's is one nested Sequential, so its names are places: patches at 0 and 2, layer i at 3 + i, and the head
    behind them. timm's puts them under `stem`, `blocks` and `head`. Any other name stays as it is.
    """
    place, _, leaf = name.rpartition(".")
    if place in _OUTSIDE:
        return f"{_OUTSIDE[place]}.{leaf}"
    if layer := _LAYER.fullmatch(place):
        number = int(layer[2]) - (0 if layer[1] else 3)
        return f"layers.{number}.{_WITHIN[layer[3]]}.{leaf}"
    return f"head.{leaf}" if place.isdigit() else name


def convmixer(
    *,
    num_classes: int,
    image_size: int,
    dim: int = 512,
    depth: int = 12,
    kernel_size: int = 9,
    patch_size: int = 8,
    activation: str = "gelu",
) -> ConvMixer:
    """A ConvMixer whose settings make sense for the images; else UserError."""
    if kernel_size % 2 == 0:
        raise UserError(
            f"model 'convmixer' cannot have kernel_size={kernel_size}, which has no middle: "
            f"set kernel_size to an odd number such as {kernel_size + 1}."
        )
    if patch_size > image_size:
        raise UserError(
            f"model 'convmixer' cannot have patch_size={patch_size} with images of "
            f"{image_size}×{image_size}: set patch_size to {image_size} or less."
        )
    return ConvMixer(dim, depth, kernel_size, patch_size, num_classes, activation)
