"""Logits in float32, whatever the precision of the network before them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Single(nn.Module):
    """Before a layer's class: the layer in float32, under autocast too. What is not one tensor it takes as it is."""

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the layer's own."""
        tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
        # Of tensors on `meta`, which have no values, autocast knows nothing.
        if len(tensors) != 1 or tensors[0].is_meta or not torch.is_autocast_enabled(tensors[0].device.type):
            return super().forward(*given, **named)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return super().forward(*map(_float, given), **{name: _float(value) for name, value in named.items()})


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


class SingleLinear(Single, nn.Linear):
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
        if not issubclass(kind, Single):
            head.__class__ = _SINGLE.setdefault(kind, type(f"Single{kind.__name__}", (Single, kind), {}))
    return model
