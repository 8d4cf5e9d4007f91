"""A card that is not there: CPU tensors that say they are on cuda:0, for what a machine without a GPU never shows.

Every operation, copy, event and wait is noted, so that a test sees a host that waits for the card, a CPU tensor among
the card's, and two streams, or a stream and the host, that touch the same bytes without an order between them (by
vector clocks: Mattern, "Virtual Time and Global States of Distributed Systems", 1989). Memory, speed and the kernels of
a card stay unseen. PyTorch's FakeTensorMode has no backward pass on "cuda" without one, and no streams.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import _augment

CUDA = torch.device("cuda", 0)

#: How many operations of each stream have ended, as far as somebody knows.
Clock = dict[int, int]
#: In place of a stream's number.
_HOST = None
#: Operations whose result the host must have: a number, or a size.
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
#: Where a tensor is in truth. PyTorch's types do not know this base of all tensors.
_REAL_DEVICE = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


class Use(NamedTuple):
    """A stream's operation that reads or writes bytes of a storage."""

    begin: int
    end: int
    stream: int
    count: int
    writes: bool
    what: str


class Card(TorchDispatchMode):
    """Notes what the card would do, while it is entered. `waits` and `faults` say in words what a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.faults: list[str] = []
        self.current, self.streams = 0, 1
        self.clocks: dict[int, Clock] = {}
        self.host: Clock = {}
        #: By storage: "cuda" or "pinned", with the storage itself, since its address is used again.
        self._kinds: dict[int, tuple[str, Callable[[], object]]] = {}
        self._uses: dict[int, list[Use]] = {}
        self._moving = False

    def kind(self, tensor: Tensor) -> str | None:
        """Where a tensor's bytes are: "cuda", "pinned", or None on the host."""
        if _REAL_DEVICE(tensor).type != "cpu":
            return None
        found = self._kinds.get(tensor.untyped_storage()._cdata)
        return found[0] if found is not None and found[1]() is not None else None

    def put(self, tensor: Tensor, kind: str = "cuda") -> Tensor:
        """The tensor, whose bytes are there from now on."""
        if self.kind(tensor) is None:
            storage = tensor.untyped_storage()
            self._kinds[storage._cdata] = kind, weakref.ref(storage)
            self._uses.pop(storage._cdata, None)
        return tensor

    def touch(self, what: str, reads: list[Tensor], writes: list[Tensor], stream: int | None = _HOST) -> None:
        """An operation of the host, or one queued on a stream: a fault where it has no order with an earlier one."""
        known = self.host if stream is None else self.clocks.setdefault(stream, {})
        if stream is not None:
            later(known, self.host)
            known[stream] = known.get(stream, 0) + 1
        for tensor, write in [(t, False) for t in reads] + [(t, True) for t in writes]:
            if self.kind(tensor) is None or not tensor.numel():
                continue
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.storage_offset() * tensor.element_size()
            end = begin + (last + 1) * tensor.element_size()
            uses = self._uses.setdefault(tensor.untyped_storage()._cdata, [])
            for use in uses:
                unordered = known.get(use.stream, 0) < use.count
                if (write or use.writes) and begin < use.end and use.begin < end and unordered:
                    who = "the host" if stream is None else f"stream {stream}"
                    self.faults.append(f"{what} of {who} is not ordered with {use.what} of stream {use.stream}")
            if stream is not None:
                uses.append(Use(begin, end, stream, known[stream], write, what))

    def wait(self, what: str) -> None:
        """The host waits for all that is queued on the current stream."""
        later(self.host, self.clocks.get(self.current, {}))
        self.waits.append(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        found, name = func(*args, **kwargs), func._schema.name
        if self._moving:
            return found
        storages = {t.untyped_storage()._cdata for t in given}
        new = [t for t in _tensors(found) if t.untyped_storage()._cdata not in storages]
        places = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        changed = _tensors([args[i] for i in places if i < len(args)])
        if not any(self.kind(t) == "cuda" for t in given):
            self.touch(name, given, changed)
            return found
        # A number in a tensor of its own goes along with the kernel.
        elsewhere = [t for t in given if t.ndim and self.kind(t) != "cuda"]
        if name == "aten::copy_":
            ahead = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            if elsewhere and not (ahead and self.kind(elsewhere[0]) == "pinned"):
                self.wait(name)
        elif elsewhere:
            self.faults.append(f"{name}: a tensor of {tuple(elsewhere[0].shape)} on the host among the card's")
        for tensor in new:
            self.put(tensor)
        if new or changed:
            self.touch(name, given, new + changed, self.current)
        if name in _WAITS:
            self.wait(name)
        return found

    def move(self, real: Callable[..., Tensor], tensor: Tensor, up: bool, ahead: bool, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor on the other side (`Tensor.to`)."""
        self._moving = True
        moved = real(tensor, dtype=dtype, copy=True)
        self._moving = False
        self.touch("to", [tensor], [self.put(moved) if up else moved], self.current)
        if not (ahead and (not up or self.kind(tensor) == "pinned")):
            self.wait("to")
        return moved


def later(known: Clock, other: Clock) -> None:
    """What the other knows is known too."""
    for stream, count in other.items():
        known[stream] = max(known.get(stream, 0), count)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The card. What is patched is as it was after the test."""
    one = Card()
    _patch_tensors(one, monkeypatch)
    _patch_streams(one, monkeypatch)
    autocast, one_hot = torch.autocast.__init__, torch.nn.functional.one_hot
    monkeypatch.setattr(
        torch.autocast, "__init__", lambda self, device_type, *args, **more: autocast(self, "cpu", *args, **more)
    )

    def one_hot_there(tensor: Tensor, num_classes: int) -> Tensor:
        """On a CPU alone PyTorch's own looks at the values."""
        if not tensor.is_cuda:
            return one_hot(tensor, num_classes)
        return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()

    for module in (torch.nn.functional, _augment):  # the second has it by name
        monkeypatch.setattr(module, "one_hot", one_hot_there)
    with one:
        yield one


def _patch_tensors(one: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensors are, come from and go to."""
    to, tolist, deepcopy = Tensor.to, Tensor.tolist, Tensor.__deepcopy__

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        devices = [a for a in (*args, kwargs.pop("device", None)) if isinstance(a, (str, torch.device))]
        dtypes = [a for a in (*args, kwargs.pop("dtype", None)) if isinstance(a, torch.dtype)]
        ahead = kwargs.pop("non_blocking", False) or any(a is True for a in args)
        dtype = dtypes[0] if dtypes else tensor.dtype
        up = bool(devices) and torch.device(devices[0]).type == "cuda"
        if not devices or up == tensor.is_cuda:
            return to(tensor, dtype=dtype, **kwargs)
        return one.move(to, tensor, up, ahead, dtype)

    def listed(tensor: Tensor) -> list[Any]:
        if tensor.is_cuda:
            one.wait("tolist")
        one.touch("tolist", [tensor], [])
        return tolist(tensor)

    def factory(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            up = device is not None and torch.device(device).type == "cuda"
            found = real(*args, **kwargs) if up or device is None else real(*args, device=device, **kwargs)
            if up or pin_memory:
                one.put(found, "cuda" if up else "pinned")
            if up:  # in memory that the current stream may still be at
                one.touch(real.__name__, [], [found], one.current)
            if up and real is tensor_of:
                one.wait("tensor")  # from memory that is not pinned
            return found

        return made

    tensor_of = torch.tensor
    changes: dict[str, Any] = {
        "device": property(lambda t: CUDA if one.kind(t) == "cuda" else _REAL_DEVICE(t)),
        "is_cuda": property(lambda t: one.kind(t) == "cuda"),
        "to": moved,
        "tolist": listed,
        "cpu": lambda t: moved(t, "cpu"),
        "pin_memory": lambda t: one.put(t.clone(), "pinned"),
        "__deepcopy__": lambda t, memo: deepcopy(t, memo) if isinstance(t, torch.nn.Parameter) else t.detach().clone(),
    }
    for name, change in changes.items():
        monkeypatch.setattr(Tensor, name, change, raising=False)
    for name in ("empty", "zeros", "ones", "tensor", "arange", "zeros_like"):
        monkeypatch.setattr(torch, name, factory(getattr(torch, name)))


def _patch_streams(one: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self) -> None:
            self.clock: Clock = {}

        def record(self, stream: Stream | None = None) -> None:
            self.clock = one.host | one.clocks.get(one.current if stream is None else stream.number, {})

        def synchronize(self) -> None:
            later(one.host, self.clock)

    class Stream:
        def __init__(self, device: torch.device | None = None, number: int | None = None) -> None:
            self.number = one.streams if number is None else number
            one.streams += number is None

        def wait_event(self, event: Event) -> None:
            later(one.clocks.setdefault(self.number, {}), event.clock)

        def wait_stream(self, other: Stream) -> None:
            later(one.clocks.setdefault(self.number, {}), one.clocks.get(other.number, {}))

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        before, one.current = one.current, stream.number
        yield
        one.current = before

    changes: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "stream": within,
        "current_stream": lambda device=None: Stream(number=one.current),
    }
    for name, change in changes.items():
        monkeypatch.setattr(torch.cuda, name, change)
