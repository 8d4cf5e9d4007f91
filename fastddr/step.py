"""One training step as a function: what the trainer runs, the benchmark times and the planner traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

    def add(self, loss: Tensor, logits: Tensor, grade: Tensor) -> None:
        """Count one micro batch in: its mean loss, its logits (b, C) and its grades (b), or their shares (b, C).

        Of a mixed photograph the grade with the larger share is the right one.
        """
        if grade.ndim == 2:
            grade = grade.argmax(1)
        self.loss += loss.detach().double() * len(grade)
        self.correct += (logits.detach().argmax(1) == grade).sum()
        self.count += len(grade)

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
    mix: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Forward and backward of every micro batch of a global batch, then one update of the weights.

    Args:
        accelerator: knows precision, ranks and how many micro batches make a step.
        model: prepared by the accelerator; images (b, 3, h, w) to logits (b, C).
        micro_batches: this rank's part of one global batch, `accelerator.gradient_accumulation_steps` of them.
        criterion: logits and grades, or shares of them, to the mean loss.
        optimizer: prepared by the accelerator; it steps at the last micro batch only.
        tally: counts loss and correct photographs in.
        clip_norm: global L2 norm that the gradient is clipped to.
        mix: number of the micro batch, its images and grades to mixed images and shares (b, C) of the grades.
    """
    for microstep, batch in enumerate(micro_batches):
        image, grade = batch.image, batch.grade
        if mix is not None:
            image, grade = mix(microstep, image, grade)
        with accelerator.accumulate(model):
            logits = model(image)
            loss = criterion(logits, grade)
            accelerator.backward(loss)
            if clip_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tally.add(loss, logits, grade)
