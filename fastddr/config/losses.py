"""What the settings of the loss may be."""

from __future__ import annotations

from fastddr.config.sections import LossConfig
from fastddr.errors import UserError


def check_loss(loss: LossConfig, sixth: bool, windows: bool, where: str) -> None:
    """Raise `UserError` unless the settings go together; `sixth`: whether ungradable is a class,
    `windows`: whether photographs are scored in several windows."""

    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise UserError(f"{where}: {sentence}")

    need(0 <= loss.label_smoothing < 1, "loss.label_smoothing must be from 0 to below 1.")
    need(0 <= loss.beta < 1, f"loss.beta is {loss.beta}, but must be from 0 to below 1.")
    if loss.name == "mse":
        need(
            not sixth,
            "loss.name mse places photographs on the scale of grades, on which ungradable is no step; set ungradable "
            "to exclude, or loss.name to cross_entropy.",
        )
        need(
            not windows,
            "loss.name mse fits its thresholds to one window of each photograph; set evaluation.field to center or "
            "full, and average windows afterwards with `fastddr evaluate --window multi`.",
        )
        need(
            loss.label_smoothing == 0 and loss.class_weights == "none",
            "loss.label_smoothing and loss.class_weights are of cross-entropy; leave them out, or set loss.name to "
            "cross_entropy.",
        )
