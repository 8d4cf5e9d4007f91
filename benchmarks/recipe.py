"""What a training loop is to the benchmark of whole training, and the photographs that all loops are given."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import sources
import torch

from fastddr.config import Config
from fastddr.data.grades import UNGRADABLE
from fastddr.ranks import available_cores


@dataclass(frozen=True)
class Case:
    """What is trained, on what."""

    root: str
    """Class folders: {train,valid,test}/{0..4}/*.jpg."""
    config: Config
    resized: bool
    """Whether the photographs are not as large as the canvas, and must be scaled."""
    endless: bool = True
    """Train for as many epochs as are asked for; else the learning rate ends with the configuration's epochs."""


class Epoch(NamedTuple):
    """What one epoch came to."""

    images: int
    seconds: float
    waited: float
    """Of these, seconds for which the host waited for data."""


class Recipe(ABC):
    """A training loop, epoch by epoch."""

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, case: Case, options: Mapping[str, str]) -> None:
        self.case, self.config = case, case.config
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.free = self._free()
        self.tuned = False
        self.room = 0
        """Bytes of the GPU that `rest` gave back and the next epoch will want."""
        self.workers = int(options.get("workers", available_cores()))

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here; None if it can."""
        return None

    @abstractmethod
    def _train(self) -> tuple[int, float]:
        """One epoch: (images, seconds waited)."""

    @abstractmethod
    def score(self) -> float:
        """Quadratic-weighted kappa on valid."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything."""

    def about(self) -> dict[str, Any]:
        """What was chosen for it, for its row."""
        return {}

    def epoch(self) -> Epoch:
        """Train for one epoch, and wait for the device at its end."""
        if self.room:
            # As one block, of which the allocator cuts what it is asked for: to ask the driver is no part of training.
            torch.empty(self.room, dtype=torch.uint8, device=self.device)
            self.room = 0
        began = time.perf_counter()
        images, waited = self._train()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        if self.device.type == "cuda" and not self.tuned:
            # In the first epoch cuDNN tries algorithms with all the memory that it gets.
            torch.cuda.reset_peak_memory_stats(self.device)
            self.tuned = True
        return Epoch(images, took, waited)

    def rest(self) -> None:
        """Leave the GPU's memory that holds nothing to others, whose turn is next."""
        if self.device.type == "cuda":
            self.room = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
            torch.cuda.empty_cache()

    def _free(self) -> int:
        # To ask for it makes the context.
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def vram(self) -> dict[str, int]:
        """Bytes of the GPU: the allocator's peaks, and all that was taken since CUDA was begun; {} on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
            "taken": self.free - self._free(),
        }


def class_folders(root: Path, target: Path, length: int) -> int:
    """Link the graded photographs of a data set into {split}/{grade}/, which every loader reads; the size of train.

    `length` is the least number of training photographs: the list is repeated, each link a photograph of its own.
    0 = as it is.
    """
    found = sources.read(root)
    files = found.files()
    sizes = {}
    for split in ("train", "valid", "test"):
        if split == "test" and not found.has(split):
            continue
        ids = [int(id_) for id_ in found.ids(split)]
        times = max(1, -(-length // len(ids))) if split == "train" else 1
        for grade in range(UNGRADABLE):
            (target / split / str(grade)).mkdir(parents=True)
        for turn in range(times):
            for id_ in ids:
                file = Path(files[id_]).resolve()
                link = target / split / str(found.grade[id_]) / f"{turn:03d}-{id_:06d}{file.suffix.lower()}"
                try:
                    os.link(file, link)
                except OSError:  # another file system
                    link.symlink_to(file)
        sizes[split] = times * len(ids)
    return sizes["train"]
