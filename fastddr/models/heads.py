"""Logits in float32, whatever the precision of the network before them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _Single(nn.Module):
    """Before a layer's class: the layer in float32, under autocast too. What is no tensor it takes as it is."""

    def forward(self, values: Any, *more: Any, **named: Any) -> Any:
        """As the layer's own."""
        # Of tensors on `meta`, which have no values, autocast knows nothing.
        if not isinstance(values, Tensor) or values.is_meta or not torch.is_autocast_enabled(values.device.type):
            return super().forward(values, *more, **named)
        with torch.autocast(values.device.type, enabled=False):
            return super().forward(values.float(), *more, **named)


class SingleLinear(_Single, nn.Linear):  # type: ignore[misc]  # PyTorch calls the argument `input`
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
