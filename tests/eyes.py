"""Small sets of drawn fundus photographs, and what `fastddr prepare` makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import pytest
import tests_support
from PIL import Image

from fastddr.data import crop, prepare, survey
from fastddr.data.crop import Recipe
from fastddr.data.disc import Disc
from fastddr.data.prepare import Summary

SMALL = Recipe(32)
FEW = photographs.photos({"train": [0, 1, 2, 3, 4, 0, 5], "valid": [0, 1], "test": [0, 1]})


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """The disc is said to fill the photograph, but where a test asks for the `real` finder: most are about files."""

    def whole(pixels: np.ndarray) -> Disc:
        height, width = pixels.shape[:2]
        return Disc(width / 2, height / 2, height / 2, float(pixels.mean()) / 255, "stub")

    with pytest.MonkeyPatch.context() as patch:
        if "real" not in request.fixturenames:
            patch.setattr(crop, "find_disc", whole)
        yield


def eye(
    path: Path,
    number: int = 0,
    size: tuple[int, int] = (120, 90),
    centre: tuple[float, float] | None = None,
    radius: float = 36,
    **settings: Any,
) -> Path:
    """A lit disc on a black ground, with a pattern that no other number has."""
    x, y = centre or (size[0] / 2, size[1] / 2)
    columns, lines = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    inside = np.hypot(columns - x, lines - y) < radius
    smooth = Image.fromarray(np.random.default_rng(number).integers(90, 200, (4, 4, 3), dtype=np.uint8))
    pixels = np.asarray(smooth.resize(size, Image.Resampling.BICUBIC)) * inside[..., None].astype(np.uint8)
    exif = Image.Exif()
    if orientation := settings.pop("orientation", None):
        exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, **settings)
    return path


def folders(root: Path, extension: str = ".jpg") -> Path:
    """Class folders with 8 photographs, all of them different."""
    for number, split in enumerate(["train"] * 4 + ["valid"] * 2 + ["test"] * 2):
        eye(root / split / str(number % 3) / f"n{number}{extension}", number)
    return root


def official(root: Path, extension: str = ".jpg") -> Path:
    for number, split in enumerate(["train"] * 4 + ["valid"] * 2 + ["test"] * 2):
        eye(root / "DR_grading" / split / f"n{number}{extension}", number)
        with (root / "DR_grading" / f"{split}.txt").open("a") as stream:
            stream.write(f"n{number}{extension} {number % 3}\n")
    return root


def run(data: Path, out: Path, **settings: Any) -> Summary:
    return prepare.run(str(data), out, settings.pop("recipe", SMALL), **{"sheet": 3} | settings)


def told(root: Path) -> dict[str, tuple[int, str | None, str | None]]:
    """What a layout says of each photograph, by its path without the extension."""
    entries = survey.take(root).entries
    return {os.path.splitext(e.path)[0]: (e.grade, e.split, e.patient) for e in entries}


def table(out: Path) -> list[dict[str, str]]:
    """What was made of each photograph."""
    return tests_support.table(out / "prepared" / "prepared.csv")


def damage(file: Path) -> None:
    """Break the scan: the header stays whole."""
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
