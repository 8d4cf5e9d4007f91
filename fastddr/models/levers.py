"""Levers of memory: activations that are computed again, `torch.compile`, the layout of maps."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import einops
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastddr.config import Config
from fastddr.errors import UserError
from fastddr.kernels.warp import triton_lacks


class Blocks(nn.Sequential):
    """Blocks one after the other, maps to maps; names and order are those of a Sequential.

    With `recompute` a block keeps nothing for the backward pass but its input, and runs once more in it (Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016).
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        for block in self:
            if self.recompute and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
            else:
                x = block(x)
        return x


def recompute_blocks(model: nn.Module, name: str) -> None:
    """From now on each block of the model keeps only its input, and is computed again in the backward pass.

    Outputs, gradients and BatchNorm's statistics stay what they were, on a CPU to the bit.

    Raises:
        UserError: the model cannot do it.
    """
    ours = [module for module in model.modules() if isinstance(module, Blocks)]
    for blocks in ours:
        blocks.recompute = True
    if not ours:
        refused = UserError(
            f"--memory.checkpointing: {name} does not say what its blocks are; leave it off, and lower "
            "--micro-batch-size, or take --compile with --memory.activation-budget 0.5."
        )
        if not hasattr(model, "set_grad_checkpointing"):
            raise refused
        try:
            cast(Any, model).set_grad_checkpointing(True)
        except AssertionError:  # timm's way to say so
            raise refused from None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_lend_statistics)
            # Always: what is computed again stops with an exception as soon as it has all that is needed.
            module.register_forward_hook(_restore_statistics, always_call=True)


def _lend_statistics(norm: nn.Module, inputs: Any) -> None:
    """A BatchNorm in the backward pass runs again: its statistics have that batch already, so copies get it."""
    # Without statistics it would keep another number of tensors than the first time, which PyTorch refuses.
    # -1 outside of a backward pass; PyTorch's own checkpointing asks this too.
    if torch._C._current_graph_task_id() != -1:
        own = norm.__dict__["_own"] = dict(norm._buffers)
        norm._buffers.update({name: None if tensor is None else tensor.clone() for name, tensor in own.items()})


def _restore_statistics(norm: nn.Module, inputs: Any, output: Any) -> None:
    if own := norm.__dict__.pop("_own", None):
        norm._buffers.update(own)


def layout(config: Config, device: torch.device) -> str:
    """The order of maps on a device: NHWC or NCHW.

    cuDNN is fast with depthwise kernels of 5 and 7 in NHWC, and slow with larger ones: published training speeds of
    ConvMixer-1024/20 with kernel 9 (an RTX 3090, half precision) are twice as high in NCHW.
    """
    if config.memory.layout != "auto":
        return config.memory.layout
    large = config.model == "convmixer" and config.convmixer.kernel_size > 7
    return "NCHW" if large and device.type == "cuda" else "NHWC"


def keep_contiguous(model: nn.Module) -> None:
    """Maps in PyTorch's default order (NCHW) and not channels_last, whatever the images are laid out in."""
    model.to(memory_format=torch.contiguous_format)
    model.register_forward_pre_hook(_contiguous_input)
    patches = getattr(model, "patches", None)
    if isinstance(patches, nn.Module):  # the ConvMixer's, which are cut by a matrix product and come channels_last
        patches.register_forward_hook(_contiguous_output)


def _contiguous_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def _contiguous_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.contiguous()


def check_compiler(config: Config, device: torch.device) -> None:
    """Raise UserError where `config.compile` asks for a compiler for this device, and the machine has none."""
    if not config.compile:
        return
    if device.type == "cuda":
        lacks = triton_lacks()
        if lacks is not None:
            raise UserError(f"--compile lacks {lacks}; install that, or leave it off here.")
    elif not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("--compile needs a C++ compiler on a CPU; install g++, or leave it off.")


def compiled(model: nn.Module, config: Config) -> nn.Module:
    """The model under `torch.compile`, or as it is unless `config.compile`.

    The compiled one shares weights and buffers with the given one, which stays as it is. `memory.activation_budget` and
    the layout of maps are settings of PyTorch's for the whole process. Where there are several ranks, `model` has DDP
    around it.
    """
    if not config.compile:
        return model
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.activation_memory_budget = config.memory.activation_budget
    # It would lay out maps in channels_last by itself.
    torch._inductor.config.layout_optimization = layout(config, next(model.parameters()).device) == "NHWC"
    # einops notes the kinds of tensors that it has met, and what is compiled depends on these notes: were a first trace
    # to write them, all would be compiled a second time.
    for met in (torch.empty(1, 1), nn.Parameter(torch.empty(1, 1))):
        einops.rearrange(met, "a b -> (a b)")
    # Micro batches are all of one size, so nothing need be prepared for others.
    return cast(nn.Module, torch.compile(model, dynamic=False))


@contextmanager
def deterministic(config: Config) -> Iterator[None]:
    """Within it an operation that PyTorch has in no deterministic form on a GPU ends the run in one sentence.

    Raises:
        UserError: the model needs one, and `config.deterministic` forbids it.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"([\w ]+?) does not have a deterministic implementation", str(error))
        if not config.deterministic or found is None:
            raise
        raise UserError(
            f"--deterministic: PyTorch has no deterministic {found[1].strip()}, which {config.model} needs here; take "
            "another model, or leave --deterministic off."
        ) from error


@contextmanager
def compiling(config: Config, heard: Callable[[], None]) -> Iterator[None]:
    """Within it a compiler that fails ends the run in one sentence, which is at the first step and not before; and so
    does what `deterministic` forbids.

    `heard` raises where the run was asked to stop: Ctrl-C and schedulers signal the compiler's processes too, which end
    at once and look as if they had failed.

    Raises:
        UserError: the model cannot be compiled on this machine.
    """
    if not config.compile:
        with deterministic(config):
            yield
        return
    import torch._dynamo.config
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    try:
        with deterministic(config):
            yield
    except TorchDynamoException as error:
        heard()
        if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, torch.OutOfMemoryError):
            raise error.inner_exception from error
        if torch._dynamo.config.verbose:
            raise
        # Behind it comes PyTorch's advice; before it a C++ compiler may have said pages.
        why = textwrap.shorten(str(error).partition("Set TORCHDYNAMO_VERBOSE=1")[0], 400, placeholder=" …")
        raise UserError(
            f"torch.compile cannot compile {config.model} here: {why}; leave --compile off, or set "
            "TORCHDYNAMO_VERBOSE=1 to see all of it."
        ) from error
