"""Ratios of loaders, and whether they reach what was set as the aim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import harness
import numpy as np

#: The baseline: torchvision's DataLoader by a peer of its own, or where that was not measured, fastddr's loader of it.
BASELINES = ("torch-pil", "torchvision")
#: Share of the measured copy bandwidth that does for the kernel as well.
BANDWIDTH = 0.25


def of(
    speeds: Mapping[str, Sequence[float]], kinds: Mapping[str, str], about: Mapping[str, Any], *, gpu: bool
) -> list[dict[str, Any]]:
    """Rows of ratios, and of targets: these have `target` (at least so much) and `met`."""
    rows: list[dict[str, Any]] = []
    baselines = [name for name in BASELINES if name in speeds]
    peers = [name for name, kind in kinds.items() if kind == "peer"]
    best = max(peers, key=lambda name: float(np.median(speeds[name])), default=None)
    ours = [name for name in speeds if kinds.get(name) == "fastddr" and name.startswith(("dali", "resident"))]
    for name in ours:
        for other in dict.fromkeys([*baselines, *([best] if best else [])]):
            found = harness.ratio(speeds[name], speeds[other])
            rows.append({"name": f"{name} / {other}{', the best peer' if other == best else ''}", **found, "unit": "×"})

    def aim(name: str, values: Sequence[float], unit: str, least: float) -> None:
        found = harness.spread(values)
        rows.append({"name": name, **found, "unit": unit, "target": least, "met": found["median"] >= least})

    def against(name: str, other: str | None, least: float, what: str = "") -> None:
        if name in speeds and other is not None:
            aim(
                f"{name} / {other}{what}", [a / b for a, b in zip(speeds[name], speeds[other], strict=True)], "×", least
            )

    def alone(name: str, least: float) -> None:
        if name in speeds:
            aim(name, speeds[name], "images/s", least)

    baseline = baselines[0] if baselines else None
    plain = about["policy"] == "report"
    if gpu:
        if plain:
            alone("dali", 10_000)
            against("dali", baseline, 2.5)
        else:
            for name in ours:
                if name.startswith("resident"):
                    alone(name, 200_000)
        _kernel(speeds, rows, aim)
        return rows
    against("dali", baseline, 3.0 if plain and "quality 95" in about["photographs"] else 1.7)
    against("dali", best, 1.0, ", the best peer")
    if plain:
        for name in ours:
            if name.startswith("resident"):
                against(name, baseline, 5.0)
        alone("resident store alone, uint8", 15_000)
    return rows


def _kernel(speeds: Mapping[str, Sequence[float]], rows: list[dict[str, Any]], aim: Any) -> None:
    """The kernel has two aims, either of which does: images a second, or a share of the copy bandwidth."""
    kernel, copying = speeds.get("resident kernel alone"), speeds.get("copying")
    if kernel is None or copying is None:
        return
    aim("resident kernel alone", kernel, "images/s", 1_000_000)
    share = float(np.median(copying))
    aim("resident kernel alone, share of the copy bandwidth", [rate / share for rate in kernel], "×", BANDWIDTH)
    for row in rows[-2:]:
        row["either"] = True


def training(
    speeds: Mapping[str, Sequence[float]], kinds: Mapping[str, str], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of ratios and targets of whole training loops: fastddr against its ceiling, and against each peer."""
    rows: list[dict[str, Any]] = []
    gpu, ours = about["device"] == "cuda", "fastddr"
    ceiling = next((name for name, kind in kinds.items() if kind == "ceiling"), None)
    for name, kind in kinds.items():
        if kind == "fastddr" and ceiling is not None:
            row = {"name": f"{name} / {ceiling}", **harness.ratio(speeds[name], speeds[ceiling]), "unit": "×"}
            if name == ours:
                least = 0.98 if gpu else 0.90
                row |= {"target": least, "met": row["median"] >= least}
            rows.append(row)
    if ours not in speeds:
        return rows
    # The fastest form of a peer is the one that its users would take.
    best: dict[str, str] = {}
    for name, kind in kinds.items():
        if kind == "peer":
            rows.append({"name": f"{ours} / {name}", **harness.ratio(speeds[ours], speeds[name]), "unit": "×"})
            peer = name.partition(",")[0]
            if peer not in best or np.median(speeds[name]) > np.median(speeds[best[peer]]):
                best[peer] = name
    big = gpu and about["model"] == "ConvMixer 512/12 k9 p8"
    aims = {"report": 20.0, "timm": 2.0} if big else {} if gpu else {"report": 1.4}
    for peer, least in aims.items():
        for row in rows:
            if peer in best and row["name"] == f"{ours} / {best[peer]}":
                row |= {"target": least, "met": row["median"] >= least}
    return rows


def sentence(row: Mapping[str, Any]) -> str:
    """`target: dali / torch-pil ≥ 3.0: 4.30 (4.10-4.50), met`."""
    digits = 0 if row["target"] >= 100 else 2
    least, median, low, high = (f"{row[key]:,.{digits}f}" for key in ("target", "median", "low", "high"))
    if row["unit"] == "% of the step":
        return f"target: {row['name']} < {row['target']:g} %: {median} ({low}-{high}), {_verdict(row)}"
    return f"target: {row['name']} ≥ {least}: {median} ({low}-{high}), {_verdict(row)}"


def _verdict(row: Mapping[str, Any]) -> str:
    return "met" if row["met"] else f"NOT met{' (either of two is enough)' * row.get('either', False)}"
