"""Where the figures of a run go: `metrics.jsonl` always, Weights & Biases and TensorBoard beside it.

`metrics.jsonl` is the truth and the trackers are copies: an error of a tracker is said once, ends that
tracker and never the run, while a line that cannot be written to `metrics.jsonl` raises OSError.

The trackers are driven directly, not through `Accelerator.init_trackers`, for three reasons. Its W&B tracker
hands our step to W&B as the run's own, and cannot tell after a kill which of our rows W&B has (`wandb_run`);
it starts all trackers in one call, so one that fails takes the others and the run along; and its TensorBoard
tracker writes the config as hyper-parameters, which must be flat. Only the main process writes, all others
hold a tracker that does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from fastddr import files
from fastddr.config import TrackingConfig
from fastddr.errors import UserError
from fastddr.tracking.copies import Answers, Copy, Mistake, first_line
from fastddr.tracking.wandb_run import Begun, WandbRun

__all__ = ["METRICS", "Answers", "Mistake", "Tracker", "read", "truncate_to"]

METRICS = "metrics.jsonl"
#: What stands in each line before its figures.
_HEAD = ("step", "epoch", "time")

Number = float | int | None
Say = Callable[[str], None]


class Tracker:
    """Logs figures by optimizer step. Made by `start`; end it with `finish` on every way out."""

    def __init__(self, lines: TextIO | None, copies: list[Copy], say: Say) -> None:
        self._lines, self._copies, self._say = lines, copies, say
        self._options = TrackingConfig()
        self.wandb = Begun()

    @classmethod
    def silent(cls) -> Tracker:
        """One that does nothing, for all ranks but the main one."""
        return cls(None, [], lambda line: None)

    @classmethod
    def start(
        cls,
        run_dir: Path,
        config: Mapping[str, Any],
        *,
        options: TrackingConfig,
        resume_step: int | None,
        validated: bool = True,
        say: Say,
    ) -> Tracker:
        """Open the run's records. For the main rank alone: the others are `silent`.

        `resume_step` is the step of the checkpoint that training goes on from: later lines of `metrics.jsonl`
        are cut off, to be written again. None begins anew and leaves no line. Where that step ends an epoch that
        was not `validated` yet, its validation comes again and goes too. `config` may be nested. `say` gets at most one
        line a tracker. Raises OSError when the run folder cannot be written, and UserError where a line is not ours.
        """
        run_dir = Path(run_dir).absolute()
        path = run_dir / METRICS
        truncate_to(path, -1 if resume_step is None else resume_step, validated)
        tracker = cls(path.open("a", encoding="utf-8", buffering=1), [], say)
        tracker._options = options
        try:
            if options.wandb:
                tracker._start_wandb(run_dir, config)
            if options.tensorboard:
                with tracker._guard("TensorBoard"):
                    from fastddr.tracking.boards import TensorBoard

                    tracker._copies.append(TensorBoard(run_dir / "tensorboard", config))
            # Each takes what it lacks: a killed process may have lost some of it, or there was no such tracker yet.
            for line in read(path):
                known = {name: value for name, value in line.items() if name not in _HEAD and value is not None}
                tracker._copy(known, line)
        except BaseException:  # nobody has it yet to close what has begun
            tracker.finish(failed=True)
            raise
        return tracker

    def log(self, values: Mapping[str, Any], *, step: int, epoch: float) -> None:
        """Record numbers (Python's, NumPy's or one-element tensors; None is kept) at an optimizer step.

        In `metrics.jsonl` a value that is not finite is null. Raises OSError if it cannot be written there.
        """
        if self._lines is None:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        head = {"step": int(step), "epoch": epoch, "time": round(time.time(), 3)}
        record = {**head, **{name: _finite(value) for name, value in numbers.items()}}
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._copy({name: value for name, value in numbers.items() if value is not None}, head)

    def _copy(self, known: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        # A line that somebody else wrote may have its step alone.
        values = {**known, "epoch": head["epoch"]} if "epoch" in head else known
        self._each(lambda copy: copy.log(values, int(head["step"]), head.get("time", time.time())))

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Show a picture file under a name in the trackers; the run folder has it already."""
        self._each(lambda copy: copy.log_image(name, Path(path), int(step)))

    def log_answers(self, answers: Answers, step: int) -> None:
        """What a model said of a split at the end: curves, and the worst mistakes.

        Photographs themselves only with `log_images`: trackers may be public.
        """
        self._each(lambda copy: copy.log_answers(answers, int(step), self._options.log_images))

    def log_manifest(self, path: Path) -> None:
        """The list of the photographs, as where it lies and its checksum."""
        self._each(lambda copy: copy.log_file("manifest", "dataset", path, [], upload=False))

    def log_checkpoints(self, folder: Path) -> None:
        """The checkpoints `best` and `last` in a folder, as the options say."""
        if self._options.checkpoints != "none":
            upload = self._options.checkpoints == "upload"
            for alias in ("best", "last"):
                path = folder / alias
                if path.is_dir():
                    self._each(partial(_log_checkpoint, path=path, alias=alias, upload=upload))

    def finish(self, *, failed: bool = False) -> None:
        """Close everything; a second call does nothing. `failed` marks the W&B run as failed."""
        copies, self._copies = self._copies, []
        for copy in copies:
            with self._guard(copy.name):
                copy.finish(failed)
        lines, self._lines = self._lines, None
        if lines is not None:
            # A line that could not be written is still in the stream, and fails again; that was told when it first did.
            with contextlib.suppress(*((OSError,) if failed else ())):
                lines.close()

    def sync(self) -> None:
        """Bring what was logged to the disk itself: a checkpoint must not be later than the figures before it.

        May be called in another thread than all else. Raises OSError where it cannot be done, and where `metrics.jsonl`
        was removed or replaced: lines still go to the old file, which nobody finds any more.
        """
        if self._lines is not None:
            if not os.path.samestat(os.fstat(self._lines.fileno()), os.stat(self._lines.name)):
                raise FileNotFoundError(errno.ENOENT, "another file is in its place", self._lines.name)
            os.fsync(self._lines.fileno())

    def _start_wandb(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        with self._guard("W&B"):
            copy = WandbRun(run_dir, config, self._options)
            begun = copy.start()
            if begun is not None:
                self.wandb = begun
                self._copies.append(copy)
                self._say(begun.said)

    def _each(self, do: Callable[[Copy], None]) -> None:
        """Do something with each tracker, and end the one that fails at it."""
        for copy in list(self._copies):
            with self._guard(copy.name, copy):
                do(copy)

    @contextlib.contextmanager
    def _guard(self, name: str, copy: Copy | None = None) -> Iterator[None]:
        try:
            yield
        # Whatever it is, for a copy of the figures must never stop a run: packages that do not fit each other raise
        # anything, and W&B's errors derive from no class of its own.
        except Exception as error:  # noqa: BLE001
            self._say(f"{name} is off from here on, {METRICS} goes on: {first_line(error)}")
            if copy is not None and copy in self._copies:
                self._copies.remove(copy)
                with contextlib.suppress(Exception):  # what it lacks is told already
                    copy.finish(failed=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; none where there is no such file.

    Raises:
        UserError: a line is broken, other than a last one that a killed process left unfinished.
    """
    return [record for _, record in _lines(path, _text(path))]


def truncate_to(path: Path, step: int, validated: bool = True) -> None:
    """Cut `metrics.jsonl` back to its lines with `step` <= the given one.

    Unless the step was `validated`, its validation goes too. So does a last line that a killed process left unfinished.
    Written beside and renamed, so a kill leaves the old file or the new one. Raises UserError as `read`.
    """
    text = _text(path)
    kept = ""
    for line, record in _lines(path, text):
        at = int(record["step"])
        # The figures of the end are of no step, and come again when the run gets there again.
        again = ("final/",) if validated or at < step else ("final/", "valid/")
        if at <= step and not any(name.startswith(again) for name in record) and line.endswith("\n"):
            kept += line
    if kept != text:
        files.put(path, kept.encode(), sync=True)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line, with its end, and what it holds, which has a step at least. Raises UserError as `read`."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.strip():  # somebody mended the file
            continue
        try:
            record = files.parse(line)
            int(record["step"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number}: not a line of figures; mend or remove it.") from error
        yield line, record


def _log_checkpoint(copy: Copy, path: Path, alias: str, upload: bool) -> None:
    copy.log_file("checkpoint", "model", path, [alias, path.resolve().name], upload)


def _number(value: Any) -> Number:
    """A Python number of a scalar; whole numbers stay whole."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return value.item() if hasattr(value, "item") else float(value)


def _finite(value: Number) -> Number:
    return value if value is None or math.isfinite(value) else None
