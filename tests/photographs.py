"""Tiny photographs, and data sets of them in every layout, drawn for the tests of data."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastddr.data.layouts import Listing

#: GDRBench's names of the class folders.
BENCH = ("nodr", "mild_npdr", "moderate_npdr", "severe_npdr", "pdr")


class Photo(NamedTuple):
    """One photograph of a set: its number makes its pixels and its name."""

    number: int
    grade: int
    split: str

    @property
    def name(self) -> str:
        return f"007-{self.number:04d}-000.jpg"


def draw(path: Path, number: int = 0, size: tuple[int, int] = (40, 32), **settings: Any) -> Path:
    """A smooth picture that no other number has, in the format of the name's extension unless `settings` say another.

    `mode` converts it, `orientation` is an EXIF orientation; the rest goes to Pillow.
    """
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    if mode := settings.pop("mode", None):
        image = image.convert(mode)
    exif = Image.Exif()
    if orientation := settings.pop("orientation", None):
        exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
    image.save(path, settings.pop("format", known.get(path.suffix.lower())), exif=exif, **settings)
    return path


def photos(of_split: Mapping[str, Iterable[int]]) -> list[Photo]:
    """Photographs with these grades in these splits."""
    found: list[Photo] = []
    for split, grades in of_split.items():
        found += [Photo(len(found) + place, grade, split) for place, grade in enumerate(grades)]
    return found


#: 12 + 6 + 7 gradable photographs and two ungradable ones.
SET = photos({"train": [0, 1, 2, 3, 4, 0] * 2 + [5], "valid": [0, 1, 2, 3, 4, 0], "test": [0, 1, 2, 3, 4, 0, 2, 5]})


def official(root: Path, of: Iterable[Photo] = SET, extension: str = ".jpg") -> Path:
    """`root` is DDR-dataset."""
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for photo in of:
        name = Path(photo.name).stem + extension
        draw(root / "DR_grading" / photo.split / name, photo.number)
        lines[photo.split].append(f"{name} {photo.grade}")
    for split, of_split in lines.items():
        if of_split:
            (root / "DR_grading" / f"{split}.txt").write_text("\n".join(of_split) + "\n")
    return root


def write_csv(file: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def kaggle(root: Path, of: Iterable[Photo] = SET) -> Path:
    """Without splits, and without the ungradable photographs."""
    graded = [photo for photo in of if photo.grade < 5]
    for photo in graded:
        draw(root / "DR_grading" / "DR_grading" / photo.name, photo.number)
    write_csv(root / "DR_grading.csv", ["id_code", "diagnosis"], [[p.name, p.grade] for p in graded])
    return root


def gdrbench(root: Path, of: Iterable[Photo] = SET, name: str = "DDR") -> Path:
    """Without test, and without the ungradable photographs."""
    lines: dict[str, list[str]] = {"train": [], "crossval": []}
    for photo in of:
        if photo.grade < 5 and photo.split != "test":
            path = f"{name}/{BENCH[photo.grade]}/{photo.name}"
            draw(root / "images" / path, photo.number)
            lines["train" if photo.split == "train" else "crossval"].append(f"{path} {photo.grade}")
    (root / "splits").mkdir(parents=True, exist_ok=True)
    for ending, of_split in lines.items():
        (root / "splits" / f"{name}_{ending}.txt").write_text("\n".join(of_split) + "\n")
    return root


def folders(root: Path, of: Iterable[Photo] = SET) -> Path:
    for photo in of:
        draw(root / photo.split / str(photo.grade) / photo.name, photo.number)
    return root


def labelled(root: Path, of: Iterable[Photo] = SET) -> Path:
    """Our own table."""
    rows = []
    for photo in of:
        draw(root / "photographs" / photo.name, photo.number)
        rows.append([f"photographs/{photo.name}", photo.grade, photo.split])
    write_csv(root / "labels.csv", ["path", "grade", "split"], rows)
    return root


LAYOUTS = {"official": official, "kaggle": kaggle, "gdrbench": gdrbench, "folders": folders, "csv": labelled}

# ------------------------------------------------------------------------------------------ for loaders

#: Photographs that are no plain RGB JPEG: what `draw` is told of each.
ODD: dict[str, dict[str, Any]] = {
    "greyscale": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "progressive": {"progressive": True},
    **{f"turned {way}": {"orientation": way} for way in range(2, 9)},
    "png": {"format": "PNG"},
    "grey png": {"format": "PNG", "mode": "L"},
    "palette": {"format": "PNG", "mode": "P"},
    "transparent": {"format": "PNG", "mode": "RGBA"},
    "turned png": {"format": "PNG", "orientation": 6},
    "tiff": {"format": "TIFF"},
    "lzw tiff": {"format": "TIFF", "compression": "tiff_lzw"},
    "cmyk tiff": {"format": "TIFF", "mode": "CMYK"},
    "turned tiff": {"format": "TIFF", "orientation": 6},
}

#: Sizes of the photographs of `mixed`; the fourth lies on its side.
SHAPES = [(80, 80), (120, 80), (80, 131), (300, 211), (97, 401), (60, 50), (160, 160)]


def mixed(root: Path, shapes: Iterable[tuple[int, int]] = SHAPES) -> Path:
    """Photographs of many shapes, smooth so that a resampling can be compared, for an 80 px canvas."""
    rng = np.random.default_rng(5)
    for split in ("train", "valid", "test"):
        for number, (width, height) in enumerate(shapes):
            noise = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
            exif = Image.Exif()
            if number == 3:
                exif[0x0112] = 6
            path = root / split / str(number % 5) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95, exif=exif)
    return root


def odd(root: Path) -> Path:
    """The photographs of `ODD`, all of them called .jpg, as large as their 80 px canvas."""
    for split in ("train", "valid", "test"):
        for number, (name, settings) in enumerate(ODD.items()):
            path = root / split / str(number % 5) / f"{name}.jpg"
            draw(path, number, size=(100, 80), **{"format": "JPEG"} | settings)
    return root


def picture(path: Path, pixels: np.ndarray, **settings: Any) -> Path:
    """These pixels (height, width, 3) to the bit: a PNG, whatever it is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG", **settings)
    return path


GRADE = {photo.name: photo.grade for photo in SET}
SPLIT = {photo.name: photo.split for photo in SET}


def seen(found: Listing, what: str = "grade") -> dict[str, Any]:
    """File name to grade, or to another field."""
    named = {os.path.basename(entry.path): getattr(entry, what) for entry in found.entries}
    assert len(named) == len(found.entries)
    return named
