"""The photographs that loaders are measured on: yours, or synthetic ones in more than one encoding."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console

from fastddr.data import manifest, problems, survey, synthetic
from fastddr.data.manifest import Manifest
from fastddr.errors import UserError
from fastddr.loaders import capacity
from fastddr.progress import EpochBar
from fastddr.ranks import available_cores

#: What is said of each in tables.
NAMES = {"95-420": "synthetic, quality 95, 4:2:0", "100-444": "synthetic, quality 100, 4:4:4"}


def roots(data: Path | None, encodings: Sequence[str], photographs: int | None) -> list[tuple[str, Path]]:
    """(Name, folder) of each kind of photographs; synthetic ones are made where they are not there yet."""
    if data is not None:
        return [(data.resolve().name, data)]
    counts = synthetic.ddr_counts(photographs) if photographs else synthetic.DEFAULT_COUNTS
    console, total = Console(soft_wrap=True), sum(map(sum, counts.values()))
    with EpochBar(console, "making the synthetic photographs, once", total) as bar:
        root = synthetic.ensure(counts, on_progress=lambda done, _: bar.update(done))
    # The generator's own encoding is 95-420.
    return [(NAMES[name], root if name == "95-420" else full_chroma(root)) for name in encodings]


def read(root: Path) -> Manifest:
    """The manifest of a set.

    Raises:
        UserError: something in it cannot be used. A benchmark leaves nothing out, so there is no flag for that.
    """
    seen = survey.take(root)
    bad = problems.errors(seen.problems())
    if bad:
        more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
        advice = f"`fastddr prepare {shlex.quote(str(root))} NEW-SET --on-bad exclude` makes one."
        said = f"{bad[0].sentence(seen.root)}{more}; or measure a set without what is bad"
        raise UserError(problems.one_line(f"{said}: {advice}"))
    return manifest.of(seen)


def warm(found: Manifest) -> bool:
    """Read the photographs once, so that they lie in the page cache, and say so; False where they do not fit there."""
    console, total = Console(soft_wrap=True), int(found.size.sum())
    about = f"{len(found)} photographs ({total / 2**20:,.0f} MiB)"
    if total > capacity.free_ram():
        console.print(f"{about} are more than the free memory, so loaders also read from the disk.", highlight=False)
        return False
    console.print(f"reading {about} once, so that they lie in the page cache", highlight=False)
    with ThreadPoolExecutor(available_cores()) as threads:
        for _ in threads.map(lambda file: len(Path(file).read_bytes()), found.files()):
            pass
    return True


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
