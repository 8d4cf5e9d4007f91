"""Is this machine all right, and if something is slow, why: a short tree of questions, asked of measured figures.

others at work?  → stop them           clocks or heat?  → cooling, power limit
decoder wrong?   → do not train        memory or arithmetic below what is stored? → the machine, not fastddr
does training reach its ceiling (`replay`)?
    no  → the loader: which stage takes its time, and what helps that stage
    yes → the model: does compilation help, how far is the step from its roofline
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import compare
from decode import MOST_LEVELS
from stored import Result

#: What helps a stage of a loader.
REMEDIES = {
    "read": "reading: put the photographs on a local SSD, or make smaller masters of them (`fastddr prepare`)",
    "decode": "decoding: `--loader resident` decodes once; else masters of fewer pixels (`fastddr prepare`), or more "
    "cores (`--loading.threads`)",
    "warp": "warping: `--augment.policy report` cuts windows alone; on a GPU it costs next to nothing",
    "colour": "colouring: `--augment.policy report` leaves colours alone",
    "normalise": "normalising: it is one pass; a GPU does it",
    "copy": "copying to the device: `--loading.store vram` keeps photographs there",
    "kernel": "making batches from photographs that are in the GPU's memory already: no store is faster, and a larger "
    "`--batch-size` gives each call more to do",
    "gather": "gathering photographs on the host: on a GPU `--loading.store vram` keeps them there, else a larger "
    "`--batch-size` feeds more at once",
    "Python": "feeding the loader from Python: a larger `--batch-size` feeds more at once",
}
#: Degrees Celsius from which on a card may slow itself down.
HOT = 83.0

Results = Mapping[str, Result]


def tell(found: Results, stored: Sequence[Result]) -> list[str]:
    """Sentences, the most important first; the last says that nothing is wrong where nothing was found.

    Args:
        found: the new results by benchmark.
        stored: older ones, of any machine.
    """
    said = [
        *_others(found), *_clocks(found), *_decoder(found), *_slower(found, stored), *_loading(found), *_model(found),
    ]  # fmt: skip
    return said or ["Nothing wrong was found."]


def _others(found: Results) -> Iterator[str]:
    disturbed = sorted(name for name, result in found.items() if result.disturbed)
    if disturbed:
        yield f"Others were at work on this machine during {', '.join(disturbed)}: stop them and measure again."


def _clocks(found: Results) -> Iterator[str]:
    for result in found.values():
        for moment in result.record.get("conditions", {}).values():
            cards = (moment or {}).get("gpus")
            for card in cards if isinstance(cards, list) else []:
                if (card.get("temperature_c") or 0) >= HOT:
                    where = f"GPU {card['index']} is at {card['temperature_c']:.0f} °C ({result.name})"
                    yield f"{where}: cards slow down there, look to its cooling."
                    return


def _decoder(found: Results) -> Iterator[str]:
    if "decode" not in found:
        return
    for row in (row for row in found["decode"].rows if "kind" not in row):
        if "failed" in row:
            yield (f"The decoder failed at {row['name']} ({row['failed']}): train with `--loader torchvision` and try "
                   "another version of DALI.")  # fmt: skip
        elif row["largest_levels"] > MOST_LEVELS:
            off = f"{row['largest_levels']:.0f} levels of 255"
            yield (f"The decoder gives wrong pixels at {row['name']} (off by {off}): train with `--loader torchvision` "
                   "and try another version of DALI.")  # fmt: skip


def _slower(found: Results, stored: Sequence[Result]) -> Iterator[str]:
    """The machine's own ceilings first: if those fell, nothing else needs an explanation."""
    for name in sorted(found, key=lambda name: name != "ceilings"):
        old = compare.partner(found[name], stored)
        if old is None:
            continue
        worse = [change for change in compare.changes(found[name], old) if change.worse]
        if not worse:
            continue
        now = found[name].record["versions"]
        new = {
            key: f"{was} then, {now.get(key)} now" for key, was in old.record["versions"].items() if now.get(key) != was
        }
        cause = ""
        if name == "ceilings":
            cause = " The machine itself is slower than it was: look for other users, power limits, heat."
        elif new:
            cause = f" Versions differ: {', '.join(f'{key} {text}' for key, text in new.items())}."
        yield f"{name}, beside {old.record['date'][:10]}: {worse[0].sentence}{_more(len(worse) - 1)}.{cause}"
        if name == "ceilings":
            return


def _more(count: int) -> str:
    return f", and {count} more" if count else ""


def _loading(found: Results) -> Iterator[str]:
    if "train" not in found:
        return
    result = found["train"]
    for row in result.measured:
        if row["kind"] == "target" and row["name"] == "fastddr / fastddr, replay":
            if row["high"] < row["target"]:
                ours = next(one for one in result.measured if one["name"] == "fastddr" and _same_case(one, row))
                yield (f"{row['model']} trains at {row['median']:.2f} of its ceiling{_lost(row['median'], ours)}"
                       f"{_stage(found, ours)}")  # fmt: skip
            else:
                yield f"{row['model']} trains at {row['median']:.2f} of its ceiling: loading does not hold it up."


def _same_case(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(
        one.get(key) == other.get(key) for key in ("photographs", "model", "precision", "image_size", "batch_size")
    )


def _lost(ratio: float, row: Mapping[str, Any]) -> str:
    """Where the rest of the ceiling is: a loader may also work at the same time as the model, and slow it down."""
    wait = row["data_wait"]
    if wait >= (1 - ratio) / 2:
        return ", so it waits for photographs."
    return f", and waits for photographs for {100 * wait:.0f} % of the time: loading takes cores or GPU from the model."


def _stage(found: Results, row: Mapping[str, Any]) -> str:
    """What the time of the loader of this training goes into, and what helps."""
    chosen, store = row.get("loader"), row.get("store")
    by_label: dict[str, dict[str, float]] = {}
    if "loader" in found:
        for row in found["loader"].measured:
            label, _, stage = row["name"].partition(": ")
            if row.get("kind") == "profile" and label.partition(",")[0] == chosen:
                by_label.setdefault(label, {}).setdefault(stage, row["median"])
    # What stops a loader depends on where it keeps photographs.
    shares = by_label.get(f"{chosen}, {store}") or next(iter(by_label.values()), {})
    if not shares:
        return f" The loader is {chosen}; `python benchmarks/loader.py` says what stops it."
    stage = max(shares, key=lambda name: shares[name])
    remedy = next((text for key, text in REMEDIES.items() if key in stage), f"{stage}: see docs/loading.md")
    return f" The loader is {chosen}, and {shares[stage]:.0f} % of its time go into {remedy}."


def _model(found: Results) -> Iterator[str]:
    if "step" not in found:
        return
    rows = [row for row in found["step"].measured if row.get("unit") == "images/s"]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        best = max(mine, key=lambda row: row["median"])
        share = best.get("roofline_share")
        near = "" if share is None else f", at {100 * share:.0f} % of what the card's memory and arithmetic allow"
        yield f"The fastest step of {model} is {best.get('mode')}, {best.get('layout')}{near}."


def summary(found: Results) -> dict[str, Any]:
    """The figures that count, by name, for one look."""
    shown: dict[str, Any] = {}
    for name, kinds in (("loader", ("fastddr", "peer")), ("train", ("fastddr", "peer", "ceiling"))):
        if name in found:
            for row in found[name].measured:
                if row.get("kind") in kinds:
                    about = row.get("policy") if name == "loader" else row.get("model")
                    shown[f"{name}: {row['name']}, {about}"] = f"{row['median']:,.0f} {row['unit']}"
    return shown
