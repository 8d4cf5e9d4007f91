"""Whether a change has made fastddr slower: a minute or two, in ratios, so that any machine can judge it.

    python benchmarks/guard.py

Measures in a few short rounds how many times as fast the loaders are as torchvision's DataLoader, and what share of its
ceiling training comes to, and compares with the newest stored result of a machine of the same kind (its GPU, or its
number of cores). A ratio fails where even the upper end of its interval is below `share` of the stored median; what
fails is measured once more, since a machine may be disturbed for a minute. Exit code 1 if it fails again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import script
import stored

from fastddr.errors import UserError

HERE = Path(__file__).parent
#: What is run: the benchmark, and arguments that make it short.
RUNS: dict[str, tuple[str, ...]] = {
    "loader": ("--photographs", "240", "--encodings", "95-420", "--policies", "report", "--length", "0", "--rounds",
               "5", "--seconds", "0.4", "--no-profile", "--loaders", "dali", "resident:ram", "torch-pil"),
    "train": ("--photographs", "240", "--rounds", "5", "--recipes", "fastddr", "fastddr:loader=replay",
              "report:workers=0"),
}  # fmt: skip
#: The stored ratio that stands for one that is not stored by the same name: where a store lies hardly matters.
SAME = {"resident, ram / torch-pil": "resident, mmap / torch-pil"}


@dataclass
class Options:
    """Compare ratios with the stored ones."""

    share: float = 0.6
    """Of the stored ratio, that must be reached."""
    results: Path = stored.RESULTS
    """Where the stored results lie."""


@dataclass(frozen=True)
class Finding:
    """A ratio, and what it must come to."""

    name: str
    median: float
    high: float
    stored: float
    least: float

    @property
    def good(self) -> bool:
        """Whether its interval reaches what is asked."""
        return self.high >= self.least


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The ratio rows by name, whether a target was set for them or not; policies other than `report` aside."""
    return {
        row["name"].removesuffix(", the best peer"): row
        for row in rows
        if row.get("unit") == "×" and row.get("policy", "report") == "report" and "failed" not in row
    }


def judge(rows: Sequence[Mapping[str, Any]], older: stored.Result, share: float) -> list[Finding]:
    """Every ratio that is stored too."""
    known = ratios([row for row in older.measured if "quality 100" not in row.get("photographs", "")])
    found = []
    for name, row in ratios(rows).items():
        old = known.get(name) or known.get(SAME.get(name, ""))
        if old is not None:
            found.append(Finding(name, row["median"], row["high"], old["median"], share * old["median"]))
    return found


def measured(benchmark: str) -> list[dict[str, Any]]:
    """The rows of a short run.

    Raises:
        RuntimeError: the benchmark failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / f"{benchmark}.py"), *RUNS[benchmark], "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{benchmark}.py ended with {done.returncode}: {done.stderr[-2000:]}")
        return stored.read(out).rows


def check(benchmark: str, older: stored.Result, share: float) -> bool:
    """Whether all its ratios hold, by the second time."""
    for last in (False, True):
        found = judge(measured(benchmark), older, share)
        if not found:
            raise UserError(f"{older.path.name} has no ratio that {benchmark}.py measured now; store a new result.")
        for one in found:
            verdict = "" if one.good else ": FAILED" if last else ": again"
            harness.say(f"{one.name}: {one.median:.2f} (to {one.high:.2f}), at least {one.least:.2f} is asked, "
                        f"{one.stored:.2f} is stored{verdict}")  # fmt: skip
        if all(one.good for one in found):
            return True
    return False


def main(options: Options) -> int:
    """Measure and compare; 1 if a ratio fell."""
    hardware = harness.hardware_name(harness.machine())
    older = {result.name: result for result in stored.newest(options.results) if result.hardware == hardware}
    held = True
    for benchmark in RUNS:
        if benchmark not in older:
            harness.say(f"{benchmark}: no result of a {hardware} is stored, so there is nothing to compare with.")
            continue
        held &= check(benchmark, older[benchmark], options.share)
    return int(not held)


if __name__ == "__main__":
    script.run(main, Options)
