"""A run is a folder: its name, its files, its state, and whether it goes on or begins."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from fastddr import files
from fastddr.config import Config, check_text, dump, from_mapping, identity_changes
from fastddr.config.strict import read_yaml
from fastddr.errors import UserError

#: Keys that a run may leave to `auto` or None; what they became is stored, and used again.
AUTO = ("loader", "precision", "micro_batch_size", "threads")

#: Seconds for which a start waits for another process to let go of the run.
_PATIENCE = 10.0
#: Seconds for which a rank waits until it sees what rank 0 has written: longer than NFS keeps what it knew of a folder.
_SEEN_AFTER = 90.0

State = Literal["running", "preempted", "failed", "done"]


@dataclass
class Progress:
    """Where training stands; what a checkpoint's state.json keeps."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Optimizer steps done."""
    best_qwk: float | None = None
    best_loss: float | None = None
    """On valid, of that epoch; it decides between epochs of equal kappa."""
    best_step: int = 0
    best_epoch: int = 0
    skipped: int = 0
    """Steps that were left out because their loss or gradient was not finite."""
    overflowed: int = 0
    """Steps that the scaler of float16 left out."""
    grading: dict[str, Any] | None = None
    """Of a regression: thresholds and spread, as the last validation fitted them (`evaluation.grading`)."""

    @property
    def at(self) -> str:
        """As the names of weights have it, `inference.restore`'s too: `step 130, epoch 10`."""
        return f"step {self.step}, epoch {self.epoch}"

    def keep_if_best(self, qwk: float, loss: float) -> bool:
        """Keep the epoch just scored on valid as the best one, if it is that; whether it is.

        The highest kappa is best, and among equal ones the lowest loss: as long as a model names one grade for all,
        kappa is 0 whatever it has learned, and the first epoch would stay the best one.
        """
        if self.best_qwk is not None and self.best_loss is not None:
            gain = qwk - self.best_qwk
            # Kappa is a ratio of sums: two ways to the same figure may differ in the last bits.
            tie = abs(gain) < 1e-9
            if not (loss < self.best_loss if tie else gain > 0):
                return False
        self.best_qwk, self.best_loss = qwk, loss
        self.best_step, self.best_epoch = self.step, self.epoch
        return True


class RunFolder:
    """Where each file of a run stands."""

    def __init__(self, path: Path, lock: TextIO | None = None) -> None:
        """`lock`: what `hold` gave to the process that trains it."""
        self.path, self.lock = path, lock
        #: The resolved configuration, which reloads to the same run.
        self.config = path / "config.yaml"
        #: What it was trained on, with the fingerprint.
        self.manifest = path / "manifest.csv"
        #: Every figure that was logged, one JSON object a line.
        self.metrics = path / "metrics.jsonl"
        #: What was taken of the weights that it began at, and what was not; there only with `--init`.
        self.init = path / "init.txt"
        #: Folder of the checkpoints.
        self.checkpoints = path / "checkpoints"
        #: Whoever makes this file asks the run to save and to end.
        self.stop = path / "STOP"
        #: Every time that the test split was scored.
        self.test_scorings = path / "test_scorings.jsonl"
        #: Steps whose loss or gradient was not finite, with their photographs; there only where there was one.
        self.bad_steps = path / "bad_steps.jsonl"

    @property
    def replaced(self) -> bool:
        """Whether the folder of who trains is moved or deleted by now, and another is in its place."""
        if self.lock is None:
            return False
        lock = self.path / ".lock"
        try:
            return not os.path.samestat(os.fstat(self.lock.fileno()), os.stat(lock))
        except FileNotFoundError:
            # Also a hand may have taken it for left over.
            return os.path.isdir(self.path) and not os.path.isfile(self.config)
        except OSError:  # nobody can tell now; whoever writes there meets the same
            return False

    def check_place(self) -> None:
        """Raise `FileNotFoundError` where another folder is in the place of this one: its files are not ours."""
        if self.replaced:
            raise FileNotFoundError(errno.ENOENT, "another folder is in its place", str(self.path))

    def began_at(self) -> str | None:
        """The first line of init.txt, which counts the tensors; None of a run that began at random weights."""
        return self.init.read_text(encoding="utf-8").partition("\n")[0] if self.init.is_file() else None

    def write(self, file: Path, text: str) -> None:
        """Write a file whole or not at all. Raises OSError where it cannot be, or `check_place` does."""
        self.check_place()
        files.put(file, text.encode(), sync=True)

    def begin(self, config: str, manifest: str, taken: Sequence[str]) -> None:
        """Write what a new run is: its configuration, its photographs, and what it took of the weights it begins at."""
        with files.naming(self.path):
            self.write(self.config, config)
            self.write(self.manifest, manifest)
            if taken:
                self.write(self.init, "\n".join(taken) + "\n")

    def renew(self, config: Config) -> None:
        """Write down the runtime keys of this start, as where the photographs lie now.

        What `auto` became stays as the run began: fewer ranks than now may go on later.
        """
        stored = from_mapping(read_yaml(self.config), str(self.config))
        kept: dict[str, Any] = {key: getattr(stored, key) for key in AUTO}
        if (now := replace(config, **kept)) != stored:
            self.write(self.config, dump(now))

    def set_status(self, state: State, step: int | None, reason: str = "") -> None:
        """What a scheduler reads. Where the step is not known, as in a start that failed, it is the last that was."""
        step = self.status().get("step", 0) if step is None else step
        self.write(self.path / "status.json", json.dumps({"state": state, "step": step, "reason": reason}) + "\n")

    def status(self) -> dict[str, Any]:
        """The status as it was last written; empty for a run that never got so far. Raises OSError as reading does."""
        try:
            return files.parse((self.path / "status.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}

    def append_test_scoring(
        self, by: str, weights: str, split: str, values: Mapping[str, Any], fingerprint: str
    ) -> None:
        """One more line of `test_scorings.jsonl`, of these figures of a split (`metrics.figures`)."""
        self.check_place()
        shown = {key: values[key] for key in ("n", "loss", "accuracy", "qwk")}
        record = {"by": by, "weights": weights, "split": split, **shown, "fingerprint": fingerprint}
        _append(self.test_scorings, record)

    def append_bad_step(self, record: dict[str, Any]) -> None:
        """One more line of `bad_steps.jsonl`."""
        self.check_place()
        _append(self.bad_steps, record)


def _append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a+b") as lines:
        whole = True
        if lines.seek(0, os.SEEK_END):
            lines.seek(-1, os.SEEK_END)
            whole = lines.read(1) == b"\n"
        # Behind half a line this one would be lost with it.
        text = json.dumps({"time": round(time.time(), 3), **record}) + "\n"
        lines.write((text if whole else "\n" + text).encode())


def expanded(place: str | Path) -> Path:
    """A path with `~` and `~user` as the folders that they stand for.

    Raises:
        UserError: there is no such user, or no home.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise UserError(f"{place}: there is no home folder for this `~` here; give the path without it.") from None


def data_name(place: Path) -> str:
    """What a data set is called: as its folder, or as the one above where that is DDR's own `DR_grading`."""
    return place.parent.name if place.name == "DR_grading" and place.parent.name else place.name


def new_name(preset: str, data: str, now: datetime) -> str:
    """PRESET-DATA-TIME, of characters that any file system takes."""

    def short(name: str) -> str:
        path = Path(name)
        stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
        return re.sub(r"[^\w.]+", "_", stem).strip("._") or "data"

    folder = data if data == "synthetic" else data_name(expanded(data).absolute())
    return f"{short(preset)}-{short(folder)}-{now:%Y%m%d-%H%M%S}"


def locate(config: Config, now: datetime) -> tuple[Path, bool]:
    """Folder of the run, and whether it is an earlier run that goes on.

    Raises:
        UserError: the folder holds something else than a run.
    """
    if config.run_dir is None:
        return Path("runs") / new_name(config.preset, config.data, now), False
    path = expanded(config.run_dir)
    if (path / "config.yaml").is_file():
        return path, True
    if path.exists() and not path.is_dir():
        raise UserError(f"--run-dir {path}: this is a file; give a folder.")
    # A start that was killed may have left a hidden file of ours, and who asks a run to stop may be early.
    if path.is_dir() and any(not entry.name.startswith(".") and entry.name != "STOP" for entry in path.iterdir()):
        raise UserError(f"--run-dir {path}: this folder holds something that is not a run; give a new or empty one.")
    return path, False


def placed(config: Config) -> dict[str, str]:
    """Where the photographs lie, and the list of those to leave out, by paths that hold whatever folder one is in.

    So `fastddr evaluate` finds them from any folder. A link stays a link: it may be moved to other photographs.
    """
    given = {"data": config.data, "exclude": config.exclude}
    found = {
        key: str(expanded(path).absolute())
        for key, path in given.items() if path is not None and path != "synthetic"
    }  # fmt: skip
    for key, path in found.items():
        check_text(path, f"--{key} {given[key]}: the whole path of it")
    return found


def hold(path: Path, say: Callable[[str], None], *, begins: bool = False) -> TextIO:
    """Take the folder of a run for this process: until the stream that is returned is closed, or the process ends.

    Where the file system knows no locks it is not kept from others, which `say` hears. Waits some seconds for a process
    that is about to end. `begins`: there is no run in it yet.

    Raises:
        UserError: another process has it, or was faster; two would write over each other's figures, and delete each
            other's checkpoints.
    """
    stream = (path / ".lock").open("a+", encoding="utf-8")
    try:
        without = _lock(stream, path)
        if begins and (path / "config.yaml").is_file():
            raise UserError(f"--run-dir {path}: another start has begun a run here; give the command again.")
    except UserError:
        stream.close()
        raise
    if without is None:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}\n")
        stream.flush()
    else:
        say(f"  {path} is in a file system without locks ({without}): nothing keeps a second start out")
    return stream


def _lock(stream: TextIO, path: Path) -> str | None:
    """Lock the stream; what the file system says where it knows no locks, else None. Raises `UserError` as `hold`."""
    ends = time.monotonic() + _PATIENCE
    while True:
        try:
            # Of the process: one that it forked does not hold it when it ends.
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return error.strerror
            if time.monotonic() > ends:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise UserError(
                    f"--run-dir {path}: {holder} is at this run; wait until it has ended, or give another folder."
                ) from None
            time.sleep(0.2)
        else:
            return None


def claim(path: Path, named: bool) -> Path:
    """Make the folder of a new run. One that the user did not name gets a number where another run was first.

    Raises:
        UserError: it has no place there; or its file system has no symbolic links, which `best` and `last` are.
    """
    if named:
        path.mkdir(parents=True, exist_ok=True)
    found = path if named else numbered(path)
    link = found / f".link.{os.getpid()}"
    try:
        link.symlink_to("step")
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise UserError(
            f"--run-dir {found}: there are no symbolic links in this file system (exFAT? SMB?), and checkpoints need "
            "them; give a folder in another."
        ) from None
    link.unlink()
    return found


def seen(path: Path) -> None:
    """Wait until this process sees the run that rank 0 has begun or found, as that of another machine may not yet.

    Raises:
        UserError: it does not, for `_SEEN_AFTER`.
    """
    ends = time.monotonic() + _SEEN_AFTER
    while not (path / "config.yaml").is_file():
        if time.monotonic() > ends:
            raise UserError(
                f"--run-dir {path}: {platform.node()} does not see the run that rank 0 has there; give a folder that "
                "all machines share."
            )
        time.sleep(0.2)


def numbered(path: Path) -> Path:
    """Make a new folder, with a number behind its name where others bear it.

    Raises:
        UserError: a thousand do.
    """
    for number in range(1, 1000):
        found = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            found.mkdir(parents=True)
        except FileExistsError:
            continue
        return found
    raise UserError(f"{path}: a thousand folders bear this name; move some of them.")


def continue_from(config: Config, run: RunFolder, world: int) -> Config:
    """The configuration of a run that goes on: the stored one, with the new one's runtime keys.

    What was left to `auto` stays as it was chosen then, where `world` ranks can do it. A micro batch that is asked for
    as it was stored is taken for what `auto` chose: the run's own config.yaml may have been given as the preset.

    Raises:
        UserError: an identity key differs, with all that do.
    """
    stored = from_mapping(read_yaml(run.config), str(run.config))
    open_ = ("auto", None)
    kept: dict[str, Any] = {
        key: getattr(stored, key) for key in AUTO if getattr(config, key) in open_ and getattr(stored, key) not in open_
    }
    held = kept.get("micro_batch_size", config.micro_batch_size)
    if held == stored.micro_batch_size != "auto" and stored.batch_size % (world * int(held)):
        # As many ranks as now cannot hold what one rank held then; it is chosen anew.
        stored = replace(stored, micro_batch_size="auto")
        kept["micro_batch_size"] = "auto"
    merged = replace(config, **kept)
    changes = identity_changes(stored, merged)
    if changes:
        listed = "; ".join(f"{key} was {before!r} and is now {now!r}" for key, (before, now) in changes.items())
        raise UserError(
            f"--run-dir {run.path}: this run cannot go on with other settings: {listed}; to go on as it "
            f"began, give --preset {shlex.quote(str(run.config))} --run-dir {shlex.quote(str(run.path))} without them."
        )
    return merged


def check_precision(path: Path, stored: str, launched: str) -> None:
    """Raise `UserError` where a run that goes on would train in another precision: accelerate launch's own wins."""
    if stored not in ("auto", launched):
        raise UserError(
            f"--run-dir {path}: this run is in {stored}, and accelerate launch asks for {launched}; launch it without "
            "--mixed_precision."
        )
