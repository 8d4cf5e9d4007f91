"""How many images a second training comes to, from JPEGs on the disk: fastddr's trainer beside others' loops.

    python benchmarks/train.py                              # synthetic set; on a CPU the quickstart's model
    python benchmarks/train.py --data DDR-masters --preset report-convmixer --recipes fastddr fastddr:loader=replay timm
    python benchmarks/train.py --target-qwk 0.5 0.7         # not images a second, but the time to these kappas

A turn is one whole epoch, from the first batch that is asked for to the last update, without validation and checkpoint.
Every recipe (`recipes` says what each does) lives in processes of its own, which are halted while another's turn is
measured; one epoch of each is a warm-up, in which the resident loader decodes and a compiler compiles. In each round
every recipe has one turn; intervals are those of the median over the rounds, ratios are taken round by round.

`fastddr, replay` repeats one batch and so has nothing to load: the ceiling of this model on this machine, in micro
batches of the loop of fastddr's that is named before it. A loader that never keeps the model waiting comes to 1.0
of it.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import harness
import kappas
import numpy as np
import script
import sources
import targets
import torch
from flops import Mixer
from halted import Halted, close_all
from recipe import Case, Epoch, class_folders
from recipes import Spec, make

from fastddr import sampling
from fastddr.config import Config, load_preset
from fastddr.config import check as check_config
from fastddr.config.sections import AugmentConfig
from fastddr.errors import UserError
from fastddr.ranks import available_cores


@dataclass
class Options(script.Output):
    """Compare training loops, end to end."""

    data: Path | None = None
    """Folder of photographs; by default synthetic ones, in the user's cache."""
    photographs: int | None = None
    """Size of the synthetic set; by default that of the quickstart."""
    length: int | None = None
    """Training photographs of an epoch, at least: the set is repeated. 0 = the set as it is. By default 6260, as DDR
    has, on a GPU, and 0 on a CPU."""
    preset: str | None = None
    """Where settings start; by default report-convmixer on a GPU, quickstart on a CPU."""
    recipes: tuple[str, ...] | None = None
    """Names with options: `fastddr:loader=dali`, `report:workers=0`, `timm:channels_last,compile`."""
    models: tuple[str, ...] = ()
    """Models, each with its settings in the preset; by default the preset's own."""
    precisions: tuple[Literal["auto", "fp32", "bf16", "fp16"], ...] = ("auto",)
    """Of fastddr and of those peers that have a choice. `auto`: what fastddr trains in here, `runs_in` of a row."""
    image_sizes: tuple[int, ...] = ()
    """Sides of the window; the canvas keeps its proportion to it. By default the preset's."""
    batch_sizes: tuple[int, ...] = ()
    """By default the preset's."""
    rounds: int = 5
    """Turns of each recipe, at least 5."""
    seconds: float | None = None
    """No further recipe is begun after so many."""
    target_qwk: tuple[float, ...] = ()
    """Measure the time to these quadratic-weighted kappas on valid instead, from the first batch on, validation
    included; every training begins anew and ends with the preset's epochs at the latest. The JSON is
    results/train-kappa_...."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """For that: of the weights and of the order."""


#: fastddr's own loaders apart, and of the peers the forms that may be their fastest.
_OURS = ("fastddr", "fastddr:loader=replay", "fastddr:loader=dali", "fastddr:loader=torchvision")
_CPU = (*_OURS, "report", "report:workers=0", "report:channels_last,workers=0", "torchvision:workers=0",
        "torchvision:channels_last,workers=0", "timm:channels_last,workers=0", "timm:channels_last")  # fmt: skip
_GPU = (*_OURS, "report", "report:channels_last", "report:workers=0", "torchvision", "torchvision:channels_last",
        "timm", "timm:compile", "timm:channels_last", "timm:channels_last,compile")  # fmt: skip
#: For the time to a kappa: of the report's way the form that is fastest on a CPU, and on a GPU as the report had it:
#: there channels_last slows large depthwise kernels down. The loops of torchvision and timm lack the schedules of their
#: scripts, which changes no speed, but would be no fair race.
_CPU_KAPPA = ("fastddr", "report:channels_last,workers=0")
_GPU_KAPPA = ("fastddr", "report")


class Contender(Halted):
    """A recipe in its own process group, and its turns."""

    def __init__(self, spec: Spec, case: Case) -> None:
        self.spec = spec
        self.turns: list[tuple[Epoch, float]] = []
        self.first: Epoch | None = None
        self.gpu_use: float | None = None
        self.vram: dict[str, int] = {}
        self.about: dict[str, Any] = {}
        super().__init__(spec.label, make, spec, case)

    def warm(self) -> Epoch:
        """One epoch, in which memory is looked at; on a GPU a second one, to see how busy it is."""
        with self.watched():
            first: Epoch = self.ask("epoch")
        self.first = first
        if torch.cuda.is_available():
            self.gpu_use = _gpu_use(lambda: self.ask("epoch"))
        # Now, while no other is beside it, and because one that is stopped in its turn answers nothing any more.
        self.vram, self.about = self.ask("vram"), self.ask("about")
        self.ask("rest")
        return first

    def __call__(self) -> float:
        """Images a second in one epoch."""
        before = harness.cpu_seconds(self._process.pid or 0)
        epoch: Epoch = self.ask("epoch")
        self.turns.append((epoch, harness.cpu_seconds(self._process.pid or 0) - before))
        self.ask("rest")
        return epoch.images / epoch.seconds

    def row(self) -> dict[str, Any]:
        """What its turns cost."""
        seconds = sum(epoch.seconds for epoch, _ in self.turns)
        found: dict[str, Any] = {
            "recipe": self.spec.name,
            **self.about,
            "images": self.turns[0][0].images,
            "data_wait": round(sum(epoch.waited for epoch, _ in self.turns) / seconds, 4),
            "cpu_share": round(sum(cpu for _, cpu in self.turns) / seconds / available_cores(), 3),
            "ram_gib": round(self.memory / 2**30, 2),
            "first_epoch_seconds": round(self.first.seconds, 2) if self.first else None,
        }
        for name, size in self.vram.items():
            found[f"vram_{name}_gib"] = round(size / 2**30, 2)
        return found if self.gpu_use is None else found | {"gpu_use": round(self.gpu_use, 3)}


def _gpu_use(work: Callable[[], object]) -> float | None:
    """The mean share of the time of some work in which the GPU had any, as `nvidia-smi` sees it; None without that."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # its numbers are not those of CUDA_VISIBLE_DEVICES
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200", "-i", uuid]
    with tempfile.TemporaryFile("w+") as seen:
        try:
            process = subprocess.Popen(["nvidia-smi", *query], stdout=seen)
        except OSError:  # no such tool: the figure is left out of the row
            work()
            return None
        try:
            work()
        finally:
            process.terminate()
            process.wait()
        seen.seek(0)
        values = [float(line) for line in seen if line.strip().isdigit()]
    return float(np.mean(values)) / 100 if values else None


def cases(options: Options, root: Path, side: int | None) -> list[tuple[Case, dict[str, Any]]]:
    """Everything that is asked for, with what its rows say of it."""
    gpu = torch.cuda.is_available()
    base = load_preset(options.preset or ("report-convmixer" if gpu else "quickstart"))
    wanted = itertools.product(
        options.models or (base.model,), options.image_sizes or (base.image_size,), options.precisions,
        options.batch_sizes or (base.batch_size,),
    )  # fmt: skip
    found = []
    for model, size, precision, batch in wanted:
        canvas = round(base.canvas * size / base.image_size)
        config = replace(base, model=model, image_size=size, canvas=canvas, precision=precision, batch_size=batch)
        check_config(config, "command line")
        about = {
            "model": describe(config), "precision": precision, "image_size": size, "canvas": canvas,
            "batch_size": batch, "policy": config.augment.policy, "device": "cuda" if gpu else "cpu",
        }  # fmt: skip
        found.append((Case(str(root), config, resized=side != canvas), about))
    return found


def describe(config: Config) -> str:
    """`ConvMixer 64/4 k5 p8`."""
    if config.model == "convmixer":
        wanted = config.convmixer
        return str(Mixer(wanted.dim, wanted.depth, wanted.kernel_size, wanted.patch_size))
    if config.model == "cnn":
        return f"CNN {config.cnn.blocks}×{config.cnn.width}"
    if config.model != "resnet":
        return config.model
    return f"ResNet-{config.resnet.depth} {config.resnet.width}"


def race(
    specs: Sequence[Spec], case: Case, about: Mapping[str, Any], rounds: int, until: float | None, say: Any,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one case: recipes, then ratios and targets. No recipe is begun after `until` (`time.monotonic`).

    Where it is stopped (SIGTERM, Ctrl-C), `keep` is given the rows of the rounds that were whole by then.
    """
    contenders: dict[str, Contender] = {}
    rows: list[dict[str, Any]] = []
    speeds: dict[str, list[float]] = {}

    def leave_out(label: str, why: str) -> None:
        # One that cannot run must not take the figures of the others along.
        say(f"{label} is left out: {why}.")
        kind = next(spec.kind for spec in specs if spec.label == label)
        rows.append({"name": label, "kind": kind, **about, "failed": why})
        contender = contenders.pop(label, None)
        if contender is not None:
            contender.close()

    try:
        for spec in specs:
            try:
                if until is not None and time.monotonic() > until and len(contenders) > 1:
                    raise UserError(harness.TIME_UP)
                contenders[spec.label] = Contender(spec, _as_its_loader(spec, case, contenders))
                first = contenders[spec.label].warm()
            except (UserError, RuntimeError) as problem:
                leave_out(spec.label, harness.sentence(problem))
                continue
            say(f"  {spec.label} has warmed up: {first.images} images in {first.seconds:.1f} s")
        harness.interleaved(dict(contenders), rounds, lambda k: say(f"  round {k} of {rounds}"), leave_out, speeds)
        return rows + _judged(contenders, speeds, about)
    except (KeyboardInterrupt, SystemExit):
        # At once: whoever stops this may not wait until all loops have ended.
        keep(rows + _judged(contenders, harness.whole_rounds(speeds), about))
        raise
    finally:
        close_all(contenders.values())


def _as_its_loader(spec: Spec, case: Case, contenders: Mapping[str, Contender]) -> Case:
    """For a ceiling, with the micro batch of fastddr's first loop: `auto` would choose from what that has left free."""
    for other in contenders.values():
        if (spec.kind, other.spec.kind) == ("ceiling", "fastddr"):
            return replace(case, config=replace(case.config, micro_batch_size=other.about["micro_batch_size"]))
    return case


def _judged(
    contenders: Mapping[str, Contender], speeds: Mapping[str, Sequence[float]], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the contenders that have a speed, then of their ratios and targets."""
    kinds = {label: contenders[label].spec.kind for label in speeds}
    rows = [
        {"name": label, "kind": kind, **about, **harness.spread(speeds[label]), "unit": "images/s",
         **contenders[label].row()}
        for label, kind in kinds.items()
    ]  # fmt: skip
    for row in targets.training(speeds, kinds, about):
        rows.append({"kind": "target" if "target" in row else "ratio", **about, **row})
    return rows


def unequal(specs: Sequence[Spec], augment: AugmentConfig) -> str | None:
    """What to say where fastddr's loops do more to a photograph than those of others; None where all do the same."""
    if sampling.only_crops(augment) and sampling.only_normalises(augment):
        return None
    if not any(spec.kind == "peer" for spec in specs):
        return None
    return f"The loops of others only cut and mirror, which is less work than policy {augment.policy}."


def report(rows: Sequence[Mapping[str, Any]], say: Any) -> None:
    """Tables of one case."""
    title = f"{rows[0]['model']}, {rows[0]['image_size']} px, batch {rows[0]['batch_size']}, {rows[0]['precision']}"
    measured = [row for row in rows if "failed" not in row]
    columns = ("data_wait", "cpu_share", "gpu_use", "ram_gib", "vram_allocated_gib", "first_epoch_seconds")
    speeds = [row for row in measured if row["kind"] in ("fastddr", "peer", "ceiling")]
    if speeds:
        harness.show(title, speeds, [column for column in columns if any(column in row for row in speeds)])
    ratios = [row for row in measured if row["kind"] == "ratio"]
    if ratios:
        harness.show(f"{title}: ratios", ratios)
    for row in measured:
        if row["kind"] == "target":
            say(targets.sentence(row))


def main(options: Options) -> None:
    """Measure, print and write."""
    say = harness.say
    seeds = tuple(dict.fromkeys(options.seeds))
    if options.target_qwk and len(seeds) < 5:
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: an interval wants at least 5.")
    if options.target_qwk and options.seconds is not None:
        raise UserError("--seconds ends no race to a kappa, in which every seed counts; leave it out, or --target-qwk.")
    gpu = torch.cuda.is_available()
    usual = (_GPU_KAPPA if gpu else _CPU_KAPPA) if options.target_qwk else (_GPU if gpu else _CPU)
    # One that is named twice is measured once: rows go by the label.
    specs = list({spec.label: spec for spec in map(Spec.parse, options.recipes or usual)}.values())
    part = "kappa" if options.target_qwk else None
    harness.begin(options.rounds)
    length = options.length if options.length is not None else 6260 if gpu else 0
    rows: list[dict[str, Any]] = []
    until = None if options.seconds is None else time.monotonic() + options.seconds
    with (
        tempfile.TemporaryDirectory(prefix="fastddr-benchmark-") as folder,
        harness.writing("train", rows, options.out, part=part, wandb=options.wandb) as written,
    ):

        def keep(done: list[dict[str, Any]]) -> None:
            rows.extend(done)
            written.save()

        [(photographs, source)] = sources.roots(options.data, ("95-420",), options.photographs)
        root = Path(folder) / "photographs"
        images = class_folders(source, root, length)
        found = sources.read(source)
        sides = {int(side) for side in np.minimum(found.width, found.height)}
        side = sides.pop() if len(sides) == 1 else None
        for case, about in cases(options, root, side):
            about = {"photographs": photographs, "epoch": images, **about}
            say(f"{about['model']}, {about['image_size']} of {about['canvas']} px, batch {about['batch_size']}, "
                f"{about['precision']}: epochs of {images} photographs")  # fmt: skip
            say(unequal(specs, case.config.augment))
            if not options.target_qwk:
                done = race(specs, case, about, options.rounds, until, say, keep)
                rows += done
                report(done, say)
            else:
                before = len(rows)
                for done in kappas.race(specs, case, about, options.target_qwk, seeds, say):
                    # A training for each seed takes long: what there is must outlive an end before the last.
                    rows[before:] = done
                    written.save()
                kappas.show(rows[before:], say)


if __name__ == "__main__":
    script.run(main, Options)
