"""What one of others' loaders is to `benchmarks/loader.py`; `peers` has them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from fastddr.loaders import Task


class Peer(ABC):
    """Batches of images, for ever."""

    name: ClassVar[str]
    #: Which of `workers` and `prefetch` it heeds.
    options: ClassVar[tuple[str, ...]] = ("workers",)
    #: Whether each worker makes `prefetch` batches ahead, as in a `DataLoader`, and not all together.
    ahead_each: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        self.task = task
        self.prefetch = task.prefetch or 2
        """Batches that each worker, or a pipeline's last stage, may have made before anybody asks: two is the default
        of `DataLoader` and of DALI."""
        self.files = [task.files[id_] for id_ in task.ids]

    @classmethod
    def missing(cls, task: Task) -> str | None:
        """Why this peer cannot do the task here; None if it can."""
        del task
        return None

    @abstractmethod
    def batches(self) -> Iterator[Tensor]:
        """Normalised images on the device, without end."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of threads and processes."""
