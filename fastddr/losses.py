"""Losses: what the training step makes small. Always in float32, whatever the model's precision."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fastddr.errors import UserError, nearest

NAMES = ("cross_entropy",)


class CrossEntropy(nn.CrossEntropyLoss):
    """Mean cross-entropy in nats over the valid photographs of a batch, with label smoothing.

    `label_smoothing` is the share of the target that is spread evenly over all grades: Szegedy et al.,
    "Rethinking the Inception Architecture" (2016), section 7.
    """

    def forward(
        self,
        logits: Float[Tensor, "b classes"],
        grades: Int[Tensor, " b"] | Float[Tensor, "b classes"],
        valid: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, ""]:
        """One float32 number. Without `valid` all count; a batch of padding alone has the loss 0, not NaN.

        `grades` are numbers of classes, or where photographs were mixed the share of each class, of any float dtype.
        """
        soft = grades.is_floating_point()
        grades = grades.float() if soft else grades.long()
        if valid is None:
            return super().forward(logits.float(), grades)
        if soft:
            each = F.cross_entropy(logits.float(), grades, reduction="none", label_smoothing=self.label_smoothing)
            return each.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)
        # A masked sum keeps every shape fixed and asks the device nothing.
        targets = grades.masked_fill(~valid, self.ignore_index)
        total = F.cross_entropy(
            logits.float(),
            targets,
            reduction="sum",
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return total / valid.sum().clamp(min=1)


def build(name: str = "cross_entropy", *, label_smoothing: float = 0.0) -> nn.Module:
    """A module that takes logits (b, classes), grades (b) or shares of them (b, classes), and optionally valid (b) to
    one float32 number.

    Raises UserError for an unknown loss and for a label smoothing that is not in [0, 1).
    """
    if name not in NAMES:
        raise UserError(f"there is no loss {name!r}: {nearest(name, NAMES)}")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"the loss cannot have label_smoothing={label_smoothing}: set it to 0 or more and less than 1.")
    return CrossEntropy(label_smoothing=label_smoothing)
