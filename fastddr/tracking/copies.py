"""What a tracker is, and what it is told at the end of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fastddr import files
from fastddr.data.photograph import small

#: Longest side of a photograph in a tracker, in pixels.
THUMBNAIL = 512


class Mistake(NamedTuple):
    """A photograph that was graded wrongly."""

    path: str
    """As the reports name it."""
    file: Path
    """Where it lies."""
    truth: int
    predicted: int
    confidence: float
    """The probability of the predicted grade."""


@dataclass(frozen=True)
class Answers:
    """What a model said of a split."""

    split: str
    grades: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n C"]
    names: Sequence[str]
    """Of the C grades."""
    worst: Sequence[Mistake]
    """The worst first."""

    @property
    def present(self) -> list[int]:
        """Grades that some photographs have and others have not: those with a curve."""
        found, counts = np.unique(self.grades, return_counts=True)
        return [int(grade) for grade, count in zip(found, counts, strict=True) if count < len(self.grades)]


@runtime_checkable
class Copy(Protocol):
    """One tracker."""

    name: str

    def log(self, values: Mapping[str, float], step: int, when: float) -> None: ...
    def log_image(self, name: str, path: Path, step: int) -> None: ...
    def log_answers(self, answers: Answers, step: int, photographs: bool) -> None: ...
    def log_file(self, name: str, kind: str, path: Path, aliases: Sequence[str], upload: bool) -> None: ...
    def finish(self, failed: bool) -> None: ...


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def short(path: Path) -> str:
    """The path as the user would type it: relative to where they are, if it lies below."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def write_line(file: Path, line: str) -> None:
    """Beside and renamed: an empty file would be taken for what it is not at every later start."""
    files.put(file, f"{line}\n".encode())


def thumbnail(file: Path) -> Image.Image:
    """A photograph, upright, of at most `THUMBNAIL` pixels a side; a grey square where it cannot be opened."""
    found = small(file, THUMBNAIL) or Image.new("RGB", (THUMBNAIL, THUMBNAIL), (225, 225, 225))
    found.thumbnail((THUMBNAIL, THUMBNAIL))
    return found
