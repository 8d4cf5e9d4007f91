"""Draws the pictures of results again, from their files.

    python benchmarks/plot.py                            # of the newest of each benchmark and machine, and README's
    python benchmarks/plot.py results/train_....json     # of these

A picture lies beside its result and carries the SHA-256 of its rows, so that a test sees when it is out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import loaders_told
import plots
import script
import stored
import tyro
from matplotlib.figure import Figure

from fastddr.errors import UserError


@dataclass
class Options:
    """Draw results."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Files that benchmarks wrote; by default the newest of each benchmark and machine."""


Rows = Sequence[dict[str, Any]]


def _loaders(rows: Rows) -> tuple[Figure, str]:
    title = f"Loaders, {rows[0]['image_size']} px windows of a {rows[0]['canvas']} px canvas"
    return plots.loaders([{**row, "name": loaders_told.loader_name(row["name"])} for row in rows]), title


def _training(rows: Rows) -> tuple[Figure, str]:
    if any(row["kind"] == "qwk" for row in rows):
        return plots.kappas(rows), "Time to a kappa on valid"
    return plots.training(rows), "Whole training"


def _changes(rows: Rows) -> tuple[Figure, str]:
    data = next(row["data"] for row in rows if "failed" not in row)
    of = "synthetic photographs" if data == "synthetic" else f"data {data}"
    return plots.changes(rows), f"One change at a time, {of}"


#: Picture and title of those benchmarks that have one.
DRAWN: dict[str, Callable[[Rows], tuple[Figure, str]]] = {
    "loader": _loaders,
    "train": _training,
    "step": lambda rows: (plots.steps(rows), "The training step alone"),
    "ablation": _changes,
    "cards": lambda rows: (plots.cards(rows), "The largest batch"),
}


def _draw(result: stored.Result, path: Path, rows: Rows) -> Path:
    benchmark = result.record["benchmark"]
    figure, title = DRAWN[benchmark](rows)
    # A prediction is of no machine.
    where = "predicted by fastddr plan" if benchmark == "cards" else result.hardware
    return plots.save(figure, f"{title}, {where}", path, result.digest)


def beside(result: stored.Result) -> Path:
    """Draw one result, beside its file."""
    return _draw(result, result.path.with_suffix(".png"), result.rows)


def pictures(results: Sequence[stored.Result]) -> Iterator[tuple[stored.Result, Path]]:
    """Each picture that there should be, with the result that it shows."""
    for result in results:
        if result.record["benchmark"] in DRAWN:
            yield result, result.path.with_suffix(".png")
    shown = stored.first(results, "loader")
    if shown is not None:
        yield shown, loaders_told.first_picture(shown)


def first(result: stored.Result) -> Path:
    """README's: whole loaders, of the first policy only."""
    policy = result.measured[0]["policy"]
    rows = [row for row in result.measured if row["policy"] == policy and row["kind"] != "store"]
    return _draw(result, loaders_told.first_picture(result), rows)


def main(options: Options) -> None:
    """Draw, and say what."""
    if options.results:
        given = [stored.read(path) for path in options.results]
        for result in given:
            if result.record["benchmark"] not in DRAWN:
                raise UserError(
                    f"{result.path}: there is no picture of {result.record['benchmark']}; "
                    f"there is one of {', '.join(DRAWN)}."
                )
        drawn = [beside(result) for result in given]
    else:
        results = stored.newest()
        drawn = [
            beside(result) if path.parent == result.path.parent else first(result) for result, path in pictures(results)
        ]
    for path in drawn:
        print(f"drawn: {path}")


if __name__ == "__main__":
    script.run(main, Options)
