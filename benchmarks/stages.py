"""What stops a loader: how much of its time goes into reading, decoding, warping, normalising, copying and Python.

A stage's share is what it adds to the time of one image when it is put behind the stages before it, so a stage that
runs beside a slower one adds nothing. `Python` is what is left over: feeding, batching, passing between processes,
waiting for each other. Of DALI it is what the whole loader takes in the same rounds beyond its stages.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import numpy as np
import torch
from PIL import Image
from timing import Clock, cache_bytes, in_turn

from fastddr.data.photograph import upright
from fastddr.loaders import Loader, Task, dali, vision
from fastddr.loaders.base import Requests
from fastddr.loaders.normaliser import Normaliser

#: Rounds in which the stages are timed, in turn.
ROUNDS = 5
#: Of the kernel alone, in turn.
_BATCHES = 24
#: Stages of DALI's operators; what is not named here is geometry.
_OPERATORS = {
    "Read": "read",
    "Image": "decode",
    "ImageSlice": "decode",
    "CropMirrorNormalize": "normalise",
    "CoordTransform": "colour and normalise",
    "ColorTwist": "colour and normalise",
    "Copy": "copy",
}


@dataclass(frozen=True)
class Stages:
    """The shares of a loader's stages, round by round."""

    shares: Mapping[str, Sequence[float]]
    """Per cent of the time of an image."""
    decode_only: Sequence[float]
    """Images a second of reading and decoding and nothing more; empty where that is not a stage."""


def of(loader: Loader, rate: float, seconds: float) -> Stages | None:
    """The stages of a loader that runs at `rate` images a second; None where they are not known.

    `seconds`: how long each stage is run, a round.
    """
    match loader.name:
        case "dali":
            return _dali(loader, loader, seconds)
        case "torchvision":
            return _torchvision(loader, rate, seconds)
        case "resident":
            return _resident(loader, rate, seconds)
    return None


def sentence(label: str, shares: Mapping[str, Sequence[float]]) -> str:
    """`dali: decode 78 %, normalise 12 %, Python 3 %`, the largest first."""
    medians = {stage: float(np.median(values)) for stage, values in shares.items()}
    said = (f"{stage} {medians[stage]:.0f} %" for stage in sorted(medians, key=medians.__getitem__, reverse=True))
    return f"{label}: {', '.join(said)}"


def _shares(added: Mapping[str, Sequence[float]], whole: float | Sequence[float]) -> dict[str, list[float]]:
    """Per cent from seconds an image; what the stages do not explain of `whole`, also by rounds, is Python's."""
    found: dict[str, list[float]] = {stage: [] for stage in (*added, "Python")}
    wholes = itertools.repeat(whole) if isinstance(whole, float) else whole
    for took, *seconds in zip(wholes, *added.values(), strict=False):
        round_ = {stage: max(value, 0.0) for stage, value in zip(added, seconds, strict=True)}
        round_["Python"] = round_.get("Python", 0.0) + max(took - sum(round_.values()), 0.0)
        total = sum(round_.values())
        for stage, value in round_.items():
            found[stage].append(100 * value / total)
    return found


def _repeated(work: Callable[[], int], seconds: float) -> Callable[[], float]:
    """A trial: seconds an image, of some work that returns how many images it was done for."""

    def trial() -> float:
        images, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds or not images:
            images += work()
        return took / images

    return trial


def _raced(trials: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """The rounds of some trials, without the first, which warms up."""
    return {name: values[1:] for name, values in harness.interleaved(trials, ROUNDS + 1).items()}


# ------------------------------------------------------------------------------------------------------------- dali


class _Cut:
    """A pipeline whose graph ends early: it takes the inputs that it still has, and no others."""

    #: Of the whole graph, and inputs of what is left.
    stages: list[str]
    names: set[str]

    def __init__(self, build: Callable[[], Any], stage: str) -> None:
        self.began = False

        def graph(task: Task, pixels: Any, **settings: Any) -> Any:
            ends = _ends(whole(task, pixels, **settings))
            self.stages, self.names = list(ends), _ancestors(ends[stage])
            return ends[stage]

        whole = dali._graph
        with patch.object(dali, "_graph", graph):
            self.pipeline = build()

    def feed_input(self, name: str, value: Any, **settings: Any) -> None:
        if name in self.names:
            self.pipeline.feed_input(name, value, **settings)

    def send(self, loader: Any, batches: Iterator[tuple[Requests, int]]) -> None:
        """Begins a batch, as the loader whose pipeline this is would."""
        loader._feed(*next(batches))
        self.pipeline.schedule_run()

    def fill(self, loader: Any, batches: Iterator[tuple[Requests, int]]) -> int:
        """Begins as many batches as may be on their way; how many that are."""
        depth: int = self.pipeline.prefetch_queue_depth
        if self.began:
            for _ in range(depth):
                self.send(loader, batches)
        else:
            # DALI's first run fills its whole queue.
            for _ in range(depth):
                loader._feed(*next(batches))
            self.pipeline.schedule_run()
            self.began = True
        return depth


def _ends(node: Any) -> dict[str, Any]:
    """The last node of each stage on the way of the photograph, from its path to `node`."""
    way = [node]
    while inputs := way[-1].source.inputs:
        way.append(inputs[0])
    ends: dict[str, Any] = {}
    for step in reversed(way):
        operator = re.fullmatch(r"__(\w+?)_\d+", step.name)
        # Without an operator's name: the external source that the paths come from.
        stage = _OPERATORS.get(operator[1], "warp") if operator else "Python"
        ends.pop(stage, None)  # so that the stages stand in the order of their ends
        ends[stage] = step
    return ends


def _ancestors(node: Any) -> set[str]:
    return {node.name}.union(*(_ancestors(before) for before in node.source.inputs))


def _epochs(task: Task) -> Iterator[tuple[Requests, int]]:
    """What is asked for, epoch after epoch: to work out the maps of each is part of it."""
    for epoch in itertools.count():
        requests = task.requests(epoch)
        for k in range(len(requests)):
            yield requests, k


def _dali(loader: Any, outer: Loader, seconds: float, begin: Callable[[], None] = lambda: None) -> Stages:
    """Of a loader with a pipeline, which is `outer` or a part of it. `begin` is called before each turn of a stage."""
    task = loader.task
    names = _Cut(loader._build, "Python").stages
    cuts = {stage: _Cut(loader._build, stage) for stage in names}
    batches = _epochs(task)

    def turn(cut: _Cut, normaliser: Normaliser | None = None) -> float:
        """Seconds an image. What other turns have left is done by then, and nothing is left to them."""
        own, loader._pipeline = loader._pipeline, cut
        begin()

        def receive() -> int:
            (output,) = cut.pipeline.outputs()
            cut.send(loader, batches)
            if normaliser is not None:
                normaliser(torch.from_dlpack(output.as_tensor()))
            return task.micro_batch_size

        try:
            depth = cut.fill(loader, batches)
            for _ in range(depth):  # which were made one after the other, with nobody waiting
                receive()
            took = _repeated(receive, seconds)()
            for _ in range(depth):
                cut.pipeline.outputs()
        finally:
            loader._pipeline = own
        return took

    def turn_of_all() -> float:
        walk = (batch for epoch in itertools.count() for batch in outer.epoch(epoch))

        def receive() -> int:
            next(walk)
            return task.micro_batch_size

        try:
            for _ in range(dali._depth(task) + 1):
                receive()
            return _repeated(receive, seconds)()
        finally:
            walk.close()

    turns: dict[str, Callable[[], float]] = {stage: partial(turn, cut) for stage, cut in cuts.items()}
    if loader._normaliser is not None:
        turns["normalise"] = partial(turn, cuts[names[-1]], loader._normaliser)
        names.append("normalise")
    found = _raced({**turns, "all": turn_of_all})
    added = {names[0]: found[names[0]]}
    for before, stage in itertools.pairwise(names):
        added[stage] = [a - b for a, b in zip(found[stage], found[before], strict=True)]
    return Stages(_shares(added, found["all"]), [1 / value for value in found.get("decode", [])])


# ------------------------------------------------------------------------------------------------------ torchvision


def _torchvision(loader: Any, rate: float, seconds: float) -> Stages:
    """One after another in this process, with one core: a worker does the same."""
    task = loader.task
    requests = task.requests(0)
    items = itertools.cycle(vision._items(task.files, requests, 0))
    window = np.zeros((task.image_size, task.image_size, 3), dtype=np.uint8)
    colour = requests.at(0).colour[0]
    encoded = {file: Path(file).read_bytes() for file in {task.files[id_] for id_ in requests.id[0]}}

    def read() -> int:
        with open(next(items).file, "rb") as file:
            file.read()
        return 1

    def decode() -> int:
        with Image.open(io.BytesIO(encoded[next(items).file])) as image:
            image.convert("RGB")
        return 1

    def opened() -> int:
        upright(next(items).file)
        return 1

    def rendered() -> int:
        vision.render(next(items), task.image_size, task.only_crops)
        return 1

    def normalised() -> int:
        pixels = window.astype(np.float32)
        mixed = pixels * np.diag(colour) if task.only_normalises else pixels @ colour[:, :3].T
        mixed += colour[:, 3]
        return 1

    works = {"read": read, "decode": decode, "opened": opened, "rendered": rendered, "normalised": normalised}
    found = _raced({name: _repeated(work, seconds) for name, work in works.items()})
    colours = "normalise" if task.only_normalises else "colour and normalise"
    geometry = [
        whole - opened_ - normal
        for whole, opened_, normal in zip(found["rendered"], found["opened"], found["normalised"], strict=True)
    ]
    added = {"read": found["read"], "decode": found["decode"], "warp": geometry, colours: found["normalised"]}
    # As many photographs are worked on at once as there are workers.
    return Stages(_shares(added, max(task.threads, 1) / rate), [])


# --------------------------------------------------------------------------------------------------------- resident


def _resident(loader: Any, rate: float, seconds: float) -> Stages | None:
    task = loader.task
    if loader._finisher is not None:

        def begin() -> None:
            # Everything is in the store by now, so nothing has to be made ready.
            loader._finisher._fed = len(task.requests(0))

        found = _dali(loader._finisher, loader, seconds, begin).shares
        # What its first operator is fed with is gathered from the store.
        return Stages({stage.replace("Python", "gather, Python"): values for stage, values in found.items()}, [])

    if task.store == "vram":
        # Nothing is copied and nothing else is waited for: beyond the kernel's own time the card waits for Python.
        return Stages(_shares({"kernel": [1 / alone for alone in kernel(loader, seconds)]}, 1 / rate), [])
    if loader._ring is None:
        return None  # on a CPU without DALI
    batches = ((requests, k) for requests in map(task.requests, itertools.count()) for k in loader._filled(requests, 0))

    def gathered() -> int:
        """As far as a batch comes on the host: into a pinned slot, that is not sent."""
        requests, k = next(batches)
        boxes, _ = loader._boxes(requests, k)
        with loader._ring.slot(int(3 * (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).sum())) as slot:
            loader._gather(requests.id[k], boxes, slot.host)
        return task.micro_batch_size

    [(name, gathering)] = _raced({"gather, Python": _repeated(gathered, seconds)}).items()
    shares = [100 * min(known * rate, 1.0) for known in gathering]
    return Stages({name: shares, "copy, kernel, waiting": [100 - share for share in shares]}, [])


def kernel(loader: Any, seconds: float) -> list[float]:
    """Images a second of the kernel that makes a batch from a store on the GPU, and nothing else.

    Some batches in turn, more of them than its cache holds, from arguments that are on the GPU already, and made in as
    many places as together are twice as large as its cache. Measured by the GPU's clock, and queued before the first
    begins: Python may take longer to send a batch than the kernel to make it. A round lasts about `seconds`, the
    queueing included.
    """
    from fastddr.loaders import resident

    calls: list[Callable[[], Any]] = []
    sizes: list[int] = []
    whole = resident.kernels.warp

    def noted(*arguments: Any) -> Any:
        calls.append(partial(whole, *arguments))
        made = calls[-1]()
        sizes.append(made.nbytes)
        return made

    with patch.object(resident.kernels, "warp", noted):
        for _ in itertools.islice(loader.epoch(0), _BATCHES):
            pass
    rates = []
    device = loader.task.device
    # Not all of them: beside a store there may be little room.
    held: deque[object] = deque(maxlen=min(math.ceil(2 * cache_bytes(device) / max(sizes)), len(calls)))
    clock, call = Clock(device, queued=True), in_turn(calls, held)
    for _ in range(ROUNDS + 1):
        took, began = [], time.perf_counter()
        while not took or time.perf_counter() - began < seconds:
            took.append(clock.seconds(call, _BATCHES))
        rates.append(loader.task.micro_batch_size * len(took) / sum(took))
    return rates[1:]
