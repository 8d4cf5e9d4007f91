"""What stands in the generated texts of README.md, docs/ and the preset headers; `tables.py` puts it there.

Each text takes the newest results and a function that makes links, and gives paragraphs, in Markdown or, of
`quickstart-header`, lines. It names the command, the machine, the versions and the date of its result, and links it.
What is not measured yet is said in one sentence a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import loaders_told
import machines
import outcomes
from stored import Result
from wording import Link, Row, figure, on, said, source, split, table, words

_CASE = ("model", "precision", "image_size", "batch_size")
#: Others' loops of whole training in words (`recipes`).
_LOOPS = {
    "report": "the loop of the 2022 report (`ImageFolder`, Pillow, Adam, float32)",
    "torchvision": "the loop of torchvision's classification reference",
    "timm": "the loop of timm's training script",
}


def _runs(row: Row) -> str:
    count = "one run" if row["n"] == 1 else f"{row['n']} runs"
    return f"{count}, seed{'s' * (row['n'] > 1)} {', '.join(map(str, row['seeds']))}" if "seeds" in row else count


def quickstart(results: Sequence[Result], link: Link) -> list[str]:
    """How long the README's first command takes, and its score."""

    def say(result: Result, rows: dict[str, Row]) -> str:
        kappa = rows["valid qwk"]
        return (
            f"O{on(result)[1:]} it takes {figure(rows['whole command'], ' s')} after installation and reaches a "
            f"quadratic-weighted kappa of {figure(kappa)} on the synthetic valid split ({_runs(kappa)}): "
            f"{source(result, link)}"
        )

    return machines.sentences(results, "quickstart", say)


def quickstart_header(results: Sequence[Result], link: Link) -> list[str]:
    """The same for the preset's header."""
    del link
    lines = []
    for result in machines.of(results, "quickstart"):
        rows = {row["name"]: row for row in result.measured}
        valid, test = rows["valid qwk"], rows["test qwk"]
        lines += [
            f"Time:   {figure(rows['whole command'], ' s')} {on(result)}, the synthetic set made and all reported.",
            f"Result: kappa (QWK) {figure(valid)} on valid and {figure(test)} on test of the synthetic set "
            f"({_runs(valid)}); says nothing of DDR. {source(result, None)}",
        ]
    return lines or ["Time:   not measured yet: python benchmarks/quickstart.py"]


def _set(row: Row) -> str:
    size = row["least"] if row["least"] == row["most"] else f"{row['least']} to {row['most']}"
    kind = "synthetic ones" if row["source"] == "synthetic" else f"those of {row['source']}"
    return f"{row['photographs']:,} {kind} ({size} px, {row['kilobytes']} kB on average)"


def data(results: Sequence[Result], link: Link) -> list[str]:
    """Reading, checking and preparing."""
    return machines.sentences(results, "data", lambda result, rows: (
        f"A set of {rows['labels']['photographs']:,} photographs whose headers are known is read in "
        f"{figure(rows['labels'], ' s')}. Photographs a second, of {_set(rows['decode'])}: {figure(rows['headers'])} "
        f"opened for the first time, {figure(rows['decode'])} decoded by `check`, {figure(rows['prepare'])} made by "
        f"`prepare`; {rows['prepare']['n']} rounds: {source(result, link)}"
    ))  # fmt: skip


def prepare(results: Sequence[Result], link: Link) -> list[str]:
    """What `fastddr prepare` costs."""
    return machines.sentences(results, "data", lambda result, rows: (
        f"O{on(result)[1:]} `prepare` makes {figure(rows['prepare'])} photographs of {rows['prepare']['size']} px a "
        f"second from {_set(rows['prepare'])}, the start of its workers counted in, without contact sheets; "
        f"{rows['prepare']['n']} rounds: {source(result, link)}"
    ))  # fmt: skip


def synth(results: Sequence[Result], link: Link) -> list[str]:
    """Making the synthetic set."""

    def say(result: Result, rows: dict[str, Row]) -> str:
        made = [row for row in rows.values() if row["unit"] == "photographs/s"]
        rates = words(f"{figure(row)} a second on {row['name']}" for row in made)
        return f"Photographs of {made[0]['size']} px: {rates} ({made[0]['n']} rounds): {source(result, link)}"

    return machines.sentences(results, "synth", say)


def train(results: Sequence[Result], link: Link) -> list[str]:
    """Whole training: a line for each model, precision, size and batch."""
    texts = []
    for result in machines.of(results, "train"):
        different, same = split(result.rows, ("photographs", *_CASE))
        # A peer has several forms, which go by its name and a comma.
        peers = dict.fromkeys(row["name"].partition(",")[0] for row in result.rows if row["kind"] == "peer")
        lines = []
        for rows in _cases(result.rows):
            ours = [row for row in rows if row["name"] == "fastddr"]
            ceiling = [row["name"] for row in rows if row["kind"] == "ceiling"]
            cells = [figure(ours[0]) if ours else "", _ratio(rows, ceiling[:1])]
            for peer in peers:
                cells.append(_ratio(rows, [row["name"] for row in rows if row["name"].partition(",")[0] == peer]))
            lines.append([said(rows[0], different) or "`fastddr`", *cells])
        headings = ["", "images/s", "of the `replay` ceiling", *(f"times `{peer}`" for peer in peers)]
        about = (
            f"**{result.hardware}.** Images a second of whole training, {said(result.rows[0], same)}; medians with "
            "95 % intervals."
        )
        texts += [
            " ".join([about, *_decoded(result), *_loops(result)]),
            table(headings, lines),
            f"Measured by {source(result, link)}",
        ]
        for other in machines.of(results, "train-kappa"):
            if other.hardware == result.hardware:
                texts += [f"{_sooner(rows)}: {source(other, link)}" for rows in _cases(other.rows)]
    return texts + machines.missing(results, "train")


def _decoded(result: Result) -> list[str]:
    """What is outside the clock where fastddr keeps what it decodes."""
    if any(row["name"] == "fastddr" and row.get("loader") == "resident" for row in result.measured):
        return ["`fastddr` counts from its second epoch on, when its `resident` loader has decoded everything."]
    return []


def _loops(result: Result) -> list[str]:
    """What the peers are that were measured, and how fastddr's speed is put beside theirs."""
    told = []
    forms = [row["name"] for row in result.measured if row["kind"] == "peer"]
    for peer in dict.fromkeys(form.partition(",")[0] for form in forms):
        if peer in _LOOPS:
            both = any(form.split(", ")[0] == peer and "channels_last" in form for form in forms)
            told.append(f"`{peer}` is {_LOOPS[peer]}{', in the default layout (NCHW) alone' * (not both)}")
    ratios = (
        "`times X` is fastddr's images a second divided by X's, round by round, with X in the fastest of its forms "
        "that were run."
    )
    return [f"{words(told)}.", ratios] if told else []


def _cases(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each model, precision, size and batch."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row.get(name) for name in _CASE), []).append(row)
    return list(cases.values())


def _sooner(rows: Sequence[Row]) -> str:
    """The time of one case to the highest kappa that all loops came to with every seed, in a sentence."""
    named = {row["name"]: row for row in rows if "failed" not in row}
    loops = dict.fromkeys(row["recipe"] for row in rows if row["kind"] == "qwk")
    targets = {row["target_qwk"] for row in rows if "target_qwk" in row}
    reached = [target for target in targets if all(f"{loop}: to kappa {target:g}" in named for loop in loops)]
    case = said(rows[0], _CASE)
    if not reached:
        return f"Not all came to a kappa that was asked for, of {case}"
    target, times = max(reached), []
    for loop in loops:
        ratio = named.get(f"{loop} / {next(iter(loops))}: to kappa {target:g}")
        more = f", {figure(ratio)} times as long" if ratio else ""
        times.append(f"`{loop}` trains {figure(named[f'{loop}: to kappa {target:g}'], ' s')}{more}")
    seeds = len(named[f"{next(iter(loops))}: to kappa {target:g}"]["seeds"])
    recipes = "" if all(loop.partition(",")[0] != "report" for loop in loops) else (
        "; the recipes differ: `report` trains without normalisation and at a constant learning rate"
    )  # fmt: skip
    if any("workers=0" in loop for loop in loops):
        recipes += "; with `workers=0` a loop loads in the training process"
    return (f"Until the quadratic-weighted kappa on valid comes to {target:g}, validation included, {words(times)} "
            f"({case}, {seeds} seeds, ratios seed by seed{recipes})")  # fmt: skip


def _ratio(rows: Iterable[Row], others: Sequence[str]) -> str:
    """`fastddr` against the fastest of the others; empty where there is no such ratio."""
    names = [f"fastddr / {other}" for other in others]
    found = [row for row in rows if row["name"] in names and "failed" not in row]
    return figure(min(found, key=lambda row: row["median"])) if found else ""


def train_all(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of whole training."""

    return machines.listed(results, link, "train", "Whole training", lambda result: " ".join(_decoded(result)))


def train_kappa(results: Sequence[Result], link: Link) -> list[str]:
    """The time to a kappa: a line for each case and loop, a column for each kappa."""
    texts = []
    for result in machines.of(results, "train-kappa"):
        cases = [[row for row in rows if row["kind"] == "qwk"] for rows in _cases(result.rows)]
        timed = [row for rows in cases for row in rows]
        # A loop that could not run has a row without a kappa.
        one, targets = timed[0], sorted({row["target_qwk"] for row in timed if "target_qwk" in row})
        if not targets:
            texts.append(f"**{result.hardware}.** No loop could run: {source(result, link)}")
            continue
        different, same = split(timed, ("photographs", *_CASE))
        first = one["recipe"]
        lines = []
        for rows, all_rows in zip(cases, _cases(result.rows), strict=True):
            named = {row["name"]: row for row in all_rows}
            for loop in dict.fromkeys(row["recipe"] for row in rows):
                cells = []
                for target in targets:
                    row = named.get(f"{loop}: to kappa {target:g}")
                    cells += [_seeds(row), _epochs(row), _to_first(named, loop, first, target)] if row else ["-"] * 3
                lines.append([", ".join(filter(None, (said(rows[0], different), loop))), *cells])
        headings = [""]
        for target in targets:
            headings += [f"to {target:g}, s", "epochs", f"times `{first}`"]
        seeds = max(len(row["seeds"]) for row in timed if "seeds" in row)
        about = (
            f"**{result.hardware}.** Seconds of training, validation included, until the quadratic-weighted kappa on "
            f"valid comes to {words(f'{target:g}' for target in targets)}: {said(one, same)}, at most "
            f"{one['epochs_at_most']} epochs; medians of {seeds} seeds with 95 % intervals, ratios seed by seed. Where "
            "not every seed came to it there is no median. The recipes differ: `fastddr` trains by the preset's, "
            "`report` as in 2022: Adam at the preset's peak rate throughout, pixels not normalised."
        )
        texts += [about, table(headings, lines), machines.picture(result, result.path.with_suffix(".png"), link)]
        texts.append(f"Measured by {source(result, link)}")
    return texts or ["Not measured yet: `python benchmarks/train.py --target-qwk 0.5 0.7`."]


def _epochs(row: Row) -> str:
    """From the seed that came to it first to the one that came last."""
    reached = [epoch for epoch in row["epochs"] if epoch is not None]
    return " to ".join(dict.fromkeys(map(str, (min(reached), max(reached))))) if reached else "-"


def _seeds(row: Row) -> str:
    """The time, or how many seeds came to it."""
    if "failed" not in row:
        return figure(row)
    return f"{sum(each is not None for each in row['seconds'])} of {len(row['seconds'])} seeds"


def _to_first(named: Mapping[str, Row], loop: str, first: str, target: float) -> str:
    ratio = named.get(f"{loop} / {first}: to kappa {target:g}")
    return "1" if loop == first else figure(ratio) if ratio else "-"


#: Benchmarks of which a text is nothing but all rows, and what these are.
_LISTED = {
    "step": "The training step alone",
    "operations": "Single operations of a ConvMixer",
    "ceilings": "What the machine can do at most",
    "decode": "The `dali` loader beside Pillow",
    "faults": "What is lost when something goes wrong",
    "predict": "Grading photographs without labels",
    "answers": "Seconds from the start of a command to its end; `again`: from the cache",
}
BLOCKS: dict[str, Callable[[Sequence[Result], Link], list[str]]] = {
    "quickstart": quickstart,
    "quickstart-header": quickstart_header,
    "loader": loaders_told.loader,
    "loader-all": loaders_told.loader_all,
    "data": data,
    "prepare": prepare,
    "synth": synth,
    "train": train,
    "train-all": train_all,
    "train-kappa": train_kappa,
    **{name: partial(machines.listed, name=name, what=what) for name, what in _LISTED.items()},
    "scaling": outcomes.scaling,
    "scaling-paper": outcomes.scaling_paper,
    "seeds": outcomes.seeds,
    "memory": outcomes.memory,
    "cards": outcomes.cards,
    "cards-all": outcomes.cards_all,
    "report": outcomes.report,
    "ablation": outcomes.ablation,
    "pretraining": outcomes.pretraining,
}
