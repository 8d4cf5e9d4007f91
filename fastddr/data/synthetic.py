"""A synthetic DDR: fundus photographs drawn from a seed, on disk in DDR's own layout.

docs/synthetic.md tells what lies where: the files, their layouts (`arrange`) and what can be spoilt in them (`faults`).
A photograph depends on (seed, split, index, grade, size) and on nothing else, so files are the same bytes whatever the
number of workers and whatever else is generated.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastddr import files, ranks
from fastddr.data import cache
from fastddr.data.arrange import Photograph, form_of
from fastddr.data.eye.anatomy import draw_eye
from fastddr.data.eye.camera import develop, draw_camera, spoil, stream
from fastddr.data.eye.canvas import Canvas
from fastddr.data.eye.lesions import Lesion, draw_signs
from fastddr.data.eye.retina import light
from fastddr.data.faults import FAULTS, inject
from fastddr.data.grades import DDR, UNGRADABLE
from fastddr.data.layouts import SPLITS
from fastddr.data.workers import each
from fastddr.errors import UserError

#: Of the generator. Raise it with every change that changes a pixel or a file: old folders are then not used.
VERSION = 2
#: The quickstart set: 960 photographs. Flatter than DDR, in which one photograph in fifty is grade 3: so few
#: photographs in DDR's own proportions would leave a small model a dozen of them to learn from.
DEFAULT_COUNTS = {
    "train": (180, 90, 150, 90, 90, 20),
    "valid": (50, 25, 40, 25, 25, 5),
    "test": (50, 25, 40, 25, 25, 5),
}
DEFAULT_SIZE = 512
DEFAULT_SEED = 0
#: A folder that a killed process left behind is cleared away after so many seconds.
_STALE = 24 * 3600.0


def render(
    seed: int, split: str, index: int, grade: int, size: int = DEFAULT_SIZE
) -> tuple[NDArray[np.uint8], list[Lesion]]:
    """One photograph, (size size 3), and where its lesions are.

    The eye and the camera follow from (seed, split, index) alone: with another grade the same eye comes out
    with other signs. Grade 5 is a spoiled photograph of a healthy eye.
    """
    photo, lesions = _photograph(seed, split, index, grade, size)
    return np.array(photo), lesions


def _photograph(seed: int, split: str, index: int, grade: int, size: int) -> tuple[Image.Image, list[Lesion]]:
    """`render` as Pillow has it: the way to a file does not lead through an array."""
    if not 0 <= grade <= UNGRADABLE:
        raise ValueError(f"grade {grade} is not one of 0-5")
    eye = draw_eye(stream(seed, split, index, "eye"))
    camera = draw_camera(stream(seed, split, index, "camera"))
    if grade == UNGRADABLE:
        camera = spoil(camera, stream(seed, split, index, "spoil"))
    canvas = Canvas(eye, camera, size)
    lesions = draw_signs(canvas, stream(seed, split, index, "signs"), 0 if grade == UNGRADABLE else grade)
    rows = light(canvas, stream(seed, split, index, "light"))
    return develop(rows, size, camera, stream(seed, split, index, "sensor")), lesions


def photo_name(split: str, index: int) -> str:
    """A file name in DDR's form, unlike any other of the set and silent about the grade."""
    block, within = divmod(index, 10_000)
    return f"{block + 1:03d}-{within:04d}-{SPLITS.index(split) + 1}00.jpg"


# ------------------------------------------------------------------------------------------- how many


def ddr_counts(total: int) -> dict[str, tuple[int, ...]]:
    """`total` photographs in DDR's proportions of splits and grades 0-5, at least 2 of each grade in each."""
    least = 2
    cells = [(split, grade, n) for split in SPLITS for grade, n in enumerate(DDR[split])]
    if total < least * len(cells):
        raise UserError(f"{total} photographs are too few: {least} for each grade and split make {least * len(cells)}.")
    # A cell whose share is under the least gets the least; what is left is shared among the others, which may
    # push more of them under it.
    poor: set[int] = set()
    while True:
        left = total - least * len(poor)
        whole = sum(n for i, (_, _, n) in enumerate(cells) if i not in poor)
        fresh = {i for i, (_, _, n) in enumerate(cells) if i not in poor and left * n < least * whole}
        if not fresh:
            break
        poor |= fresh
    # Largest remainder, in whole numbers, so that no rounding of floats decides.
    got = {i: least if i in poor else left * n // whole for i, (_, _, n) in enumerate(cells)}
    rest = sorted((i for i in got if i not in poor), key=lambda i: (-(left * cells[i][2] % whole), i))
    for i in rest[: total - sum(got.values())]:
        got[i] += 1
    return {split: tuple(got[i] for i, c in enumerate(cells) if c[0] == split) for split in SPLITS}


def _plan(counts: Mapping[str, Sequence[int]], seed: int) -> list[Photograph]:
    """Every photograph. Grades are shuffled: neither name nor place tells them."""
    plan = []
    for split, numbers in counts.items():
        if split not in SPLITS:
            raise UserError(f"Unknown split {split!r} in counts: known are {', '.join(SPLITS)}.")
        if len(numbers) != UNGRADABLE + 1 or any(n < 0 for n in numbers):
            raise UserError(
                f"Counts of split {split!r} must be six numbers, one for each grade 0-5, not {list(numbers)}."
            )
        grades = np.repeat(np.arange(UNGRADABLE + 1), numbers)
        stream(seed, split, 0, "order").shuffle(grades)
        plan += [Photograph(split, i, int(grade), photo_name(split, i)) for i, grade in enumerate(grades)]
    return plan


# ------------------------------------------------------------------------------------------ generation


class _Job(NamedTuple):
    """One photograph to be made, and how."""

    file: str
    photo: Photograph
    seed: int
    size: int
    quality: int
    progressive: float  #: share of the photographs that are


def _write(job: _Job) -> list[Lesion]:
    """Render one photograph and save it: what a worker process does."""
    _keep_memory()
    split, index = job.photo.split, job.photo.index
    photo, lesions = _photograph(job.seed, split, index, job.photo.grade, job.size)
    # A stream of its own, which is below a larger share whenever it is below a smaller one.
    progressive = job.progressive > 0 and stream(job.seed, split, index, "progressive").random() < job.progressive
    photo.save(job.file, "JPEG", quality=job.quality, subsampling="4:2:0", progressive=progressive)
    return lesions


@functools.cache
def _keep_memory() -> None:
    """Let the C library keep what is freed for the next photograph, which is drawn some 3 % sooner; once in a process.

    glibc mmaps what is as large as the largest block that was freed, and trims its heap at twice that.
    """
    np.empty(24 << 20, np.uint8)


def generate(
    root: Path,
    *,
    counts: Mapping[str, Sequence[int]],
    size: int = DEFAULT_SIZE,
    seed: int = DEFAULT_SEED,
    quality: int = 95,
    layout: str = "official",
    progressive: float = 0.0,
    corrupt: int = 0,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic DDR to `root`, which must not exist, and return `root`.

    All is written to a hidden folder beside `root` and renamed at the end: `root` is whole or is not there.

    docs/synthetic.md tells what the arguments mean.

    Args:
        counts: For each split, how many photographs of each grade 0-5.
        size: Side in pixels.
        workers: None = as many processes as this one may use cores; 1 = none but this one.
        on_progress: Called with (done, total) after each photograph.

    Raises:
        UserError: `root` exists, or an argument is out of its range.
    """
    root = Path(root)
    if root.exists() or root.is_symlink():
        raise UserError(f"{root} already exists: choose another folder or remove it first.")
    for name, value, least, most in (
        ("size", size, 16, 8192),
        ("quality", quality, 1, 100),
        ("progressive", progressive, 0, 1),
    ):
        if not least <= value <= most:
            raise UserError(f"A synthetic set cannot have {name} {value}: choose from {least} to {most}.")
    form = form_of(layout)
    placed = {photo: where for photo in _plan(counts, seed) if (where := form.place(photo)) is not None}
    if not placed:
        raise UserError(f"Layout {layout!r} has no place for any of the photographs: ask for other grades or splits.")
    if not 0 <= corrupt < len(placed):
        most = len(placed) - 1
        raise UserError(f"A set of {most + 1} photographs cannot have {corrupt} faulty ones: choose from 0 to {most}.")
    workers = min(ranks.available_cores() if workers is None else workers, max(len(placed) // 8, 1))
    root.parent.mkdir(parents=True, exist_ok=True)
    part = root.parent / f".{root.name}.{uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        form.make_folders(part, counts)
        jobs = [_Job(str(part / where), photo, seed, size, quality, progressive) for photo, where in placed.items()]
        with (
            open(part / form.lesions, "w", newline="\n", encoding="utf-8") as table,
            each(_write, jobs, workers, lost=f"{root}: a process that drew photographs") as results,
        ):
            table.write("split,name,kind,x,y,radius\n")
            for done, (photo, lesions) in enumerate(zip(placed, results, strict=True), 1):
                for m in lesions:
                    table.write(f"{photo.split},{photo.name},{m.kind},{m.x:.1f},{m.y:.1f},{m.radius:.1f}\n")
                if on_progress is not None:
                    on_progress(done, len(placed))
        form.write_labels(part, counts, placed)
        if corrupt:
            turn = [FAULTS[i % len(FAULTS)] for i in range(corrupt)]
            splits = {where: photo.split for photo, where in placed.items()}
            found = inject(part, list(splits), turn, seed, splits=splits)
            listed = files.table([("path", "fault"), *sorted(found.items())])
            (part / "faults.csv").write_text(listed, encoding="utf-8", newline="\n")
        try:
            part.rename(root)
        except OSError as error:
            if not root.exists():
                raise
            raise UserError(f"{root} was made by another process meanwhile: use that one or remove it.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # after the rename there is nothing left to remove
    return root


# ---------------------------------------------------------------------------------------------- cache


def default_root(
    counts: Mapping[str, Sequence[int]] = DEFAULT_COUNTS,
    size: int = DEFAULT_SIZE,
    seed: int = DEFAULT_SEED,
) -> Path:
    """Where `ensure` keeps that set: in $FASTDDR_CACHE, else in the user's cache folder.

    The folder's name tells the generator's version and everything that the files depend on.
    """
    text = ";".join(f"{split}={','.join(map(str, counts[split]))}" for split in sorted(counts))
    # The quality of the JPEGs is always this one; it stays in the name, or every cache would draw its sets again.
    digest = hashlib.sha256(f"{text};quality=95".encode()).hexdigest()[:12]
    return cache.folder() / f"synthetic-v{VERSION}-seed{seed}-{size}px-{digest}"


def ensure(
    counts: Mapping[str, Sequence[int]] = DEFAULT_COUNTS,
    size: int = DEFAULT_SIZE,
    seed: int = DEFAULT_SEED,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The root of the synthetic set with these settings, generated into the cache if it is not there yet."""
    root = default_root(counts, size, seed)
    if root.is_dir():
        return root
    for left in root.parent.glob(f".{root.name}.*.part"):
        with suppress(FileNotFoundError):  # another process has finished it meanwhile
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)
    try:
        return generate(root, counts=counts, size=size, seed=seed, on_progress=on_progress)
    except UserError:
        if root.is_dir():  # another process was first: its files are the same bytes
            return root
        raise
