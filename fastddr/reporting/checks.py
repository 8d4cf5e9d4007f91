"""What `fastddr check` says of a data set: tables for a person, JSON for a program."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastddr.data.grades import DDR, UNGRADABLE, UNKNOWN
from fastddr.data.layouts.common import some
from fastddr.data.problems import ERRORS, NOTES, Problem, errors, lister, one_line
from fastddr.data.survey import Survey

#: Layouts in which DDR itself lies; beside their counts stand DDR's own.
_OF_DDR = ("official", "kaggle", "gdrbench")


def as_json(seen: Survey, problems: Sequence[Problem]) -> dict[str, Any]:
    """What a program reads: layout, fingerprint, counts by split and grade, and each problem."""
    return {
        "layout": seen.layout,
        "root": str(seen.root),
        "fingerprint": seen.fingerprint,
        "photographs": len(seen.entries),
        "counts": seen.counts(),
        "notes": seen.notes,
        "formats": dict(_shares(seen, "format")),
        "sampling": dict(_shares(seen, "sampling")),
        "progressive": _progressive(seen),
        "sizes": [{"width": w, "height": h, "photographs": n} for (w, h), n in _sizes(seen).most_common()],
        "problems": [
            {"path": p.path, "kind": p.kind, "severity": p.severity, "reason": one_line(p.reason)} for p in problems
        ],
    }


def show(seen: Survey, problems: Sequence[Problem], console: Console, fix_list: Path | None = None) -> None:
    """Print the tables; `fix_list` is where the errors were written, if they were."""
    console.print(Text(f"{seen.root}", style="bold"), soft_wrap=True)
    console.print(f"layout {seen.layout}, {len(seen.entries):,} photographs, fingerprint {seen.fingerprint[:16]}…")
    for note in seen.notes:
        console.print(Text(f"note: {one_line(note)}"), soft_wrap=True)
    console.print()
    console.print(_counts(seen))
    console.print()
    for label, text in _facts(seen):
        console.print(Text.assemble((f"{label:12}", "dim"), text), soft_wrap=True)
    if problems:
        console.print()
        console.print(_problems(problems))
    console.print()
    bad = errors(problems)
    there = {entry.split for entry in seen.entries if 0 <= entry.grade < UNGRADABLE}
    lacking = [split for split in ("train", "valid") if split not in there]
    if not bad and lacking:
        said = "Training needs gradable photographs in train and valid, and there are none in"
        console.print(f"No errors: every photograph decodes. {said} {' and '.join(lacking)}.", soft_wrap=True)
        return
    if not bad:
        console.print(f"No errors: every photograph decodes{_taken(seen)}", style="green", soft_wrap=True)
        return
    console.print(
        f"{len(bad):,} errors. Training stops at them; mend them, or leave them out with --on-bad exclude.", style="red"
    )
    if fix_list is None:
        console.print(f"To see all or to edit the list first: {lister(seen.command)}", soft_wrap=True)
    else:
        listed = shlex.quote(str(fix_list))
        console.print(f"They are listed in {listed}; to leave them out:", soft_wrap=True)
        console.print(f"accelerate launch -m fastddr train --data {seen.asked} --exclude {listed}", soft_wrap=True)


def _taken(seen: Survey) -> str:
    """The end of the sentence about a set without errors: what training takes by default, and what it leaves out."""
    grades = Counter(entry.grade for entry in seen.entries)
    ungradable, unknown = grades[UNGRADABLE], grades[UNKNOWN]
    left_out = [f"{ungradable:,} ungradable ones (--ungradable class takes them)"] if ungradable else []
    left_out += [f"{unknown:,} without a grade"] if unknown else []
    if not left_out:
        return ", and training takes them all."
    return f". Training takes {len(seen.entries) - ungradable - unknown:,} and leaves out {' and '.join(left_out)}."


def _counts(seen: Survey) -> Table:
    counts = seen.counts()
    grades = [str(grade) for grade in range(6)]
    if any("unknown" in of_split for of_split in counts.values()):
        grades.append("unknown")
    table = Table(title="Photographs by split and grade (5 = ungradable)", title_justify="left")
    for heading in ("", *grades, "all"):
        table.add_column(heading, justify="right" if heading else "left")

    def add(name: str, row: Sequence[int], style: str = "") -> None:
        table.add_row(name, *(f"{n:,}" for n in row), f"{sum(row):,}", style=style)

    for split, of_split in [*counts.items(), ("all", dict(sum(map(Counter, counts.values()), Counter())))]:
        add(split, [of_split.get(grade, 0) for grade in grades], "bold" if split == "all" else "")
        if seen.layout in _OF_DDR:
            own = DDR[split] if split in DDR else [sum(column) for column in zip(*DDR.values(), strict=True)]
            add("  DDR's own", [*own, *[0] * (len(grades) - len(own))], "dim")
    return table


def _facts(seen: Survey) -> list[tuple[str, str]]:
    records = [record for record in seen.records.values() if record.width]
    if not records:
        return []
    short = sorted(min(record.width, record.height) for record in records)
    sizes = _sizes(seen)
    common = ", ".join(f"{w}×{h} ({n / len(records):.0%})" for (w, h), n in sizes.most_common(3))
    more = f", {len(sizes) - 3} others" if len(sizes) > 3 else ""
    total = sum(record.size for record in records)
    found = [
        ("sizes", f"{common}{more}; short side {short[0]} to {short[-1]}, median {median(short):.0f} px"),
        ("files", f"{total / 2**30:.2f} GiB, {total / len(records) / 1000:.0f} kB each; {_said(seen, 'format')}"),
    ]
    if any(record.sampling for record in records):
        found.append(("JPEG chroma", f"{_said(seen, 'sampling')}; progressive {_progressive(seen):.0%}"))
    return found


def _sizes(seen: Survey) -> Counter[tuple[int, int]]:
    return Counter((record.width, record.height) for record in seen.records.values() if record.width)


def _shares(seen: Survey, field: str) -> list[tuple[str, int]]:
    return Counter(value for r in seen.records.values() if (value := getattr(r, field))).most_common()


def _said(seen: Survey, field: str) -> str:
    shares = _shares(seen, field)
    total = sum(n for _, n in shares)
    return ", ".join(f"{value} {n / total:.0%}" for value, n in shares)


def _progressive(seen: Survey) -> float:
    """Share of the JPEGs that are progressive."""
    jpegs = [record for record in seen.records.values() if record.format == "JPEG"]
    return sum("progressive" in record.traits.split(",") for record in jpegs) / len(jpegs) if jpegs else 0.0


def _problems(problems: Sequence[Problem]) -> Table:
    table = Table(title="What is wrong, and what is worth knowing", title_justify="left")
    table.add_column("kind", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("what, and the first")
    kinds = Counter(problem.kind for problem in problems)
    for kind in [*ERRORS, *NOTES]:
        if kind not in kinds:
            continue
        of_kind = [problem for problem in problems if problem.kind == kind]
        first = of_kind[0]
        if first.severity == "error":
            # The reasons differ: a few are shown whole, --json and --fix-list have them all.
            said = "\n".join(one_line(f"{p.path}: {p.reason}") for p in of_kind[:3])
            said += f"\n… to mend: {ERRORS[kind]}" if len(of_kind) > 3 else f"\nto mend: {ERRORS[kind]}"
        else:
            said = f"{NOTES[kind]}: {one_line(some([p.path for p in of_kind]))}"
        style = "red" if first.severity == "error" else ""
        table.add_row(kind, first.severity, f"{kinds[kind]:,}", Text(said), style=style)
    return table
