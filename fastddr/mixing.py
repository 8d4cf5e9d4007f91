"""Mixing within a batch: each photograph with its neighbour, and their grades in the same shares.

Mixup blends two photographs: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018). CutMix pastes a box of
one into the other: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features"
(2019). Both are torchvision's. They come after the maps of `fastddr.sampling`, in training only.

Nothing here has state: what is drawn is a function of (seed, step, microstep, rank), so a run that goes on mixes as one
that was never stopped. Partners are of one micro batch, so mixing is not the same on another number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastddr.config import AugmentConfig, Config
from fastddr.errors import UserError


class Mixer:
    """Mixes micro batches. With both kinds on, a fair coin decides for each."""

    def __init__(self, augment: AugmentConfig, classes: int, *, seed: int, rank: int = 0) -> None:
        """`augment.mixup` or `augment.cutmix` must be above 0; grades are below `classes`."""
        # Imported by those that mix only: it takes a second.
        from torchvision.transforms import v2

        self._kinds: list[v2.MixUp | v2.CutMix] = []
        if augment.mixup:
            self._kinds.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
        if augment.cutmix:
            self._kinds.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
        self._seed, self._rank = seed, rank

    def __call__(
        self, step: int, microstep: int, image: Float[Tensor, "b 3 h w"], grade: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b classes"]]:
        """New images (channels_last, same dtype) and float32 shares of each grade, which add up to 1.

        Args:
            step: optimizer steps done before this one.
            microstep: number of the micro batch within the step.
            image: left as it is.
            grade: left as it is.
        """
        # torchvision draws from the global generator of the CPU, whatever device the images are on; so the numbers are
        # on the host already, and no one waits for the device. Not `manual_seed`, which would also seed every GPU.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_number(self._seed, step, microstep, self._rank))
            kind = self._kinds[int(torch.randint(len(self._kinds), ()))]
            mixed, target = kind(image, grade.long())
        # `roll`, which both kinds use, need not keep the layout on every device; where it does, this costs nothing.
        return mixed.contiguous(memory_format=torch.channels_last), target


def _number(*of: int) -> int:
    """A seed of 63 bits. Mixed well, so that neighbouring steps share nothing."""
    return int(np.random.SeedSequence(of).generate_state(1, np.uint64)[0] >> 1)


class Seeded:
    """For models whose layers draw, as dropout does: before each micro batch the generators are set by its number.

    So a run that goes on draws as one that was never stopped, and each rank draws its own.
    """

    def __init__(self, mixer: Mixer | None, *, seed: int, rank: int) -> None:
        """`mixer`: what else is done to a micro batch."""
        self._mixer, self._seed, self._rank = mixer, seed, rank

    def __call__(self, step: int, microstep: int, image: Tensor, grade: Tensor) -> tuple[Tensor, Tensor]:
        """As `Mixer`; without one the images and grades are given back as they are."""
        if self._mixer is not None:
            image, grade = self._mixer(step, microstep, image, grade)
        # A number of its own: the layers must not draw what the mixer drew.
        number = _number(self._seed, step, microstep, self._rank, 1)
        torch.default_generator.manual_seed(number)
        if image.device.type == "cuda":
            torch.cuda.default_generators[image.device.index].manual_seed(number)
        return image, grade


def build(config: Config, rank: int, micro_batch_size: int) -> Mixer | Seeded | None:
    """What is done to each micro batch of training; None where nothing is.

    Raises:
        UserError: a micro batch of one photograph, which has no neighbour to be mixed with.
    """
    mixer = _mixer(config, rank, micro_batch_size)
    # Of ours none draws.
    return Seeded(mixer, seed=config.seed, rank=rank) if config.model.startswith("timm:") else mixer


def _mixer(config: Config, rank: int, micro_batch_size: int) -> Mixer | None:
    if not (config.augment.mixup or config.augment.cutmix):
        return None
    if micro_batch_size < 2:
        raise UserError(
            "augment.mixup and augment.cutmix mix the photographs of a micro batch, but each rank holds one at a time; "
            "give a --batch-size and a --micro-batch-size of at least 2 for each rank, or set both to 0."
        )
    return Mixer(config.augment, config.num_classes, seed=config.seed, rank=rank)
