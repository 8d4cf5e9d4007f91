"""The generated texts of loaders: side by side, against the best peer, with the limits of the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import machines
import targets
from stored import Result
from wording import Link, Row, figure, source, table, words

#: Others' loaders in words; what is not here goes by its name.
_PEERS = {
    "torch-pil": "DataLoader with Pillow",
    "torch-decode-jpeg": "DataLoader with torchvision's decoder",
    "torchcodec": "DataLoader with TorchCodec",
    "torchvision-gpu": "torchvision's decoder for GPUs",
    "spdl-decode-jpeg": "SPDL with torchvision's decoder",
    "dali-plain": "plain DALI pipeline",
}
#: Those of them that only a GPU can run.
_ON_GPUS = ("torchvision-gpu",)
_STORES = {"vram": "in the GPU's memory", "ram": "in RAM", "mmap": "in a file"}
_BEST = ", the best peer"
#: In a table, which has those peers alone that were run.
_OF_THESE = "the best of these peers"
#: Photographs that are not their own canvas, and how they are not; what is not here nor synthetic may be any.
_LARGER = {"fundus960": "larger than the canvas and not square"}


def first_picture(result: Result) -> Path:
    """The picture at the top of README's benchmarks, of the first result of `loader`."""
    return result.path.parents[2] / "docs" / "images-per-second.png"


def loader(results: Sequence[Result], link: Link) -> list[str]:
    """README's first picture, and loaders side by side."""
    found = machines.of(results, "loader")
    texts = [machines.picture(found[0], first_picture(found[0]), link)] if found else []
    for result in found:
        texts += _loaders(result, link, ("fastddr", "peer"))
    return texts + machines.missing(results, "loader")


def loader_all(results: Sequence[Result], link: Link) -> list[str]:
    """The same of every measurement of loaders, with parts, ceilings and limits, and its picture."""
    texts = []
    for result in results:
        if result.record["benchmark"] == "loader":
            texts += _loaders(result, link, ("fastddr", "peer", "store", "ceiling", "limit"))
            texts.append(machines.picture(result, result.path.with_suffix(".png"), link))
    return texts + machines.missing(results, "loader")


def _loaders(result: Result, link: Link, kinds: Sequence[str]) -> list[str]:
    panels: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in result.measured:
        panels.setdefault((row["photographs"], row["policy"]), {})[row["kind"], row["name"]] = row
    # What is the same in all headings stands above the table.
    parts = [photographs.split(", ") for photographs, _ in panels]
    same = [part for part in parts[0] if all(part in others for others in parts)]
    headings = [
        ", ".join([*(part for part in photographs.split(", ") if part not in same), f"`{policy}`"])
        for photographs, policy in panels
    ]
    names = dict.fromkeys(key for kind in kinds for panel in panels.values() for key in panel if key[0] == kind)
    lines = [
        [_marked(*key), *(figure(panel[key]) if key in panel else "" for panel in panels.values())] for key in names
    ]
    one = result.measured[0]
    about = (
        f"**{result.hardware}.** Images a second from {_set(same)}: {one['image_size']} px windows of a "
        f"{one['canvas']} px canvas, batches of {one['batch_size']}, {one['threads']} threads or processes; medians of "
        f"{one['n']} rounds with 95 % intervals. `resident` counts from its second epoch on, when it has decoded "
        "everything. Ratios are taken round by round."
    )
    about = " ".join([about, *_conditions(list(panels), result)])
    failed = [f"{row['name']} (`{row['policy']}`): {row['failed']}" for row in result.rows if "failed" in row]
    return [
        about,
        table(["", *headings], lines + _ratios(list(panels.values()))),
        *([f"Without a figure: {'; '.join(failed)}."] if failed else []),
        f"Measured by {source(result, link)}",
    ]


def _set(parts: Sequence[str]) -> str:
    """What was read: synthetic photographs, or a set by its name."""
    if parts and parts[0] != "synthetic":
        return f"the photographs of `{', '.join(parts)}`"
    return f"{', '.join(parts)} photographs"


def _conditions(panels: Sequence[tuple[str, str]], result: Result) -> list[str]:
    """What a reader must know to compare fairly, in sentences."""
    lengths = sorted({row["epoch"] for row in result.measured if "epoch" in row})
    told = [f"An epoch has {words(f'{length:,}' for length in lengths)} photographs."] if lengths else []
    large = dict.fromkeys(row["photographs"] for row in result.measured if row.get("in_page_cache") is False)
    sets = dict.fromkeys(name for name, _ in panels)
    if not large:
        told.append("Files lie in the page cache.")
    else:
        which = f" `{'` and `'.join(large)}`" if len(large) < len(sets) else ""
        told.append(f"The photographs{which} are more than the free memory, so loaders also read from the disk.")
    if 0 < len(large) < len(sets):
        told.append("The others' files lie in the page cache.")
    if not any(row["kind"] == "peer" for row in result.measured):
        return told
    tried = {row["name"].partition(", ")[0] for row in result.rows}
    absent = [name for name in _PEERS if name not in tried and (result.gpu or name not in _ON_GPUS)]
    if absent:
        told.append(f"Known peers that were not run: {words(f'`{name}`' for name in absent)}.")
    peers = {row["name"].partition(", ")[0] for row in result.measured if row["kind"] == "peer"}
    plain = "dali-plain" in peers  # which samples as fastddr does
    if plain and len(peers) == 1:
        return told
    others = "other peers" if plain else "peers"
    ours = "the plain DALI pipeline and fastddr's loaders" if plain else "fastddr's loaders"
    for photographs in dict.fromkeys(name for name, _ in panels if not name.startswith("synthetic")):
        known = _LARGER.get(photographs)
        first = f"The photographs are {known}: " if known else "Where photographs are not as large as the canvas, "
        told.append(f"{first}{others} resample the whole photograph, {ours} the window alone.")
    if any(policy == "fundus" for _, policy in panels):
        told.append(f"For `fundus` {others} change the hue in HSV, which costs them more than it costs fastddr.")
    return told


def loader_name(name: str) -> str:
    """A loader in words: `resident, in a file` for `resident, mmap`."""
    first, *options = name.split(", ")
    return ", ".join([_PEERS.get(first, first), *(_STORES.get(option, option) for option in options)])


def _marked(kind: str, name: str) -> str:
    """The same in Markdown: fastddr's loaders are names to type, limits in italics."""
    first, comma, rest = loader_name(name).partition(", ")
    if kind == "fastddr":
        # Not what torchvision's users have.
        whose = "fastddr's " if first == "torchvision" else ""
        return f"{whose}`{first}`{comma}{rest}"
    return f"*{first}{comma}{rest}*" if kind == "limit" else f"{first}{comma}{rest}"


def _ratios(panels: Sequence[Mapping[tuple[str, str], Row]]) -> list[list[str]]:
    """Lines of `dali` and `resident` against a DataLoader with Pillow, and against the best peer of each column."""
    peers = {name for panel in panels for kind, name in panel if kind == "peer"}
    baseline = next((name for name in targets.BASELINES if name in peers), None)
    lines = []
    for name in dict.fromkeys(name for panel in panels for kind, name in panel if kind == "fastddr"):
        against = [[row for (kind, ratio), row in panel.items()
                    if kind == "ratio" and re.fullmatch(rf"{re.escape(name)} / .*{_BEST}", ratio)]
                   for panel in panels]  # fmt: skip
        usual = [[row for (kind, ratio), row in panel.items()
                  if kind == "ratio" and ratio.removesuffix(_BEST) == f"{name} / {baseline}"]
                 for panel in panels]  # fmt: skip
        bests = {row["name"].removesuffix(_BEST).partition(" / ")[2] for rows in against for row in rows}
        first = _PEERS.get(baseline or "", baseline)
        if bests == {baseline}:
            against, first = [], f"{first}, {_OF_THESE}"
        second = f"{loader_name(*bests)}, {_OF_THESE}" if len(bests) == 1 else "the best peer of the column"
        for found, what in ((usual, first), (against, second)):
            if any(found):
                cells = [figure(rows[0], "×") if rows else "" for rows in found]
                lines.append([f"{_marked('fastddr', name)} / {what}", *cells])
    return lines
