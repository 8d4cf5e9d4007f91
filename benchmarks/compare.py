"""New figures beside stored ones of the same hardware: what has become slower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stored import Result

#: Units of which less is better; of all others more is.
LESS = (
    "s", "ms", "µs", "us", "× the time", "% of the step", "of a step", "%", "valid loss", "GiB", "MiB",
)  # fmt: skip
#: Whole numbers, words and truths that are outcomes, or of no weight for a speed; all others are settings.
_NO_SETTING = (
    "median", "low", "high", "n", "target", "met", "reached", "compared", "loader", "store", "runs_in", "images",
    "micro_batch_size", "either",
)  # fmt: skip
#: A figure is worse where it is by so much, and the intervals lie apart.
WORSE = 0.9


@dataclass(frozen=True)
class Change:
    """One figure now and as it was stored."""

    name: str
    unit: str
    now: float
    then: float
    factor: float
    """How many times as good as it was: below 1 is worse, whatever the unit."""
    worse: bool
    """By more than a tenth, with intervals that lie apart."""

    @property
    def sentence(self) -> str:
        """`resident: 1,200 images/s, 0.61 of the 1,980 that are stored`."""
        return f"{self.name}: {_number(self.now)} {self.unit}, {self.factor:.2f} times as good as {_number(self.then)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def identity(row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a row is a figure of: its name and settings, and how long an epoch is, which some loaders begin anew."""
    return tuple(
        sorted(
            (key, value)
            for key, value in row.items()
            if isinstance(value, str | int) and key not in _NO_SETTING and not key.startswith("parameters")
        )
    )


def changes(now: Result, then: Result) -> list[Change]:
    """The figures that both have, the worst first."""
    before = {identity(row): row for row in then.measured}
    found = []
    for row in now.measured:
        old = before.get(identity(row))
        # Shares of a whole are no merit: where one stage became faster, those of the others have grown.
        if old is None or row.get("kind") == "profile" or not row["median"] or not old["median"]:
            continue
        less = row["unit"] in LESS
        factor = old["median"] / row["median"] if less else row["median"] / old["median"]
        apart = row["low"] > old["high"] if less else row["high"] < old["low"]
        settings = [str(row[key]) for key in ("model", "mode", "layout", "policy") if key in row]
        name = ", ".join([row["name"], *(text for text in settings if text not in row["name"])])
        found.append(Change(name, row["unit"], row["median"], old["median"], factor, apart and factor < WORSE))
    return sorted(found, key=lambda change: change.factor)


def partner(result: Result, stored: Iterable[Result]) -> Result | None:
    """The stored result of the same benchmark and hardware; None if there is none."""
    return next((old for old in stored if (old.name, old.hardware) == (result.name, result.hardware)), None)
