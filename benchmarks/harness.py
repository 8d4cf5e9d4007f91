"""What all benchmarks share: interleaved rounds, medians with intervals, the machine, and the JSON that they write.

Rows: {"name", settings..., "median", "low", "high", "unit", "n"}; low and high are the 95 % percentile-bootstrap
interval of the median over n rounds.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastddr.ranks import available_cores

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("fastddr", "torch", "torchvision", "accelerate", "pillow", "numpy")


def interleaved(
    trials: Mapping[str, Callable[[], float]], rounds: int, on_round: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    """Each trial once a round, round after round, so that a slow minute of the machine falls on all of them."""
    found: dict[str, list[float]] = {name: [] for name in trials}
    for number in range(rounds):
        for name, trial in trials.items():
            found[name].append(trial())
        if on_round is not None:
            on_round(number + 1)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, with the 95 % percentile-bootstrap interval of it."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "n": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios of two trials, round by round: what the machine does to both cancels out."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def machine() -> dict[str, Any]:
    """The hardware that this process sees."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpus"] = torch.cuda.device_count()
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"]).lower().replace("_", "-")
        if name in _PACKAGES or name.startswith(("nvidia-dali-cuda", "nvidia-nvimgcodec")):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def write(benchmark: str, rows: Sequence[Mapping[str, Any]], out: Path | None) -> Path:
    """Write the result as JSON and return where: by default results/NAME_HARDWARE_DATE.json."""
    now = datetime.now(UTC)
    hardware = machine()
    if out is None:
        label = hardware["gpu"] or f"{hardware['cores']}-core-cpu"
        out = RESULTS / f"{benchmark}_{'-'.join(str(label).lower().split())}_{now:%Y-%m-%d}.json"
    script = Path(sys.argv[0])
    record = {
        "benchmark": benchmark,
        "machine": hardware,
        "versions": versions(),
        "date": now.isoformat(timespec="seconds"),
        # The arguments that name a place of this machine would help nobody.
        "command": shlex.join(["python", f"{script.parent.name}/{script.name}", *_public(sys.argv[1:])]),
        "rows": list(rows),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return out


def _public(arguments: Sequence[str]) -> list[str]:
    def public(argument: str) -> str:
        flag, equals, value = argument.rpartition("=")
        return f"{flag}{equals}{Path(value).name if '/' in value else value}"

    return [public(argument) for argument in arguments]


def show(title: str, rows: Sequence[Mapping[str, Any]], extra: Sequence[str] = ()) -> None:
    """The rows as a table: name, median, interval, and the columns named in `extra`."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "median", "95 % interval", "unit", *extra):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for row in rows:
        digits = 0 if row["median"] >= 100 else 2
        figures = [f"{row[key]:,.{digits}f}" for key in ("median", "low", "high")]
        cells = [str(row["name"]), figures[0], f"{figures[1]} – {figures[2]}", str(row["unit"])]
        table.add_row(*cells, *(str(row.get(key, "")) for key in extra))
    Console(soft_wrap=True).print(table)
