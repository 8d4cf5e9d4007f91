"""Logits in float32, whatever the precision of the network before them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SingleLinear(nn.Linear):
    """A linear layer in float32, under autocast too."""

    def forward(self, values: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        """As `nn.Linear`."""
        # Of tensors on `meta`, which have no values, autocast knows nothing.
        if values.is_meta or not torch.is_autocast_enabled(values.device.type):
            return super().forward(values)
        with torch.autocast(values.device.type, enabled=False):
            return super().forward(values.float())


def single(model: nn.Module, heads: Iterable[str]) -> nn.Module:
    """The model with logits in float32. In bfloat16 they have three digits: the two largest may be equal, and then the
    lower grade is taken, and a regression's values come in steps of 1/64.
    """
    for name in heads:
        head = model.get_submodule(name)
        if type(head) is nn.Linear:
            # Not another layer in its place: names, weights and copies stay as they are.
            head.__class__ = SingleLinear
    return model
