"""How the generated texts say figures, machines and sources, and how their tables look."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stored import Result

Row = Mapping[str, Any]
Link = Callable[[Path], str]
#: Settings that become columns where they differ, and stand above the table where they do not, with how they are said.
SETTINGS = {
    "photographs": "{}", "model": "{}", "mode": "{}", "layout": "{}", "precision": "{} precision", "dtype": "{}",
    "image_size": "{} px", "canvas": "canvas of {} px", "channels": "{} channels", "side": "sides of {}",
    "batch_size": "batches of {}", "policy": "policy `{}`",
}  # fmt: skip
#: What rows tell beside their figure: shares of one, and plain numbers; all that ends with `_gib` comes after them.
SHARES = {
    "data_wait": "data wait", "cpu_share": "CPU", "gpu_use": "GPU", "share_of_copy": "of copy",
    "share_of_matmul": "of matmul", "roofline_share": "of roofline",
}  # fmt: skip
NUMBERS = {
    "ms_a_step": "ms a step", "gigabytes_per_second": "GB/s", "teraflop_per_second": "TFLOP/s",
    "to_reference": "× reference", "largest_levels": "largest difference, levels",
    "mean_levels": "mean difference, levels",
}  # fmt: skip
#: Benchmarks whose figures no other work on the machine changes.
_TIMELESS = ("memory", "cards", "seeds")


def number(value: float, like: float | None = None) -> str:
    """Two or three digits that count, and all before the point; as many as `like` gets, where that is given."""
    like = abs(value if like is None else like)
    if like >= 9.95:
        digits = 0
    elif like >= 1.995:
        digits = 1
    else:
        digits = 2 if like >= 0.1 or like == 0 else 1 - math.floor(math.log10(like))
    return f"{value:,.{digits}f}"


def figure(row: Row, unit: str = "") -> str:
    """`2,977 (2,842-3,232)`, the unit behind the median; no interval of one repeat or a count.

    `failed` where there is none.
    """
    if "failed" in row:
        return "failed"
    if re.fullmatch(r"of \d+", row.get("unit", "")):
        return f"{row['median']:,g}{unit}"
    median, low, high = (number(row[key], row["median"]) for key in ("median", "low", "high"))
    return f"{median}{unit} ({low}-{high})" if row["n"] > 1 else f"{median}{unit}"


def words(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def article(name: str) -> str:
    """The name with `a` or `an`; a name in capitals is spelt: an NVIDIA, an RTX."""
    spelt = name[:2].isupper() and name[0] in "AEFHILMNORSX"
    return f"{'an' if spelt or name[:1] in 'AEIOU' else 'a'} {name}"


def machine(result: Result) -> str:
    """`2 cores of an AMD EPYC, no GPU`."""
    found = result.record["machine"]
    count = found.get("gpus", 1)
    gpus = "no GPU" if not result.gpu else found["gpu"] if count == 1 else f"{count} × {found['gpu']}"
    return f"{found['cores']} cores of {article(found['cpu'])}, {gpus}"


def on(result: Result) -> str:
    """`on 2 CPU cores`, `on an NVIDIA H100`."""
    return f"on {article(result.hardware) if result.gpu else str(result.record['machine']['cores']) + ' CPU cores'}"


def source(result: Result, link: Link | None) -> str:
    """The end of a sentence: command, machine, versions, date and file; and whether others disturbed it.

    Without `link` the file is named, for where there are no links.
    """
    versions = result.record["versions"]
    dali = next((version for name, version in versions.items() if name.startswith("nvidia-dali")), None)
    # Where the file was written is no part of what was measured.
    said = [f"`{re.sub(r' --(?:out [^ ]+|folder [^ ]+|wandb)', '', result.record['command'])}`", machine(result)]
    said += [f"torch {versions['torch']}", *([f"DALI {dali}"] if dali else []), result.record["date"][:10]]
    said += [f"[JSON]({link(result.path)})" if link else f"benchmarks/results/{result.path.name}"]
    disturbed = result.disturbed and result.record["benchmark"] not in _TIMELESS
    busy = " Others were at work on the machine meanwhile, so it is to be measured again." if disturbed else ""
    return f"{', '.join(said)}.{busy}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are words, the others figures."""
    lines = [headings, [":--" if place < left else "--:" for place in range(len(headings))], *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def said(row: Row, settings: Iterable[str]) -> str:
    """`ConvMixer 64/4 k5 p8, fp32, 224 px`: those settings that the row has."""
    return ", ".join(SETTINGS[name].format(row[name]) for name in settings if name in row)


def split(rows: Iterable[Row], settings: Iterable[str] = tuple(SETTINGS)) -> tuple[list[str], list[str]]:
    """(Settings that differ between the rows, settings that all of them share)."""
    rows = list(rows)
    present = [name for name in settings if any(name in row for row in rows)]
    different = [name for name in present if len({str(row.get(name)) for row in rows}) > 1]
    return different, [name for name in present if name not in different]


def listing(rows: Sequence[Row]) -> list[str]:
    """All rows, in a table for each kind and unit, with what differs between them and what they cost; then failures.

    Ratios to a reference are a column of the others, and no table of their own.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "failed" not in row and row.get("to") != "reference":
            kind = str(row.get("kind", ""))
            kind = {"peer": "fastddr", "ceiling": "fastddr", "target": "ratio"}.get(kind, kind)
            groups.setdefault((kind, row["unit"]), []).append(row)
    texts, last = [], ""
    for (_, unit), group in groups.items():
        about, found = _listing(group, unit)
        texts += [f"{about}:"] if about not in ("", last) else []
        texts.append(found)
        last = about
    failed = [f"{row['name']} ({said(row, SETTINGS)}): {row['failed']}" for row in rows if "failed" in row]
    return [*texts, *([f"Without a figure: {'; '.join(failed)}."] if failed else [])]


def _listing(rows: Sequence[Row], unit: str) -> tuple[str, str]:
    """(What all rows share, the table)."""
    different, same = split(rows)
    # A name may hold some of its settings.
    different = [key for key in different if not all(str(row.get(key, "")) in row["name"] for row in rows)]
    extra = {name: heading for name, heading in (SHARES | NUMBERS).items() if _any(rows, name)}
    extra |= {name: _size(name) for row in rows for name in row if name.endswith("_gib") and _any(rows, name)}
    headings = ["", *(name.replace("_", " ") for name in different), {"×": "times", "": "value"}.get(unit, unit)]
    lines = []
    for row in rows:
        aim = f" (aim {row['target']:g}: {'met' if row['met'] else 'not met'})" if "target" in row else ""
        cells = [row["name"] + aim, *(str(row.get(name, "")) for name in different), figure(row)]
        lines.append(cells + [_extra(name, row.get(name)) for name in extra])
    return said(rows[0], same), table([*headings, *extra.values()], lines, left=1 + len(different))


def _any(rows: Iterable[Row], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _extra(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{number(100 * value)} %" if name in SHARES else number(value)


def _size(name: str) -> str:
    """`VRAM allocated, GiB` of `vram_allocated_gib`."""
    word, *rest = name.removesuffix("_gib").split("_")
    return f"{' '.join([word.upper(), *rest])}, GiB"
