"""Where the synthetic photographs go and where their grades are written, in each layout in which DDR is found.

docs/synthetic.md tells the layouts. What a layout has no place for is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastddr.data.grades import UNGRADABLE
from fastddr.data.layouts import SPLITS
from fastddr.errors import UserError, nearest


@dataclass(frozen=True)
class Photograph:
    """One photograph of the set, and its file."""

    split: str
    index: int
    grade: int
    name: str


class Form(NamedTuple):
    """A layout: paths below the root and lines of label files, with `{name}`, `{split}` and so on in them."""

    photo: str
    labels: str = ""  #: none where the folders tell the grade
    row: str = ""
    header: str = ""
    lesions: str = "lesions.csv"
    splits: Mapping[str, str] = dict(zip(SPLITS, SPLITS, strict=True))  #: those it has, and its names of them
    greatest: int = UNGRADABLE  #: grade that it has

    def place(self, photo: Photograph) -> str | None:
        """The photograph's path below the root, with slashes, or None where the layout has no place for it."""
        return self._fill(self.photo, photo) if photo.split in self.splits and photo.grade <= self.greatest else None

    def make_folders(self, root: Path, splits: Iterable[str]) -> None:
        """Make all folders of photographs, whether or not there is one for each."""
        for cell in (Photograph(split, 0, grade, "") for split in splits for grade in range(UNGRADABLE + 1)):
            if (where := self.place(cell)) is not None:
                (root / where).mkdir(parents=True, exist_ok=True)

    def write_labels(self, root: Path, splits: Iterable[str], photos: Iterable[Photograph]) -> None:
        """Write a label file for each of the splits, or one for all, with the photographs that have a place."""
        if not self.labels:
            return
        names = [self.splits[split] for split in splits if split in self.splits]
        texts = {self.labels.format(split=name): [self.header] for name in names}
        for photo in photos:
            texts[self._fill(self.labels, photo)].append(self._fill(self.row, photo))
        for file, rows in texts.items():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_text("".join(rows), encoding="utf-8", newline="\n")

    def _fill(self, text: str, photo: Photograph) -> str:
        # Two photographs of a split that follow each other are the two eyes of one patient.
        patient = f"{photo.split}-{photo.index // 2:05d}"
        split, folder = self.splits[photo.split], _CLASSES[photo.grade]
        return text.format(name=photo.name, split=split, grade=photo.grade, folder=folder, patient=patient)


#: GDRBench's folders of grades 0-4; of ungradable photographs it has none.
_CLASSES = ("nodr", "mild_npdr", "moderate_npdr", "severe_npdr", "pdr", "")
_FORMS = {
    "official": Form(
        "DR_grading/{split}/{name}", "DR_grading/{split}.txt", "{name} {grade}\n", lesions="DR_grading/lesions.csv"
    ),
    "kaggle": Form(
        "DR_grading/DR_grading/{name}", "DR_grading.csv", "{name},{grade}\n", "id_code,diagnosis\n", greatest=4
    ),
    "gdrbench": Form(
        "images/DDR/{folder}/{name}", "splits/DDR_{split}.txt", "DDR/{folder}/{name} {grade}\n",
        splits={"train": "train", "valid": "crossval"}, greatest=4,
    ),
    "folders": Form("{split}/{grade}/{name}"),
    "csv": Form(
        "photographs/{name}", "labels.csv", "photographs/{name},{grade},{split},{patient}\n",
        "path,grade,split,patient\n",
    ),
}  # fmt: skip
LAYOUTS = tuple(_FORMS)


def form_of(layout: str) -> Form:
    """The layout of that name.

    Raises:
        UserError: there is none.
    """
    if layout not in _FORMS:
        raise UserError(f"There is no layout {layout!r}; {nearest(layout, LAYOUTS)}")
    return _FORMS[layout]
