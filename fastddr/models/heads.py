"""Logits in float32, whatever the precision of the network before them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class _Single(nn.Module):
    """Before a layer's class: the layer in float32, under autocast too."""

    def forward(self, values: Tensor) -> Tensor:
        """As the layer's own."""
        # Of tensors on `meta`, which have no values, autocast knows nothing.
        if values.is_meta or not torch.is_autocast_enabled(values.device.type):
            return self._own(values)
        with torch.autocast(values.device.type, enabled=False):
            return self._own(values.float())

    def _own(self, values: Tensor) -> Tensor:
        found: Tensor = super().forward(values)
        return found


class SingleLinear(_Single, nn.Linear):
    """A linear layer in float32, under autocast too."""


#: Of a layer's class the one in float32: some of timm's classifiers are linear layers of its own, or convolutions.
_SINGLE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SingleLinear}


def single(model: nn.Module, heads: Iterable[str]) -> nn.Module:
    """The model with logits in float32. In bfloat16 they have three digits: the two largest may be equal, and then the
    lower grade is taken, and a regression's values come in steps of 1/64.
    """
    for name in heads:
        head = model.get_submodule(name)
        # Not another layer in its place: names, weights and copies stay as they are.
        kind = type(head)
        if not issubclass(kind, _Single):
            head.__class__ = _SINGLE.setdefault(kind, type(f"Single{kind.__name__}", (_Single, kind), {}))
    return model
