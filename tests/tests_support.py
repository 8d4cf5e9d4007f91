"""Small things that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data.manifest import Manifest

#: The tiny set of the fixture `tiny`, grades 0-5 by split: every grade in every split, odd counts.
TINY = {"train": (9, 4, 7, 3, 4, 1), "valid": (3, 2, 3, 1, 2, 0), "test": (4, 2, 3, 2, 2, 1)}
TINY_SIZE = 80

ROOT = Path(__file__).parents[1]


def task(found: Manifest, split: str = "train", **changes: Any) -> loaders.Task:
    """A loader's task on a split of a manifest: 64 px windows of an 80 px canvas, four at a time."""
    settings: dict[str, Any] = {
        "files": found.files(),
        "grades": found.grade,
        "widths": found.width,
        "heights": found.height,
        "ids": found.ids(split),
        "train": split == "train",
        "image_size": 64,
        "canvas": TINY_SIZE,
        "augment": AugmentConfig(),
        "seed": 1,
        "batch_size": 4,
        "threads": 1,
    }
    return loaders.Task(**(settings | changes))
