"""The loaders of one run: chosen together, since training and validation share what memory there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from fastddr import ranks
from fastddr.config import Config
from fastddr.config.augment import MAX_SHRINK
from fastddr.data.manifest import Manifest
from fastddr.loaders import build, stores
from fastddr.loaders.base import Loader, Task
from fastddr.loaders.capacity import least, measure
from fastddr.loaders.choosing import choose, streaming
from fastddr.runtime import Runtime

#: Loaders by what they ask of a machine, the most demanding first.
_MODEST = ("replay", "resident", "dali", "torchvision")


class RunLoaders:
    """Opens the loaders of a run and closes them together.

    `train` and `valid` are read in every epoch and opened at once; `once` opens one for a single reading.
    """

    def __init__(
        self, config: Config, manifest: Manifest, runtime: Runtime, say: Callable[[str], None], taken: int = 0
    ) -> None:
        """Choose the loader and where it keeps photographs, the same on all ranks.

        `taken`: bytes of the card that training itself will take, as far as that is known.

        Raises:
            UserError: what was asked for has no room, or the batch is larger than the training split.
        """
        self._config, self._manifest, self._runtime, self._say = config, manifest, runtime, say
        tasks = self._task("train", train=True), self._task("valid")
        kept = stores.on_disk(tasks)
        free = least(ranks.gather([measure(runtime.device, ranks.local_world(), taken, kept)]))
        # What a machine lacks (DALI, a Triton that runs) ranks find on their own: all take what each of them can.
        choices = ranks.gather([choose(config.loader, tasks, config.epochs, free)])
        self.choice = max(choices, key=lambda choice: _MODEST.index(choice.loader))
        place = f" in {self.choice.store}" if self.choice.loader == "resident" else ""
        say(f"loader {self.choice.loader}{place}: {self.choice.reason}")
        smaller = config.canvas / config.image_size
        if config.evaluation.field == "full" and smaller > MAX_SHRINK:
            say(
                f"evaluation full: what is seen is {smaller:.2g} times smaller than in training; --evaluation.field "
                "center or multi keeps the size"
            )
        # A file that is large enough for what is read in each epoch may be too small for test as well.
        every = (*tasks, self._task("test")) if manifest.has("test") else tasks
        need = sum(stores.place(task).total for task in every)
        self._keeps_test = self.choice.store == "mmap" and need <= free.allowed("mmap", tasks[0].budget)
        self._opened: list[Loader] = []
        try:
            self.train, self.valid = (self._open(task) for task in tasks)
        except BaseException:  # nobody has this object yet to close what is open
            self.close()
            raise

    def once(self, split: str) -> Loader:
        """A loader to score a split with, as validation does; close it after that."""
        task = self._task(split)
        # Nothing is kept of what is read once. A file is another matter: later runs read it too. But what trained on
        # another canvas lies in another file, and was not counted for this one.
        there = self._keeps_test if split == "test" else task.canvas == self.train.task.canvas
        return self._open(task if self.choice.store == "mmap" and there else replace(task, store="none"))

    def close(self) -> None:
        """Close them all. Safe to call again."""
        with ExitStack() as stack:
            for loader in self._opened:
                stack.callback(loader.close)

    def _open(self, task: Task) -> Loader:
        name = self.choice.loader
        if name == "replay" and not task.train:
            # An evaluation on one repeated batch would be a wrong figure, not a fast one.
            name, _ = streaming()
        loader = build(name, task if task.store == "none" else replace(task, store=self.choice.store), self._tell)
        self._opened.append(loader)
        return loader

    def _tell(self, line: str) -> None:
        """What one rank alone has met, such as what a bad disk changed; the console is rank 0's."""
        if self._runtime.rank == 0:
            self._say(line)
        else:
            print(f"fastddr, rank {self._runtime.rank}: {line}", file=sys.stderr)

    def _task(self, split: str, train: bool = False) -> Task:
        return task(self._config, self._manifest, self._runtime, self._manifest.ids(split), train=train)


def scoring(
    config: Config, manifest: Manifest, runtime: Runtime, ids: Int[np.ndarray, " n"], say: Callable[[str], None]
) -> Loader:
    """A loader that reads these photographs once, each as validation does, with the loader of the configuration."""
    name = streaming()[0] if config.loader == "auto" else config.loader
    return build(name, replace(task(config, manifest, runtime, ids, train=False), store="none"), say)


def task(config: Config, manifest: Manifest, run: Runtime, ids: Int[np.ndarray, " n"], *, train: bool) -> Task:
    """What a loader needs to know to train on these photographs, or to score them."""
    full = not train and config.evaluation.field == "full"
    evaluated = (config.evaluation.batch_size or run.micro_batch_size) * run.world
    budget = config.loading.store_gib
    return Task(
        files=manifest.files(),
        grades=manifest.grade,
        widths=manifest.width,
        heights=manifest.height,
        ids=ids,
        train=train,
        image_size=config.image_size,
        canvas=config.image_size if full else config.canvas,
        augment=config.augment,
        seed=config.seed,
        batch_size=config.batch_size if train else evaluated,
        multi=not train and config.evaluation.field == "multi",
        accumulation=run.accumulation if train else 1,
        rank=run.rank,
        world=run.world,
        device=run.device,
        dtype=run.image_dtype,
        threads=config.loading.threads or ranks.cores(),
        prefetch=config.loading.prefetch,
        regions=config.loading.regions,
        jpeg_engines=config.loading.jpeg_engines,
        store=config.loading.store,
        budget=None if budget is None else int(budget * 2**30),
    )
