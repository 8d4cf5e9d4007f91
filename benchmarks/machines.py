"""What all generated texts share: the results of one benchmark, a text a machine, a sentence where none is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import plots
from stored import Result
from wording import Link, Row, listing, source


def of(results: Iterable[Result], name: str) -> list[Result]:
    """The results of one benchmark."""
    return [result for result in results if result.name == name]


def missing(results: Sequence[Result], name: str) -> list[str]:
    """A sentence for each machine that has results, but none of this benchmark, and for GPUs if none has any."""
    known = {result.hardware: result.gpu for result in results}
    done = {result.hardware for result in of(results, name)}
    absent = [hardware for hardware in known if hardware not in done]
    absent += [] if any(known.values()) else ["GPU"]
    return [f"**{hardware}.** {not_yet(name)}" for hardware in absent]


def not_yet(name: str) -> str:
    """What stands where a figure will."""
    return f"Not measured yet: `python benchmarks/{name}.py`."


def sentences(results: Sequence[Result], name: str, say: Callable[[Result, dict[str, Row]], str]) -> list[str]:
    """One sentence a machine, of the rows by name."""
    found = [say(result, {row["name"]: row for row in result.measured}) for result in of(results, name)]
    return found or [not_yet(name)]


def picture(result: Result, path: Path, link: Link) -> str:
    """A picture of a result, in Markdown."""
    shown = plots.SHOWN.get(result.name, plots.SHOWN[result.record["benchmark"]])
    return f"![{shown}: {result.hardware}]({link(path)})"


def listed(
    results: Sequence[Result], link: Link, name: str, what: str, more: Callable[[Result], str] = lambda result: ""
) -> list[str]:
    """All rows of a benchmark, in tables, and its picture; `more` is what else there is to say of a result."""
    texts = []
    for result in of(results, name):
        texts.append(f"**{result.hardware}.** {what}, medians with 95 % intervals, measured by {source(result, link)}")
        texts += filter(None, [more(result)])
        texts += listing(result.rows)
        if name in ("train", "step"):
            texts.append(picture(result, result.path.with_suffix(".png"), link))
    return texts + missing(results, name)
