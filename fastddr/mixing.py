"""Mixing within a batch: each photograph with its neighbour, and their grades in the same shares.

Mixup blends two photographs: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018). CutMix pastes a box of
one into the other: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features"
(2019). Both are torchvision's. They come after the maps of `fastddr.sampling`, in training only.

Nothing here has state: what is drawn is a function of (seed, step, microstep, rank), so a run that goes on mixes as one
that was never stopped. Partners are of one micro batch, so mixing is not the same on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastddr.config import Config
from fastddr.errors import UserError


class Draws:
    """What is done to each micro batch of training: photographs are mixed, and layers that draw get their numbers.

    With both kinds of mixing on, a fair coin decides for each micro batch.
    """

    def __init__(self, config: Config, rank: int, micro_batch_size: int) -> None:
        """Raises UserError where a micro batch of one photograph shall be mixed, which has no neighbour."""
        self.kinds: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
        #: Whether layers may draw, as dropout does. Of our models none does.
        self.layers = config.model.startswith("timm:")
        self._seed, self._rank = config.seed, rank
        mixup, cutmix = config.augment.mixup, config.augment.cutmix
        if not (mixup or cutmix):
            return
        if micro_batch_size < 2:
            raise UserError(
                "augment.mixup and augment.cutmix mix the photographs of a micro batch, but each rank holds one at a "
                "time; give a --batch-size and a --micro-batch-size of at least 2 for each rank, or set both to 0."
            )
        # Imported by those that mix only: it takes a second.
        from torchvision.transforms import v2

        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)):
            if alpha:
                self.kinds.append(kind(alpha=alpha, num_classes=config.num_classes))

    def __call__(
        self, step: int, microstep: int, image: Float[Tensor, "b 3 h w"], grade: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b 3 h w"], Tensor]:
        """Mixed: new images (channels_last, same dtype) and float32 shares of each grade (b, classes), which add up to
        1. Else what was given, which is left as it is in any case.

        `step`: optimizer steps done before this one; `microstep`: number of the micro batch within the step.
        """
        of = (self._seed, step, microstep, self._rank)
        if self.kinds:
            # torchvision draws from the global generator of the CPU, whatever device the images are on; so the numbers
            # are on the host already, and no one waits for the device. Not `manual_seed`, which also seeds every GPU.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_number(*of))
                kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
                mixed, grade = kind(image, grade.long())
            # `roll`, which both kinds use, need not keep the layout on every device; where it does, this costs nothing.
            image = mixed.contiguous(memory_format=torch.channels_last)
        if self.layers:
            # A number of its own: the layers must not draw what was drawn to mix.
            number = _number(*of, 1)
            torch.default_generator.manual_seed(number)
            if image.device.type == "cuda":
                torch.cuda.default_generators[image.device.index].manual_seed(number)
        return image, grade


def _number(*of: int) -> int:
    """A seed of 63 bits. Mixed well, so that neighbouring steps share nothing."""
    return int(np.random.SeedSequence(of).generate_state(1, np.uint64)[0] >> 1)
