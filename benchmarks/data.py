"""How fast a data set is read, checked and prepared, on all cores.

    python benchmarks/data.py                      # 512 px synthetic JPEGs
    python benchmarks/data.py --data DDR-dataset   # yours

`labels`: seconds in which a fresh process reads a set of 100,000 photographs (links to a few small ones) whose headers
are known: labels, file sizes, splits, problems, fingerprint; measured first, before the disk is busy.
`headers`: photographs a second that are opened for the first time. `decode`: photographs a second that `fastddr check`
decodes. `prepare`: photographs a second that `fastddr prepare` checks, crops, resizes and writes, in every round as if
for the first time; the start of its workers is counted in, but neither the command's own (Python and imports) nor the
contact sheets, which it draws by default.
The files are in the page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import numpy as np
import script
from PIL import Image

from fastddr import ranks
from fastddr.data import crop, manifest, prepare, survey, synthetic


@dataclass
class Options(script.Output):
    """Measure reading, checking and preparing."""

    data: Path | None = None
    """A data set in any layout; by default the synthetic one."""
    rounds: int = 5
    """Repeats of each measurement."""
    rows: int = 100_000
    """Photographs of the set that is only read."""
    size: int = 512
    """Side of the prepared photographs in pixels."""


#: In a process of its own, as at the start of a run; without the imports.
READ = """
import sys, time
from fastddr.data import manifest
began = time.perf_counter()
manifest.read(sys.argv[1]).fingerprint
print(time.perf_counter() - began)
"""


def linked(root: Path, rows: int) -> Path:
    """A set of so many photographs in the official layout, all of them links to a few small ones."""
    for split, share in (("train", 0.5), ("valid", 0.2), ("test", 0.3)):
        folder = root / split
        folder.mkdir(parents=True)
        names = [f"{split}-{number:07d}.jpg" for number in range(round(rows * share))]
        for place, name in enumerate(names):
            # File systems limit the links to one file.
            if place % 10_000 == 0:
                source = folder / name
                Image.fromarray(np.full((16, 16, 3), place % 251, dtype=np.uint8)).save(source)
            else:
                os.link(source, folder / name)
        (root / f"{split}.txt").write_text("".join(f"{name} {place % 5}\n" for place, name in enumerate(names)))
    return root


def preparing(data: Path, size: int) -> float:
    """Seconds of `fastddr prepare` where nothing is known of the photographs: what is known is not decoded strictly."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, FASTDDR_CACHE=f"{folder}/cache"):
        began = time.perf_counter()
        prepare.run(str(data), Path(folder) / "out", crop.Recipe(size), on_bad="exclude", sheet=0)
        return time.perf_counter() - began


def main(options: Options) -> None:
    """Measure, print and write.

    Raises:
        UserError: too few rounds.
    """
    harness.begin(options.rounds)
    rows: list[dict[str, Any]] = []
    found: dict[str, list[float]] = {}
    with (
        harness.writing("data", rows, options.out, wandb=options.wandb),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        # The set may be in the user's cache; what is measured is not, or the second round would find it known.
        data = options.data or synthetic.ensure()
        os.environ["FASTDDR_CACHE"] = f"{folder}/cache"
        many = linked(Path(folder) / "many", options.rows)
        manifest.read(many)
        seen = survey.take(data)
        photographs = [entry.path for entry in seen.entries]

        def labels() -> float:
            done = subprocess.run([sys.executable, "-c", READ, str(many)], capture_output=True, text=True, check=True)
            return float(done.stdout)

        def headers() -> float:
            began = time.perf_counter()
            survey.take(data, afresh=True)
            return len(photographs) / (time.perf_counter() - began)

        def decode() -> float:
            began = time.perf_counter()
            seen.decode(photographs, ranks.cores(), keep=False)
            return len(photographs) / (time.perf_counter() - began)

        def prepared() -> float:
            return len(photographs) / preparing(data, options.size)

        first = [labels() for _ in range(options.rounds)]
        rows.append({"name": "labels", "photographs": options.rows, **harness.spread(first), "unit": "s"})
        sizes = sorted({(r.width, r.height) for r in seen.records.values()})
        about = {
            "photographs": len(photographs),
            "source": "synthetic" if options.data is None else options.data.name,
            "least": "×".join(map(str, sizes[0])),
            "most": "×".join(map(str, sizes[-1])),
            "kilobytes": round(sum(r.size for r in seen.records.values()) / len(photographs) / 1000),
        }
        trials = {"headers": headers, "decode": decode, "prepare": prepared}
        try:
            harness.interleaved(
                trials, options.rounds, lambda k: harness.say(f"round {k} of {options.rounds}"), found=found
            )
        finally:
            # Also where it is stopped; else all rounds are whole.
            for name, values in harness.whole_rounds(found).items():
                made = {"size": options.size} if name == "prepare" else {}
                rows.append({"name": name, **about, **made, **harness.spread(values), "unit": "photographs/s"})
        harness.show("Reading, checking and preparing", rows, ["photographs"])


if __name__ == "__main__":
    script.run(main, Options)
