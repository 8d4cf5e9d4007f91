"""How the weights move: optimizer, learning rate as a function of the step, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastddr.config import Config, OptimizerConfig
from fastddr.errors import UserError


def build(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    betas: Sequence[float] = (0.9, 0.999),
    fused: bool | None = None,
) -> Optimizer:
    """Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) or SGD with Nesterov momentum.

    Parameters of one dimension, which are the biases and the norms' scales and shifts, are not decayed, with
    any of the three: pulling them to zero does not simplify the function. Nor are those that the model itself names in
    `no_weight_decay()`, by name or by a pattern like `pos_embed.*`, as timm's transformers do of their positions.
    Frozen parameters are left out. `momentum` is SGD's alone, `betas` Adam's and AdamW's; SGD with momentum 0 is plain
    SGD. Build it after the model is on its device: on CUDA the step is one fused kernel, elsewhere only with `fused`.
    Raises UserError where all is frozen.
    """
    patterns = tuple(cast(Any, model).no_weight_decay()) if hasattr(model, "no_weight_decay") else ()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [parameter for _, parameter in named]
    spared = {name for name, _ in named if any(fnmatchcase(name, pattern) for pattern in patterns)}
    decayed = [parameter for name, parameter in named if parameter.ndim > 1 and name not in spared]
    kept = [parameter for name, parameter in named if parameter.ndim <= 1 or name in spared]
    if not trained:
        raise UserError(f"optimizer {name!r} has no weight to train: unfreeze some.")
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # None leaves the choice of the loop to torch.
    fused = True if all(parameter.is_cuda for parameter in trained) else fused
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
        if momentum > 0:
            # As SGD begins; but where its first step is left out, a fused one would keep memory as it was found.
            for parameter in trained:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    first, second = betas
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, betas=(first, second), fused=fused)


def from_config(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer of a configuration, as `build` makes it."""
    chosen = config.optimizer
    return build(
        model, chosen.name, lr=config.lr, weight_decay=chosen.weight_decay, momentum=chosen.momentum, betas=chosen.betas
    )


def lr_factor(step: int, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine") -> float:
    """What the peak learning rate is multiplied by for optimizer step `step` of 0 … total_steps − 1.

    A straight line over the warm-up, 1/(w+1), 2/(w+1), …, which reaches 1 at step w = `warmup_steps`; then 1
    ("constant") or half a cosine wave that would reach 0 at `total_steps`, one after the last step
    (Loshchilov and Hutter 2017, equation 5, without restarts). A function of the step alone, so a resume
    needs no state. The warm-up leaves one step at least.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * done))


def planned_factor(planned: OptimizerConfig, step: int, total_steps: int) -> float:
    """`lr_factor` of a configuration; its warm-up is a share of all steps, and leaves one at least."""
    warmup = min(round(planned.warmup_ratio * total_steps), total_steps - 1)
    return lr_factor(step, total_steps, warmup, planned.schedule)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group this learning rate: peak times `lr_factor(step, ...)`, before each step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def ema_decay(step: int, decay: float) -> float:
    """The decay at optimizer step `step` = 0, 1, …: min(decay, (1 + step) / (10 + step)).

    A fixed decay would keep the random first weights for about 1 / (1 − decay) steps; this forgets them at
    once.
    """
    return min(decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Parts:
    """The tensors of a model, listed once: to walk a deep one anew takes the host a good part of a small step.

    Loading, stepping and counting write into them; moving the model to a device may put others in their place.
    """

    parameters: list[Tensor]
    statistics: list[Tensor]
    """Buffers of floating-point numbers, such as BatchNorm's."""
    counters: list[Tensor]
    """The other buffers."""

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """Those of a model, wrapped or not."""
        buffers = list(model.buffers())
        return cls(
            list(model.parameters()),
            [buffer for buffer in buffers if buffer.is_floating_point()],
            [buffer for buffer in buffers if not buffer.is_floating_point()],
        )


def make_ema(model: nn.Module) -> nn.Module:
    """A copy of the model, in evaluation mode, that `update_ema` keeps at the mean of its recent weights.

    Give it the bare model, before DDP or torch.compile wrap it. The copy stays on the model's device and in
    its memory format and takes no gradient.
    """
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(
    ema: nn.Module,
    model: nn.Module,
    step: int,
    decay: float,
    skip: Tensor | None = None,
    asks: bool | None = None,
    parts: tuple[Parts, Parts] | None = None,
) -> None:
    """After step 0, 1, …: average = d · average + (1 − d) · model, with d = `ema_decay(step, decay)`.

    Floating-point parameters and buffers are averaged, counters copied: the latest statistics of BatchNorm do not
    belong to averaged weights. `model` may be wrapped by now. Where `skip`, a flag on the device, is set, nothing
    moves: the step was left out. `asks` says whether the host looks at the flag, which is what it does on a CPU alone.
    `parts` are those of `ema` and of `model`, where they are at hand. PyTorch's `AveragedModel` is not used, for it
    copies its counter to the device at each call, which makes the host wait for the device; this asks it nothing.
    """
    if asks is None:
        asks = skip is not None and not skip.is_cuda
    if skip is not None and asks and bool(skip):
        return
    ours, theirs = parts or (Parts.of(ema), Parts.of(model))
    averages, values = [*ours.parameters, *ours.statistics], [*theirs.parameters, *theirs.statistics]
    if ours.counters:
        torch._foreach_copy_(ours.counters, theirs.counters)
    share = 1.0 - ema_decay(step, decay)
    if skip is None or asks:
        torch._foreach_lerp_(averages, values, share)
    else:
        # The flag stays on the device; a factor of all differences is one launch for many tensors.
        moves = torch._foreach_sub(values, averages)
        torch._foreach_mul_(moves, torch.where(skip, 0.0, share))
        torch._foreach_add_(averages, moves)
