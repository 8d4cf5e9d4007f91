"""Loaders: one contract (`base.Loader`), the same pixels, different speeds."""

from __future__ import annotations

from fastddr.errors import UserError
from fastddr.loaders import dali
from fastddr.loaders.base import Batch, Loader, Task
from fastddr.loaders.replay import ReplayLoader
from fastddr.loaders.vision import VisionLoader

__all__ = ["Batch", "Loader", "Task", "build", "choose"]


def choose(name: str) -> tuple[str, str]:
    """The loader that `name` stands for, and the reason.

    Raises:
        UserError: two builds of DALI are installed over each other.
    """
    if name != "auto":
        return name, "--loader asked for it"
    if dali.installed():
        return "dali", "NVIDIA DALI is installed"
    return "torchvision", "NVIDIA DALI is not installed, which would be faster (Linux only)"


def build(name: str, task: Task) -> Loader:
    """The loader of this name (`auto` is resolved by `choose`)."""
    name, _ = choose(name)
    match name:
        case "dali":
            return dali.DaliLoader(task)
        case "torchvision":
            return VisionLoader(task)
        case "replay":
            return ReplayLoader(task, lambda inner: build("auto", inner))
    raise UserError(f"--loader {name}: there is no such loader; known are: auto, dali, torchvision, replay.")
