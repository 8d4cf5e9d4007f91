"""Which of the compared runs differ in their training seed alone, and how much that makes of their figures."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastddr.config import flatten, may_change
from fastddr.config.strict import read_yaml

#: Besides what a resume may change: what follows from the machine, and changes a figure's last digits at most.
_OF_THE_MACHINE = {"loader", "threads", "micro_batch_size", "deterministic"}
#: Facts of a report that say how it scored, which an evaluation may do otherwise than its run.
_SCORED = ("Window", "Precision", "Fingerprint of the data")


def recipe(place: Path, weights: str, facts: Mapping[str, Any]) -> tuple[str, int] | None:
    """What a run trained, its photographs, which of its weights were scored and how, as a sum; and its seed.

    None where the folder of the run is not there, as of a report that was copied alone.

    Args:
        place: the folder of a run, of its report, or of an evaluation.
        weights: what they are called; their step is no part of the recipe.
        facts: of the report (`reporting.facts`).

    Raises:
        UserError: its config.yaml is broken.
    """
    run = next((folder for folder in (place, *place.resolve().parents[:2]) if (folder / "config.yaml").is_file()), None)
    if run is None or not (run / "manifest.csv").is_file():
        return None
    settings = flatten(read_yaml(run / "config.yaml"))
    seed = settings.pop("seed", None)
    kept = {key: value for key, value in settings.items() if key not in _OF_THE_MACHINE and not may_change(key)}
    photographs = hashlib.sha256((run / "manifest.csv").read_bytes()).hexdigest()
    scored = [re.sub(r" \(.*?\)", "", weights), *(facts.get(label) for label in _SCORED)]
    text = json.dumps([kept, photographs, scored], sort_keys=True, default=str)
    return None if not isinstance(seed, int) else (hashlib.sha256(text.encode()).hexdigest(), seed)


def groups(recipes: Sequence[tuple[str, int] | None]) -> list[list[int]]:
    """Places of runs that have one recipe and each another seed, two or more; of a seed that comes again the first."""
    found: dict[str, dict[int, int]] = {}
    for place, known in enumerate(recipes):
        if known is not None:
            found.setdefault(known[0], {}).setdefault(known[1], place)
    return [list(seeds.values()) for seeds in found.values() if len(seeds) > 1]


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (n − 1) over seeds; None where a run has no such figure."""
    known = [value for value in values if value is not None]
    return (statistics.fmean(known), statistics.stdev(known)) if len(known) == len(values) else None
