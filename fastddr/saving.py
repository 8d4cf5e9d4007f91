"""When a run saves a checkpoint, what is in it, and how the next start goes on from it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console

from fastddr import checkpoints, ranks, runs
from fastddr.checkpoints import Snapshot, Training
from fastddr.config import Config, from_mapping
from fastddr.config.strict import read_yaml
from fastddr.data import manifest, source
from fastddr.errors import CANNOT_USE, PASSING, UserError
from fastddr.meters import versions
from fastddr.runs import Progress, RunFolder


@contextmanager
def told(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """An error of writing is said and goes no further: another error is on its way up."""
    try:
        yield
    except OSError as error:
        say(f"{what} could not be written: {error}")


def finished(run: RunFolder, config: Config, console: Console) -> bool:
    """Whether an earlier run is done. To be called by all ranks.

    Its data may be gone by now, but data that lie elsewhere must be the same photographs, as for a run that goes on.

    Raises:
        UserError: on every rank, the data are others, or cannot be read.
    """

    def began_with() -> str | None:
        """The fingerprint of the data that it began with; None where they are named as they were."""
        stored = from_mapping(read_yaml(run.config), str(run.config))
        return None if runs.placed(config) == runs.placed(stored) else manifest.fingerprint_in(run.manifest)

    if ranks.from_main(lambda: run.status().get("state")) != "done":
        return False
    began = ranks.from_main(began_with)
    if began is not None:
        _same_data(run, began, source.open_data(config, console).fingerprint)
    return True


def _same_data(run: RunFolder, began: str, now: str) -> None:
    """Raise `UserError` where the data, by their fingerprint, are not those that a run began with."""
    if began != now:
        raise UserError(
            f"--run-dir {run.path}: the data are not those that this run began with (compare {run.manifest}); "
            "restore them, or begin a new run."
        )


def resume(run: RunFolder, training: Training, fingerprint: str, say: Callable[[str], None]) -> Progress | None:
    """Go on from the newest checkpoint of a run that is whole: where it stood, None where there is no checkpoint.

    To be called by all ranks; rank 0 chooses. `fingerprint` is of the data as they are now; `say` hears of each
    checkpoint that is passed over, and of the step.

    Raises:
        UserError: on every rank, no checkpoint is whole, or one cannot be read now; the data are others, or the weights
            are of another model.
    """

    def newest() -> Any:
        found = checkpoints.load_newest(run.checkpoints, say)
        if found is not None:
            return found.path
        if checkpoints.standing(run.checkpoints):
            # To begin anew would throw away the figures, and these folders, in which a reader may find more than we.
            raise UserError(
                f"--run-dir {run.path}: no checkpoint in {run.checkpoints} is whole; mend the disk or bring one back, "
                "or begin a new run in another folder."
            )
        return None

    path = ranks.from_main(newest)
    if path is None:
        return None
    saved = checkpoints.load(path)
    try:
        began, progress = saved.state["fingerprint"], Progress(**saved.state["progress"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its state.json is not as this version of fastddr writes it ({error}); go on with the version "
            f"that wrote it ({saved.state.get('versions')})."
        ) from None
    _same_data(run, began, fingerprint)
    training.restore(saved)

    def mended() -> bool:
        checkpoints.put_aside(run.checkpoints, path, say)
        checkpoints.point(run.checkpoints, path, best=progress.best_step == progress.step)
        return progress.best_step in (0, progress.step) or _is_best(run, progress, say)

    if not ranks.from_main(mended):
        # The next epoch that is scored is the best one; were it compared with the lost one, there might never be one.
        progress.best_qwk = progress.best_loss = None
        progress.best_step = progress.best_epoch = 0
    say(f"resumed at step {progress.step}, from {path}")
    return progress


def _is_best(run: RunFolder, progress: Progress, say: Callable[[str], None]) -> bool:
    """Whether the best checkpoint that training knows of is there; else its link goes.

    Raises:
        UserError: it cannot be read now.
    """
    link = run.checkpoints / "best"
    try:
        found = checkpoints.load_own(checkpoints.led_to(link)).state["progress"]["step"]
    except (checkpoints.Damaged, KeyError) as error:
        why = str(error)
    else:
        if found == progress.best_step:
            return True
        why = f"it is of step {found}."
    link.unlink(missing_ok=True)
    say(f"the best checkpoint, of step {progress.best_step}, is lost, and the next epoch counts as the best: {why}")
    return False


def best(run: RunFolder, progress: Progress, say: Callable[[str], None]) -> tuple[checkpoints.Checkpoint, str]:
    """The best checkpoint at the end, and what its weights are called; where it is lost, the last one.

    To be called by all ranks; rank 0 chooses.

    Raises:
        UserError: on every rank, neither is whole, or one cannot be read now.
    """

    def choose() -> Any:
        for name in ("best", "last"):
            try:
                # Not the link: on another machine it may lead to the best one of before for a while.
                path = checkpoints.led_to(run.checkpoints / name)
                checkpoints.load_own(path)
                return path
            except checkpoints.Damaged as error:
                problem = error
                say(f"the {name} checkpoint is lost: {error}")
        raise problem

    found = checkpoints.load(ranks.from_main(choose))
    known = found.state["progress"]
    at, is_best = f"(step {known['step']}, epoch {known['epoch']})", known["step"] == progress.best_step
    progress.best_step, progress.best_epoch = known["step"], known["epoch"]
    return found, f"best {at}" if is_best else f"last {at}, for the best ones are lost"


def kept(run: RunFolder) -> str:
    """The words for where good weights lie; none where none were scored yet, for the last ones may be bad already."""
    best = run.checkpoints / "best"
    return f" ({best} holds the best weights that were scored)" if best.exists() else ""


class Saver:
    """Takes checkpoints of a run: rank 0 writes them in a thread, the others only count along."""

    def __init__(
        self,
        run: RunFolder,
        training: Training,
        config: Config,
        *,
        main: bool,
        fingerprint: str,
        step: int,
        before: Callable[[], None],
    ) -> None:
        """Of a run that begins, or goes on, at a step.

        `config` is as resolved, `main` is rank 0, `fingerprint` that of the data; `before` is called before a
        checkpoint is written, in the thread that writes it.
        """
        self.config, self._run, self._training = config, run, training
        self._about = {"config": asdict(config), "fingerprint": fingerprint, "versions": versions()}
        #: Step of the last checkpoint that was taken.
        self.step = step
        self._owed = False
        self._before = before
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if main else None
        self._pending: Future[None] | None = None

    def due(self, step: int, asked: bool, *, last: bool) -> bool:
        """Whether to save after this step, also where the clock `asked`; after an epoch's `last`, only once validated.

        Raises:
            OSError: on rank 0, an earlier checkpoint could not be written.
        """
        if self._pending is not None and self._pending.done():
            self._wait()
        every = self.config.save_every_steps
        wanted = asked or (every is not None and step % every == 0)
        self._owed = wanted and last
        return wanted and not last

    def due_after(self, epoch: int, best: bool) -> bool:
        """Whether to save after this many epochs, the last of them validated."""
        owed, self._owed = self._owed, False
        return best or owed or epoch % self.config.save_every_epochs == 0 or epoch == self.config.epochs

    def save(self, progress: Progress, *, best: bool) -> None:
        """Take a checkpoint. It is copied now, and written while training goes on.

        Raises:
            OSError: on rank 0, the one before could not be written.
        """
        if self._pool is not None:
            about = {"progress": asdict(progress), **self._about}
            snapshot = self._training.snapshot(progress.step, about)
            self._wait()
            self._pending = self._pool.submit(self._write, snapshot, best)
        self.step = progress.step

    def _write(self, snapshot: Snapshot, best: bool) -> None:
        self._before()
        checkpoints.write(self._run.checkpoints, snapshot, best=best, keep=self.config.keep_checkpoints)
        self._run.set_status("running", snapshot.step)

    def _wait(self) -> None:
        """Until the last one stands. Raises OSError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def flush(self) -> None:
        """Wait until every checkpoint that was taken stands.

        Raises:
            OSError: on rank 0, it could not be written, or the run's folder is another's by now.
        """
        self._wait()
        self._run.check_place()

    @contextmanager
    def readable(self, progress: Progress) -> Iterator[None]:
        """Turn the error of a full disk, an unwritable folder or too many open files into a sentence that says what is
        left."""
        try:
            yield
        except OSError as error:
            if error.errno not in CANNOT_USE | PASSING:
                raise
            with suppress(OSError):  # where the last checkpoint cannot be written either, the one before is left
                self.flush()
            run = self._run
            again = f"give the same command with --run-dir {run.path}"
            if run.replaced or (error.errno == errno.ENOENT and not os.path.isdir(run.path)):
                left, again = f"its folder {run.path} was moved or deleted", f"bring it back, and {again}"
            else:
                left = self._left()
                if error.errno not in PASSING:
                    again = f"make room or mend the folder, and {again}"
            ends = f"{error.filename or run.path}: {error.strerror}; the run ends at step {progress.step}"
            raise UserError(f"{ends}, and {left}: {again}.") from error

    def _left(self) -> str:
        try:
            kept = checkpoints.standing(self._run.checkpoints)
        except OSError:  # what ended the run keeps it from being listed too
            return f"the last checkpoint is in {self._run.checkpoints}"
        return f"the last checkpoint is {kept[-1].name}" if kept else "there was no checkpoint yet"

    def close(self) -> None:
        """Wait as `flush` does, and end the thread. Safe to call again."""
        if self._pool is not None:
            with self._pool:
                self._wait()
