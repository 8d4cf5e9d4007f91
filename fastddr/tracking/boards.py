"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastddr.data.problems import in_markdown
from fastddr.tracking.copies import Answers, thumbnail


class TensorBoard:
    """Event files in a folder. Those of earlier starts are hidden, for who goes on with a run logs all of it again: a
    process that was killed, or a writer that failed, may have lost any part.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=0, flush_secs=10)
        settings = json.dumps(dict(config), indent=2, default=str)
        self._writer.add_text("config", "".join(f"    {row}\n" for row in settings.splitlines()), 0)

    def log(self, values: Mapping[str, float], step: int, when: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)

    def log_image(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def log_answers(self, answers: Answers, step: int, photographs: bool) -> None:
        """Precision-recall curves of each grade, and the worst mistakes as text; their pictures only on request."""
        for grade in answers.present:
            name, score = answers.names[grade], answers.probabilities[:, grade]
            self._writer.add_pr_curve(f"{answers.split}/pr {grade} {name}", answers.grades == grade, score, step)
        rows = "".join(
            f"| {in_markdown(mistake.path)} | {answers.names[mistake.truth]} | "
            f"{answers.names[mistake.predicted]} | {mistake.confidence:.0%} |\n"
            for mistake in answers.worst
        )
        head = "| photograph | truth | predicted | confidence |\n| :-- | :-- | :-- | --: |\n"
        self._writer.add_text(f"{answers.split}/worst", head + rows, step)
        if photographs:
            for number, mistake in enumerate(answers.worst, 1):
                pixels = np.asarray(thumbnail(mistake.file))
                self._writer.add_image(f"{answers.split}/worst {number:02d}", pixels, step, dataformats="HWC")

    def log_file(self, name: str, kind: str, path: Path, aliases: Sequence[str], upload: bool) -> None:
        """Nothing: TensorBoard keeps no files."""

    def finish(self, failed: bool) -> None:
        self._writer.close()
