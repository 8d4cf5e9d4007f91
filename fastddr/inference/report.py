"""`fastddr report RUN`: the report of a run, or of an evaluation, made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastddr import reporting
from fastddr.cli import answered
from fastddr.errors import UserError
from fastddr.reporting import again


@dataclass(frozen=True)
class Report:
    """Make the report of a run again, from its predictions and its metrics.jsonl; nothing is scored.

    For a newer fastddr's tables and pictures. The predictions stay as they are.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or an evaluation's (RUN/evaluations/NAME)."""
    data: Path | None = None
    """Where the photographs lie now, for the picture of the worst mistakes; by default where they lay then."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb; its exit code."""
    asked = tyro.cli(Report, args=list(arguments), prog="fastddr report")

    def work() -> int:
        if asked.data is not None and not asked.data.is_dir():
            raise UserError(f"--data {asked.data}: there is no such folder.")
        folder = again.write(asked.run, asked.data).parent
        reporting.summary(asked.run, tensorboard=(asked.run / "tensorboard").is_dir(), folder=folder)
        return 0

    return answered(work)
