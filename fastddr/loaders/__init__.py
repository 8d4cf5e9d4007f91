"""Loaders: one contract (`base.Loader`), the same pixels, different speeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastddr.errors import UserError
from fastddr.loaders import dali
from fastddr.loaders.base import Batch, Loader, Task
from fastddr.loaders.capacity import Free, least, measure
from fastddr.loaders.choosing import Choice, choose, settled, streaming
from fastddr.loaders.replay import ReplayLoader
from fastddr.loaders.resident import ResidentLoader
from fastddr.loaders.vision import VisionLoader

__all__ = ["Batch", "Choice", "Free", "Loader", "Task", "build", "choose", "least", "measure", "streaming"]


def build(name: str, task: Task, say: Callable[[str], None] | None = None) -> Loader:
    """The loader of this name. `auto` is chosen for this task alone, as for many epochs (see `choose`).

    `say` is told what a user should know of the loading.
    """
    if name == "auto":
        chosen = settled(name, task)
        return build(chosen.loader, replace(task, store=chosen.store), say)
    match name:
        case "dali":
            return dali.DaliLoader(task)
        case "resident":
            return ResidentLoader(task, say)
        case "torchvision":
            return VisionLoader(task)
        case "replay":
            return ReplayLoader(task, lambda inner: build(streaming()[0], inner))
    raise UserError(f"--loader {name}: there is no such loader; known are: auto, dali, resident, torchvision, replay.")
