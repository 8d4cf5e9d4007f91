"""Tables of `operations.py` and `step.py`: the keys of their rows under short headings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import harness
from wording import NUMBERS, SHARES

_HEADINGS = NUMBERS | SHARES | {"peak_gib": "GiB"}


def figure(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """As `harness.show`, with those columns that any row has, at three significant digits."""
    keys = [key for key in _HEADINGS if any(key in row for row in rows)]
    shown = [dict(row) | {_HEADINGS[key]: f"{row[key]:.3g}" for key in keys if key in row} for row in rows]
    harness.show(title, shown, [_HEADINGS[key] for key in keys])
