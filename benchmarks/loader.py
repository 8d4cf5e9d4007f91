"""Images a second of loaders, fastddr's and others', side by side on the same photographs and the same cores.

    python benchmarks/loader.py                                       # synthetic 512² JPEGs
    python benchmarks/loader.py --data DDR-masters --policies report  # your own
    python benchmarks/loader.py --loaders dali resident:mmap torchvision:workers=0 torchcodec
    python benchmarks/loader.py --step dali resident                  # and how long a training step waits for data

Every loader lives in processes of its own (`trials`), which are halted while another one's turn is measured. In each
round every loader has one turn of some seconds, in full swing; the rounds come after a warm-up, which is a whole epoch
for loaders that keep what they decode. Intervals are those of the median over the rounds, ratios are taken round by
round. `peers` says what the peers do, `limits` what the lines in the picture are, `stages` how the profile comes about.

An epoch is made as long as DDR's training split: the list of photographs is repeated, each a photograph of its own. A
set of a few batches would show how loaders begin and end an epoch, and not how fast they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import harness
import limits
import numpy as np
import script
import sources
import stages
import targets
import torch
from halted import close_all
from peers import PEERS
from stored import DISTURBED
from trials import OURS, Spec, Trial

from fastddr.config.sections import POLICIES
from fastddr.data.grades import UNGRADABLE
from fastddr.data.manifest import Manifest
from fastddr.errors import UserError
from fastddr.loaders import Task
from fastddr.ranks import available_cores


@dataclass
class Options(script.Output):
    """Compare loaders. The picture of the result lies beside it."""

    data: Path | None = None
    """Folder of photographs; by default synthetic ones, in the user's cache."""
    encodings: tuple[Literal["95-420", "100-444"], ...] = ("95-420", "100-444")
    """Of the synthetic photographs: JPEG quality and chroma."""
    photographs: int | None = None
    """Size of the synthetic set; by default that of the quickstart."""
    length: int = 6260
    """Photographs in an epoch, at least: the set is repeated. 0 = the set as it is."""
    loaders: tuple[str, ...] = (
        "dali", "resident:mmap", "resident", "torchvision", "torchvision:workers=0", "replay", *PEERS,
    )  # fmt: skip
    """Names with options: `dali`, `resident:mmap,store_gib=4`, `torchvision:workers=0`, `torch-pil:prefetch=4`."""
    policies: tuple[str, ...] = ("report", "fundus")
    """What is done to a photograph. `report`: window and flips. `fundus`: also rotation, scale and colour."""
    image_size: int = 256
    """Side of the window."""
    canvas: int = 512
    """Short side of the canvas."""
    batch_size: int = 64
    """Photographs in a batch."""
    threads: int | None = None
    """Decoding threads or worker processes; by default the cores of this process."""
    rounds: int = 7
    """Turns of each loader, at least 5."""
    seconds: float = 2.0
    """How long a turn is, at least."""
    profile: bool = True
    """Also measure what stops `dali`, `resident` and `torchvision`."""
    step: tuple[str, ...] = ()
    """Loaders of which the share of a training step that is spent waiting for data is measured as well."""
    step_model: tuple[int, int, int, int] = (512, 12, 9, 8)
    """ConvMixer for that: width, depth, kernel, patch. On a CPU take a small one."""
    steps: int = 30
    """Counted steps of that, after 5 that are not."""


STORE_ALONE = "resident store alone, uint8"
KERNEL_ALONE = "resident kernel alone"


def make_task(found: Manifest, policy: str, options: Options) -> tuple[Task, float]:
    """The task, and the mean size of a file in kilobytes."""
    # All splits: nothing is learnt here, and longer epochs are nearer to a real set's.
    ids = np.flatnonzero(found.grade < UNGRADABLE)
    times = max(1, -(-options.length // len(ids)))
    files = found.files()
    task = Task(
        files=[files[id_] for id_ in ids] * times,
        grades=np.tile(found.grade[ids], times),
        widths=np.tile(found.width[ids], times),
        heights=np.tile(found.height[ids], times),
        ids=np.arange(len(ids) * times),
        train=True,
        image_size=options.image_size,
        canvas=options.canvas,
        augment=POLICIES[policy],
        seed=0,
        batch_size=options.batch_size,
        device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
        threads=options.threads or available_cores(),
    )
    return task, float(found.size[ids].mean()) / 1000


class Panel:
    """All that is measured for one kind of photographs and one policy."""

    def __init__(
        self, task: Task, about: Mapping[str, Any], options: Options, rows: list[dict[str, Any]] | None = None
    ) -> None:
        self.task, self.about, self.options = task, dict(about), options
        self.trials: dict[str, Trial] = {}
        self.rows = [] if rows is None else rows
        """Where its rows are put, behind those of other panels."""
        self._first = len(self.rows)
        self.speeds: dict[str, list[float]] = {}
        self.kinds: dict[str, str] = {}

    def _add(self, name: str, kind: str, values: Sequence[float], unit: str = "images/s", **more: Any) -> None:
        row = {"name": name, "kind": kind, **self.about, **harness.spread(values), "unit": unit, **more}
        self.rows.append(row)

    @property
    def mine(self) -> list[dict[str, Any]]:
        """The rows of this panel."""
        return self.rows[self._first :]

    def begin(self, specs: Sequence[Spec]) -> None:
        """Start the loaders; what cannot run here is left out, and said why."""
        for spec in specs:
            lacks = spec.missing(self.task)
            if lacks is not None:
                lacks = lacks.rstrip(".")
                # What could be installed was asked for and has no figure; the others are not for these photographs.
                if spec.name in PEERS and any(word in lacks for word in ("install", "cannot be loaded")):
                    self._leave_out(spec.label, lacks)
                else:
                    harness.say(f"{spec.label} is left out: {lacks}.")
                continue
            began = time.perf_counter()
            try:
                self.trials[spec.label] = Trial(spec, self.task)
                self.trials[spec.label].warm()
            except (UserError, RuntimeError) as problem:
                self._leave_out(spec.label, harness.sentence(problem))
                continue
            harness.say(f"  {spec.label} has warmed up in {time.perf_counter() - began:.0f} s")

    def _leave_out(self, label: str, why: str) -> None:
        """One that cannot run must not take the figures of the others along."""
        harness.say(f"{label} is left out: {why}.")
        self.rows.append({"name": label, "kind": "failed", **self.about, "failed": why})
        self.kinds.pop(label, None)
        trial = self.trials.pop(label, None)
        if trial is not None:
            trial.close()

    @staticmethod
    def _kind(name: str) -> str:
        if name == "replay":
            return "ceiling"
        return "peer" if name in PEERS else "fastddr"

    def race(self) -> None:
        """All rounds."""
        turns: dict[str, Any] = {
            label: lambda trial=trial: trial(self.options.seconds) for label, trial in self.trials.items()
        }
        self.kinds = {label: self._kind(trial.spec.name) for label, trial in self.trials.items()}
        residents = (trial for trial in self.trials.values() if trial.spec.name == "resident")
        store = next(residents, None) if self.task.only_crops and self.task.device.type == "cpu" else None
        if store is not None and self._asked(STORE_ALONE, store, "raw", 0.1) is not None:
            turns[STORE_ALONE] = lambda: store.ask("raw", self.options.seconds).rate
            self.kinds[STORE_ALONE] = "store"
        rounds = self.options.rounds
        try:
            harness.interleaved(
                turns, rounds, lambda k: harness.say(f"  round {k} of {rounds}"), self._leave_out, self.speeds
            )
        finally:
            # Also where it is stopped; else all rounds are whole.
            for label, values in harness.whole_rounds(self.speeds).items():
                self._add(label, self.kinds[label], values, **self._cost(self.trials.get(label)))
        others = [row["others_cpu_share"] for row in self.mine if "others_cpu_share" in row]
        if others and max(others) > DISTURBED:
            harness.say(
                f"Other processes took up to {100 * max(others):.0f} % of the cores meanwhile; "
                "measure again on an idle machine."
            )
        self._kernel()

    def _cost(self, trial: Trial | None) -> dict[str, Any]:
        if trial is None:
            return {}
        mine, others = trial.cpu_shares(available_cores())
        found: dict[str, Any] = {
            "loader": trial.spec.name,
            **trial.spec.options,
            "cpu_share": round(mine, 3),
            "others_cpu_share": round(others, 3),
            "ram_gib": round(trial.memory / 2**30, 2),
        }
        if trial.warmth.vram is not None:
            found["vram_gib"] = round(trial.warmth.vram / 2**30, 2)
        if trial.warmth.first_epoch is not None:
            found["first_epoch_seconds"] = round(trial.warmth.first_epoch, 1)
        return found

    def _asked(self, what: str, trial: Trial, question: str, *arguments: float) -> Any:
        """What a loader answers beside its speed; None, and said why, where it fails, for its speed is known."""
        try:
            return trial.ask(question, *arguments)
        except (UserError, RuntimeError) as problem:
            harness.say(f"{what} is left out: {harness.sentence(problem)}.")
            return None

    def _kernel(self) -> None:
        for trial in self.trials.values():
            rates = self._asked(KERNEL_ALONE, trial, "kernel", 0.2) if trial.spec.name == "resident" else None
            if rates is not None:
                self.speeds[KERNEL_ALONE] = rates
                self._add(KERNEL_ALONE, "store", rates)
                return

    def profile(self) -> None:
        """What stops each of fastddr's loaders."""
        for label, trial in self.trials.items():
            if not self.options.profile or trial.spec.name in PEERS:
                continue
            seconds = min(self.options.seconds / 4, 0.5)
            found = self._asked(
                f"the profile of {label}", trial, "stages", float(np.median(self.speeds[label])), seconds
            )
            if found is None:
                continue
            harness.say(stages.sentence(label, found.shares))
            for stage, values in found.shares.items():
                self._add(f"{label}: {stage}", "profile", values, "% of the time")
            if found.decode_only and label == "dali":
                self._limit("DALI, reading and decoding alone", found.decode_only)

    def limits(self) -> None:
        """What the hardware allows."""
        cores, rounds = self.task.threads, self.options.rounds
        seconds = min(self.options.seconds / 4, 0.5)
        files = limits.spaced(self.task.files, 64)
        if all(file.lower().endswith((".jpg", ".jpeg")) for file in files):
            try:
                rates = limits.decoded(files, seconds, rounds)
                self._limit(f"libjpeg-turbo, whole photographs, one core × {cores}", [cores * rate for rate in rates])
            except UserError as problem:
                harness.say(f"The limit of libjpeg-turbo is left out: {harness.sentence(problem)}.")
        bandwidth = limits.copied(self.task.device, cores, rounds)
        cost = limits.bytes_moved(self.task.image_size, self.task.dtype)
        gigabytes = round(float(np.median(bandwidth)) / 1e9, 1)
        self._limit("copying", [rate / cost for rate in bandwidth], gigabytes_per_second=gigabytes)

    def _limit(self, name: str, rates: Sequence[float], **more: float) -> None:
        self.speeds[name] = list(rates)
        self._add(name, "limit", rates, **more)

    def compare(self) -> None:
        """Ratios and targets."""
        found = targets.of(self.speeds, self.kinds, self.about, gpu=self.task.device.type == "cuda")
        for row in found:
            self.rows.append({"kind": "target" if "target" in row else "ratio", **self.about, **row})

    def close(self) -> None:
        """End all loaders."""
        trials, self.trials = self.trials, {}
        close_all(trials.values())


def measure(panel: Panel, specs: Sequence[Spec], keep: Callable[[], None] = lambda: None) -> None:
    """One panel from its beginning to its end, and `keep` before its loaders are ended: who stops it may not wait."""
    try:
        panel.begin(specs)
        panel.race()
        panel.limits()
        panel.compare()
        panel.profile()
    finally:
        try:
            keep()
        finally:
            panel.close()


def waits(panel: Panel, specs: Sequence[Spec]) -> None:
    """How long a training step waits for each of these loaders."""
    import waiting

    task, options = panel.task, panel.options
    for spec in specs:
        lacks = spec.missing(task)
        name = f"data wait, {spec.label}"
        try:
            if lacks is None:
                panel.rows.append(panel.about | waiting.share(spec, task, options.step_model, options.steps))
        except (UserError, RuntimeError) as problem:
            lacks = harness.sentence(problem)
            panel.rows.append({"name": name, "kind": "failed", **panel.about, "failed": lacks})
        if lacks is not None:
            harness.say(f"{name} is left out: {lacks.rstrip('.')}.")


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """A panel's tables of speeds and limits, of ratios, and its targets."""
    title = f"{rows[0]['photographs']}, {rows[0]['policy']}"
    columns = ("cpu_share", "ram_gib", "vram_gib", "first_epoch_seconds")
    speeds = [row for row in rows if row["kind"] in ("fastddr", "store", "peer", "ceiling", "limit")]
    harness.show(title, speeds, [column for column in columns if any(column in row for row in speeds)])
    others = [row for row in rows if row["kind"] in ("ratio", "wait")]
    if others:
        harness.show(f"{title}: ratios and waiting", others)
    for row in rows:
        if row["kind"] == "target":
            harness.say(targets.sentence(row))


def main(options: Options) -> None:
    """Measure, print, write and draw."""
    # Not at the top, because each loader's process imports this file: what it does not need would be in its memory.
    import plot
    import stored

    unknown = [policy for policy in options.policies if policy not in POLICIES]
    if unknown:
        raise UserError(f"--policies {' '.join(unknown)}: known are {', '.join(POLICIES)}.")
    # One that is named twice is measured once: rows go by the label.
    specs = list({spec.label: spec for spec in map(Spec.parse, options.loaders)}.values())
    waiters = list({spec.label: spec for spec in map(Spec.parse, options.step)}.values())
    if any(spec.name not in OURS for spec in waiters):
        raise UserError(f"--step: it can measure {', '.join(OURS)}.")
    harness.begin(options.rounds)
    rows: list[dict[str, Any]] = []
    with harness.writing("loader", rows, options.out, wandb=options.wandb) as written:
        for photographs, root in sources.roots(options.data, options.encodings, options.photographs):
            found = sources.read(root)
            warm = sources.warm(found)
            for policy in options.policies:
                task, kilobytes = make_task(found, policy, options)
                about = {
                    "photographs": photographs,
                    "policy": policy,
                    "mean_kilobytes": round(kilobytes, 1),
                    "image_size": options.image_size,
                    "canvas": options.canvas,
                    "batch_size": options.batch_size,
                    "epoch": len(task.ids),
                    "threads": task.threads,
                    "device": task.device.type,
                    # A setting only where it is not as ever.
                    **({} if warm else {"in_page_cache": False}),
                }
                harness.say(
                    f"{photographs}, {policy}: epochs of {len(task.ids)}, {task.threads} threads, {task.device}"
                )
                panel = Panel(task, about, options, rows)
                measure(panel, specs, written.save)
                if policy == options.policies[0]:
                    waits(panel, waiters)
                    written.save()
                if panel.mine:
                    report(panel.mine)
    if written.path is not None:
        harness.say(f"drawn: {plot.beside(stored.read(written.path)).name}")


if __name__ == "__main__":
    script.run(main, Options)
