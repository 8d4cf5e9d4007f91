"""Loaders that take turns: each lives in a process group of its own and is halted while another runs (`halted`).

A turn measures a loader in full swing: what it had made before it was halted is taken first and not timed.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import harness
import script
import stages
import torch
from halted import Halted
from peers import PEERS

from fastddr import loaders
from fastddr.errors import UserError
from fastddr.loaders import Task, dali_decoder

#: fastddr's own loaders that can be measured, and which options each heeds; `Peer.options` has those of others.
OURS: dict[str, tuple[str, ...]] = {
    "dali": ("workers", "prefetch"), "resident": ("workers", "store_gib"), "torchvision": ("workers", "prefetch"),
    "replay": (),
}  # fmt: skip
STORES = ("auto", "vram", "ram", "mmap")
#: How the value of an option is written.
_VALUES = {"workers": r"\d+", "prefetch": r"[1-9]\d*", "store_gib": r"\d+(\.\d+)?"}


@dataclass(frozen=True)
class Spec:
    """A loader or a peer, and its options."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From `NAME[:OPTION[,OPTION]]`, an option being `key=value` or a kind of store.

        Raises:
            UserError: there is no such loader, or it has no such option.
        """
        name, given = script.named("--loaders", text, (*OURS, *PEERS))
        known = OURS[name] if name in OURS else PEERS[name].options
        options = {}
        for key, value in given.items():
            if name == "resident" and key in STORES and not value:
                options["store"] = key
            elif key in known and re.fullmatch(_VALUES[key], value):
                options[key] = value
            else:
                raise UserError(f"--loaders {text}: {_offered(name, known)}.")
        if "prefetch" in options and options.get("workers") == "0":
            raise UserError(f"--loaders {text}: without workers nothing is made ahead; leave prefetch out.")
        return cls(name, options)

    @property
    def label(self) -> str:
        """How the loader is called in tables."""
        said = [value if key == "store" else f"{key}={value}" for key, value in self.options.items()]
        return ", ".join([self.name, *said])

    def task(self, task: Task) -> Task:
        """The task with this loader's options."""
        changes: dict[str, Any] = {}
        if "workers" in self.options:
            changes["threads"] = int(self.options["workers"])
        if "prefetch" in self.options:
            changes["prefetch"] = int(self.options["prefetch"])
        if "store" in self.options:
            changes["store"] = self.options["store"]
        if "store_gib" in self.options:
            changes["budget"] = int(float(self.options["store_gib"]) * 2**30)
        return replace(task, **changes)

    def missing(self, task: Task) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if self.name in PEERS:
            return PEERS[self.name].missing(task)
        if self.name == "dali" and not dali_decoder.installed():
            return "NVIDIA DALI is not installed; see the README"
        return None


def _offered(name: str, known: Sequence[str]) -> str:
    """The options of a loader, for whoever gave another."""
    if not known:
        return f"{name} has no options"
    forms = [f"{key}={'X' if key == 'store_gib' else 'N'}" for key in known]
    return f"options of {name} are {', '.join([*forms, *(STORES if name == 'resident' else ())])}; N is a whole number"


class Turn(NamedTuple):
    """What one turn of a loader came to."""

    images: int
    seconds: float
    cpu: float
    """Seconds of processor time of the whole process group."""
    others: float
    """Seconds of processor time of everything else on the machine."""

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


class Warm(NamedTuple):
    """What the warm-up came to."""

    first_epoch: float | None
    """Seconds of the first epoch, of loaders that keep what they decode."""
    vram: int | None
    """Most bytes of the GPU that were taken since its context was there."""


# ------------------------------------------------------------------------------------------------- the loader's process


class _Source:
    """What a loader's process does when it is asked."""

    def __init__(self, spec: Spec, task: Task) -> None:
        self.spec, self.task = spec, task
        self.gpu = task.device.type == "cuda"
        self.free = self._free()
        self.peer = PEERS[spec.name](task) if spec.name in PEERS else None
        self.loader: Any = None if self.peer is not None else loaders.build(spec.name, task)
        self.stream: Generator[int, None, None] | None = None
        # Batches that may be ready when a turn begins, and one more; and those that workers bring all at once.
        each, ahead = spec.name == "torchvision" if self.peer is None else self.peer.ahead_each, task.prefetch or 2
        most = ahead * task.threads if each else max(ahead + task.threads, 2 * task.threads)
        self.ready, self.burst = max(most, 4) + 1, max(task.threads, 1)

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.task.device)[0] if self.gpu else 0

    def _sizes(self) -> Generator[int, None, None]:
        if self.peer is not None:
            for images in self.peer.batches():
                yield len(images)
        else:
            for epoch in itertools.count():
                for batch in self.loader.epoch(epoch):
                    yield len(batch.image)

    def _next(self, stream: Generator[int, None, None] | None = None) -> int:
        if stream is None:
            self.stream = stream = self.stream or self._sizes()
        return next(stream)

    def _synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.task.device)

    def warm(self) -> Warm:
        """One whole epoch of a loader that keeps what it decodes; of any other, some batches."""
        began, images, least = time.perf_counter(), 0, self.free
        keeps = self.spec.name == "resident"
        wanted = len(self.task.ids) if keeps else 2 * self.ready * self.task.batch_size
        while images < wanted:
            images += self._next()
            least = min(least, self._free())
            # An epoch leaves out its last, partial batch.
            if keeps and wanted - images < self.task.batch_size:
                break
        self._synchronize()
        took = time.perf_counter() - began if keeps else None
        for _ in range(self.ready):
            self._next()
            least = min(least, self._free())
        return Warm(took, self.free - least if self.gpu else None)

    def turn(self, seconds: float) -> Turn:
        """Batches for so many seconds, or a little longer, until all workers have brought as many."""
        return self._timed(seconds, None)

    def raw(self, seconds: float) -> Turn:
        """The same, of a resident loader's store alone: windows in uint8, neither warped nor coloured."""
        self._rest()
        windows = map(self.loader.raw_windows, itertools.count())
        return self._timed(seconds, (len(images) for epoch in windows for images in epoch))

    def _timed(self, seconds: float, stream: Generator[int, None, None] | None) -> Turn:
        for _ in range(self.ready):
            self._next(stream)
        self._synchronize()
        group = os.getpgid(0)
        cpu, busy, began = harness.cpu_seconds(group), harness.busy_seconds(), time.perf_counter()
        images, batches = 0, 0
        while time.perf_counter() - began < seconds or batches % self.burst:
            images += self._next(stream)
            batches += 1
        self._synchronize()
        took = time.perf_counter() - began
        cpu = harness.cpu_seconds(group) - cpu
        return Turn(images, took, cpu, max(harness.busy_seconds() - busy - cpu, 0.0))

    def stages(self, rate: float, seconds: float) -> stages.Stages | None:
        """What stops it, by its stages; None of a loader of which that is not known."""
        self._rest()
        return None if self.loader is None else stages.of(self.loader, rate, seconds)

    def kernel(self, seconds: float) -> list[float] | None:
        """Images a second of the kernel alone, of a store in the GPU's memory; None of any other loader."""
        if not self.gpu or self.loader is None or self.loader.task.store != "vram":
            return None
        self._rest()
        return stages.kernel(self.loader, seconds)

    def _rest(self) -> None:
        """End the epoch that is under way."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def close(self) -> None:
        """Ends the loader."""
        self._rest()
        (self.peer or self.loader).close()


def _source(spec: Spec, task: Task) -> _Source:
    # In its own process and not in the benchmark's: some peers catch signals as soon as they are imported.
    missing = spec.missing(task)
    if missing is not None:
        raise UserError(missing)
    return _Source(spec, task)


# ------------------------------------------------------------------------------------------------- the benchmark's side


class Trial(Halted):
    """A loader in its own process group, halted while it is not asked.

    Raises:
        UserError: the loader cannot be built; why, in a sentence.
    """

    def __init__(self, spec: Spec, task: Task) -> None:
        self.spec = spec
        self.task = spec.task(task)
        self.warmth = Warm(None, None)
        self.turns: list[Turn] = []
        super().__init__(spec.label, _source, spec, self.task)

    def warm(self) -> None:
        """The warm-up, in which memory is looked at."""
        with self.watched():
            self.warmth = self.ask("warm")

    def __call__(self, seconds: float) -> float:
        """Images a second in a turn of so many seconds."""
        turn: Turn = self.ask("turn", seconds)
        self.turns.append(turn)
        return turn.rate

    def cpu_shares(self, cores: int) -> tuple[float, float]:
        """Shares of what the cores had to give over all turns: this loader's, and everybody else's."""
        given = cores * sum(turn.seconds for turn in self.turns)
        return sum(turn.cpu for turn in self.turns) / given, sum(turn.others for turn in self.turns) / given
