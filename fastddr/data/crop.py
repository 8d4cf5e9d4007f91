"""One photograph cropped to the disc of the retina, padded with black to a square and resized: what `prepare` writes.

It is written beside, under a hidden name that no layout takes for a photograph, and renamed. Its line in the journal
comes before that: a file of that name and size is then whole, and what was written is always listed.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from fastddr import files
from fastddr.data import photograph
from fastddr.data.disc import Disc, find_disc, square
from fastddr.data.photograph import BadPhotograph
from fastddr.errors import UserError

Format = Literal["jpeg", "png"]
#: Of the outputs. Raise it with every change of a byte of them.
VERSION = 2
#: Sides that make sense, in pixels.
LEAST, MOST = 16, 8192
#: Of the JPEGs, with chroma of full resolution: training decodes them again and again, so little may be lost here.
QUALITY = 100
#: Of the PNGs. The files are a sixth larger than with Pillow's own level and take a fifth of the time.
_COMPRESSION = 1
#: Rows that are padded and resized at a time.
_STRIP = 256
#: Ends the hidden name of what is being written.
PART = ".part"


@dataclass(frozen=True)
class Recipe:
    """What masters are made with; all of it changes their bytes."""

    size: int = 512
    """Side in pixels."""
    format: Format = "jpeg"
    """JPEG of quality 100 with full chroma, or PNG."""
    version: int = VERSION
    """Of `fastddr prepare`."""

    def __post_init__(self) -> None:
        if not LEAST <= self.size <= MOST:
            raise UserError(f"--size {self.size}: choose from {LEAST} to {MOST} pixels.")

    def __str__(self) -> str:
        made = "" if self.version == VERSION else f", by version {self.version} of `fastddr prepare`"
        return f"{self.size} px, {self.format}{made}"


class Job(NamedTuple):
    """A photograph to make."""

    source: str
    """Relative to the root of the data set."""
    source_bytes: int
    whole: bool
    """Whether it is known already that all of it decodes."""
    path: str
    """Of the output, relative to the root of the new data set."""
    target: str
    """Where it is written, relative to the output folder."""


class Row(NamedTuple):
    """What is written down of a finished photograph: a row of prepared.csv."""

    path: str
    source: str
    source_bytes: int
    bytes: int
    left: int
    """Left, top and side: the square that was cut out, in whole pixels of the upright source."""
    top: int
    side: int
    x: str
    """Centre, radius and confidence of the disc are text, so that what a journal kept is what is written at the end."""
    y: str
    radius: str
    confidence: str
    method: str


class Result(NamedTuple):
    """What became of a job: a row, or the kind and reason of a fault of the photograph."""

    source: str
    row: Row | None
    digest: str = ""
    """Of the source's pixels, where they were hashed."""
    kind: str = ""
    reason: str = ""


def name_of(path: str, format: Format) -> str:
    """The output's path for a source's: the same where its extension fits the format."""
    stem, extension = os.path.splitext(path)
    if format == "jpeg":
        return path if extension.lower() in (".jpg", ".jpeg") else f"{stem}.jpg"
    return path if extension.lower() == ".png" else f"{stem}.png"


class Master(NamedTuple):
    """A photograph as `prepare` makes it, not yet written."""

    content: bytes
    digest: str
    """Of the source's pixels, where they were hashed."""
    disc: Disc
    left: int
    top: int
    side: int


def master(file: str, recipe: Recipe, *, whole: bool) -> Master:
    """The master of a photograph; `whole`: it is known already that all of it decodes.

    Raises:
        BadPhotograph: it cannot be used.
    """
    digest = ""
    with photograph.strict_sizes():
        if not whole:
            digest = photograph.digest(file)
        image = _upright(file)
    disc = find_disc(np.asarray(image))
    left, top, side = square(disc, image.width, image.height)
    return Master(_encoded(cut(image, left, top, side, recipe.size), recipe.format), digest, disc, left, top, side)


def make(job: Job, root: str, out: str, recipe: Recipe, journal: str) -> Result:
    """Make one photograph of the data set at `root` for the new one in `out`, and add a line to the journal.

    Raises:
        UserError: it cannot be written.
    """
    try:
        made = master(os.path.join(root, job.source), recipe, whole=job.whole)
    except BadPhotograph as bad:
        return Result(job.source, None, kind=bad.kind, reason=bad.reason)
    disc = made.disc
    row = Row(
        job.path, job.source, job.source_bytes, len(made.content), made.left, made.top, made.side,
        f"{disc.x:.2f}", f"{disc.y:.2f}", f"{disc.radius:.2f}", f"{disc.confidence:.4f}", disc.method,
    )  # fmt: skip
    target = os.path.join(out, job.target)
    try:
        _write(target, made.content, row, journal)
    except OSError as error:
        raise cannot_write(target, error) from None
    return Result(job.source, row, made.digest)


def cut(image: Image.Image, left: int, top: int, side: int, size: int) -> Image.Image:
    """A square of a photograph at another size, antialiased; black where the square reaches out of the photograph.

    It is resized in width a strip at a time, then in height. Pillow does the same with the whole square, to the same
    bytes, but needs memory for all of it.
    """
    narrow = Image.new("RGB", (size, side))
    end = min(top + side, image.height)
    for start in range(max(top, 0), end, _STRIP):
        lines = min(_STRIP, end - start)
        strip = image.crop((left, start, left + side, start + lines))
        narrow.paste(strip.resize((size, lines), Image.Resampling.LANCZOS), (0, start - top))
    return narrow.resize((size, size), Image.Resampling.LANCZOS)


def _upright(file: str) -> Image.Image:
    try:
        return photograph.again(photograph.upright, file)
    except photograph.DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise photograph.unreadable(error) from None
        raise BadPhotograph("corrupt", f"the decoder complains: {error}") from None


def _encoded(image: Image.Image, format: Format) -> bytes:
    content = io.BytesIO()
    if format == "jpeg":
        image.save(content, "JPEG", quality=QUALITY, subsampling=0)
    else:
        image.save(content, "PNG", compress_level=_COMPRESSION)
    return content.getvalue()


def _write(target: str, content: bytes, row: Row, journal: str) -> None:
    place = Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    # The journal's new line must not hold for an old file that happens to be as large.
    place.unlink(missing_ok=True)
    append(journal, row)
    files.put(place, content, ending=PART)


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """The sentence about a place that cannot be written to, or read."""
    way = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see that you may write and read there"
    return UserError(
        f"{path}: it cannot be used ({error.strerror or error}); {way} and run again: what is done is not done again."
    )


def append(journal: str, row: Row) -> None:
    """Add a line to a journal, in one piece: several processes write to the same one.

    It begins with a line break too, since a kill or a full disk may have torn the line before it.
    """
    line = b"\n" + json.dumps(row).encode() + b"\n"
    with open(journal, "ab", buffering=0) as stream:
        if stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), journal)


def rows_of(lines: Iterable[bytes]) -> list[Row]:
    """The rows of a journal's lines. One that is torn, by a kill or a full disk, counts as not written."""
    found = []
    for line in lines:
        try:
            row = Row(*json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(row.path, str):
            found.append(row)
    return found
