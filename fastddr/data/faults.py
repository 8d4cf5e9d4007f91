"""Faults that data sets are found with, put in on purpose: into a synthetic set, or by a test into any photograph.

Each fault spoils one JPEG and leaves its name, so labels stay as they are. Some make the file useless (`empty`), some
only unusual (`greyscale`). `problems` reports them by the same names, but for `bomb`, which is `dimensions` there.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastddr.data.eye.camera import Rng, stream
from fastddr.errors import UserError, nearest

__all__ = ["FAULTS", "apply", "inject"]

_TEXT = b"Thumbs.db was here. This is not a photograph.\n"
_HTML = b"""<!DOCTYPE html>
<html><head><title>403 Forbidden</title></head>
<body><h1>Forbidden</h1><p>You do not have permission to access this resource.</p></body></html>
"""


def _photo(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _save(image: Image.Image, path: Path, kind: str, **options: object) -> None:
    """Into memory first: nothing is half written, and a link's target or another name of the file stays whole."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95, "subsampling": "4:2:0"} if kind == "JPEG" else {}), **options)
    _write(path, file.getvalue())


def _write(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _sixteen_bit(path: Path, rng: Rng) -> None:
    grey = np.asarray(_photo(path).convert("L"), np.uint16) * 257
    _save(Image.fromarray(grey), path, "PNG")


def _turned(path: Path, rng: Rng) -> None:
    """Stored lying on its left side; orientation 6 says: turn clockwise to look at it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    _save(_photo(path).transpose(Image.Transpose.ROTATE_90), path, "JPEG", exif=exif)


def _bomb(path: Path, rng: Rng) -> None:
    """A header of 60,000 × 60,000 pixels, 10.8 GB as RGB, and next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    _write(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def _corrupt(path: Path, rng: Rng) -> None:
    """Other bytes inside the scan: it still decodes, to shifted or grey blocks, and libjpeg only warns."""
    import simplejpeg  # here: nothing else of the generator needs it

    from fastddr.data.photograph import DAMAGED

    data = path.read_bytes()
    scan = _scan(data)
    length = max(min(48, (len(data) - scan) // 8), 4)
    for _ in range(1000):
        at = int(rng.integers(scan + (len(data) - scan) // 4, scan + 3 * (len(data) - scan) // 4))
        if data[at - 1] == 0xFF:  # its second byte would make a marker of the two
            continue
        # No 0xFF: it would begin a marker.
        spoilt = data[:at] + rng.integers(0, 255, length, dtype=np.uint8).tobytes() + data[at + length :]
        try:
            with Image.open(io.BytesIO(spoilt)) as image:
                image.load()
        except DAMAGED:  # another place is tried
            continue
        try:
            simplejpeg.decode_jpeg(spoilt, strict=True)
        except ValueError as error:
            if "Corrupt JPEG data" in str(error):
                _write(path, spoilt)
                return
    raise UserError(f"{path} cannot be corrupted so that it still decodes: take a larger photograph.")


def _scan(data: bytes) -> int:
    """Where a JPEG's first scan begins."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xDA:
            return at + 2 + length
        at += 2 + length
    raise UserError("Only a JPEG can be corrupted: this file has no scan.")


def _broken_link(path: Path, rng: Rng) -> None:
    path.unlink()
    path.symlink_to(f"gone/{path.name}")


def _truncated(path: Path, rng: Rng) -> None:
    data = path.read_bytes()
    _write(path, data[: len(data) // 2])


#: What spoils a file, by the name of the fault; `duplicate` needs a second file.
_KINDS: dict[str, Callable[[Path, Rng], object]] = {
    "empty": lambda path, rng: _write(path, b""),
    "truncated": _truncated,
    "junk": lambda path, rng: _write(path, b"\0" + rng.bytes(4095)),  # never a known signature
    "text": lambda path, rng: _write(path, _TEXT),
    "html": lambda path, rng: _write(path, _HTML),
    "extension": lambda path, rng: _save(_photo(path), path, "PNG"),
    "format": lambda path, rng: _save(_photo(path), path, "GIF"),
    "cmyk": lambda path, rng: _save(_photo(path).convert("CMYK"), path, "JPEG"),
    "16-bit": _sixteen_bit,
    "greyscale": lambda path, rng: _save(_photo(path).convert("L"), path, "JPEG"),
    "progressive": lambda path, rng: _save(_photo(path), path, "JPEG", progressive=True),
    "turned": _turned,
    "bomb": _bomb,
    "corrupt": _corrupt,
    "unreadable": lambda path, rng: path.chmod(0),
    "broken-link": _broken_link,
    "missing": lambda path, rng: path.unlink(),
}
FAULTS: tuple[str, ...] = (*_KINDS, "duplicate")


def apply(path: Path, fault: str, *, other: Path | None = None, seed: int = 0) -> Path:
    """Put one fault into the photograph `path`, a JPEG, and return `path`.

    `other` is what a `duplicate` becomes a copy of; by default the next file of the same kind in the folder. `seed`
    and the file's name decide on all that is random.
    """
    path = Path(path)
    _known([fault])
    if fault == "duplicate":
        if other is None:
            others = sorted(p for p in path.parent.glob(f"*{path.suffix}") if p != path and p.is_file())
            other = next((p for p in others if p > path), others[0] if others else None)
        if other is None:
            raise UserError(f"{path} has no other photograph beside it of which it could be made a duplicate.")
        _write(path, other.read_bytes())
    else:
        _KINDS[fault](path, stream(seed, path.name, 0, fault))
    return path


def inject(
    root: Path,
    files: Sequence[str],
    faults: Sequence[str],
    seed: int = 0,
    *,
    splits: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Put each of the faults into one of the files, and return which got which: path -> fault.

    Args:
        root: Folder that the paths are relative to.
        files: Photographs that may be spoilt, JPEGs. Each gets one fault at most.
        faults: Names of `FAULTS`; a name may come twice.
        seed: Decides which file gets which fault. The order of `files` counts, too.
        splits: Split of each file. With it, the faults go to the splits by turns, and a duplicate is one of its split
            where another photograph of that is left.

    Raises:
        UserError: a fault is unknown, or there are too few files.
    """
    _known(faults)
    spare = int("duplicate" in faults)  # what a duplicate is a copy of stays whole
    if len(faults) + spare > len(files):
        raise UserError(
            f"{len(faults)} faults need {len(faults) + spare} photographs, and there are {len(files)}: put in fewer."
        )
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(splits[file] if splits is not None else "", []).append(file)
    for split, group in groups.items():
        stream(seed, split, 0, "faults").shuffle(group)
    turns = [file for turn in range(max(map(len, groups.values()), default=0)) for file in _nth(groups, turn)]
    found = dict(zip(turns, faults, strict=False))
    whole = turns[len(found) :]
    for file, fault in found.items():
        other = None
        if fault == "duplicate":
            same = [f for f in whole if splits is not None and splits[f] == splits[file]]
            other = Path(root) / (same or whole)[0]
        apply(Path(root) / file, fault, other=other, seed=seed)
    return found


def _nth(groups: Mapping[str, Sequence[str]], turn: int) -> list[str]:
    return [group[turn] for group in groups.values() if turn < len(group)]


def _known(faults: Sequence[str]) -> None:
    for fault in faults:
        if fault not in FAULTS:
            raise UserError(f"There is no fault {fault!r}; {nearest(fault, FAULTS)}")
