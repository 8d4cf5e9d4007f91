"""One training step as a function: what the trainer runs, the benchmark times and the planner traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from fastddr.data.grades import ICDR
from fastddr.loaders.base import Batch
from fastddr.optimizers import Parts


@dataclass
class Tally:
    """Sums over photographs since the last reset, kept on the device so that no step waits for the host."""

    loss: Tensor
    correct: Tensor
    count: Tensor
    seen: int = 0
    """All photographs, those of a bad step too; the host knows how many, so no device is asked."""

    @classmethod
    def zeros(cls, device: torch.device) -> Tally:
        """All sums zero."""
        loss, correct, count = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        return cls(loss, correct, count)

    def add(self, loss: Tensor, logits: Tensor, grade: Tensor, finite: Tensor) -> None:
        """Count one micro batch in: its mean loss, its logits (b, C) and its grades (b), or their shares (b, C).

        One whose loss is not finite, which the flag `finite` says, is seen and does not count. Of a mixed photograph
        the grade with the larger share is the right one. Of a regression `logits` are values (b, 1), which are rounded:
        its thresholds are fitted after the epoch.
        """
        if grade.ndim == 2:
            grade = grade.argmax(1)
        logits = logits.detach()
        predicted = logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0].round().clamp(0, len(ICDR) - 1)
        # A loss that is not finite would stand for all photographs of the window; its step is told by itself.
        self.loss += torch.where(finite, loss.detach().double(), 0.0) * len(grade)
        self.correct += (predicted == grade).sum() * finite
        self.count += finite * len(grade)
        self.seen += len(grade)

    def stack(self) -> Tensor:
        """(4,): loss, correct, count, seen."""
        return torch.stack([self.loss, self.correct, self.count, self.count.new_tensor(self.seen)])


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Iterable[Batch],
    criterion: nn.Module,
    optimizer: Optimizer,
    tally: Tally,
    clip_norm: float | None = None,
    mix: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    parts: Parts | None = None,
) -> Tensor:
    """Forward and backward of every micro batch of a global batch, then one update of the weights.

    A step whose loss or gradient is not finite changes nothing: neither weights nor moments nor BatchNorm's statistics.
    On a GPU that is decided on the device, and the host does not wait for it. A loss that is not finite makes the
    gradient so, which is the same on all ranks, so all decide alike. In float16 the scaler keeps such gradients away,
    which are normal until it has found its scale: such a step changes nothing either, but is bad only where a loss was
    not finite.

    Args:
        accelerator: knows precision, ranks and how many micro batches make a step.
        model: prepared by the accelerator; images (b, 3, h, w) to logits (b, C), or to one value (b, 1).
        micro_batches: this rank's part of one global batch, `accelerator.gradient_accumulation_steps` of them.
        criterion: logits and grades, or shares of them, to the mean loss.
        optimizer: prepared by the accelerator; it steps at the last micro batch only.
        tally: counts loss and correct photographs in.
        clip_norm: global L2 norm that the gradient is clipped to.
        mix: number of the micro batch, its images and grades to mixed images and shares (b, C) of the grades.
        parts: the model's, where they are at hand.

    Returns:
        On the device, (2 + micro batches,): whether the step was bad, and whether the scaler left it out though it was
        not, both the same on all ranks; and of each micro batch of this rank, whether its loss was not finite.
    """
    parts = parts or Parts.of(model)
    statistics = parts.statistics
    before = torch.cat([buffer.flatten() for buffer in statistics]) if statistics else None
    bad = overflowed = torch.zeros((), dtype=torch.bool, device=parts.parameters[0].device)
    spoilt: list[Tensor] = []
    for microstep, batch in enumerate(micro_batches):
        image, grade = batch.image, batch.grade
        if mix is not None:
            image, grade = mix(microstep, image, grade)
        with accelerator.accumulate(model):
            logits = model(image)
            loss = criterion(logits, grade)
            finite = loss.detach().isfinite()
            # A loss may be infinite where its gradient is not; that way the other ranks hear of it as well.
            accelerator.backward(loss * torch.where(finite, 1.0, math.nan))
            spoilt.append(~finite)
            if accelerator.sync_gradients:
                bad = ~_norm(accelerator, parts.parameters, clip_norm).isfinite()
                if accelerator.scaler is not None:
                    unfit, bad = bad, _anywhere(accelerator, torch.stack(spoilt).any())
                    overflowed = unfit & ~bad
                _update(accelerator, optimizer, bad)
        tally.add(loss, logits, grade, finite)
    if before is not None:
        # In one piece: a launch for each of the many small tensors would take longer than the work.
        kept = torch.where(bad | overflowed, before, torch.cat([buffer.flatten() for buffer in statistics]))
        flat = kept.split([buffer.numel() for buffer in statistics])
        torch._foreach_copy_(statistics, [part.view_as(buffer) for part, buffer in zip(flat, statistics, strict=True)])
    return torch.stack([bad, overflowed, *spoilt])


def _norm(accelerator: Accelerator, parameters: list[Tensor], clip_norm: float | None) -> Tensor:
    """The global L2 norm of the gradient, before it is clipped; in float16 it may still be scaled."""
    if clip_norm is not None:
        norm = accelerator.clip_grad_norm_(parameters, clip_norm)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.detach()


def _anywhere(accelerator: Accelerator, bad: Tensor) -> Tensor:
    """Whether it is so on any rank."""
    if accelerator.num_processes == 1:
        return bad
    flag = bad.int()
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return flag.bool()


def _update(accelerator: Accelerator, optimizer: Optimizer, bad: Tensor) -> None:
    """One call of the optimizer, which changes nothing if the step is bad, and no gradient is left.

    The accelerator's wrapper is for the scaler alone: before each step it looks on the disk whether a package is there.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    scaler = accelerator.scaler
    if scaler is not None:
        one = torch.ones((), device=bad.device)
        before = scaler.scale(one), scaler._growth_tracker.clone()  # which has no public way that would not wait
        optimizer.step()  # the scaler leaves out what is not finite, and halves its scale
        # A loss that is not finite says nothing of the scale; one bad photograph an epoch would bring it to zero.
        scaler.update(torch.where(bad, before[0], scaler.scale(one)))
        scaler._growth_tracker.copy_(torch.where(bad, before[1], scaler._growth_tracker))
    elif all(group.get("fused") for group in inner.param_groups):
        # What the scaler does: the fused kernels read the flag on the device.
        inner.found_inf = bad.float()
        inner.step()
        del inner.found_inf
    elif not bad:
        inner.step()
    inner.zero_grad(set_to_none=True)
