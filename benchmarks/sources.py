"""The photographs that loaders are measured on: yours, or synthetic ones in more than one encoding."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console

from fastddr.data import synthetic
from fastddr.errors import UserError
from fastddr.progress import EpochBar
from fastddr.ranks import available_cores

#: What is said of each in tables.
NAMES = {"95-420": "synthetic, quality 95, 4:2:0", "100-444": "synthetic, quality 100, 4:4:4"}


def roots(data: Path | None, encodings: Sequence[str], photographs: int | None, size: int) -> list[tuple[str, Path]]:
    """(Name, folder) of each kind of photographs; synthetic ones are made where they are not there yet."""
    if data is not None:
        return [(data.resolve().name, data)]
    counts = synthetic.ddr_counts(photographs) if photographs else synthetic.DEFAULT_COUNTS
    console, total = Console(soft_wrap=True), sum(map(sum, counts.values()))
    with EpochBar(console, "making the synthetic photographs, once", total) as bar:
        root = synthetic.ensure(counts, size, on_progress=lambda done, _: bar.update(done))
    # The generator's own encoding is 95-420.
    return [(NAMES[name], root if name == "95-420" else full_chroma(root)) for name in encodings]


def full_chroma(root: Path) -> Path:
    """The same pixels at quality 100 with full chroma, as masters have it; in a folder beside `root`, made once."""
    target = root.with_name(f"{root.name}-100-444")
    if target.is_dir():
        return target
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=root.parent))

    def encode(file: Path) -> None:
        with Image.open(file) as photograph:
            photograph.save(part / file.relative_to(root), "JPEG", quality=100, subsampling=0)

    try:
        shutil.copytree(root, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.jpg"))
        with ThreadPoolExecutor(available_cores()) as threads:
            list(threads.map(encode, root.rglob("*.jpg")))
        try:
            os.rename(part, target)
        except OSError:
            # Another process was first: its files are the same bytes.
            if not target.is_dir():
                raise UserError(f"{target} cannot be made.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
