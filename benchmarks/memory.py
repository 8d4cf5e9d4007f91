"""Peak memory of training steps, measured beside what `fastddr plan` predicts, one fresh process a trial.

    python benchmarks/memory.py                      # on a GPU: six models, crops, batches, precisions, recomputation
    python benchmarks/memory.py --cards 4 6 8 12 16 24   # and the largest batch on smaller cards than this, emulated
    python benchmarks/memory.py --tiny               # a rehearsal on a CPU, where the witness is the CPU's allocator
    python tests/card/run.py python benchmarks/memory.py --image-sizes 256 --batch-sizes 4 --precisions bf16 fp32
                                                     # PyTorch's CUDA allocator without a GPU: see docs/memory.md

On a GPU a trial is some steps of `fastddr.step.training_step`; measured are the most that PyTorch's allocator gave out
and reserved, and what the driver says is used beyond that (the context). Predicted is what the replayed allocator
gives out and reserves for the same step's tape, counted as PyTorch counts, without any allowance. On a CPU the measured
side is what PyTorch's CPU allocator was asked for (`torch.profiler` with `profile_memory`), the scratch of CPU kernels
included: it rehearses the benchmark and says nothing of a GPU's workspaces. Predicted is the tape's sum there.

`--cards` caps the allocator (`set_per_process_memory_fraction`) at a card's size less the context, with what libraries
load into it in a first step, and finds by bisection the largest batch whose steps go through, and of the report's
ResNet the largest crop, beside what `fastddr plan` says of such a card. The case of the 2022 report, a ResNet of 40
layers on 512 px in float32 with a stem of stride 1, is among the default configurations; `--resnet.stem standard` and
bf16 cure it.

Rows of `kind` memory: median, low and high are the measured peak in GiB over the steps; `predicted_gib`, `error` (of
predicted to measured), and the predicted kinds, in which rests of blocks are not. The last rows are the median and the
worst error.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import product
from typing import Any, Literal

import harness
import networks
import numpy as np
import script
import torch
from torch import nn

from fastddr.errors import UserError
from fastddr.memory import allowances
from fastddr.memory.allocator import replay
from fastddr.memory.allowances import Allowance
from fastddr.memory.predicting import COMPILED, goes_through, usable
from fastddr.memory.tape import KINDS, Tape
from fastddr.memory.tracing import BATCHES, Steps, Training, trace
from fastddr.meters import is_out_of_memory

GIB = 2**30
#: Steps of a trial, each with a peak of its own.
REPEATS = 5
#: Ours, the report's, and two strangers.
MODELS = ("convmixer-512-12-k9-p8", "cnn", "resnet,depth=40", "resnet,depth=40,stem=stride1", "timm:resnet50",
          "timm:convnext_tiny")  # fmt: skip
#: Photographs at once where the largest crop is looked for, as the report had them.
CROP_BATCH = 16
#: Of the search: steps of a crop, and where it ends.
STEP, MOST_SIDE, MOST_BATCH = 32, 2048, 1024
TINY = ("convmixer-16-2-k3-p8", "cnn,blocks=2,width=8", "resnet,depth=10,width=16")


@dataclass(frozen=True)
class Trial:
    """One process."""

    model: str
    image_size: int
    batch_size: int
    precision: str
    recomputed: bool
    compiled: bool = False
    limit_gib: float | None = None
    """Of an emulated card; None: the whole one."""

    @property
    def name(self) -> str:
        """In tables."""
        more = ", recomputed" * self.recomputed + ", compiled" * self.compiled
        return f"{self.model}, {self.image_size} px, batch {self.batch_size}, {self.precision}{more}"

    @property
    def steps(self) -> Steps:
        """What is traced for it."""
        return Steps(self.image_size, networks.CLASSES, self.precision, recomputed=self.recomputed)

    def make(self, device: torch.device | None = None) -> nn.Module:
        """The network, on a device, in the order of maps in which it is trained there; without one, to be traced."""
        if device is None:
            return networks.build(self.model, self.image_size).to(memory_format=torch.channels_last)
        return networks.as_trained(self.model, self.image_size, device)


@dataclass
class Options(script.Output):
    """Measure peak memory."""

    models: tuple[str, ...] = ()
    """Networks, as `benchmarks/networks.py` names them."""
    image_sizes: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    """fp32, bf16, fp16."""
    recomputed: tuple[bool, ...] = ()
    """With activation checkpointing of each block; by default without and, on a GPU, with."""
    compiled: tuple[bool, ...] = (False,)
    """Under torch.compile, beside the plan's estimate of it, which is no part of the errors in the last rows."""
    cards: tuple[float, ...] = ()
    """Sizes in GiB of cards to emulate, on a GPU that is no smaller."""
    tiny: bool = False
    """Small models on small images: a rehearsal in a minute."""


def trials(options: Options, *, gpu: bool) -> list[Trial]:
    """All configurations; on a GPU at least sixty by default."""
    small = options.tiny or not gpu
    models = options.models or (TINY if small else MODELS)
    sizes = options.image_sizes or ((64, 96) if small else (256, 512))
    batches = options.batch_sizes or ((16,) if small else (8, 16, 32))
    precisions = options.precisions or (("fp32",) if small else ("fp32", "bf16"))
    recomputed = options.recomputed or ((False,) if small else (False, True))
    for model in models:
        networks.check(model)
    return [Trial(*chosen) for chosen in product(models, sizes, batches, precisions, recomputed, options.compiled)]


# ------------------------------------------------------------------------------------------------- the trial's process


def measured(trial: Trial) -> dict[str, Any]:
    """What this process found: bytes allocated and reserved at the peak; on a CPU allocated alone.

    Raises:
        torch.OutOfMemoryError: the emulated card is too small.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        if trial.limit_gib is not None:
            cap(trial, device)
    network = trial.make(device)
    training = Training(network, trial.steps, trial.batch_size)
    if trial.compiled:
        training.model = torch.compile(training.model)
    training.begin()
    training.step(0)  # what libraries keep once, they keep now
    if not gpu:
        return {"allocated": [on_cpu(training) for _ in range(REPEATS)]}
    allocated = []
    for number in range(REPEATS):
        torch.cuda.reset_peak_memory_stats(device)
        training.step(number)
        torch.cuda.synchronize(device)
        allocated.append(torch.cuda.max_memory_allocated(device))
    return {
        "allocated": allocated,
        "reserved": torch.cuda.max_memory_reserved(device),
        "context": context(device)[0],
    }


def context(device: torch.device) -> tuple[int, int]:
    """Bytes of the card: used beyond what PyTorch's allocator holds, and all there are."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device), total


def cap(trial: Trial, device: torch.device) -> None:
    """Leave the allocator what a card of the trial's size would have left for it.

    Raises:
        torch.OutOfMemoryError: that is nothing.
    """
    # Libraries load their kernels when they are first called, and they too are in the context.
    _first_step(trial, device)
    gc.collect()  # a model in half precision is freed by nothing else
    torch.cuda.empty_cache()
    assert trial.limit_gib is not None
    taken, total = context(device)
    share = (trial.limit_gib * GIB - taken) / total
    if share <= 0:
        raise torch.OutOfMemoryError("out of memory: the context alone is larger")
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def _first_step(trial: Trial, device: torch.device) -> None:
    """A step of few of its photographs; of BatchNorm's smallest maps one alone would be too few."""
    training = Training(trial.make(device), trial.steps, min(trial.batch_size, 2))
    training.begin()
    training.step(0)


def on_cpu(training: Training) -> int:
    """Bytes that the CPU's allocator held at most in a step: what was there before, and its own record of the rest."""
    from torch.profiler import ProfilerActivity, profile

    kept = [*training.network.parameters(), *training.network.buffers()]
    kept += [value for state in training.optimizer.state.values() for value in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training.step(1)
    now = most = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return int(most)


# ---------------------------------------------------------------------------------------------- the benchmark's process


def in_process(trial: Trial) -> dict[str, Any]:
    """The trial in a process of its own; `failed` with the reason where it did not go through."""
    command = [sys.executable, __file__, "--trial", json.dumps(asdict(trial))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    return {"failed": lines[-1][:200]}


def searched(works: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` that works, within a sixteenth, by doubling and bisection; 0 if none does."""
    low, high = 0, 1
    while high <= most and works(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def works(trial: Trial) -> bool:
    """Whether its steps go through on the emulated card.

    Raises:
        RuntimeError: they failed, but not for want of memory.
    """
    reason: str = in_process(trial).get("failed", "")
    if reason and "out of memory" not in reason.lower() and not is_out_of_memory(RuntimeError(reason)):
        raise RuntimeError(f"{trial.name}: {reason}")
    return not reason


def _hide_card() -> None:
    """Of the process that traces: every step of an optimizer would ask for the card, also that of a trace."""
    harness.end_with_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@cache
def _tracer() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_hide_card)


def _trace(trial: Trial, batches: Sequence[int]) -> Tape:
    return trace(trial.make, trial.steps, batches)


def traced(trial: Trial, batches: Sequence[int] = BATCHES) -> Tape:
    """The tape of its step.

    Where there is a card, from a process that does not see it: here a trace would take a context on it, which trials
    would count as theirs, and which they could not use.
    """
    if torch.cuda.is_available():
        return _tracer().submit(_trace, trial, batches).result()
    return _trace(trial, batches)


@lru_cache(maxsize=64)
def _tape(trial: Trial) -> Tape:
    return estimated(traced(trial, (2, 3)), compiled=trial.compiled)


def estimated(tape: Tape, *, compiled: bool) -> Tape:
    """The tape of an eager step, or what the plan makes of it for a compiled one."""
    if not compiled:
        return tape
    kept = [kind == "activations" for kind in tape.kinds]
    return replace(tape, each=[int(e * COMPILED) if k else e for e, k in zip(tape.each, kept, strict=True)])


def predicted(trial: Trial, allowance: Allowance) -> bool:
    """Whether `fastddr plan` would say that it fits on the emulated card, where no loader takes any of it."""
    assert trial.limit_gib is not None
    room = usable(trial.limit_gib, allowance) - allowance.workspaces - allowance.context
    return goes_through(_tape(replace(trial, batch_size=0, limit_gib=None)), trial.batch_size, room)


def largest(trial: Trial, what: Literal["batch", "crop"], allowance: Allowance) -> dict[str, Any]:
    """The largest batch, or the largest crop in steps of 32 px, found and predicted, as a row."""

    def sized(count: int) -> Trial:
        return replace(trial, **({"batch_size": count} if what == "batch" else {"image_size": STEP * count}))

    most, unit = (MOST_BATCH, 1) if what == "batch" else (MOST_SIDE // STEP, STEP)
    same = f"{trial.image_size} px" if what == "batch" else f"batch {trial.batch_size}"
    about = {
        "name": f"largest {what}, {trial.limit_gib:g} GiB, {trial.model}, {same}, {trial.precision}", "kind": "largest",
        "model": trial.model, "precision": trial.precision, "card_gib": trial.limit_gib,
        **({"image_size": trial.image_size} if what == "batch" else {"batch_size": trial.batch_size}),
    }  # fmt: skip
    try:
        found = unit * searched(lambda count: works(sized(count)), most)
    except RuntimeError as problem:
        # One model that cannot run must not take the figures of the others along.
        return about | {"failed": str(problem)}
    alone = unit * searched(lambda count: predicted(sized(count), allowance), most)
    return about | {
        "median": found, "low": found, "high": found, "n": 1, "unit": "photographs" if what == "batch" else "px",
        "predicted": alone, "share": alone / found if found else None,
    }  # fmt: skip


def row(trial: Trial, *, gpu: bool) -> dict[str, Any]:
    """A configuration's measurement beside its prediction."""
    described = {"name": trial.name, "kind": "memory", "model": trial.model, "image_size": trial.image_size,
                 "batch_size": trial.batch_size, "precision": trial.precision,
                 "witness": "PyTorch's CUDA allocator" if gpu else "CPU allocator's record"}  # fmt: skip
    found = in_process(trial)
    if "failed" in found:
        return described | {"failed": found["failed"]}
    tape = estimated(traced(trial), compiled=trial.compiled)
    peak = tape.peak(trial.batch_size)
    spread = harness.spread([size / GIB for size in found["allocated"]])
    replayed = replay(tape, trial.batch_size) if gpu else None
    # PyTorch counts as given out what was too little to cut off a block; the CPU's record has what was asked for.
    predicted = peak.held if replayed is None else replayed.peak
    described |= spread | {"unit": "GiB", "predicted_gib": predicted / GIB}
    if trial.compiled:
        described["estimated"] = True
    described["error"] = predicted / GIB / spread["median"] - 1
    described |= {f"{kind.replace(' ', '_')}_gib": peak.kinds[kind] / GIB for kind in KINDS if peak.kinds[kind]}
    if replayed is not None:
        described |= {"reserved_gib": found["reserved"] / GIB,
                      "predicted_reserved_gib": replayed.most / GIB}  # fmt: skip
        if not os.environ.get("FASTDDR_PRETENDED_CARD"):  # whose context is made up
            described["context_gib"] = found["context"] / GIB
    return described


def errors(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and worst error of the prediction over all configurations that have one; an estimate is none."""
    traced = [each for each in rows if "error" in each and not each.get("estimated")]
    found = [abs(each["error"]) for each in traced]
    if len(found) < 5:
        return []
    worst = max(traced, key=lambda each: abs(each["error"]))
    about = {"kind": "error", "unit": "%", "configurations": len(found)}
    spread = harness.spread([100 * value for value in found])
    most = 100 * float(np.max(found))
    return [
        {"name": "median error of the prediction", **about, **spread},
        {"name": f"worst error: {worst['name']}", **about, "median": most, "low": most, "high": most, "n": len(found)},
    ]


def main(options: Options) -> None:
    """Measure, print and write."""
    gpu = torch.cuda.is_available()
    if options.cards and not gpu:
        raise UserError("--cards emulates cards on a GPU, and PyTorch sees none here.")
    for size in options.cards:
        # Of its properties, which leave no context on it: trials would count one as theirs.
        whole = torch.cuda.get_device_properties(0).total_memory / GIB
        if not 0 < size <= whole:
            raise UserError(f"--cards {size:g}: give sizes above 0 and up to this card's own {whole:.2f} GiB.")
    harness.begin()
    rows: list[dict[str, Any]] = []
    with harness.writing("memory", rows, options.out, wandb=options.wandb, tiny=options.tiny):
        _measure(options, rows, gpu=gpu)
        shown = [each for each in rows if "failed" not in each]
        harness.show(f"Peak memory, {harness.hardware_name(harness.machine())}", shown, ("predicted_gib", "error"))
        for each in rows:
            if "failed" in each:
                harness.say(f"{each['name']} failed: {each['failed']}")


def _measure(options: Options, rows: list[dict[str, Any]], *, gpu: bool) -> None:
    for trial in trials(options, gpu=gpu):
        rows.append(row(trial, gpu=gpu))
    allowance = allowances.load(torch.cuda.get_device_name(0) if gpu else None)
    for size, model, precision in product(
        options.cards, options.models or MODELS, options.precisions or ("fp32", "bf16")
    ):
        for side in options.image_sizes or (256, 512):
            rows.append(largest(Trial(model, side, 1, precision, False, limit_gib=size), "batch", allowance))
        if "depth" in model or options.models:  # the case of the report, and what is asked for
            rows.append(largest(Trial(model, 0, CROP_BATCH, precision, False, limit_gib=size), "crop", allowance))
    rows += errors(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trial"]:
        harness.end_with_parent()
        print(json.dumps(measured(Trial(**json.loads(sys.argv[2])))))
        sys.exit(0)
    script.run(main, Options)
