"""Contact sheets: the photographs whose discs were hardest to find, with what was found drawn into them.

A person who looks at them sees in a minute whether the crops are right.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastddr.data import photograph
from fastddr.data.crop import Row
from fastddr.data.problems import one_line

#: Tiles across and down a page, and the side of a tile's picture, in pixels.
_COLUMNS, _ROWS, _SIDE = 10, 10, 230
_PAGE = _COLUMNS * _ROWS
#: Space between tiles, and below a picture for two lines of text of this size.
_GAP, _TEXT, _FONT = 8, 36, 14
_PAPER, _INK, _OUTSIDE = (255, 255, 255), (0, 0, 0), (90, 90, 90)
_CIRCLE, _SQUARE = (0, 255, 0), (255, 220, 0)
#: A photograph is brightened until its brightest parts have this level, but not beyond this factor.
_BRIGHT, _MOST = 140, 16.0


def pages(folder: Path, photographs: int) -> list[Path]:
    """The files of the sheets that so many photographs fill."""
    return [folder / f"sheet-{page + 1:03d}.jpg" for page in range(-(-photographs // _PAGE))]


def is_page(path: str) -> bool:
    """Whether a file bears the name of a sheet, with any extension."""
    return re.fullmatch(r"sheet-\d+\.\w+", path.rpartition("/")[2]) is not None


def draw(root: Path, rows: Sequence[Row], threads: int) -> Iterator[bytes]:
    """The sheets as JPEG, of the rows in their order.

    Args:
        root: of the sources.
        rows: of the photographs.
        threads: how many are decoded at a time.
    """

    def tile(row: Row) -> Image.Image:
        return _tile(os.path.join(root, row.source), row)

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), _PAGE):
            yield _page(list(pool.map(tile, rows[start : start + _PAGE])))


def _page(tiles: Sequence[Image.Image]) -> bytes:
    width, height = _SIDE + _GAP, _SIDE + _TEXT + _GAP
    lines = -(-len(tiles) // _COLUMNS)
    columns = min(len(tiles), _COLUMNS)
    page = Image.new("RGB", (_GAP + columns * width, _GAP + lines * height), _PAPER)
    for place, tile in enumerate(tiles):
        page.paste(tile, (_GAP + place % _COLUMNS * width, _GAP + place // _COLUMNS * height))
    content = io.BytesIO()
    page.save(content, "JPEG", quality=88)
    return content.getvalue()


def _tile(file: str, row: Row) -> Image.Image:
    """A reduced photograph with circle and square, and two lines of text below.

    Its name is the source's: what is wrong goes into a list for `--exclude`, which is of sources.
    """
    image = photograph.upright(file)
    # All of the photograph and all of the square fit in.
    left, top = float(min(0, row.left)), float(min(0, row.top))
    width, height = max(image.width, row.left + row.side) - left, max(image.height, row.top + row.side) - top
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    # A pixel at the edge is for the lines.
    scale = (_SIDE - 2) / side
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    tile = Image.new("RGB", (_SIDE, _SIDE + _TEXT), _PAPER)
    tile.paste(_OUTSIDE, (0, 0, _SIDE, _SIDE))
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    tile.paste(_brightened(small), (round(1 - left * scale), round(1 - top * scale)))
    picture = tile.crop((0, 0, _SIDE, _SIDE))
    pen = ImageDraw.Draw(picture)
    x, y, radius = (float(value) * scale for value in (row.x, row.y, row.radius))
    x, y = x - left * scale + 1, y - top * scale + 1
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=_CIRCLE)
    x, y = (row.left - left) * scale + 1, (row.top - top) * scale + 1
    pen.rectangle((x, y, x + row.side * scale, y + row.side * scale), outline=_SQUARE)
    tile.paste(picture, (0, 0))
    pen = ImageDraw.Draw(tile)
    font = ImageFont.load_default(_FONT)
    pen.text((2, _SIDE + 1), _fitted(one_line(row.source.rpartition("/")[2]), pen, font), _INK, font)
    pen.text((2, _SIDE + 18), f"{row.method} {float(row.confidence):.2f}", _INK, font)
    return tile


def _brightened(image: Image.Image) -> Image.Image:
    """A dark photograph brighter, so that a person sees what is in it; another as it is."""
    levels = np.asarray(image)
    bright = float(np.percentile(levels.max(axis=2), 98))
    factor = min(_MOST, _BRIGHT / max(bright, 1.0))
    return Image.fromarray(np.minimum(levels * factor, 255).astype(np.uint8)) if factor > 1 else image


def _fitted(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A name cut in its middle to the width of a tile."""
    keep = len(text)
    shown = text
    while pen.textlength(shown, font) > _SIDE - 4 and keep > 2:
        keep -= 1
        shown = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return shown
