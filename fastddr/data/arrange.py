"""Where the synthetic photographs go and where their grades are written, in each layout in which DDR is found.

    official    ROOT/DR_grading/{train,valid,test}/NAME and {train,valid,test}.txt, `NAME G` a line
    kaggle      ROOT/DR_grading/DR_grading/NAME and ROOT/DR_grading.csv: id_code,diagnosis
    gdrbench    ROOT/images/DDR/{nodr,...}/NAME and ROOT/splits/DDR_{train,crossval}.txt, `DDR/nodr/NAME G` a line
    folders     ROOT/{train,valid,test}/{0,...,5}/NAME
    csv         ROOT/photographs/NAME and ROOT/labels.csv: path,grade,split,patient

The Kaggle copy knows neither splits nor ungradable photographs. GDRBench's has a train and a crossval split, which take
DDR's train and valid; test and ungradable photographs are not in it. What a layout has no place for is left out.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fastddr.data.grades import UNGRADABLE
from fastddr.errors import UserError, nearest

Layout = Literal["official", "kaggle", "gdrbench", "folders", "csv"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
#: GDRBench's folders of grades 0-4, and its names of the splits that it has.
CLASSES = ("nodr", "mild_npdr", "moderate_npdr", "severe_npdr", "pdr")
CROSSVAL = {"train": "train", "valid": "crossval"}


def layout_of(name: str) -> Layout:
    """The layout of that name.

    Raises:
        UserError: there is none.
    """
    for layout in LAYOUTS:
        if layout == name:
            return layout
    raise UserError(f"There is no layout {name!r}; {nearest(name, LAYOUTS)}")


@dataclass(frozen=True)
class Photograph:
    """One photograph of the set, and its file."""

    split: str
    index: int
    grade: int
    name: str


def place(layout: Layout, photo: Photograph) -> str | None:
    """The photograph's path below the root, with slashes, or None where the layout has no place for it."""
    match layout:
        case "official":
            return f"DR_grading/{photo.split}/{photo.name}"
        case "kaggle":
            return None if photo.grade == UNGRADABLE else f"DR_grading/DR_grading/{photo.name}"
        case "gdrbench":
            if photo.grade == UNGRADABLE or photo.split not in CROSSVAL:
                return None
            return f"images/DDR/{CLASSES[photo.grade]}/{photo.name}"
        case "folders":
            return f"{photo.split}/{photo.grade}/{photo.name}"
        case "csv":
            return f"photographs/{photo.name}"


def folders(layout: Layout, splits: Iterable[str]) -> list[str]:
    """Folders below the root, whether or not there is a photograph for each."""
    match layout:
        case "official":
            return [f"DR_grading/{split}" for split in splits]
        case "kaggle":
            return ["DR_grading/DR_grading"]
        case "gdrbench":
            return ["splits", *(f"images/DDR/{name}" for name in CLASSES)]
        case "folders":
            return [f"{split}/{grade}" for split in splits for grade in range(UNGRADABLE + 1)]
        case "csv":
            return ["photographs"]


def lesions_file(layout: Layout) -> str:
    """Where the table of the lesions lies below the root."""
    return "DR_grading/lesions.csv" if layout == "official" else "lesions.csv"


def patient(photo: Photograph) -> str:
    """Two photographs of a split that follow each other are the two eyes of one patient."""
    return f"{photo.split}-{photo.index // 2:05d}"


def write_labels(layout: Layout, root: Path, splits: Sequence[str], photos: Sequence[Photograph]) -> None:
    """Write the label files of the photographs, which the layout all has a place for. `folders` needs none."""
    match layout:
        case "official":
            for split in splits:
                lines = (f"{photo.name} {photo.grade}\n" for photo in photos if photo.split == split)
                (root / "DR_grading" / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
        case "kaggle":
            _table(root / "DR_grading.csv", ("id_code", "diagnosis"), ((photo.name, photo.grade) for photo in photos))
        case "gdrbench":
            for split, known_as in CROSSVAL.items():
                lines = (
                    f"DDR/{CLASSES[photo.grade]}/{photo.name} {photo.grade}\n"
                    for photo in photos
                    if photo.split == split
                )
                (root / "splits" / f"DDR_{known_as}.txt").write_text("".join(lines), encoding="utf-8")
        case "csv":
            rows = ((f"photographs/{p.name}", p.grade, p.split, patient(p)) for p in photos)
            _table(root / "labels.csv", ("path", "grade", "split", "patient"), rows)
        case "folders":
            pass


def _table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
