"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastddr.data.problems import in_markdown
from fastddr.tracking.copies import Answers, thumbnail, write_line


class TensorBoard:
    """Event files in a folder; on a resume the events from the checkpoint's step on are hidden, to be written again.

    From an earlier step on where TensorBoard failed before that checkpoint: `next.txt` beside the files tells how far
    they came to the disk.
    """

    name = "TensorBoard"
    #: All of them: a copy of the figures must never stop a run.
    errors: tuple[type[Exception], ...] = (Exception,)

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._kept = folder / "next.txt"
        #: The first step that the event files may lack; a run that was killed before its first checkpoint begins anew.
        self._next = min(self._known(), resume_step or 0) if any(folder.glob("events.*")) else 0
        #: The step of the last line that was written, or is there from earlier.
        self._last = self._next
        self._writer = SummaryWriter(str(folder), purge_step=self._next, flush_secs=10)
        write_line(self._kept, str(self._next))  # an earlier process may have come further
        settings = json.dumps(dict(config), indent=2, default=str)
        self._writer.add_text("config", "".join(f"    {row}\n" for row in settings.splitlines()), resume_step or 0)

    def log(self, values: Mapping[str, float], step: int, when: float) -> None:
        if step >= self._next:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step, walltime=when)
            self._last = step

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

    def sync(self) -> None:
        """A killed process must not lose what lies before a checkpoint: nobody writes it again."""
        last = self._last  # what another thread logs from here on may come to the disk later
        self._writer.flush()
        write_line(self._kept, str(last))

    def _known(self) -> int:
        """Up to which step all events came to the disk; 0 where nobody kept it."""
        kept = self._kept.read_text(encoding="utf-8", errors="replace").strip() if self._kept.is_file() else ""
        return int(kept) if kept.isdecimal() else 0

    def finish(self, failed: bool) -> None:
        self._writer.close()
