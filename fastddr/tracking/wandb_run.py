"""Weights & Biases, offline or online. The only module that imports wandb."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from platformdirs import user_cache_dir

import fastddr
from fastddr.config import TrackingConfig
from fastddr.meters import RATE, WAIT, of_training
from fastddr.tracking.copies import Answers, first_line, short, thumbnail, write_line

#: Seconds for W&B to come online before the run goes on offline, and to upload its rest at the end.
INIT_TIMEOUT, FINISH_TIMEOUT = 20, 120
#: Where neither the user nor WANDB_PROJECT names one.
PROJECT = "fastddr"
#: What the table of runs shows of a curve; of all others the last value.
SUMMARIES = {
    "valid/qwk": "max",
    "valid/accuracy": "max",
    "valid/macro_f1": "max",
    "valid/balanced_accuracy": "max",
    "valid/auc": "max",
    "valid/loss": "min",
    RATE: "mean",
    WAIT: "mean",
}
#: Seconds for W&B's program that reads an offline part.
_READ_TIMEOUT = 120
#: What is logged at one step, in its turn.
_TURNS = {"train": 0, "valid": 1, "final": 2}
_OF_A_STEP = len(_TURNS)

#: Points of a curve at most; a chart holds 10,000 in all.
POINTS = 500


@dataclass(frozen=True)
class Begun:
    """What there is to know of a W&B run that has begun; nothing of none."""

    said: str = ""
    """The line to say."""
    commands: tuple[str | None, str | None] = (None, None)
    """What to type to see an offline run in the terminal, and to upload all its parts: every resume leaves one."""


class WandbRun:
    """A W&B run whose files lie in RUN/wandb, online where possible.

    The mode is that of WANDB_MODE; else offline unless there is a login (WANDB_API_KEY, netrc, settings).
    What cannot come online goes on offline. Its id is kept in RUN/wandb/id.txt, so a resumed run is the same
    run. Raises ImportError without wandb.

    Each row has a step of W&B's own that follows from ours and from what is logged, and grows. W&B takes nothing back,
    and a process that is killed loses what W&B had not written (15 s of it, offline); so a row is left out where W&B
    has it, or a later one, and who goes on with a run logs all its earlier rows again. Online, W&B's server says what
    it has; offline, that is what lies in RUN/wandb.
    """

    name = "W&B"

    def __init__(self, run_dir: Path, config: Mapping[str, Any], options: TrackingConfig) -> None:
        import wandb

        self._wandb = wandb
        self._run_dir, self._config, self._options = run_dir, config, options
        #: Of a sweep's run also the project and the entity that its agent gave it.
        self._kept = _read_id(run_dir / "wandb" / "id.txt")
        self._project = options.project or os.environ.get("WANDB_PROJECT") or self._kept.project or PROJECT
        self._name = os.environ.get("WANDB_NAME") or run_dir.name
        self._run: Any = None
        #: Variables of the environment that this run has set.
        self._own: list[str] = []
        #: W&B's own step of the first row that it has not got.
        self._next = 0
        #: What is shown with the final figures, in their row: a report that fails half-way must leave none of it.
        self._answers: dict[str, Any] = {}
        #: The lines with figures of `SUMMARIES`, of earlier processes too: W&B sums up what this one logs, and counts
        #: a line of one step like one of hundreds.
        self._seen: list[dict[str, float]] = []

    def start(self) -> Begun | None:
        """Begin the run; None where WANDB_MODE switches W&B off."""
        try:
            return self._start()
        except BaseException:  # Ctrl-C too: nobody has this run yet to end it
            self._give_back()
            if self._run is not None:
                with suppress(Exception):  # what went wrong first is raised below
                    self._run.finish(exit_code=1)
            raise

    def _start(self) -> Begun | None:
        if os.environ.get("WANDB_MODE", "").lower() == "disabled":
            return None
        folder = self._run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._put("WANDB_DATA_DIR", folder)  # where artifacts are staged; by default outside the run folder
        if not _writable(Path(user_cache_dir("wandb"))):  # without its cache W&B makes no artifact
            self._put("WANDB_CACHE_DIR", folder / "cache")
        mode, why = choose_mode(self._wandb)
        if mode == "disabled":
            self._give_back()
            return None
        self._kept = _with_id(self._kept, folder / "id.txt")
        earlier = _parts(folder, self._kept.id)
        try:
            self._run = self._init(mode)
        except Exception as error:  # W&B's derive from no class of their own
            if mode in ("offline", "dryrun"):
                raise
            # The service still holds the run's id, and would refuse it to the offline run.
            self._wandb.teardown()
            why = f"could not come online: {first_line(error)}"
            self._run = self._init("offline")
        if self._run.id != self._kept.id:  # an agent of a sweep has its own, and the run goes on by them
            self._kept, self._project = Kept(self._run.id, self._run.entity or "", self._run.project), self._run.project
            # Without an entity, as offline, the project has no place of its own.
            write_line(folder / "id.txt", " ".join(self._kept if self._kept.entity else self._kept[:1]))
        if self._run.offline:
            self._next = max(_next_of(earlier, self._project), self._known())
        else:
            self._next = self._run.starting_step
            # Those that were not uploaded: the run gets all their rows again.
            _put_aside([part for part in earlier if not part.with_name(f"{part.name}.synced").exists()])
        self._keep()
        self._run.define_metric("*", step_metric="step")
        for metric, summary in SUMMARIES.items():
            self._run.define_metric(metric, step_metric="step", summary=summary)
        if self._options.log_code:  # W&B shows as a run's code that of its last part
            self._run.log_code(root=str(Path(fastddr.__file__).parent), name="fastddr-code")
        if not self._run.offline:
            return Begun(f"W&B: {self._run.url or mode}")
        place = shlex.quote(short(folder))
        view, sync = f"wandb leet {place}", f"wandb sync {place}/offline-run-*"
        said = f"W&B: offline ({why}); see it with: {view}; upload later with: {sync}"
        return Begun(said, (view, sync))

    def log(self, values: Mapping[str, float], step: int, when: float) -> None:
        kind = next((name.partition("/")[0] for name in values if "/" in name), None)
        if kind not in _TURNS:  # in a line of metrics.jsonl that somebody else wrote
            return
        if summed := SUMMARIES.keys() & values.keys():
            self._seen.append({"step": step, **{name: values[name] for name in summed}})
        own = _OF_A_STEP * step + _TURNS[kind]
        if own >= self._next:
            answers = self._answers if kind == "final" else {}
            self._run.log({**answers, **values, "step": step, "_timestamp": when}, step=own, commit=True)
            self._next = own + 1

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._answers[name] = self._wandb.Image(str(path))

    def log_answers(self, answers: Answers, step: int, photographs: bool) -> None:
        """Confusion matrix, precision-recall and ROC curves of each grade, and a table of the worst mistakes."""
        names, grades = list(answers.names), answers.grades.tolist()
        split = answers.split
        found = self._answers
        predicted = answers.probabilities.argmax(1).tolist()
        found[f"{split}/confusion_matrix"] = self._wandb.plot.confusion_matrix(
            y_true=grades, preds=predicted, class_names=names, title=f"Confusion matrix, {split}"
        )
        for name, chart in self._curves(answers).items():
            found[f"{split}/{name}"] = chart
        columns: list[str | int] = ["photograph", "truth", "predicted", "confidence"]
        columns += ["picture"] if photographs else []
        table = self._wandb.Table(columns=columns)
        for mistake in answers.worst:
            row = [mistake.path, names[mistake.truth], names[mistake.predicted], mistake.confidence]
            if photographs:
                row.append(self._wandb.Image(thumbnail(mistake.file)))
            table.add_data(*row)
        found[f"{split}/worst"] = table

    def _curves(self, answers: Answers) -> dict[str, Any]:
        """ROC and precision-recall of each grade against the rest, as charts of W&B's own (its helpers want pandas)."""
        from sklearn.metrics import precision_recall_curve, roc_curve

        charts = {}
        for name, curve, order, x, y, title in (
            ("roc", roc_curve, (0, 1), "1 − specificity", "sensitivity", "ROC"),
            ("pr", precision_recall_curve, (1, 0), "recall", "precision", "Precision and recall"),
        ):
            table = self._wandb.Table(columns=["class", x, y])
            for grade in answers.present:
                found = curve(answers.grades == grade, answers.probabilities[:, grade])
                xs, ys = (found[place] for place in order)
                # Evenly along the curve, both ends included.
                rows = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), POINTS)).round().astype(int))
                for row in rows:
                    table.add_data(answers.names[grade], float(xs[row]), float(ys[row]))
            charts[name] = self._wandb.plot_table(
                vega_spec_name="wandb/area-under-curve/v0",
                data_table=table,
                fields={"x": x, "y": y, "class": "class"},
                string_fields={"title": f"{title}, {answers.split}", "x-axis-title": x, "y-axis-title": y},
            )
        return charts

    def log_file(self, name: str, kind: str, path: Path, aliases: Sequence[str], upload: bool) -> None:
        """A file or folder as an artifact: its bytes, or where it lies and its checksums."""
        artifact = self._wandb.Artifact(f"{name}-{self._run.id}", type=kind, metadata={"path": short(path)})
        if not upload:
            artifact.add_reference(path.resolve().as_uri(), name=None if path.is_dir() else path.name)
        elif path.is_dir():
            artifact.add_dir(str(path.resolve()))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, failed: bool) -> None:
        self._give_back()
        try:
            for name, how in SUMMARIES.items():
                if (value := self._summed_up(name, how)) is not None:
                    self._run.summary.update({name: {how: value}})
        finally:
            try:
                self._run.finish(exit_code=int(failed))
            except TimeoutError:
                place = shlex.quote(short(self._run_dir / "wandb"))
                raise TimeoutError(
                    f"not all was uploaded within {FINISH_TIMEOUT} s; for the rest: wandb sync {place}/*run-*"
                ) from None
        # Not where that fails: rows that W&B had not written come again.
        self._keep()

    def _summed_up(self, name: str, how: str) -> float | None:
        """What the table of runs shows of a figure; None where it has none."""
        if how == "mean":
            trained = of_training(self._seen, name)
            return None if trained is None else trained.mean
        values = [line[name] for line in self._seen if name in line]
        return (max if how == "max" else min)(values, default=None)

    def _keep(self) -> None:
        """Keep how far this run is in its project: parts that were uploaded may be deleted (`wandb clean`)."""
        write_line(self._run_dir / "wandb" / "next.txt", f"{self._run.id} {self._next} {self._project}")

    def _known(self) -> int:
        """What was kept of this run; 0 without it, or where it is of another project."""
        file = self._run_dir / "wandb" / "next.txt"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        run_id, step, project = (*text.strip().split(maxsplit=2), "", "", "")[:3]
        return int(step) if (run_id, project) == (self._run.id, self._project) and step.isdecimal() else 0

    def _put(self, name: str, value: Path) -> None:
        """Set a variable of the environment, unless the user has."""
        if name not in os.environ:
            os.environ[name] = str(value)
            self._own.append(name)

    def _give_back(self) -> None:
        """The environment, as it was."""
        while self._own:
            os.environ.pop(self._own.pop(), None)

    def _init(self, mode: Any) -> Any:
        return self._wandb.init(
            project=self._project,
            group=self._options.group,
            job_type="train",
            name=self._name,
            dir=str(self._run_dir),
            id=self._kept.id,
            entity=os.environ.get("WANDB_ENTITY") or self._kept.entity or None,
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
                finish_timeout_raises=True,
            ),
        )


def choose_mode(wandb: Any) -> tuple[str, str]:
    """W&B's mode, in lower case, and who chose it: WANDB_MODE, `wandb disabled` or `wandb offline`, or the login."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode:
        os.environ["WANDB_MODE"] = mode  # W&B itself takes no capital letters
    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if mode:
        return mode, "WANDB_MODE"
    if settings.mode != "online":
        return settings.mode, "W&B's settings"
    try:
        known = bool(wandb.login(prompt=False, verify=False))
    except Exception:  # noqa: BLE001  # a key that is no key
        known = False
    return ("online", "") if known else ("offline", "not logged in")


def _writable(folder: Path) -> bool:
    """Whether a folder, which may not be there yet, can be written to: not where the home folder is another's."""
    try:
        while not folder.exists():
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _parts(folder: Path, run_id: str) -> list[Path]:
    """The files of earlier processes of a run, online and offline ones, the newest first by the time in their names."""
    found = [path for kind in ("run", "offline-run") for path in folder.glob(f"{kind}-*/run-{run_id}.wandb")]
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"), reverse=True)


def _next_of(parts: Sequence[Path], project: str) -> int:
    """One more than W&B's own step of the last row in the parts of a run, the newest of them first; 0 without any.

    Of several with rows two are read: the clock may have been set back. Parts without a row are put aside, and those of
    another project do not count: this one has none of their rows.

    Raises:
        RuntimeError: a part cannot be read.
    """
    found: list[int] = []
    for part in parts:
        # A program of W&B's with a documented output, for the format of the file is none of ours. It asks no network.
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
        offline = os.environ | {"WANDB_MODE": "offline"}
        read = subprocess.run(command, capture_output=True, text=True, timeout=_READ_TIMEOUT, env=offline)
        if read.returncode:
            why = (read.stderr.strip().splitlines() or ["no reason given"])[-1]
            place = short(part.parent.parent)
            raise RuntimeError(f"{short(part)} cannot be read ({why}); move {place} away to begin anew at W&B.")
        records = [json.loads(line) for line in reversed(read.stdout.splitlines())]
        own = next((record["history"]["step"].get("num", 0) for record in records if record["type"] == "history"), None)
        if own is None:
            # `wandb sync` stumbles over a part that was killed before W&B wrote anything.
            _put_aside([part])
            continue
        if project not in [record["run"].get("project", project) for record in records if record["type"] == "run"]:
            continue
        found.append(int(own) + 1)
        if len(found) == 2:
            break
    return max(found, default=0)


def _put_aside(parts: Sequence[Path]) -> None:
    """Offline parts get another name, under which `wandb sync` is not told to look for them."""
    for part in parts:
        if part.parent.name.startswith("offline-"):
            part.parent.rename(part.parent.with_name(f"replaced-{part.parent.name}"))


class Kept(NamedTuple):
    """What a run goes on by at W&B; empty where it is not known."""

    id: str = ""
    entity: str = ""
    project: str = ""


def _with_id(kept: Kept, path: Path) -> Kept:
    """With a new id, kept there, where there is none. From the system's randomness: no seed moves."""
    if not kept.id:
        kept = Kept(secrets.token_hex(4))
        write_line(path, kept.id)
    return kept


def _read_id(path: Path) -> Kept:
    return Kept(*(path.read_text(encoding="utf-8").strip().split(maxsplit=2) if path.exists() else ()))
