"""Results as they lie in `results/`: NAME_HARDWARE_DATE.json, of which the newest of each name and hardware counts.

NAME is the benchmark, or the benchmark with a word more for another measurement of it: `loader-real`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddr.errors import UserError

RESULTS = Path(__file__).parent / "results"
#: What a result has; results of before conditions were recorded lack these.
KEYS = ("benchmark", "machine", "versions", "date", "command", "rows")
#: Share of the cores, or of a card's time, that others may take before figures are called disturbed.
DISTURBED = 0.1
#: Kinds of rows that say what the machine can do, beside what a benchmark measures.
_BESIDE = {"loader": ("limit",), "step": ("ceiling",), "operations": ("ceiling",)}


def holds_figures(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row was measured; a training that did not come to a kappa was."""
    beside = _BESIDE.get(benchmark, ())
    return any(("failed" not in row or "seconds" in row) and row.get("kind") not in beside for row in rows)


def hardware_name(machine: Mapping[str, Any]) -> str:
    """The machine in a few words: its GPU, or its number of cores."""
    return str(machine["gpu"] or f"{machine['cores']}-core CPU")


@dataclass(frozen=True)
class Result:
    """One file."""

    name: str
    path: Path
    record: Mapping[str, Any]

    @property
    def hardware(self) -> str:
        return hardware_name(self.record["machine"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, those that failed too."""
        return self.record["rows"]

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The rows that have figures."""
        return [row for row in self.rows if "failed" not in row]

    @property
    def publishable(self) -> bool:
        """Whether its benchmark came to its end and measured something; older files are not marked, and did."""
        return self.record.get("complete", True) and holds_figures(self.record["benchmark"], self.rows)

    @property
    def gpu(self) -> bool:
        return self.record["machine"]["gpu"] is not None

    @property
    def disturbed(self) -> bool:
        """Whether others were at work on the machine, before, after or meanwhile; False where that was not recorded."""
        moments = self.record.get("conditions", {}).values()
        meanwhile = (row.get("others_cpu_share", 0.0) for row in self.rows)
        return any((moment or {}).get("disturbed") for moment in moments) or max(meanwhile, default=0.0) > DISTURBED

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, which a picture of them carries."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Result:
    """Read a result; its name may be any.

    Raises:
        UserError: it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}.") from None
    except ValueError:
        raise UserError(f"{path} is no JSON; give a file that a benchmark wrote.") from None
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise UserError(f"{path} is no result of a benchmark: it lacks {', '.join(missing)}.")
    name = path.stem.rsplit("_", 2)[0] if path.stem.count("_") >= 2 else record["benchmark"]
    return Result(name.removesuffix("-incomplete"), path, record)


def newest(folder: Path = RESULTS) -> list[Result]:
    """The newest result of each name and hardware; by name, machines with a GPU first.

    One that is not complete, or holds no figure, never takes the place of an older one.
    """
    found: dict[tuple[str, str], Result] = {}
    for result in filter(lambda one: one.publishable, map(read, sorted(folder.glob("*.json")))):
        key = result.name, result.hardware
        if key not in found or result.record["date"] > found[key].record["date"]:
            found[key] = result
    return sorted(found.values(), key=lambda result: (result.name, not result.gpu, result.hardware))


def first(results: Iterable[Result], name: str) -> Result | None:
    """The result of that name which is shown where there is room for one."""
    return next((result for result in results if result.name == name), None)
