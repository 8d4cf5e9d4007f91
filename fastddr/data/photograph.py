"""One file: what its header says, whether all of it decodes, and the words for what is wrong with it.

Headers are read by Pillow. A JPEG is decoded by libjpeg-turbo (simplejpeg), which tells what Pillow and DALI pass over:
damage inside the scan mostly decodes without an exception, to grey or shifted blocks, and leaves only a warning. Other
formats are decoded by Pillow. All loaders give the same pixels for greyscale, CMYK, palettes, transparency and EXIF
orientation (`tests/unit/test_loaders.py`); 16-bit photographs and a few rare kinds they do not, so these are refused.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from fastddr.data.problems import one_line
from fastddr.errors import PASSING

T = TypeVar("T")

# What Pillow remarks on metadata is not printed: it says nothing of the pixels. Here, since whoever reads photographs
# imports this, processes of loaders too.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

#: A file with more pixels is refused by its header, undecoded: Pillow's limit, 89 million, far above any fundus camera.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
#: A smaller side is no photograph.
MIN_SIDE = 8
#: Nor is one with a longer one: the square round all of it would be above the pixels at which Pillow refuses a picture.
MAX_SIDE = math.isqrt(2 * MAX_PIXELS)
#: A longer one, for its short side, is none either.
LONGEST = 8
#: What is read, by Pillow's name. MPO is a JPEG with a second picture behind the first.
_FORMATS = {"JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "TIFF": (".tif", ".tiff")}
#: EXIF orientations (tag 0x0112), by what makes a photograph upright; of some it lies on its side.
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
#: What is before EXIF in its segment of a JPEG.
_EXIF = b"Exif\0\0"
#: Entries of EXIF that make DALI believe nothing of it where what they point at lies beyond its end: texts, and the
#: bytes of rational numbers.
_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298)
_RATIONALS = {0x011A: 8, 0x011B: 8, 0x013E: 16, 0x013F: 48, 0x0211: 24, 0x0214: 48}
#: Files that people take for photographs and Pillow does not know: offset, mark, name.
_OTHERS = (
    (128, b"DICM", "a DICOM file"),
    (4, b"ftyp", "a HEIC, AVIF or video file"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
)
#: What Pillow raises at damaged bytes: its decoders, its parsers of headers and EXIF, and its limit of pixels.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, OverflowError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
_SAMPLING = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}


@dataclass(frozen=True)
class Header:
    """What the header of a photograph says."""

    width: int
    """Pixels, of the upright photograph."""
    height: int
    format: str
    """JPEG, PNG or TIFF."""
    sampling: str
    """Of a JPEG's chroma: 4:4:4, 4:2:2, 4:2:0 or other; empty for the rest."""
    traits: tuple[str, ...]
    """Kinds of notes: greyscale, cmyk, turned, progressive, extension, name."""


class BadPhotograph(Exception):
    """A file that cannot be used; `kind` is a key of `problems.ERRORS`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, one_line(reason)


def unreadable(error: OSError) -> BadPhotograph:
    """What an error of the system's says of a file: nothing, where it may pass by itself."""
    if error.errno in PASSING:
        return BadPhotograph("unreadable-now", f"it cannot be read now ({error.strerror})")
    return BadPhotograph("unreadable", f"it cannot be read ({error.strerror or error})")


def again(read: Callable[[str], T], file: str) -> T:
    """What reading a file gives, and once more after an error that may pass by itself."""
    try:
        return read(file)
    except OSError as error:
        if error.errno not in PASSING:
            raise
    return read(file)


@contextmanager
def strict_sizes() -> Iterator[None]:
    """Within it `header` refuses decompression bombs; for all threads, so it is entered before they start."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def status(file: str) -> tuple[int, int]:
    """(bytes, time of change in ns) of a file. Raises `BadPhotograph` as `about`."""
    found = about(file)
    return found.st_size, found.st_mtime_ns


def about(file: str) -> os.stat_result:
    """What the file system says of a file. Raises `BadPhotograph` where it is not there, or may not be read."""
    try:
        found = again(os.stat, file)
    except OSError as error:
        if error.errno in PASSING:
            raise unreadable(error) from None
        if os.path.islink(file):
            raise BadPhotograph("broken-link", f"it is a link to {os.readlink(file)}, which is not there") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise BadPhotograph("missing", "there is no such photograph") from None
        raise unreadable(error) from None
    if not stat.S_ISREG(found.st_mode):
        raise BadPhotograph("format", "it is a folder or a device, not a file")
    # Size and time of change would not tell. Most may be read by everybody, which saves asking.
    if found.st_mode & 0o444 != 0o444 and not os.access(file, os.R_OK):
        raise BadPhotograph("unreadable", "it cannot be read (no right to)")
    return found


def header(file: str) -> Header:
    """What the header says. To be called within `strict_sizes`.

    Raises:
        BadPhotograph: the header alone shows that the file cannot be used.
    """
    try:
        return again(_header_of, file)
    except OSError as error:
        raise unreadable(error) from None


def _header_of(file: str) -> Header:
    with open(file, "rb") as stream:
        return _header(stream, file)


def digest(file: str) -> str:
    """A hash of all pixels of a photograph, in hex: the whole file decodes without a complaint.

    Raises:
        BadPhotograph: it does not.
    """
    _, pixels = _decoded(file)
    found = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    found.update(np.ascontiguousarray(pixels).data)
    return found.hexdigest()


def sound(file: str) -> Header:
    """What the header says of a photograph that decodes to its end. To be called within `strict_sizes`.

    Raises:
        BadPhotograph: it does not.
    """
    status(file)
    return _decoded(file)[0]


def _decoded(file: str) -> tuple[Header, np.ndarray]:
    try:
        content = again(_content, file)
    except OSError as error:
        raise unreadable(error) from None
    found = _header(io.BytesIO(content), file)
    pixels = _decode_jpeg(content) if content[:2] == b"\xff\xd8" else None
    return found, _decode_by_pillow(content) if pixels is None else pixels


def _content(file: str) -> bytes:
    with open(file, "rb") as stream:
        return stream.read()


def upright(file: str) -> Image.Image:
    """A photograph as upright RGB, decoded by Pillow. What it raises is Pillow's, one of `DAMAGED`."""
    with Image.open(file) as image:
        return turned(image)


def small(file: Path, side: int) -> Image.Image | None:
    """A photograph as upright RGB, to be shrunk to `side` pixels; None where it cannot be opened."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * side, 2 * side))  # JPEG: decode at a fraction of the size
            return turned(image)
    except DAMAGED:
        return None


def turned(image: Image.Image) -> Image.Image:
    """An opened photograph as upright RGB. What it raises is one of `DAMAGED`.

    Not by Pillow's `exif_transpose`: that writes all EXIF again, and fails at one mistyped tag where the pixels are
    sound.
    """
    if image.format == "TIFF":
        # Pillow turns it by itself, and would by XMP too.
        image.info.pop("xmp", None)
    image.load()  # after which a TIFF has no orientation any more
    turn = _TURNS.get(orientation(image))
    # Only where need be: each would copy all pixels.
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """How an opened photograph lies, as DALI reads it: from its EXIF alone; 1 where that says nothing.

    Pillow's `getexif` does not do: it also believes XMP and texts of a PNG, and goes by the type of an entry. A PNG
    whose EXIF comes last has to be loaded before.
    """
    return next(iter(_orientations(image)), 1)


def _orientations(image: Image.Image) -> list[int]:
    """What each block of EXIF says that says it."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return [int(image.tag_v2.get(_ORIENTATION, 1))]
    blocks = [image.info.get("exif", b"")]
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        blocks = [content for _, content in image.applist if content.startswith(_EXIF)]
    return [said for block in blocks if (said := _orientation_in(block.removeprefix(_EXIF))) is not None]


def _orientation_in(block: bytes) -> int | None:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return None
    found = None
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2 + 12 * (count - 1), start, -12):  # of two the first counts
            (tag,) = struct.unpack_from(f"{order}H", block, place)
            if tag == _ORIENTATION:
                # Whatever its type.
                (found,) = struct.unpack_from(f"{order}H", block, place + 8)
            elif tag in _TEXTS or tag in _RATIONALS:
                length, where = struct.unpack_from(f"{order}II", block, place + 4)
                length = _RATIONALS.get(tag, length)
                if length > 4 and where + length > len(block):
                    return None
    except struct.error:
        return None
    return found


def _header(stream: io.BufferedReader | io.BytesIO, file: str) -> Header:
    try:
        with Image.open(stream) as image:
            return _facts(image, stream, file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPhotograph("dimensions", f"its header claims more than {MAX_PIXELS:,} pixels ({error})") from None
    except UnidentifiedImageError:
        stream.seek(0)
        raise _unknown(stream.read(4096), stream) from None
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; Pillow's own have none
            raise
        raise BadPhotograph(_kind(error), f"its header cannot be read ({error})") from None


def _png_has_exif(stream: io.BufferedReader | io.BytesIO) -> bool:
    """Whether one of a PNG's chunks is eXIf; leaves the stream where it was."""
    place = stream.tell()
    stream.seek(8)
    while len(head := stream.read(8)) == 8 and head[4:] not in (b"eXIf", b"IEND"):
        stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    stream.seek(place)
    return head[4:] == b"eXIf"


def _facts(image: Image.Image, stream: io.BufferedReader | io.BytesIO, file: str) -> Header:
    if image.format not in _FORMATS:
        raise BadPhotograph("format", f"it holds a {image.format} picture")
    width, height = image.size
    if (
        width * height > MAX_PIXELS
        or min(width, height) < MIN_SIDE
        or max(width, height) > MAX_SIDE
        or max(width, height) > LONGEST * min(width, height)
    ):
        raise BadPhotograph("dimensions", f"it is {width} by {height} pixels")
    # Pillow hides the depth of a 16-bit RGB PNG behind the mode RGB; the raw mode of its tile tells it.
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    raw = args if isinstance(args, str) else args[0] if args else ""
    if image.mode.startswith(("I", "F")) or "16" in str(raw):
        raise BadPhotograph("16-bit", f"it has more than 8 bits a channel (mode {image.mode})")
    if (rare := _unlike(image)) is not None:
        raise BadPhotograph("format", f"it is {rare}")
    # EXIF of a PNG may come last, so that it has to be decoded whole; most have none.
    if image.format == "PNG" and "exif" not in image.info and _png_has_exif(stream):
        image.load()
    said = _orientations(image)
    if len(set(said)) > 1:
        # DALI may die of it.
        raise BadPhotograph("corrupt", "its EXIF says twice how it lies, and not the same")
    lies = said[0] if said else 1
    traits = []
    if image.mode in ("L", "LA", "1"):
        traits.append("greyscale")
    if image.mode == "CMYK":
        traits.append("cmyk")
    if lies in _TURNS:
        traits.append("turned")
    if image.info.get("progressive"):
        traits.append("progressive")
    if os.path.splitext(file)[1].lower() not in _FORMATS[image.format]:
        traits.append("extension")
    # Pillow turns a TIFF by itself, and its size is that of the upright picture already.
    if image.format != "TIFF" and lies in _SIDEWAYS:
        width, height = height, width
    sampling = ""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode != "L":
        sampling = _SAMPLING.get(JpegImagePlugin.get_sampling(image), "other")
    return Header(width, height, "JPEG" if image.format == "MPO" else image.format, sampling, tuple(traits))


def _unlike(image: Image.Image) -> str | None:
    """What a photograph is of which Pillow and DALI make unlike pixels, or DALI none; None where they agree."""
    colours = "which decoders take for different colours"
    if image.mode == "CMYK" and image.format != "TIFF" and "adobe" not in image.info:
        return f"a CMYK JPEG that does not say whether its inks are inverted, {colours}"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.mode == "LAB":
            return f"a CIELAB TIFF, {colours}"
        if image.mode in ("LA", "PA"):
            return f"a TIFF of one channel with transparency, {colours}"
        if 1 in image.tag_v2.get(TiffImagePlugin.EXTRASAMPLES, ()):
            return f"a TIFF with premultiplied transparency, {colours}"
        if TiffImagePlugin.BITSPERSAMPLE not in image.tag_v2:  # as Pillow writes those of 1 bit
            return "a TIFF that does not say how many bits a sample has, which DALI does not decode"
    return None


def _unknown(start: bytes, stream: io.BufferedReader | io.BytesIO) -> BadPhotograph:
    """What a file is that Pillow does not know, from its first bytes; of a JPEG or TIFF, from its whole header."""
    if not start:
        return BadPhotograph("empty", "the file is empty")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:200].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return BadPhotograph("html", "it is a web page, not a photograph")
    if _has_whole_header(start, stream):
        return BadPhotograph("format", "its header is whole, but of a kind that is not read, or damaged")
    if start.startswith((b"\xff\xd8", b"\x89PNG", b"II*\0", b"MM\0*")):
        return BadPhotograph("truncated", "it breaks off in its header")
    if (known := next((name for at, mark, name in _OTHERS if start[at:].startswith(mark)), None)) is not None:
        return BadPhotograph("format", f"it is {known}")
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        # The first 4,096 bytes may end in the middle of a character.
        if error.start < len(start) - 4:
            return BadPhotograph("junk", "it is no picture of any kind")
    if b"\0" in start:
        return BadPhotograph("junk", "it is no picture of any kind")
    return BadPhotograph("text", "it is text, not a photograph")


def _has_whole_header(start: bytes, stream: io.BufferedReader | io.BytesIO) -> bool:
    """Whether a JPEG is there up to its scan, or a TIFF up to the end of its first directory; False for the rest."""
    if start.startswith(b"\xff\xd8"):
        stream.seek(2)
        # Marker and length of one segment after the other.
        while len(head := stream.read(4)) == 4 and head[0] == 0xFF and head[1] != 0xDA:
            stream.seek(int.from_bytes(head[2:], "big") - 2, os.SEEK_CUR)
        return head[:2] == b"\xff\xda"
    if start.startswith((b"II*\0", b"MM\0*")):
        order: Literal["little", "big"] = "little" if start[0] == ord("I") else "big"
        stream.seek(int.from_bytes(start[4:8], order))
        entries = 12 * int.from_bytes(stream.read(2), order)
        return 0 < entries == len(stream.read(entries))
    return False


def _decode_jpeg(content: bytes) -> np.ndarray | None:
    """All pixels, or None where libjpeg-turbo's simple interface does not do this kind of JPEG and Pillow must."""
    try:
        *_, space, _ = simplejpeg.decode_jpeg_header(content)
        wanted = "CMYK" if space in ("CMYK", "YCCK") else "GRAY" if space == "Gray" else "RGB"
        return simplejpeg.decode_jpeg(content, colorspace=wanted, strict=True)
    except ValueError as error:
        said = str(error)
    if "Premature end of JPEG" in said:
        raise BadPhotograph("truncated", "it breaks off in the middle")
    # Other warnings, as of odd but harmless scan parameters, are left to Pillow, which stops at real errors.
    if "Corrupt JPEG data" in said or "Inconsistent" in said:
        raise BadPhotograph("corrupt", f"the decoder complains: {said}")
    return None


def _kind(error: Exception) -> str:
    """What Pillow's complaint means."""
    return "truncated" if "truncated" in str(error).lower() else "corrupt"


def _decode_by_pillow(content: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except DAMAGED as error:
        raise BadPhotograph(_kind(error), f"the decoder complains: {error}") from None
