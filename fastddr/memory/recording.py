"""Notes each storage that operations make and free, and what they compute and move."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
#: How many of their first inputs are read twice.
_TWICE = {
    torch.ops.aten.native_batch_norm.default: 1,
    torch.ops.aten.native_batch_norm_backward.default: 2,
    torch.ops.aten.convolution_backward.default: 1,
}
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@dataclass
class Cost:
    """A sum, and what of it the batch divides."""

    total: int = 0
    divided: int = 0

    def add(self, count: int, batch: int) -> None:
        self.total += count
        self.divided += 0 if count % batch else count


class Recorder(TorchDispatchMode):
    """Within it every new storage is a block of the tape."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.kinds: list[str] = []
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.flop, self.moved = Cost(), Cost()
        self._living: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            # Three of four calls, a fake tensor being asked where it is: no operation.
            return args[0].fake_device
        found = func(*args, **(kwargs or {}))
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        after = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        kind = "activations" if torch.is_grad_enabled() else "temporaries"
        if func is torch.ops.aten._to_copy.default and before and self.kind(before[0]) == "parameters":
            kind = "weight copies"
        for tensor in after:
            self.note(tensor, kind)
        self._count(func, args, before, after)
        return found

    def note(self, tensor: Tensor, kind: str) -> None:
        """Give a tensor's storage a kind; one that was not seen before is taken now."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._living.get(key)
        if known is not None:
            return
        number = len(self.kinds)
        self.kinds.append(kind)
        self.sizes.append(storage.nbytes())
        self.events.append(number + 1)
        self._living[key] = number, weakref.ref(storage, partial(self._gone, key, number))

    def _gone(self, key: int, number: int, _: Any) -> None:
        self.events.append(-(number + 1))
        # A storage that came at the same address may be known by now.
        if self._living[key][0] == number:
            del self._living[key]

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Give the block of a tensor another kind, from its beginning on."""
        self.note(tensor, kind)
        self.kinds[self._living[tensor.untyped_storage()._cdata][0]] = kind

    def kind(self, tensor: Tensor) -> str | None:
        """The kind of a tensor's block; None where it has none."""
        known = self._living.get(tensor.untyped_storage()._cdata)
        return None if known is None else self.kinds[known[0]]

    def _count(self, func: Any, args: Any, before: list[Tensor], after: list[Tensor]) -> None:
        # A view moves nothing. What is written in place was read as well.
        inputs = {tensor.untyped_storage()._cdata for tensor in before}
        if all(tensor.untyped_storage()._cdata in inputs for tensor in after) and not func._schema.is_mutable:
            return
        # Statistics need a pass before the one that uses them; a convolution's gradients read the output's once each.
        twice = before[: _TWICE.get(func, 0)]
        for tensor in (*before, *after, *twice):
            self.moved.add(tensor.numel() * tensor.element_size(), self.batch)
        if func is _CONVOLUTIONS[0]:
            self.flop.add(2 * after[0].numel() * args[1][0].numel(), self.batch)
        elif func is _CONVOLUTIONS[1]:
            # The gradient of the input where somebody asks for it, and that of the weights.
            asked = int(args[10][0]) + int(args[10][1])
            self.flop.add(2 * args[0].numel() * args[2][0].numel() * asked, self.batch)
        elif func in _PRODUCTS:
            self.flop.add(2 * after[0].numel() * before[-1].shape[-2], self.batch)
