"""ResNet of any depth, written out: He et al., "Deep Residual Learning for Image Recognition" (2016).

Table 1 gives the stages, figure 5 the two blocks. The bottleneck's stride sits on its 3×3 convolution, as in
torchvision, and parameters bear torchvision's names, so that its weights load as they are.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastddr.errors import UserError
from fastddr.models.levers import Blocks

#: Table 1: blocks in each stage.
PUBLISHED = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
#: From this depth on the blocks are bottlenecks, as in table 1.
BOTTLENECK_FROM = 50
STEMS = ("standard", "stride1")
#: On a CPU oneDNN's weight gradient of a channels_last 1×1 convolution with a stride, as in a shortcut,
#: writes beyond its buffer with fewer channels: than 8 with AVX2, than 16 with AVX-512 (oneDNN issue 6035).
LEAST_WIDTH = 16


def stages(depth: int) -> tuple[int, int, int, int]:
    """How many blocks each of the four stages has, so that the network has `depth` weighted layers.

    Below 50 layers a block is basic and counts 2, from 50 on it is a bottleneck and counts 3; the stem and
    `fc` count 1 each. The five depths of the paper are the paper's. Any other total is dealt out like the 16
    blocks of ResNet-34, 3:4:6:3: one block to each stage, the others as 2:3:5:2, and what rounding leaves to
    the largest remainders, earlier stages first. So 40 layers are 19 basic blocks, (4, 5, 7, 3). Raises
    UserError for a depth that no whole number of blocks makes.
    """
    if depth in PUBLISHED:
        return PUBLISHED[depth]
    if not _possible(depth):
        below = next((d for d in range(depth, 0, -1) if _possible(d)), None)
        above = next(d for d in range(max(depth, 1), depth + 100) if _possible(d))
        raise UserError(
            f"model 'resnet' cannot have depth={depth}, which no whole number of blocks makes: "
            f"set depth to {above if below is None else f'{below} or {above}'}."
        )
    spare = (depth - 2) // _layers_in_a_block(depth) - 4
    weights = (2, 3, 5, 2)
    counts = [1 + spare * weight // 12 for weight in weights]
    by_remainder = sorted(range(4), key=lambda stage: -(spare * weights[stage] % 12))  # a stable sort
    for stage in by_remainder[: spare + 4 - sum(counts)]:
        counts[stage] += 1
    first, second, third, fourth = counts
    return first, second, third, fourth


def _layers_in_a_block(depth: int) -> int:
    return 3 if depth >= BOTTLENECK_FROM else 2


def _possible(depth: int) -> bool:
    blocks, rest = divmod(depth - 2, _layers_in_a_block(depth))
    return rest == 0 and blocks >= 4


def _conv(before: int, after: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the BatchNorm that follows has one.
    return nn.Conv2d(before, after, kernel_size, stride, padding=kernel_size // 2, bias=False)


def _shortcut(before: int, after: int, stride: int) -> nn.Sequential | None:
    """Option B of section 3.3: a projection where the shape changes, the identity (None) elsewhere."""
    if stride == 1 and before == after:
        return None
    return nn.Sequential(_conv(before, after, 1, stride), nn.BatchNorm2d(after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (figure 5, left)."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(before, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(before, width, stride)

    def forward(self, x: Float[Tensor, "b before h w"]) -> Float[Tensor, "b after h2 w2"]:
        """Maps to maps, smaller by the stride."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, the last to four times the width, beside a shortcut (figure 5)."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(before, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(before, width * self.expansion, stride)

    def forward(self, x: Float[Tensor, "b before h w"]) -> Float[Tensor, "b after h2 w2"]:
        """Maps to maps, smaller by the stride."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """Stem, four stages of widths 1, 2, 4 and 8 times `width`, mean over the map, one linear layer.

    `stem="standard"` is the paper's: 7×7 with stride 2 and max pooling with stride 2, so the first stage
    works on a quarter of the image's side. `stem="stride1"` is that of small-image ResNets: 3×3, stride 1,
    no pooling. **Beware**: its maps, and so its activations in memory, are 16 times as large. It is kept
    because it is the likely cause of the 2022 report's running out of memory, for `fastddr plan` to show.

    The convolutions start as He et al. (2015) give it (normal, fan out). Images may be of any size.
    """

    def __init__(self, depth: int, width: int, stem: str, num_classes: int) -> None:
        super().__init__()
        standard = stem == "standard"
        block = Bottleneck if _layers_in_a_block(depth) == 3 else BasicBlock
        self.conv1 = _conv(3, width, 7, 2) if standard else _conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if standard else nn.Identity()
        widths = [width << stage for stage in range(4)]
        entries = [width, *(w * block.expansion for w in widths)]
        layers = []
        for stage, (blocks, (before, after)) in enumerate(zip(stages(depth), pairwise(entries), strict=True)):
            first = block(before, widths[stage], stride=1 if stage == 0 else 2)
            others = (block(after, widths[stage], stride=1) for _ in range(blocks - 1))
            layers.append(Blocks(first, *others))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.fc = nn.Linear(entries[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Float[Tensor, "b c height width"]) -> Float[Tensor, "b classes"]:
        """Normalised images to logits."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(image)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet(*, num_classes: int, image_size: int, depth: int = 18, width: int = 64, stem: str = "standard") -> ResNet:
    """A ResNet of any depth that blocks can make; else UserError."""
    if stem not in STEMS:
        raise UserError(f"model 'resnet' cannot have stem={stem!r}: set stem to {' or '.join(STEMS)}.")
    if width < LEAST_WIDTH:
        raise UserError(
            f"model 'resnet' cannot have width={width}, with which PyTorch corrupts memory on a CPU: "
            f"set width to {LEAST_WIDTH} or more."
        )
    return ResNet(depth, width, stem, num_classes)
