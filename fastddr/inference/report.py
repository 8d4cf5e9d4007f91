"""`fastddr report RUN`: the report of a run, or of an evaluation, made again."""

from __future__ import annotations

from fastddr import reporting
from fastddr.errors import UserError
from fastddr.inference.flags import Report
from fastddr.reporting import again


def main(asked: Report) -> int:
    """Run the verb; its exit code."""
    if asked.data is not None and not asked.data.is_dir():
        raise UserError(f"--data {asked.data}: there is no such folder.")
    folder = again.write(asked.run, asked.data, asked.vector).parent
    run = again.run_of(folder)
    reporting.summary(run, tensorboard=(run / "tensorboard").is_dir(), folder=folder)
    return 0
