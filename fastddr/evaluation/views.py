"""Test-time augmentation: the mean of a model's probabilities over mirrored and turned views of a photograph."""

from __future__ import annotations

import math
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastddr.config.sections import Views

#: (quarter turns, whether mirrored first) of each view.
_VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "dihedral": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}
assert {"none", *_VIEWS} == set(get_args(Views))


def averaged(model: nn.Module, views: Views) -> nn.Module:
    """A model of logits, or its mean over the views."""
    return model if views == "none" else Averaged(model, views)


def told(views: Views) -> str:
    """What a name of weights ends with: `, dihedral averaged`."""
    return "" if views == "none" else f", {views} averaged"


class Averaged(nn.Module):
    """A model whose logits are the logarithm of its mean probabilities over the views.

    A retina may be photographed mirrored (the other eye) and has no up in a crop, so each view is as likely as the
    photograph itself.
    """

    def __init__(self, model: nn.Module, views: Views) -> None:
        """`views` are not `none`, which would be the model itself."""
        super().__init__()
        self.model, self._views = model, _VIEWS[views]
        self.training = model.training  # who scores sets it back to what it was

    def forward(self, image: Float[Tensor, "b c s s"]) -> Float[Tensor, "b C"]:
        """Square images to logits whose softmax is the mean of the views' softmax."""
        log_probabilities = []
        for turns, mirrored in self._views:
            view = image.flip(-1) if mirrored else image
            view = torch.rot90(view, turns, (-2, -1)) if turns else view
            view = view.contiguous(memory_format=torch.channels_last)
            log_probabilities.append(self.model(view).float().log_softmax(1))
        return torch.stack(log_probabilities).logsumexp(0) - math.log(len(self._views))
