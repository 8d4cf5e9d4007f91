"""The loop: set-up, epochs, validation, when to save, and the report at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastddr import checkpoints, loaders, losses, mixing, models, optimizers, ranks, reporting, runs, runtime, saving
from fastddr.alone import let_go, take
from fastddr.checkpoints import Training
from fastddr.config import Config, checked, dump
from fastddr.data import manifest, source
from fastddr.errors import UserError, unusable
from fastddr.evaluation import grading, views
from fastddr.evaluation.evaluate import score
from fastddr.evaluation.metrics import SplitResult, deciding, figures, headline
from fastddr.loaders.run import RunLoaders
from fastddr.memory.fitting import settle
from fastddr.meters import Waited, Window, code_state, enough_memory, largest, memory, out_of_memory, scaling, versions
from fastddr.progress import EpochBar, terminal
from fastddr.reporting.final import write_final
from fastddr.saving import Saver
from fastddr.step import Tally, training_step
from fastddr.stopping import Stopping, StopRequested, deaf
from fastddr.tracking import Tracker
from fastddr.watch import Bad, Watch, listed, noted, suspects


class Trainer:
    """Trains, evaluates and reports one run. Use it in a `with` block, so that everything is closed."""

    def __init__(self, config: Config) -> None:
        self.config = config = checked(config, "the Trainer's configuration")
        self.progress = runs.Progress()
        self.finished = False
        #: Who asked the run to stop, once it has followed.
        self.stopped: str | None = None
        self.saver: Saver | None = None
        self.tracker = Tracker.silent()
        self.loaders: RunLoaders | None = None
        self._named = config.run_dir is not None
        self.run = runs.RunFolder(Path(config.run_dir or "runs"))
        self.predicted_gib: float | None = None
        self._resuming = self._began = self._scoring = self._settled = self._closed = False

    def __enter__(self) -> Trainer:
        """Set everything up, or go on with an earlier run where `config.run_dir` is one.

        Raises:
            UserError: data, settings or the run's folder do not hold together, another is open, or this was closed.
        """
        take(self, self._closed)
        self._entered = monotonic()
        try:
            with ranks.watched(), enough_memory(self._too_small):
                self._set_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            said = unusable(error, self.run.path)
            if said is not None:
                raise UserError(said) from error
            raise
        return self

    def _set_up(self) -> None:
        config, state = self.config, runtime.join()
        self.console = terminal(quiet=not state.is_main_process)
        where, resumed = ranks.from_main(lambda: runs.locate(config, datetime.now()))
        self.run = run = runs.RunFolder(where)
        if resumed:
            self.run = run = runs.RunFolder(where, ranks.on_main(lambda: runs.hold(where, self.console.print)))
            ranks.on_main(lambda: run.stop.unlink(missing_ok=True))  # left from earlier
            ranks.on_all(lambda: runs.seen(where))
            config = self.config = runs.continue_from(config, self.run, state.num_processes)
            if saving.finished(run, config, self.console):
                self.console.print(f"{where} is done; its report is {where / 'report' / 'report.md'}.")
                self.finished = True
                return
            self._resuming = True
        models.levers.check_compiler(config, state.device)  # which the real step of `settle` needs
        config, self.predicted_gib, taken, planned = settle(config, state.device, state.num_processes)
        self.config = config  # with the micro batch that is held, if anything fails from here on
        self.runtime = runtime.start(config, self, "the run began in it" if resumed else runtime.ASKED)
        self.accelerator = self.runtime.accelerator
        if resumed:
            runs.check_precision(where, config.precision, self.runtime.precision)
        for decision in (*self.runtime.decisions, *planned):
            self.console.print(f"  {decision}")
        self.draws = mixing.Draws(config, self.runtime.rank, self.runtime.micro_batch_size)

        # Before the photographs are read: a model or weights that cannot be had are told at once.
        model = models.from_config(config, self.console.print, state.device)
        begin = partial(models.weights.begin, config, model, best=checkpoints.best, say=self.console.print)
        taken_over = () if resumed else begin(average=model)
        self.manifest = source.open_data(config, self.console)
        self.loaders = RunLoaders(config, self.manifest, self.runtime, self._say, taken)
        # What auto became is stored, and used again by a resume; the data by a path that holds in any folder.
        chosen: dict[str, Any] = {
            "run_dir": str(where), **runs.placed(config), "loader": self.loaders.choice.loader,
            "precision": self.runtime.precision, "micro_batch_size": self.runtime.micro_batch_size,
            "threads": self.runtime.threads,
        }  # fmt: skip
        self.config = replace(config, **chosen)
        self.train_loader, self.valid_loader = self.loaders.train, self.loaders.valid
        self.steps_per_epoch = self.train_loader.task.steps

        model.to(self.runtime.device)  # after the loaders, which look at how much of the card is free
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        decay = config.optimizer.ema_decay
        self.ema = None if decay is None else optimizers.make_ema(model)
        optimizer = optimizers.from_config(model, config)
        self.criterion = losses.from_config(
            config, self.manifest.grade[self.train_loader.task.ids], self.runtime.device
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model = models.levers.compiled(self.model, config)
        self.bare_model, self.parts = model, optimizers.Parts.of(model)
        self.ema_parts = None if self.ema is None else (optimizers.Parts.of(self.ema), self.parts)

        training = Training(model, self.ema, self.optimizer, self.accelerator.scaler)
        is_main, fingerprint = self.runtime.is_main, self.manifest.fingerprint
        going_on: runs.Progress | None = None
        if resumed:
            going_on = saving.resume(self.run, training, fingerprint, self._say)
        if going_on is None:
            self._begin(begin(average=self._weights) if resumed else taken_over)
        else:
            self.progress = going_on
        self.watch = Watch(self.runtime.device, self.progress.overflowed)
        self._began = True
        about = asdict(self.config) | {"fingerprint": fingerprint, "code": code_state(), "versions": versions()}
        # The others wait for it, as long as it takes: W&B may take its time.
        self.tracker = ranks.on_main(lambda: Tracker.start(
            self.run.path, about, options=config.tracking,
            resume_step=None if going_on is None else going_on.step,
            validated=self.progress.step == self.progress.epoch * self.steps_per_epoch,
            say=self._say,
        )) or self.tracker  # fmt: skip
        self.saver = Saver(
            self.run, training, self.config, main=is_main, fingerprint=fingerprint, step=self.progress.step,
            before=self.tracker.sync,
        )  # fmt: skip
        ranks.expect(config.rank_timeout_minutes)
        self.stopping = Stopping(
            self.run.stop, config.max_hours, config.save_every_minutes, rank=self.runtime.rank,
            world=self.runtime.world, since=self._entered,
        )  # fmt: skip
        self.console.print(
            f"{config.model}, {self.parameters:,} parameters, on {len(self.train_loader.task.ids):,} "
            f"photographs: epochs: {config.epochs}, steps an epoch: {self.steps_per_epoch}, into {self.run.path}",
            style="bold",
        )

    # ------------------------------------------------------------------------------------------ set-up

    def _begin(self, taken: Sequence[str]) -> None:
        """Make a new run's folder, with what `--init` took. A default name that is taken by now gets a number."""
        named = self._named
        self.run = runs.RunFolder(ranks.from_main(lambda: runs.claim(self.run.path, named)), self.run.lock)
        self.config = replace(self.config, run_dir=str(self.run.path))
        if not self._resuming:  # on all ranks alike
            lock = ranks.on_main(lambda: runs.hold(self.run.path, self.console.print, begins=True))
            self.run = runs.RunFolder(self.run.path, lock)
        ranks.on_main(lambda: self.run.begin(dump(self.config), self.manifest.to_csv(), taken))
        ranks.on_all(lambda: runs.seen(self.run.path))

    def _say(self, line: str) -> None:
        self.console.print(f"  {line}")

    def _too_small(self) -> str:
        store, state = self.loaders.choice.store if self.loaders else "none", runtime.join()
        kept = self._resuming or (self._began and (self._named or (self.run.checkpoints / "last").exists()))
        return out_of_memory(
            self.config, state.device, state.num_processes, store=store, need=self.predicted_gib,
            scoring=self._scoring, run=self.run.path if kept else None, named=self._resuming or self._named,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train to the end, score every split under the best weights, and write the report.

        On a request to stop (`stopping`) save, set `stopped` and return; a new Trainer goes on later.
        """
        if self.finished or self.stopped is not None:
            return
        if self.saver is None or self._closed:
            raise UserError("this Trainer is not open; call fit() within `with Trainer(config) as trainer:`.")
        readable = self.saver.readable(self.progress)
        with self.stopping.listening(), ranks.watched(), readable, enough_memory(self._too_small):
            if self.runtime.is_main:
                self.run.renew(self.config)  # only now: nothing can refuse to go on any more
                self.run.set_status("running", self.progress.step)
            try:
                with models.levers.compiling(self.config, self.stopping.heard):
                    while self.progress.epoch < self.config.epochs:
                        self.train_epoch()
                        self.validate()
                self._report()
                self.finished = True
            except StopRequested as request:
                self._stop(str(request))
            else:
                self.stopping.settle()

    def _stop(self, reason: str) -> None:
        """Save where training stands, unless that is saved, and leave the run for later."""
        self.stopped = reason
        assert self.saver is not None
        if self.progress.step > self.saver.step:
            self.saver.save(self.progress, best=False)
        self.saver.flush()
        if self.runtime.is_main:
            self.run.set_status("preempted", self.progress.step, reason)
        self._settled = True
        self.stopping.followed()
        # Before any rank ends: the launcher ends the others then, and trackers may take their time.
        self.tracker.finish()
        ranks.wait()
        self.console.print(
            f"stopped at step {self.progress.step} ({reason}), and saved; the same command with --run-dir "
            f"{self.run.path} goes on",
            style="yellow",
        )

    def train_epoch(self) -> float:
        """The rest of the epoch that `progress` stands in; the seconds for which the host waited for data."""
        config, progress = self.config, self.progress
        assert self.saver is not None
        steps = config.epochs * self.steps_per_epoch
        first = progress.step - progress.epoch * self.steps_per_epoch
        batches = Waited(self.train_loader.epoch(progress.epoch, start_step=first))
        tally = Tally.zeros(self.runtime.device)
        window = Window()
        self.model.train()
        title = f"epoch {progress.epoch + 1}/{config.epochs}"
        with EpochBar(self.console, title, self.steps_per_epoch, start=first) as bar:
            for done in range(first + 1, self.steps_per_epoch + 1):
                # The others have queued the step before: behind a collective that a lost rank does not enter, no more
                # is queued than CUDA takes without blocking the host, which could then tell nothing.
                self.stopping.arrived()
                lr = config.lr * optimizers.planned_factor(config.optimizer, progress.step, steps)
                optimizers.set_lr(self.optimizer, lr)
                seen: list[torch.Tensor] = []
                told = training_step(
                    self.accelerator, self.model, noted(islice(batches, self.runtime.accumulation), seen),
                    self.criterion, self.optimizer, tally, config.optimizer.clip_norm,
                    partial(self.draws, progress.step), self.parts,
                )  # fmt: skip
                if self.ema is not None and config.optimizer.ema_decay is not None:
                    left_out, decay, parts = told[:2].any(), config.optimizer.ema_decay, self.ema_parts
                    optimizers.update_ema(self.ema, self.bare_model, progress.step, decay, left_out, parts=parts)
                reason = self.stopping.ask()
                progress.step += 1
                self._answer(self.watch.look(told, progress.step, seen))
                last = done == self.steps_per_epoch
                due = self.saver.due(progress.step, self.stopping.wanted, last=last)
                # Also where the run may go on from: no step is missing from the means, and none is twice in them.
                if last or due or reason is not None or progress.step % config.tracking.log_every_steps == 0:
                    self.stopping.arrived()
                    self._answer(self.watch.settle())
                    self._log_window(window, tally, batches.waited, lr)
                bar.update(done, window.rate, window.wait_share, kept=lambda: self.train_loader.kept)
                self.stopping.follow(reason)
                if due:
                    self.saver.save(progress, best=False)
                    self.stopping.saved()
            # Past the last batch, so that the loader ends its epoch itself.
            if next(batches, None) is not None:
                raise RuntimeError("the loader has more batches than its epoch has steps")
        progress.epoch += 1
        return batches.waited

    def _answer(self, bad: Bad | None) -> None:
        """What follows from a step whose loss or gradient was not finite; it is that on all ranks."""
        self.progress.overflowed = self.watch.overflowed
        if bad is None:
            return
        self.progress.skipped += 1
        names = suspects(bad, self.manifest.path)
        if self.runtime.is_main:
            self.run.append_bad_step({"step": bad.step, "photographs": names})
        said = f"loss or gradient of step {bad.step} is not finite ({listed(names)}; all in {self.run.bad_steps})"
        if self.config.optimizer.on_nonfinite == "stop":
            raise UserError(
                f"{said}, and the weights are those before it; look at these photographs, leave such steps out with "
                "--optimizer.on-nonfinite skip, or begin a new run with a lower --lr or --optimizer.clip-norm 1."
            )
        self.console.print(f"{said}: left out, {self.progress.skipped} so far", style="yellow")

    def _log_window(self, window: Window, tally: Tally, waited: float, lr: float) -> None:
        """Log the means since the last time, NaN if all steps were bad. Waits for the device: once in so many steps."""
        peaks = memory(self.runtime.device, self.predicted_gib)
        found = window.close(self.accelerator.gather, tally.stack(), waited, peaks)
        found |= {"train/lr": lr, "train/skipped_steps": self.progress.skipped}
        found |= scaling(self.accelerator.scaler, self.progress.overflowed)
        self.tracker.log(found, step=self.progress.step, epoch=self.progress.step / self.steps_per_epoch)

    @property
    def _weights(self) -> nn.Module:
        """What is evaluated: the averaged weights where there are any."""
        return self.bare_model if self.ema is None else self.ema

    def _score(self, loader: loaders.Loader, weights: str, *, fit: bool = False) -> SplitResult:
        """A split; with `fit` it is valid, and a regression's grading is fitted to these weights."""
        self._scoring = True
        # Every rank keeps statistics of its own; rank 0's are those that are saved.
        if self.runtime.world > 1:
            for buffer in self._weights.buffers():
                torch.distributed.broadcast(buffer, src=0)
        model = grading.wrap(self._weights, self.config, self.progress.grading)
        found = score(
            self.accelerator,
            self._weights if fit else views.averaged(model, self.config.evaluation.tta),
            loader,
            paths=self.manifest.path,
            weights=weights,
            patients=self.manifest.patients,
            on_batch=self.stopping.check,
        )
        self._scoring = False  # not where it fails: whoever tells of that asks
        if not found.logits.isfinite().all():
            raise UserError(
                f"the model's output is not finite at step {self.progress.step}; lower --lr or set "
                f"--optimizer.clip-norm 1, and begin anew{saving.kept(self.run)}."
            )
        if fit:
            found, self.progress.grading = grading.fitted(found, self.config)
        return found

    def validate(self) -> dict[str, Any]:
        """Score the valid split, log, and save a checkpoint; the figures (`metrics.figures`)."""
        progress = self.progress
        try:
            found = self._score(self.valid_loader, "current", fit=True)
        except StopRequested:
            # Its last step is saved as a step within the epoch, so that the next start scores it.
            progress.epoch -= 1
            raise
        # All ranks hold all logits; the figures, and the packages that they need, are rank 0's work.
        values = ranks.from_main(lambda: figures(found.logits, found.grades))
        best = progress.keep_if_best(deciding(values), values["loss"])
        self.tracker.log(grading.logged(values, progress.grading), step=progress.step, epoch=progress.epoch)
        assert self.saver is not None
        if self.saver.due_after(progress.epoch, best):
            self.saver.save(progress, best=best)
            self.stopping.saved()
        shown = "  ".join(f"{key} {values[key]:.3f}" for key in headline(values) if values[key] is not None)
        self.console.print(
            f"epoch {progress.epoch}/{self.config.epochs}  valid: {shown}{'  best' if best else ''}",
            style="green" if best else None,
        )
        return values

    # ------------------------------------------------------------------------------------------ the end

    def _report(self) -> None:
        progress = self.progress
        self.train_loader.close()
        tta = views.told(self.config.evaluation.tta)
        results = {"valid_last": self._score(self.valid_loader, f"last ({progress.at}){tta}")}
        assert self.saver is not None
        self.saver.flush()
        ranks.wait()  # for rank 0's disk
        best, weights = saving.best(self.run, progress, self.console.print)
        checkpoints.load_weights(self._weights, best.weights, best.path)
        progress.grading = best.state["progress"].get("grading")
        weights += tta
        for split in manifest.SPLITS:
            if self.manifest.has(split) and (split != "test" or self.config.evaluation.test):
                assert self.loaders is not None
                loader = self.valid_loader if split == "valid" else self.loaders.once(split)
                results[split] = self._score(loader, weights)
                loader.close()
        peaks = largest(self.accelerator.gather, memory(self.runtime.device), self.runtime.device)
        if self.runtime.is_main:
            self.console.print("writing the report …")
            write_final(
                self.run, results, self.config, self.manifest, self.runtime, self.tracker, parameters=self.parameters,
                weights=weights, peaks=peaks, progress=progress, resumed=self._resuming,
            )  # fmt: skip
            self.run.set_status("done", progress.step)
        self._settled = True
        self.tracker.finish()
        if self.runtime.is_main:
            told, boards = self.tracker.wandb.commands, self.config.tracking.tensorboard
            reporting.summary(self.run.path, wandb_commands=told, tensorboard=boards, console=self.console)
        ranks.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            if error is not None:
                stack.enter_context(deaf())
            stack.callback(self.close, failed=error is not None)
            if error is not None:
                reason = ranks.why(error)
                if not isinstance(error, ranks.RankLost):
                    ranks.tell(reason)
                if self.saver is not None:
                    with saving.told("a checkpoint", self.console.print):
                        self.saver.close()
                # A run that is done or saved stays that, whatever an upload ends in; one that cannot go on is not asked
                # to try again.
                if (self._began or self._resuming) and not self._settled and runtime.join().is_main_process:
                    with saving.told("status.json", self.console.print):
                        state: runs.State = "preempted" if reason == ranks.INTERRUPTED else "failed"
                        # A scheduler is told what the next start goes on from, and of a failure how far it got.
                        reached = self.progress.step if self._began and state == "failed" else None
                        self.run.set_status(state, reached, reason)

    def close(self, failed: bool = False) -> None:
        """End loaders, trackers and the process group. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:
            stack.callback(let_go, self)
            if self.run.lock is not None:
                stack.callback(self.run.lock.close)
            # After a failure the other ranks may sit in a collective, and leaving the group would wait for them; the
            # launcher ends them when this process ends.
            if not (failed and self.runtime.world > 1) if self._began else self.finished:
                stack.callback(ranks.leave)
            stack.callback(self.tracker.finish, failed=failed)
            # On a GPU what is left behind a collective that never ends cannot be freed.
            if self.loaders is not None and not (failed and self.runtime.world > 1 and torch.cuda.is_initialized()):
                stack.callback(self.loaders.close)
            if self.saver is not None:
                stack.callback(self.saver.close)
