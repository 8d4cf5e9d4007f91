"""Variants of the training step, and the process that measures those of one precision, batch and image size.

`step.py` starts it as `python benchmarks/variants.py JOB.json`: Accelerate's precision is a process's for good. It
trains by `fastddr.step.training_step`, set up by `fastddr.runtime` as training is, on one batch of random images that
stays on the device. Models that are compared with each other are a heat: all their variants, and the reference, are
warmed up (compiled, cuDNN's choices made), then take turns; then they are freed, so that one heat's graphs and
activations do not take the memory of the next. What a heat has found is appended to the job's file of records after
each round from the third on, and a later record takes the place of an earlier one: a process that dies or is stopped
loses a round, or the heat that was still warming up. After some errors of CUDA, as of an illegal address, nothing
works any more in a process: the card is asked after each, and where it does not answer the process says which variant
that was and ends itself, and `step.py` starts another one for the others.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flops
import harness
import networks
import torch
from timing import Clock
from torch import nn

import fastddr
from fastddr import losses, optimizers, runtime
from fastddr.errors import UserError
from fastddr.loaders.base import Batch
from fastddr.meters import is_out_of_memory
from fastddr.runtime import Runtime
from fastddr.step import Tally, training_step

#: Eagerly, as `fastddr train --deterministic` computes.
DETERMINISTIC = "deterministic"
#: How a network is run, and `torch.compile`'s name of that.
MODES = {
    "eager": None,
    DETERMINISTIC: None,
    "compile": "default",
    "max-autotune": "max-autotune",
    "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs",
}
#: Steps of the warm-up after the first, in which compiling and cuDNN's trials happen. CUDA graphs are recorded in them.
_WARM = 4
#: What a variant may fail with: PyTorch, its compilers, timm and torchvision raise almost anything.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, OSError, ImportError)
#: Exit code where the job itself is refused, as every heat of it would be.
REFUSED = 2
#: More variants of one network than this would not be compiled but run eagerly, without a word.
_RECOMPILATIONS = 64


@dataclass(frozen=True)
class Variant:
    """One way to run a network."""

    model: str
    mode: str
    layout: str
    layout_optimization: bool | None = None
    """Whether Inductor may choose another layout than the network's; None where nothing is compiled."""

    @property
    def name(self) -> str:
        """In tables."""
        kept = ", layout kept" if self.layout_optimization is False else ""
        return f"{self.model}, {self.mode}, {self.layout}{kept}"


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    precision: str
    batch_size: int
    image_size: int
    heats: list[list[Variant]]
    reference: Variant
    """Takes part in every heat."""
    optimizer: str
    rounds: int
    steps: int
    threads: int
    until: float | None
    """Time of the day, as `time.time` has it, after which no variant is begun."""
    records: str
    """File of the records, a JSON list a line: those of a heat so far."""
    first: int = 0
    """Heat to begin with."""

    def write(self, file: Path) -> None:
        """For the process to read."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Job:
        """What `write` wrote."""
        found = json.loads(file.read_text(encoding="utf-8"))
        found["heats"] = [[Variant(**variant) for variant in heat] for heat in found["heats"]]
        return cls(**found | {"reference": Variant(**found["reference"])})


def reason(problem: BaseException) -> str:
    """The first line of an error, with its kind unless it is a user's."""
    lines = str(problem).strip().splitlines() or [""]
    said = lines[0].strip().rstrip(".:")
    if isinstance(problem, UserError):
        return said
    return f"{type(problem).__name__}{': ' if said else ''}{said[:200]}"


class Lost(Exception):
    """The process cannot go on after what a variant did."""

    def __init__(self, variant: Variant, why: str) -> None:
        super().__init__(f"{variant.name}: {why}")
        self.variant, self.why = variant, why


def _loses(problem: BaseException) -> bool:
    """Whether it is an error of CUDA that every later call would meet again."""
    # torch.AcceleratorError, where PyTorch has it, says the same. So do errors of cuBLAS and of a launch, which spoil
    # nothing, and want of memory.
    return "CUDA error" in str(problem) and not is_out_of_memory(problem) and not _answers()


def _answers() -> bool:
    """Whether the card still computes."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(2, device="cuda").sum().item() == 2)
    except RuntimeError:
        return False


def compiled(network: nn.Module, variant: Variant) -> nn.Module:
    """The network under `torch.compile`, or as it is where it runs eagerly.

    The layout optimization is an option of the call and not of the process: two calls with equal options are one to
    Dynamo, which would run the second variant by the first one's code.
    """
    mode = MODES[variant.mode]
    if mode is None:
        return network
    from torch._inductor import list_mode_options

    options = {**list_mode_options(mode), "layout_optimization": bool(variant.layout_optimization)}
    return torch.compile(network, options=options)


@contextmanager
def numerics(variant: Variant, device: torch.device) -> Iterator[None]:
    """How PyTorch computes for a variant: as training does, by default or with `--deterministic`."""
    if variant.mode != DETERMINISTIC:
        yield
        return
    cpu = device.type == "cpu"
    runtime.numerics(True, cpu)
    try:
        yield
    finally:
        runtime.numerics(False, cpu)


def _graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Running:
    """A variant that is ready to take its turns."""

    def __init__(self, variant: Variant, job: Job, run: Runtime) -> None:
        self.variant, self.job, self.run = variant, job, run
        self.clock = Clock(run.device)
        self.gpu = run.device.type == "cuda"
        before = torch.cuda.memory_allocated(run.device) if self.gpu else 0
        torch.manual_seed(0)
        network = networks.build(variant.model, job.image_size)
        mixer = networks.settings_of(variant.model, network)
        self.about: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flop": flops.training(network, job.image_size),
            "mixer": None if mixer is None else asdict(mixer),
        }
        network = networks.lay_out(network, variant.layout, run.device).train()
        # A small rate: one batch again and again must not drive the weights anywhere.
        optimizer = optimizers.build(network, job.optimizer, lr=1e-5)
        self.network, self.optimizer = run.accelerator.prepare(network, optimizer)
        # It would hold on to all networks of the process; nothing that a step does asks it for them.
        run.accelerator.free_memory()
        eager = MODES[variant.mode] is None
        self.network = compiled(self.network, variant)
        self.parts = optimizers.Parts.of(self.network)
        self.criterion, self.tally = losses.CrossEntropy(), Tally.zeros(run.device)
        self.batch = self._batch()
        graphs = _graphs()
        self._step()
        if not eager and _graphs() == graphs:
            raise RuntimeError("nothing was compiled for it")
        if self.gpu:
            self.clock.synchronize()
            torch.cuda.reset_peak_memory_stats(run.device)
        for _ in range(_WARM):
            self._step()
        self.clock.synchronize()
        if self.gpu:
            self.about["peak_bytes"] = torch.cuda.max_memory_allocated(run.device) - before

    def _batch(self) -> Batch:
        size, number, device = self.job.image_size, self.job.batch_size, self.run.device
        image = torch.randn(number, 3, size, size, device=device).to(self.run.image_dtype)
        return Batch(
            image=image.contiguous(memory_format=networks.LAYOUTS[self.variant.layout]),
            grade=torch.arange(number, device=device) % networks.CLASSES,
            id=torch.arange(number, device=device),
            valid=torch.ones(number, dtype=torch.bool, device=device),
        )

    def _step(self) -> None:
        training_step(
            self.run.accelerator, self.network, [self.batch], self.criterion, self.optimizer, self.tally,
            parts=self.parts,
        )  # fmt: skip

    def __call__(self) -> float:
        """Images a second of a turn, after one step that is not counted."""
        self._step()
        return self.job.batch_size / self.clock.seconds(self._step, self.job.steps)


class Heat:
    """Variants that take turns."""

    def __init__(self, number: int, job: Job, run: Runtime, say: Callable[[str], None]) -> None:
        self.number, self.job, self.run, self.say = number, job, run, say
        # The reference is first: without it the others have nothing to be compared with.
        self.variants = list(dict.fromkeys([job.reference, *job.heats[number]]))
        self.running: dict[str, Running] = {}
        self.failed: dict[str, str] = {}

    def _leave_out(self, variant: Variant, why: str) -> None:
        self.failed[variant.name] = why
        self.running.pop(variant.name, None)
        self.say(f"{variant.name} is left out: {why}.")

    def warm(self) -> None:
        """Build and compile all, one after the other."""
        for variant in self.variants:
            if self.job.until is not None and time.time() > self.job.until:
                self._leave_out(variant, harness.TIME_UP)
                continue
            began, why = time.perf_counter(), None
            try:
                with numerics(variant, self.run.device):
                    self.running[variant.name] = Running(variant, self.job, self.run)
            except (UserError, *FAILURES) as problem:
                why = reason(problem)
                if _loses(problem):
                    raise Lost(variant, why) from problem
                if isinstance(problem, torch.OutOfMemoryError) and self.running:
                    why += f" (beside {len(self.running)} other variants of this heat)"
            if why is None:
                self.say(f"  {variant.name} has warmed up in {time.perf_counter() - began:.0f} s")
            else:
                self._leave_out(variant, why)
            # After the except: its error holds the frames, and these the tensors.
            self._free()

    def _turn(self, variant: Variant) -> float:
        running = self.running.get(variant.name)
        if running is None:
            return float("nan")
        try:
            with numerics(variant, self.run.device):
                return running()
        except FAILURES as problem:
            if _loses(problem):
                raise Lost(variant, reason(problem)) from problem
            self._leave_out(variant, reason(problem))
            return float("nan")

    def race(self, keep: Callable[[list[dict[str, Any]]], None] = lambda records: None) -> list[dict[str, Any]]:
        """A record of each variant; `keep` is given those of the rounds so far, once there are a few."""
        turns = {
            variant.name: partial(self._turn, variant) for variant in self.variants if variant.name in self.running
        }
        rates: dict[str, list[float]] = {}

        def whole(number: int) -> None:
            if harness.LEAST_ROUNDS <= number < self.job.rounds:
                keep(self._records(rates))

        # What compiles now would be timed: it fails instead, and is said.
        with torch.compiler.set_stance("fail_on_recompile"):
            harness.interleaved(turns, self.job.rounds, whole, found=rates)
        return self._records(rates)

    def _records(self, rates: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        records = []
        for variant in self.variants:
            record: dict[str, Any] = {"heat": self.number, "variant": asdict(variant)}
            if variant.name in self.failed:
                record["failed"] = self.failed[variant.name]
            else:
                record |= {"rates": list(rates[variant.name]), **self.running[variant.name].about}
            records.append(record)
        return records

    def _free(self) -> None:
        gc.collect()
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free all of them and what was compiled for them."""
        self.running.clear()
        torch._dynamo.reset()
        self._free()


def main(file: Path) -> None:
    """Measure a job's heats."""
    job = Job.read(file)
    config = replace(
        fastddr.load_preset("quickstart"),
        precision=job.precision, batch_size=job.batch_size, image_size=job.image_size, threads=job.threads,
    )  # fmt: skip
    if any(variant.mode == DETERMINISTIC for heat in job.heats for variant in heat):
        # cuBLAS reads it once, when it first needs its workspace. On Hopper it is what PyTorch takes by itself.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run = runtime.start(config)
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def keep(records: list[dict[str, Any]]) -> None:
        with Path(job.records).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(records) + "\n")

    for number in range(job.first, len(job.heats)):
        heat = Heat(number, job, run, partial(print, flush=True))
        try:
            heat.warm()
            keep(heat.race(keep))
        except Lost as lost:
            keep([{"heat": number, "variant": asdict(lost.variant), "failed": lost.why, "lost": True}])
            raise
        heat.close()


if __name__ == "__main__":
    harness.end_with_parent()
    try:
        main(Path(sys.argv[1]))
    except UserError as mistake:
        # Its parent says it.
        print(mistake, file=sys.stderr)
        sys.exit(REFUSED)
    except Lost as problem:
        print(problem, file=sys.stderr, flush=True)
        # At once: to free what is on the card would fail as well, and hide what is said here.
        os._exit(1)
