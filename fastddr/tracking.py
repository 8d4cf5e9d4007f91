"""Where the figures of a run go: `metrics.jsonl` always, Weights & Biases and TensorBoard beside it.

`metrics.jsonl` is the truth and the trackers are copies: an error of a tracker is said once, ends that
tracker and never the run, while a line that cannot be written to `metrics.jsonl` raises OSError.

The trackers are driven directly, not through `Accelerator.init_trackers`, for three reasons. Its W&B tracker
hands our step to W&B as the run's own, and W&B drops what steps back, as an offline run does after a resume;
it starts all trackers in one call, so one that fails takes the others and the run along; and its TensorBoard
tracker writes the config as hyper-parameters, which must be flat. From Accelerate comes which rank is the
main process: only that one writes, all others hold a tracker that does nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

METRICS = "metrics.jsonl"
#: Seconds for W&B to come online before the run goes on offline, and to upload its rest at the end.
INIT_TIMEOUT, FINISH_TIMEOUT = 20, 120

Number = float | int | None
Say = Callable[[str], None]


@runtime_checkable
class Ranks(Protocol):
    """What is asked of an `accelerate.Accelerator`."""

    @property
    def is_main_process(self) -> bool: ...


@runtime_checkable
class _Copy(Protocol):
    """One tracker; `errors` are what it raises when it, not its caller, is at fault."""

    name: str
    errors: tuple[type[Exception], ...]

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def log_image(self, name: str, path: Path, step: int) -> None: ...
    def finish(self, failed: bool) -> None: ...


class Tracker:
    """Logs figures by optimizer step. Made by `start`; end it with `finish` on every way out."""

    def __init__(self, lines: TextIO | None, copies: list[_Copy], say: Say) -> None:
        self._lines, self._copies, self._say = lines, copies, say
        #: What to type to upload an offline W&B run; None when there is nothing to upload.
        self.sync_command: str | None = None
        #: The page of an online W&B run.
        self.url: str | None = None
        #: The id of the W&B run, online or not.
        self.wandb_id: str | None = None

    @classmethod
    def start(
        cls,
        accelerator: Ranks,
        run_dir: Path,
        config: Mapping[str, Any],
        *,
        project: str,
        wandb: bool,
        tensorboard: bool,
        resume_step: int | None,
        say: Say,
    ) -> Tracker:
        """Open the run's records; call it on all ranks.

        `resume_step` is the step of the checkpoint that training goes on from: later lines of `metrics.jsonl`
        are cut off, to be written again. None begins anew and leaves no line. `config` may be nested. `say`
        gets at most one line a tracker. Raises OSError when the run folder cannot be written.
        """
        if not accelerator.is_main_process:
            return cls(None, [], say)
        run_dir = Path(run_dir).absolute()
        path = run_dir / METRICS
        truncate_to(path, -1 if resume_step is None else resume_step)
        tracker = cls(path.open("a", encoding="utf-8", buffering=1), [], say)
        if wandb:
            tracker._start_wandb(run_dir, config, project)
        if tensorboard:
            with tracker._guard("TensorBoard", (ImportError, OSError)):
                tracker._copies.append(_TensorBoard(run_dir / "tensorboard", resume_step))
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
        known = {name: value for name, value in numbers.items() if value is not None}
        self._each(lambda copy: copy.log({**known, "epoch": epoch}, int(step)))

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Show a picture file under a name in the trackers; the run folder has it already."""
        self._each(lambda copy: copy.log_image(name, Path(path), int(step)))

    def finish(self, *, failed: bool = False) -> None:
        """Close everything; a second call does nothing. `failed` marks the W&B run as failed."""
        self._each(lambda copy: copy.finish(failed))
        self._copies = []
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _start_wandb(self, run_dir: Path, config: Mapping[str, Any], project: str) -> None:
        try:
            copy = _Wandb(run_dir, config, project)
        except ImportError as error:
            self._say(f"W&B is off: {_line(error)}")
            return
        with self._guard("W&B", copy.errors):
            said = copy.start()
            if said is None:
                return
            self._copies.append(copy)
            self.sync_command, self.url, self.wandb_id = copy.sync_command, copy.url, copy.id
            self._say(said)

    def _each(self, do: Callable[[_Copy], None]) -> None:
        """Do something with each tracker, and drop the one that fails at it."""
        for copy in list(self._copies):
            with self._guard(copy.name, copy.errors, copy):
                do(copy)

    @contextlib.contextmanager
    def _guard(self, name: str, errors: tuple[type[Exception], ...], copy: _Copy | None = None) -> Iterator[None]:
        try:
            yield
        except errors as error:
            if copy is not None:
                self._copies.remove(copy)
            self._say(f"{name} is off from here on, {METRICS} goes on: {_line(error)}")


def truncate_to(path: Path, step: int) -> int:
    """Cut `metrics.jsonl` back to its lines with `step` <= the given one, and return how many lines went.

    A last line that a killed process left unfinished goes too. Written beside and renamed, so a kill leaves
    the old file or the new one. Raises ValueError for a broken line elsewhere: it was not us who wrote that.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            at = record["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a line of figures; mend or remove it") from error
        # The figures of the end are of no step, and come again when the run gets there again.
        final = any(name.startswith("final/") for name in record)
        if at <= step and not final and line.endswith("\n"):
            kept.append(line)
    if len(kept) < len(lines):
        beside = path.with_name(f".{path.name}.tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    return len(lines) - len(kept)


class _Wandb:
    """A W&B run whose files lie in RUN/wandb, online where possible.

    The mode is that of WANDB_MODE; else offline unless there is a login (WANDB_API_KEY, netrc, settings).
    What cannot come online goes on offline. Its id is kept in RUN/wandb/id.txt, so a resumed run is the same
    run. Raises ImportError without wandb.
    """

    name = "W&B"
    errors: tuple[type[Exception], ...]

    def __init__(self, run_dir: Path, config: Mapping[str, Any], project: str) -> None:
        import wandb

        self._wandb = wandb
        # All of them: wandb's derive from no class of its own (that of a lost service straight from Exception), and
        # a copy of the figures must never stop a run. Each is said, and ends this tracker.
        self.errors = (Exception,)
        self._run_dir, self._config, self._project = run_dir, config, project
        self._run: Any = None
        self._own_data_dir = False

    def start(self) -> str | None:
        """Begin the run; the line to say, or None where WANDB_MODE switches W&B off."""
        mode, why = os.environ.get("WANDB_MODE", "").lower(), "WANDB_MODE"
        if mode == "disabled":
            return None
        folder = self._run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        if "WANDB_DATA_DIR" not in os.environ:  # where artifacts are staged; by default outside the run folder
            os.environ["WANDB_DATA_DIR"] = str(folder)
            self._own_data_dir = True
        self._wandb.setup(settings=self._wandb.Settings(silent=True))
        if not mode:
            mode, why = ("online", "") if self._logged_in() else ("offline", "not logged in")
        try:
            self._run = self._init(mode)
        except self.errors as error:
            if mode in ("offline", "dryrun"):
                raise
            # The service still holds the run's id, and would refuse it to the offline run.
            self._wandb.teardown()
            why = f"could not come online: {_line(error)}"
            self._run = self._init("offline")
        # Offline, W&B's own step is 0 after a resume, and what goes backwards is dropped: ours is a value.
        self._run.define_metric("*", step_metric="step")
        if self.sync_command is None:
            return f"W&B: {self.url}" if self.url else f"W&B: {mode}"
        return f"W&B: offline ({why}); upload later with: {self.sync_command}"

    @property
    def id(self) -> str:
        found: str = self._run.id
        return found

    @property
    def url(self) -> str | None:
        return self._run.url

    @property
    def sync_command(self) -> str | None:
        """All offline parts of this run: every resume leaves one."""
        if not self._run.offline:
            return None
        return f"wandb sync {shlex.quote(_short(self._run_dir / 'wandb'))}/offline-run-*"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "step": step})

    def finish(self, failed: bool) -> None:
        if self._own_data_dir:
            os.environ.pop("WANDB_DATA_DIR", None)
        self._run.finish(exit_code=int(failed))

    def _logged_in(self) -> bool:
        try:
            return bool(self._wandb.login(prompt=False, verify=False))
        except self.errors:  # a key that is no key
            return False

    def _init(self, mode: Any) -> Any:
        return self._wandb.init(
            project=self._project,
            name=self._run_dir.name,
            dir=str(self._run_dir),
            id=_run_id(self._run_dir / "wandb" / "id.txt"),
            resume="allow",
            reinit="create_new",  # never a run that someone else began in this process
            mode=mode,
            config=dict(self._config),
            allow_val_change=True,
            settings=self._wandb.Settings(
                silent=True,
                console="off",  # our progress bars are nothing to record
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
            ),
        )


class _TensorBoard:
    """Event files in a folder; on a resume the events after the checkpoint's step are hidden."""

    name = "TensorBoard"
    errors: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, TypeError)

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def finish(self, failed: bool) -> None:
        self._writer.close()


def _run_id(path: Path) -> str:
    """The id kept in a file, or a new one, kept there. From the system's randomness: no seed moves."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _number(value: Any) -> Number:
    """A Python number of a scalar; whole numbers stay whole."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return value.item() if hasattr(value, "item") else float(value)


def _finite(value: Number) -> Number:
    return value if value is None or math.isfinite(value) else None


def _line(error: Exception) -> str:
    """The first line of an error's text, or its name where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _short(path: Path) -> str:
    """The path as the user would type it: relative to where they are, if it lies below."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
