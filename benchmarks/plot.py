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

from fastddr.errors import UserError


@dataclass
class Options:
    """Draw results."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Files that benchmarks wrote; by default the newest of each benchmark and machine."""


def _loaders(result: stored.Result, path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    one = rows[0]
    rows = [{**row, "name": loaders_told.loader_name(row["name"])} for row in rows]
    title = f"Loaders, {one['image_size']} px windows of a {one['canvas']} px canvas, {result.hardware}"
    return plots.loaders(rows, title, path, digest=result.digest)


def _training(result: stored.Result, path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if any(row["kind"] == "qwk" for row in rows):
        return _kappas(result, path, rows)
    return plots.training(rows, f"Whole training, {result.hardware}", path, digest=result.digest)


def _kappas(result: stored.Result, path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return plots.kappas(rows, f"Time to a kappa on valid, {result.hardware}", path, digest=result.digest)


def _steps(result: stored.Result, path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return plots.steps(rows, f"The training step alone, {result.hardware}", path, digest=result.digest)


def _changes(result: stored.Result, path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    data = result.measured[0]["data"]
    of = "synthetic photographs" if data == "synthetic" else f"data {data}"
    title = f"One change at a time, {of}, {result.hardware}"
    return plots.changes(rows, title, path, digest=result.digest)


def _cards(result: stored.Result, path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return plots.cards(rows, "The largest batch, predicted by fastddr plan", path, digest=result.digest)


#: Of those benchmarks that have a picture.
DRAWN: dict[str, Callable[[stored.Result, Path, Sequence[dict[str, Any]]], Path]] = {
    "loader": _loaders,
    "train": _training,
    "step": _steps,
    "ablation": _changes,
    "cards": _cards,
}


def beside(result: stored.Result) -> Path:
    """Draw one result, beside its file."""
    draw = DRAWN[result.record["benchmark"]]
    return draw(result, result.path.with_suffix(".png"), result.rows)


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
    return _loaders(result, loaders_told.first_picture(result), rows)


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
