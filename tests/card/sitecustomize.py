"""What PyTorch's and DALI's kernels would do on a card that `runtime.c` pretends, done on the CPU on the same bytes.

Python imports this module as it starts (it lies on PYTHONPATH, see `run.py`); the rest waits for PyTorch's import. An
operation of the CUDA key goes to the CPU's kernel on aliases of its tensors, and what comes out is copied into memory
of the card, which PyTorch's own allocator gives. DALI's pipelines run on the CPU and their batches go to the card,
fastddr's Triton kernel is the plain PyTorch beside it, and NCCL is gloo.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: By module: what is done once it is imported.
AFTER: dict[str, Callable[[], None]] = {}


class Finder(importlib.abc.MetaPathFinder):
    """Lets the others find a module, and does what is to be done once it is imported."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in AFTER or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def both(module: ModuleType) -> None:
            run(module)
            AFTER.pop(name)()

        spec.loader.exec_module = both
        return spec


def after(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def keep(call: Callable[[], None]) -> Callable[[], None]:
        AFTER[name] = call
        return call

    return keep


def alias(tensor: Any) -> Any:
    """A CPU tensor on the bytes of one of the card's."""
    import torch

    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size() * tensor.element_size()
    if not size or not tensor.numel():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    there = (ctypes.c_char * size).from_address(storage.data_ptr())
    flat = torch.frombuffer(there, dtype=torch.uint8).view(tensor.dtype)
    return torch.as_strided(flat, tensor.size(), tensor.stride(), tensor.storage_offset())


def put(tensor: Any, device: Any) -> Any:
    """A copy on the card, with the same strides."""
    import torch

    there = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    alias(there).copy_(tensor, non_blocking=True)  # DALI gives memory that PyTorch takes for a card's
    return there


#: Operations whose kernels on a card do nothing but what the host does, or which the CPU does not have.
NATIVE = {"as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "resize_", "set_",
          "is_set_to", "is_pinned", "_pin_memory", "record_stream", "empty", "empty_strided", "_efficientzerotensor",
          "_local_scalar_dense", "_assert_async"}  # fmt: skip
#: Operations whose result the host waits for.
WAITS = {"nonzero", "masked_select", "equal", "_unique2"}


class Sides:
    """The tensors of one call, on the card and as the CPU's."""

    def __init__(self) -> None:
        self.by_card: dict[int, Any] = {}
        self.pairs: dict[int, tuple[Any, Any]] = {}
        """By the CPU's tensor: both."""

    def down(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            if not value.is_cuda:
                return value
            if id(value) not in self.by_card:
                self.by_card[id(value)] = one = alias(value)
                self.pairs[id(one)] = one, value
            return self.by_card[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.down, value))
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return generator(value) if isinstance(value, torch.Generator) else value

    def up(self, value: Any, device: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            return self.pairs[id(value)][1] if id(value) in self.pairs else put(value, device)
        return type(value)(self.up(one, device) for one in value) if isinstance(value, (list, tuple)) else value


def as_kernel(name: str, operation: Any) -> Callable[..., Any]:
    """The CPU's kernel, for tensors of the card."""
    import torch

    wants = [str(one.type) in ("Tensor", "Optional[Tensor]") for one in operation._schema.arguments]
    waits = name.split(".")[0] in WAITS

    def kernel(*args: Any, **kwargs: Any) -> Any:
        sides = Sides()
        if waits:
            torch.cuda.current_stream().synchronize()  # which PyTorch refuses where it shall
        # A number that stands for a tensor comes as a number.
        given = [torch.tensor(value) if i < len(wants) and wants[i] and isinstance(value, (bool, int, float)) else value
                 for i, value in enumerate(args)]  # fmt: skip
        found = operation(*map(sides.down, given), **{key: sides.down(value) for key, value in kwargs.items()})
        for one, tensor in sides.pairs.values():
            if one.shape != tensor.shape:  # an `out` that was empty
                tensor.resize_(one.shape)
                alias(tensor).copy_(one)
        here = torch.device("cuda", torch.cuda.current_device())
        return sides.up(found, next((tensor.device for _, tensor in sides.pairs.values()), here))

    return kernel


def absent(name: str) -> Callable[..., Any]:
    """In place of a kernel that would do nothing, and leave memory as it was."""

    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name}: this card is pretended, and the CPU has no kernel for it")

    return kernel


def generator(given: Any) -> Any:
    """A CPU's, whose numbers go by the state of the card's."""
    import torch

    if given.device.type != "cuda":
        return given
    made = torch.Generator()
    offset = given.get_offset()
    given.set_offset(offset + 4)
    made.manual_seed(hash((given.initial_seed(), offset)) & (2**63 - 1))
    return made


def copy_(to: Any, from_: Any, non_blocking: bool = False) -> Any:
    import torch

    (alias(to) if to.is_cuda else to).copy_(alias(from_) if from_.is_cuda else from_)
    if to.is_cuda != from_.is_cuda and not non_blocking:
        torch.cuda.current_stream().synchronize()
    return to


def cudnn_batch_norm(x: Any, *args: Any) -> Any:
    import torch

    given = [None if one is None else alias(one) for one in (x, *args[:4])]
    found = torch.ops.aten.native_batch_norm.default(*given, *args[4:])
    return (*(put(one, x.device) for one in found), torch.empty(0, dtype=torch.uint8, device=x.device))


def cudnn_batch_norm_backward(x: Any, grad: Any, *args: Any) -> Any:
    import torch

    *given, epsilon, _ = [None if one is None else one if isinstance(one, float) else alias(one) for one in args]
    found = torch.ops.aten.native_batch_norm_backward.default(alias(grad), alias(x), *given, True, epsilon, [True] * 3)
    return tuple(put(one, x.device) for one in found)


@after("torch")
def operations() -> None:
    import torch

    library = torch.library.Library("aten", "IMPL")
    operations.library = library  # what is put into it lasts as long as it does
    own = {"copy_": copy_, "cudnn_batch_norm": cudnn_batch_norm,
           "cudnn_batch_norm_backward": cudnn_batch_norm_backward}  # fmt: skip
    # Attention of plain operations: its fused kernels are of a card alone.
    for kind in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    torch.cuda._device_count_nvml = lambda: -1  # a real driver's count is not of this card
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    for full in [*registered, "aten::convolution", "aten::convolution_backward"]:
        name = full.removeprefix("aten::")
        base, _, overload = name.partition(".")
        if name in own or base in NATIVE or not full.startswith("aten::"):
            continue
        if not has(full, "CPU"):
            if not base.startswith("_use_"):  # questions, which the host answers
                library.impl(name, absent(name), "CUDA", allow_override=True)
            continue
        if "sparse" in name or "cudnn" in name:
            continue
        operation = getattr(getattr(torch.ops.aten, base), overload or "default")
        library.impl(name, as_kernel(name, operation), "CUDA", allow_override=True)
    for name, call in own.items():
        library.impl(name, call, "CUDA", allow_override=True)


@after("triton")
def triton() -> None:
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **_: Any) -> None:
        from fastddr.kernels import warp

        if self.fn.__name__ != "warp_kernel":
            raise NotImplementedError(f"{self.fn.__name__}: this card is pretended, and has no Triton")
        pixels, offset, size, back, colour, images, image_size = args
        given = map(alias, (pixels, offset, size, back, colour))
        alias(images).copy_(warp.warp_reference(*given, image_size, images.dtype))

    JITFunction.run = run


class Made:
    """What a pipeline gives, on the card."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def as_tensor(self) -> Any:
        return self._there(self._found.as_tensor())

    def __getitem__(self, place: int) -> Any:
        return self._there(self._found[place])

    def __len__(self) -> int:
        return len(self._found)

    def shape(self) -> Any:
        return self._found.shape()

    def _there(self, batch: Any) -> Any:
        import torch

        return put(torch.from_dlpack(batch), torch.device("cuda", torch.cuda.current_device()))


@after("nvidia.dali")
def dali() -> None:
    from nvidia.dali import backend, fn
    from nvidia.dali.pipeline import Pipeline

    init, outputs, run = Pipeline.__init__, Pipeline.outputs, Pipeline.run

    def on_the_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(init).bind(self, *args, **kwargs)
        self._card = given.arguments.get("device_id")
        given.arguments["device_id"] = None
        init(*given.args, **given.kwargs)

    def made(self: Any, found: Any) -> Any:
        return found if self._card is None else tuple(map(Made, found))

    Pipeline.__init__ = on_the_cpu
    Pipeline.outputs = lambda self, cuda_stream=None: made(self, outputs(self))
    Pipeline.run = lambda self, cuda_stream=None, **inputs: made(self, run(self, **inputs))
    backend.ReleaseUnusedMemory = lambda: None
    for name in ("image", "image_slice"):
        decode = getattr(fn.decoders, name)

        def decoded(*args: Any, decode: Any = decode, device: str = "cpu", **kwargs: Any) -> Any:
            return decode(*args, device=device.replace("mixed", "cpu"), **kwargs)

        setattr(fn.decoders, name, decoded)


@after("torch.distributed")
def nccl() -> None:
    import torch
    from torch import distributed
    from torch.distributed import distributed_c10d as inner

    init, barrier, backend = inner.init_process_group, inner.barrier, inner.get_backend
    gather = inner.all_gather_into_tensor
    asked = []

    def init_process_group(name: Any = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        name = name or kwargs.pop("backend", None)
        asked[:] = [name]
        init("gloo" if name == "nccl" else name, *args, **kwargs)

    def all_gather_into_tensor(output: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if not tensor.is_cuda:
            return gather(output, tensor, group, async_op)
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, tensor, group)
        output.view(-1).copy_(torch.cat([part.reshape(-1) for part in parts]))
        return None

    for module in (distributed, inner):
        module.init_process_group = init_process_group
        module.all_gather_into_tensor = all_gather_into_tensor
        module.get_backend = lambda group=None: "nccl" if group is None and asked == ["nccl"] else backend(group)
        module.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)


sys.meta_path.insert(0, Finder())
