"""One training step as a function: what the trainer runs, the benchmark times and the planner traces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from fastddr.loaders.base import Batch


@dataclass
class Tally:
    """Sums over photographs since the last reset, kept on the device so that no step waits for the host."""

    loss: Tensor
    correct: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> Tally:
        """All sums zero."""
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """Count one micro batch in: its mean loss and its (b, C) logits."""
        self.loss += loss.detach().double() * len(batch.grade)
        self.correct += (logits.detach().argmax(1) == batch.grade).sum()
        self.count += len(batch.grade)

    def stack(self) -> Tensor:
        """(3,): loss, correct, count."""
        return torch.stack([self.loss, self.correct, self.count])


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Iterable[Batch],
    criterion: nn.Module,
    optimizer: Optimizer,
    tally: Tally,
    clip_norm: float | None = None,
) -> None:
    """Forward and backward of every micro batch of a global batch, then one update of the weights.

    Args:
        accelerator: knows precision, ranks and how many micro batches make a step.
        model: prepared by the accelerator; images (b, 3, h, w) to logits (b, C).
        micro_batches: this rank's part of one global batch, `accelerator.gradient_accumulation_steps` of them.
        criterion: logits and grades to the mean loss.
        optimizer: prepared by the accelerator; it steps at the last micro batch only.
        tally: counts loss and correct photographs in.
        clip_norm: global L2 norm that the gradient is clipped to.
    """
    for batch in micro_batches:
        with accelerator.accumulate(model):
            logits = model(batch.image)
            loss = criterion(logits, batch.grade)
            accelerator.backward(loss)
            if clip_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tally.add(loss, logits, batch)
