"""The training step alone: forward, backward and optimizer on one batch that stays on the device, no loader.

    python benchmarks/step.py                                            # all models, by default in bf16 on a GPU
    python benchmarks/step.py --models convmixer-512-12-k9-p8 torchvision:resnet50 --batch-sizes 64 128
    python benchmarks/step.py --modes eager compile --seconds 600        # begins no variant after ten minutes
    python benchmarks/step.py --tiny                                     # a rehearsal, under a minute on a CPU

`networks` says how models are named. On a CPU the default is the quickstart's ConvMixer, and timm's with the same
settings, at its batch and image size in float32: some minutes, most of them compiling. Every model is run eagerly, on
a GPU also with `--deterministic`'s algorithms, and compiled, with its maps in NCHW and in NHWC, and compiled with and
without Inductor's layout optimization ("layout kept" is without). Models of the same settings, ours and timm's, are
warmed up and then take turns of a fixed number of steps, and the first model of the list, eager in NCHW, takes part
each time: ratios are taken round by round against it (`× reference`), of compiled and of deterministic to eager, and of
ours to timm's. `variants` says how; the step is `fastddr.step.training_step`, and precision, TF32 and cuDNN are set up
by `fastddr.runtime`. Where "deterministic" is among the modes, cuBLAS has the workspace that it needs for that in all
of them, which on Hopper is PyTorch's own.

How to read it: the median is images a second. FLOP are counted by `flops`. `of matmul` and `of
copy` are shares of the ceilings that were measured just before, the latter only for ConvMixers, whose bytes a formula
gives: 50 passes over each layer's map in eager mode, 33 compiled. `of roofline` is the least time that FLOP and bytes
need at these ceilings, by the time that the step took; with compile the bytes are fewer, so the same share is faster.
`GiB` is the most that PyTorch's allocator held for the variant alone. A variant that fails is left out, and said why.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import columns
import flops
import harness
import networks
import numpy as np
import script
import torch
from ceilings import Ceilings, measure, numbers_of
from columns import figure
from variants import MODES, REFUSED, Job, Variant

from fastddr.ranks import available_cores
from fastddr.runtime import DTYPES

#: On a GPU, most important first; on a CPU; and for a rehearsal.
MODELS = (
    "convmixer-512-12-k9-p8", "timm:convmixer-512-12-k9-p8", "torchvision:resnet50",
    "convmixer-768-32-k7-p8", "timm:convmixer-768-32-k7-p8", "resnet", "cnn",
    "timm:convmixer_1024_20_ks9_p14", "timm:convmixer_768_32", "timm:convmixer_1536_20",
)  # fmt: skip
CPU_MODELS = ("convmixer-64-4-k5-p8", "timm:convmixer-64-4-k5-p8")
TINY_MODELS = ("convmixer-16-1-k3-p8",)
WORKER = (sys.executable, str(Path(__file__).parent / "variants.py"))


@dataclass
class Options(script.Output):
    """Time training steps."""

    models: tuple[str, ...] = ()
    """Networks, as `benchmarks/networks.py` names them; the first is the reference. By default ten on a GPU, and the
    quickstart's and timm's twin of it on a CPU."""
    modes: tuple[Literal["eager", "deterministic", "compile", "max-autotune", "max-autotune-no-cudagraphs"], ...] = ()
    """Eagerly, eagerly with `--deterministic`'s algorithms, or by `torch.compile`; by default eager, compile and, on a
    GPU, deterministic and max-autotune."""
    layouts: tuple[Literal["NCHW", "NHWC"], ...] = ()
    """Order of the maps in memory; NHWC is PyTorch's channels_last. By default both."""
    layout_optimization: tuple[Literal["on", "off"], ...] = ("on", "off")
    """Inductor's, where compiled: whether it may change the layout."""
    precisions: tuple[Literal["bf16", "fp16", "fp32"], ...] = ()
    """By default bf16 on a GPU and fp32 on a CPU."""
    batch_sizes: tuple[int, ...] = ()
    """Images in a step; by default 64 on a GPU, 32 on a CPU."""
    image_sizes: tuple[int, ...] = ()
    """Side of the images; by default 256 on a GPU, 224 on a CPU."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """On a GPU it is one fused kernel."""
    rounds: int = 7
    """Counted rounds."""
    steps: int = 0
    """Steps of a turn; by default 10 on a GPU and 2 on a CPU."""
    seconds: float | None = None
    """No further variant is begun after so many."""
    threads: int | None = None
    """CPU threads; by default all cores."""
    tiny: bool = False
    """Width 16, depth 1, 4 images of 32 px, NCHW, eager and compiled, where nothing else is asked for: a rehearsal."""

    def filled(self, *, gpu: bool) -> Options:
        """With the defaults that depend on the device, where nothing was asked for."""
        found: dict[str, Any] = {
            "models": MODELS if gpu else CPU_MODELS,
            "modes": ("eager", "deterministic", "compile", "max-autotune") if gpu else ("eager", "compile"),
            "layouts": ("NCHW", "NHWC"),
            "precisions": ("bf16",) if gpu else ("fp32",),
            "batch_sizes": (64,) if gpu else (32,),
            "image_sizes": (256,) if gpu else (224,),
            "steps": 10 if gpu else 2,
        }
        if self.tiny:
            # Compiling takes most of the time, so one model in one layout.
            small = {"models": TINY_MODELS, "layouts": ("NCHW",), "batch_sizes": (4,), "image_sizes": (32,)}
            found |= {"modes": ("eager", "deterministic", "compile"), **small}
        return replace(self, **{key: getattr(self, key) or value for key, value in found.items()})


def heats(options: Options) -> list[list[Variant]]:
    """All variants; ours and timm's of the same settings together, which stand where the first of them does.

    Within a heat mode by mode, so that a limit of time costs the slowest compilations.
    """
    together: dict[str, list[Variant]] = {}
    models = list(dict.fromkeys(options.models))
    for mode, model, layout in product(options.modes, models, options.layouts):
        heat = together.setdefault(model if networks.mixer(model) is None else model.removeprefix("timm:"), [])
        if MODES[mode] is None:
            heat.append(Variant(model, mode, layout))
        else:
            heat += [Variant(model, mode, layout, choice == "on") for choice in options.layout_optimization]
    return list(together.values())


class Measuring:
    """The processes that measure, one after the other.

    Within it SIGTERM, by which a suite stops its parts, and Ctrl-C end the one that is there, and no other begins.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.stopped = 0
        """The signal that stopped it."""

    def __enter__(self) -> Measuring:
        self._before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self, number: int, _: object) -> None:
        """For SIGTERM and Ctrl-C: what was measured until then is kept."""
        self.stopped = number
        if self.process is not None:
            self.process.kill()

    def __call__(self, job: Job) -> list[dict[str, Any]]:
        """The records of a job, of which a later one takes the place of an earlier; what it did not come to has failed.

        Where a process dies, a heat that has had a few rounds by then keeps these records. Else, where the process has
        said by which variant it dies, another one measures the heat without that; where it has not, the heat is lost.
        Another process measures the heats behind it.
        """
        found: list[dict[str, Any]] = []
        while True:
            told, code, why = self._process(job)
            records, lost = [r for r in told if not r.get("lost")], [r for r in told if r.get("lost")]
            found += records
            if code == 0:
                return found
            last = max((record["heat"] for record in records), default=job.first - 1)
            rounds = max((len(r["rates"]) for r in records if r["heat"] == last and "rates" in r), default=job.rounds)
            if rounds < job.rounds:
                harness.say(f"{job.heats[last][0].model} has had {rounds} of {job.rounds} rounds: {why}.")
                job = replace(job, first=last + 1)
            elif lost and not self.stopped:
                found += lost
                job = _without(job, Variant(**lost[0]["variant"]), last + 1)
            else:
                last += 1
                found += _failed(job, range(last, last + 1), why)
                job = replace(job, first=last + 1)
            if self.stopped or code == REFUSED or job.first >= len(job.heats):
                break
            if job.until is not None and time.time() > job.until:
                why = harness.TIME_UP
                break
        return found + _failed(job, range(job.first, len(job.heats)), why)

    def _process(self, job: Job) -> tuple[list[dict[str, Any]], int, str]:
        """What a process has recorded, its exit code, and what became of it."""
        with tempfile.TemporaryDirectory() as folder:
            records, file = Path(folder) / "records.jsonl", Path(folder) / "job.json"
            replace(job, records=str(records)).write(file)
            # What `accelerate launch` told this process must not choose the precision of that one.
            environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
            with subprocess.Popen([*WORKER, str(file)], env=environment, stderr=subprocess.PIPE, text=True) as process:
                self.process = process
                if self.stopped:  # just now
                    process.kill()
                _, said = process.communicate()
            self.process = None
            lines = records.read_text().splitlines(keepends=True) if records.exists() else []
        # A process that is killed may leave half a line.
        found = [record for line in lines if line.endswith("\n") for record in json.loads(line)]
        if process.returncode and "Traceback" in said and not self.stopped:
            sys.stderr.write(said)
        why = (said.strip().splitlines() or ["it said nothing"])[-1].rstrip(".")
        if process.returncode < 0:
            why = f"its process was killed by {signal.Signals(-process.returncode).name}"
        if self.stopped:
            why = "the benchmark was stopped"
        return found, process.returncode, why


def _without(job: Job, variant: Variant, first: int) -> Job:
    """The job from a heat on, without a variant. If that is the reference, the next one takes its place."""
    heats = [[other for other in heat if other != variant] for heat in job.heats]
    rest = [other for heat in heats[first:] for other in heat]
    reference = rest[0] if variant == job.reference and rest else job.reference
    return replace(job, heats=heats, reference=reference, first=first if heats[first] else first + 1)


def _failed(job: Job, heats: Iterable[int], why: str) -> list[dict[str, Any]]:
    """Records of heats that no process came to."""
    return [
        {"heat": number, "variant": vars(variant), "failed": why}
        for number in heats if number < len(job.heats)
        for variant in job.heats[number]
    ]  # fmt: skip


def about(job: Job) -> str:
    """What is the same for all variants of a job."""
    return f"{job.precision}, batch {job.batch_size}, {job.image_size} px"


def rows_of(job: Job, records: Sequence[Mapping[str, Any]], ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows of a job: steps, failures, then ratios."""
    steps: dict[str, dict[str, Any]] = {}
    failed: dict[str, dict[str, Any]] = {}
    ratios: list[dict[str, Any]] = []
    common = {"precision": job.precision, "batch_size": job.batch_size, "image_size": job.image_size}
    for number in sorted({record["heat"] for record in records}):
        mine = {Variant(**r["variant"]): r for r in records if r["heat"] == number}
        rates = {variant: record["rates"] for variant, record in mine.items() if "failed" not in record}
        for variant, record in mine.items():
            # `layout_optimization` is left out where nothing is compiled.
            settings = {key: value for key, value in vars(variant).items() if value is not None}
            described = {"name": variant.name, "kind": "step", **settings, **common}
            if "failed" in record:
                failed.setdefault(variant.name, described | {"kind": "failed", "failed": record["failed"]})
            else:
                steps.setdefault(variant.name, described | costs(variant, record, job, ceilings))
        for variant, mine_rates in rates.items():
            if variant != job.reference and job.reference in rates:
                ratio = harness.ratio(mine_rates, rates[job.reference])
                steps[variant.name]["to_reference"] = figure(ratio["median"])
        ratios += [{"kind": "ratio", **common, **row} for row in compared(rates, job.reference)]
    # The reference takes part in every heat: measured once, it has not failed.
    return [*steps.values(), *(row for name, row in failed.items() if name not in steps), *ratios]


def costs(variant: Variant, record: Mapping[str, Any], job: Job, ceilings: Ceilings) -> dict[str, Any]:
    """Speed, and what that is beside the ceilings."""
    rates = record["rates"]
    rate, flop = float(np.median(rates)), record["flop"]
    found: dict[str, Any] = {
        **harness.spread(rates),
        "unit": "images/s",
        "ms_a_step": figure(1000 * job.batch_size / rate),
        "gigaflop_an_image": figure(flop / 1e9),
        "teraflop_per_second": figure(flop * rate / 1e12),
        "parameters": record["parameters"],
    }
    peak = ceilings.peak(job.precision)
    if peak is not None:
        found["share_of_matmul"] = figure(flop * rate / peak)
    if record["mixer"] is not None:
        mixer = flops.Mixer(**record["mixer"])
        compiled = MODES[variant.mode] is not None
        moved = mixer.moved(job.image_size, DTYPES[job.precision].itemsize, compiled=compiled)
        found |= {"bytes_an_image": moved, "share_of_copy": figure(moved * rate / ceilings.bandwidth)}
        if peak is not None:
            found["roofline_share"] = figure(rate * flops.least_seconds(flop, moved, peak, ceilings.bandwidth))
    if "peak_bytes" in record:
        found["peak_gib"] = round(record["peak_bytes"] / 2**30, 2)
    return found


def compared(rates: Mapping[Variant, Sequence[float]], reference: Variant) -> Iterator[dict[str, Any]]:
    """Ratios of a heat: compiled and deterministic to eager in the same layout, ours to timm's, and each to the
    reference if that is yet another one."""
    for variant, mine in rates.items():
        others = {
            Variant(variant.model, "eager", variant.layout): "eager",
            replace(variant, model=f"timm:{variant.model}"): "timm",
        }
        for other, to in ({reference: "reference"} | others).items():
            if other in rates and other != variant:
                ratio = harness.ratio(mine, rates[other])
                yield {"name": f"{variant.name} / {other.name}", "to": to, "of": variant.name, **ratio, "unit": "×"}


def report(job: Job, rows: Sequence[Mapping[str, Any]]) -> None:
    """A job's tables, and a sentence for what is not in them."""
    steps = [row for row in rows if row["kind"] == "step"]
    if steps:
        columns.show(f"Training steps, {about(job)}", steps)
    ratios = [row for row in rows if row["kind"] == "ratio" and row["to"] != "reference"]
    if ratios:
        harness.show(f"Ratios, {about(job)}", ratios)
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == "failed":
            failed.setdefault(row["failed"], []).append(row["name"])
    for why, names in failed.items():
        harness.say(f"Left out, {about(job)}: {'; '.join(names)}: {why}.")


def main(options: Options) -> None:
    """Measure, print and write."""
    until = None if options.seconds is None else time.time() + options.seconds
    gpu = torch.cuda.is_available()
    options = options.filled(gpu=gpu)
    for model in options.models:
        networks.check(model)
    harness.begin(options.rounds)
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    threads = options.threads or available_cores()
    torch.set_num_threads(threads)
    numbers = list(dict.fromkeys(numbers_of(precision, device.type) for precision in options.precisions))
    rows: list[dict[str, Any]] = []
    with harness.writing("step", rows, options.out, wandb=options.wandb, tiny=options.tiny):
        ceilings = measure(device, numbers, options.rounds, threads, tiny=options.tiny)
        rows += ceilings.rows()
        harness.show(f"Ceilings of {harness.hardware_name(harness.machine())}", rows)
        with Measuring() as measuring:
            for precision, batch_size, image_size in product(
                options.precisions, options.batch_sizes, options.image_sizes
            ):
                job = Job(
                    precision, batch_size, image_size, heats(options), Variant(options.models[0], "eager", "NCHW"),
                    options.optimizer, options.rounds, options.steps, threads, until, "",
                )  # fmt: skip
                if measuring.stopped:
                    harness.say(f"{about(job)} is left out: the benchmark was stopped.")
                    continue
                harness.say(f"{about(job)} …")
                found = rows_of(job, measuring(job), ceilings)
                report(job, found)
                rows += found
        if measuring.stopped:
            sys.exit(128 + measuring.stopped)


if __name__ == "__main__":
    script.run(main, Options)
