"""What stands in the generated texts of README.md, docs/ and the preset headers; `tables.py` puts it there.

Each text takes the newest results and a function that makes links, and gives paragraphs, in Markdown or, of
`quickstart-header`, lines. It names the command, the machine, the versions and the date of its result, and links it.
What is not measured yet is said in one sentence a machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accounts
import plots
import targets
from stored import Result
from wording import Link, Row, figure, listing, number, on, said, source, split, table, words

#: Others' loaders in words; what is not here goes by its name.
_PEERS = {
    "torch-pil": "DataLoader with Pillow",
    "torch-decode-jpeg": "DataLoader with torchvision's decoder",
    "torchcodec": "DataLoader with TorchCodec",
    "torchvision-gpu": "torchvision's decoder for GPUs",
    "spdl": "SPDL",
    "spdl-decode-jpeg": "SPDL with torchvision's decoder",
}
_STORES = {"vram": "in the GPU's memory", "ram": "in RAM", "mmap": "in a file"}
_BEST = ", the best peer"


def first_picture(result: Result) -> Path:
    """The picture at the top of README's benchmarks, of the first result of `loader`."""
    return result.path.parents[2] / "docs" / "images-per-second.png"


def _of(results: Iterable[Result], name: str) -> list[Result]:
    return [result for result in results if result.name == name]


def _missing(results: Sequence[Result], name: str) -> list[str]:
    """A sentence for each machine that has results, but none of this benchmark, and for GPUs if none has any."""
    known = {result.hardware: result.gpu for result in results}
    done = {result.hardware for result in _of(results, name)}
    absent = [hardware for hardware in known if hardware not in done]
    absent += [] if any(known.values()) else ["GPU"]
    return [f"**{hardware}.** {_not_yet(name)}" for hardware in absent]


def _not_yet(name: str) -> str:
    return f"Not measured yet: `python benchmarks/{name}.py`."


def _sentences(results: Sequence[Result], name: str, say: Callable[[Result, dict[str, Row]], str]) -> list[str]:
    """One sentence a machine, of the rows by name."""
    found = [say(result, {row["name"]: row for row in result.measured}) for result in _of(results, name)]
    return found or [_not_yet(name)]


# ------------------------------------------------------------------------------------------------------- one sentence


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

    return _sentences(results, "quickstart", say)


def quickstart_header(results: Sequence[Result], link: Link) -> list[str]:
    """The same for the preset's header."""
    del link
    lines = []
    for result in _of(results, "quickstart"):
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
    return _sentences(results, "data", lambda result, rows: (
        f"A set of {rows['labels']['photographs']:,} photographs whose headers are known is read in "
        f"{figure(rows['labels'], ' s')}. Photographs a second, of {_set(rows['decode'])}: {figure(rows['headers'])} "
        f"opened for the first time, {figure(rows['decode'])} decoded by `check`, {figure(rows['prepare'])} made by "
        f"`prepare`; {rows['prepare']['n']} rounds: {source(result, link)}"
    ))  # fmt: skip


def prepare(results: Sequence[Result], link: Link) -> list[str]:
    """What `fastddr prepare` costs."""
    return _sentences(results, "data", lambda result, rows: (
        f"O{on(result)[1:]} `prepare` makes {figure(rows['prepare'])} photographs of {rows['prepare']['size']} px a "
        f"second from {_set(rows['prepare'])}, the start of the command counted in; {rows['prepare']['n']} rounds: "
        f"{source(result, link)}"
    ))  # fmt: skip


def synth(results: Sequence[Result], link: Link) -> list[str]:
    """Making the synthetic set."""

    def say(result: Result, rows: dict[str, Row]) -> str:
        made = [row for row in rows.values() if row["unit"] == "photographs/s"]
        rates = words(f"{figure(row)} a second on {row['name']}" for row in made)
        return f"Photographs of {made[0]['size']} px: {rates} ({made[0]['n']} rounds): {source(result, link)}"

    return _sentences(results, "synth", say)


# ------------------------------------------------------------------------------------------------------------- loaders


def loader(results: Sequence[Result], link: Link) -> list[str]:
    """README's first picture, and loaders side by side."""
    found = _of(results, "loader")
    texts = [_picture(found[0], first_picture(found[0]), link)] if found else []
    for result in found:
        texts += _loaders(result, link, ("fastddr", "peer"))
    return texts + _missing(results, "loader")


def loader_all(results: Sequence[Result], link: Link) -> list[str]:
    """The same of every measurement of loaders, with parts, ceilings and limits, and its picture."""
    texts = []
    for result in results:
        if result.record["benchmark"] == "loader":
            texts += _loaders(result, link, ("fastddr", "peer", "store", "ceiling", "limit"))
            texts.append(_picture(result, result.path.with_suffix(".png"), link))
    return texts + _missing(results, "loader")


def _picture(result: Result, path: Path, link: Link) -> str:
    return f"![{plots.SHOWN[result.record['benchmark']]}: {result.hardware}]({link(path)})"


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
        f"**{result.hardware}.** Images a second from {', '.join(same)} photographs: {one['image_size']} px windows of "
        f"a {one['canvas']} px canvas, batches of {one['batch_size']}, {one['threads']} threads or processes; medians "
        f"of {one['n']} rounds with 95 % intervals. `resident` counts from its second epoch on, when it has decoded "
        "everything. Ratios are taken round by round."
    )
    return [
        about,
        table(["", *headings], lines + _ratios(list(panels.values()))),
        f"Measured by {source(result, link)}",
    ]


def loader_name(name: str) -> str:
    """A loader in words: `resident, in a file` for `resident, mmap`."""
    first, *options = name.split(", ")
    return ", ".join([_PEERS.get(first, first), *(_STORES.get(option, option) for option in options)])


def _marked(kind: str, name: str) -> str:
    """The same in Markdown: fastddr's loaders are names to type, limits in italics."""
    first, comma, rest = loader_name(name).partition(", ")
    if kind == "fastddr":
        return f"`{first}`{comma}{rest}"
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
        for found, what in ((usual, _PEERS.get(baseline or "", baseline)), (against, "the best peer of the column")):
            if any(found):
                cells = [figure(rows[0], "×") if rows else "" for rows in found]
                lines.append([f"{_marked('fastddr', name)} / {what}", *cells])
    return lines


# -------------------------------------------------------------------------------------------------- training and steps

_CASE = ("model", "precision", "image_size", "batch_size")


def train(results: Sequence[Result], link: Link) -> list[str]:
    """Whole training: a line for each model, precision, size and batch."""
    texts = []
    for result in _of(results, "train"):
        different, same = split(result.rows, ("photographs", *_CASE))
        cases: dict[tuple[Any, ...], list[Row]] = {}
        for row in result.rows:
            cases.setdefault(tuple(row.get(name) for name in _CASE), []).append(row)
        # A peer has several forms, which go by its name and a comma.
        peers = dict.fromkeys(row["name"].partition(",")[0] for row in result.rows if row["kind"] == "peer")
        lines = []
        for rows in cases.values():
            ours = [row for row in rows if row["name"] == "fastddr"]
            ceiling = [row["name"] for row in rows if row["kind"] == "ceiling"]
            cells = [figure(ours[0]) if ours else "", _ratio(rows, ceiling[:1])]
            for peer in peers:
                cells.append(_ratio(rows, [row["name"] for row in rows if row["name"].partition(",")[0] == peer]))
            lines.append([said(rows[0], different) or "`fastddr`", *cells])
        headings = ["", "images/s", "of the `replay` ceiling", *(f"times `{peer}`" for peer in peers)]
        about = (
            f"**{result.hardware}.** Images a second of whole training, {said(result.rows[0], same)}; medians with "
            "95 % intervals. Ratios are taken round by round, with each peer in its fastest form."
        )
        texts += [about, table(headings, lines), f"Measured by {source(result, link)}"]
    return texts + _missing(results, "train")


def _ratio(rows: Iterable[Row], others: Sequence[str]) -> str:
    """`fastddr` against the fastest of the others; empty where there is no such ratio."""
    names = [f"fastddr / {other}" for other in others]
    found = [row for row in rows if row["name"] in names and "failed" not in row]
    return figure(min(found, key=lambda row: row["median"])) if found else ""


def train_all(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of whole training."""
    return _listed(results, link, "train", "Whole training")


def step(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of the training step."""
    return _listed(results, link, "step", "The training step alone")


def operations(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of single operations."""
    return _listed(results, link, "operations", "Single operations of a ConvMixer")


def ceilings(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of what a machine can do at most."""
    return _listed(results, link, "ceilings", "What the machine can do at most")


def decode(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of the decoder beside Pillow."""
    return _listed(results, link, "decode", "The `dali` loader beside Pillow")


def faults(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of what is lost when something goes wrong."""
    return _listed(results, link, "faults", "What is lost when something goes wrong")


def predict(results: Sequence[Result], link: Link) -> list[str]:
    """All rows of grading photographs without labels."""
    return _listed(results, link, "predict", "Grading photographs without labels")


def scaling(results: Sequence[Result], link: Link) -> list[str]:
    """Speed, efficiency and share of communication by number of ranks."""
    texts = []
    for result in _of(results, "scaling"):
        rows = {row["name"]: row for row in result.measured}
        speeds = [row for row in rows.values() if row["unit"] == "images/s"]
        lines = []
        for ranks in sorted({row["ranks"] for row in speeds}):
            cells = []
            for kind in ("strong", "weak"):
                name = f"{kind} scaling, {ranks} rank{'s' * (ranks > 1)}"
                more = [rows.get(f"{name}: {what}") for what in ("efficiency", "communication")]
                cells += [figure(rows[name]), *(figure(row) if row else "" for row in more)]
            lines.append([str(ranks), *cells])
        one = speeds[0]
        about = (
            f"**{result.hardware}.** Training steps of {said(one, ('model', 'precision', 'image_size'))} without a "
            f"loader, {number(one['gradient_mb'])} MB of gradients: strong scaling with a global batch of "
            f"{one['batch_size']}, weak scaling with {one['batch_size']} a rank; medians of {one['n']} rounds with "
            "95 % intervals. Efficiency is of linear, communication is a share of the step."
        )
        headings = ["ranks", "strong, images/s", "efficiency", "communication"]
        headings += ["weak, images/s", "efficiency", "communication"]
        texts += [about, table(headings, lines), f"Measured by {source(result, link)}"]
    return texts + _missing(results, "scaling")


def scaling_paper(results: Sequence[Result], link: Link) -> list[str]:
    """Larger machines, worked out and not measured."""
    found = _of(results, "scaling-paper")[:1]
    if not found:
        return [_not_yet("scaling").replace(".py`", ".py --paper`")]
    rows, day = found[0].measured, found[0].record["date"][:10]
    models = list(dict.fromkeys(row["model"] for row in rows if row["kind"] == "paper model"))
    networks = list(dict.fromkeys(row["network"] for row in rows if "network" in row))
    gpus = sorted({row["gpus"] for row in rows if "gpus" in row})
    sets = list(dict.fromkeys(row["name"].partition(",")[0] for row in rows if row["kind"] == "paper steps"))

    def cell(kind: str, name: str) -> str:
        return number(next(row["median"] for row in rows if row["kind"] == f"paper {kind}" and row["name"] == name))

    texts = [
        table(["", "million parameters", "MB of gradients", "ms a step, at the card's limits"],
              [[m, *(cell("model", f"{m}: {what}") for what in ("parameters", "gradients", "a step"))] for m in models])
    ]  # fmt: skip
    for model in models:
        lines = []
        for count in gpus:
            names = [f"{model}, {count} GPUs, {network}" for network in networks]
            shares = [cell(kind, name) for kind in ("all-reduce", "weak", "strong") for name in names]
            own = f"{model}, {count} GPUs"
            lines.append([f"{count:,}", *shares, cell("photographs", own), cell("storage", own)])
        short = [network.partition("/s ")[2] for network in networks]
        headings = [f"{what}, {name}" for what in ("all-reduce ms", "weak", "strong") for name in short]
        texts += [f"{model}:", table(["GPUs", *headings, "photographs/s", "GB/s a machine"], lines)]
    lines = [
        [name, *(cell("set", f"{name}: {what}") for what in ("JPEGs", "decoded")),
         *(cell("steps", f"{name}, {count} GPUs") for count in gpus)]
        for name in sets
    ]  # fmt: skip
    headings = ["set", "GB of JPEGs", "GB decoded", *(f"steps an epoch, {count:,} GPUs" for count in gpus)]
    worked = f"Worked out, not measured, by `{found[0].record['command']}`, {day}, [JSON]({link(found[0].path)})."
    return [*texts, "Photographs:", table(headings, lines), re.sub(r" --out [^ `]+", "", worked)]


def memory(results: Sequence[Result], link: Link) -> list[str]:
    """Measured peaks beside predicted ones."""
    texts = []
    for result in _of(results, "memory"):
        texts.append(f"**{result.hardware}.** Peak memory of a training step, measured by {source(result, link)}")
        texts += accounts.peaks(result.rows)
    return texts + _missing(results, "memory")


def report(results: Sequence[Result], link: Link) -> list[str]:
    """The 2022 report's models."""
    texts = []
    for result in _of(results, "report"):
        rows = result.measured
        pretrained = next((row for row in reversed(rows) if row["pretraining"]), rows[-1])
        texts.append(f"**{result.hardware}.** {' '.join(accounts.sentences([pretrained]))} {source(result, link)}")
        texts += [accounts.accuracies(rows), accounts.details(rows), accounts.expenses(rows)]
    return texts + _missing(results, "report")


def ablation(results: Sequence[Result], link: Link) -> list[str]:
    """A baseline and one change at a time."""
    return _ablated(_of(results, "ablation"), link) + _missing(results, "ablation")


def pretraining(results: Sequence[Result], link: Link) -> list[str]:
    """The same of one change: a model that begins at ImageNet weights."""
    missing = "Not measured yet: `benchmarks/ablation.py` with `--also` and `--out ablation-pretraining_....json`."
    return _ablated(_of(results, "ablation-pretraining"), link) or [missing]


def _ablated(results: Sequence[Result], link: Link) -> list[str]:
    texts = []
    for result in results:
        first = result.measured[0]
        of = "synthetic photographs" if first["data"] == "synthetic" else f"the data `{first['data']}`"
        texts.append(
            f"**{result.hardware}.** One change at a time on {of}: median of {first['n']} "
            f"seeds with its 95 % interval, differences seed by seed. {accounts.caution(first['valid'])} "
            f"{source(result, link)}"
        )
        texts += [accounts.changes(result.rows), _picture(result, result.path.with_suffix(".png"), link)]
    return texts


def cards(results: Sequence[Result], link: Link) -> list[str]:
    """README's second picture: memory against the size of the card. A prediction is of no machine: one is enough."""
    found = _of(results, "cards")
    if not found:
        return [_not_yet("cards")]
    about = f"Predicted by {source(found[0], link)} What no trace sees, such as CUDA's context, is as declared."
    return [f"![{plots.SHOWN['cards']}]({link(found[0].path.with_suffix('.png'))})", about]


def cards_all(results: Sequence[Result], link: Link) -> list[str]:
    """The same as a table."""
    tables = [accounts.cards(result.rows) for result in _of(results, "cards")[:1]]
    return [*tables, cards(results, link)[-1]]


def answers(results: Sequence[Result], link: Link) -> list[str]:
    """How soon commands answer."""
    return _listed(results, link, "answers", "Seconds from the start of a command to its end; `again`: from the cache")


def seeds(results: Sequence[Result], link: Link) -> list[str]:
    """Numbers of ranks beside seeds."""
    texts = []
    for result in _of(results, "seeds"):
        about = f"**{result.hardware}.** {accounts.between_ranks(result.rows)} {source(result, link)}"
        texts += [about, accounts.ranks(result.rows)]
    return texts + _missing(results, "seeds")


def _listed(results: Sequence[Result], link: Link, name: str, what: str) -> list[str]:
    texts = []
    for result in _of(results, name):
        texts.append(f"**{result.hardware}.** {what}, medians with 95 % intervals, measured by {source(result, link)}")
        texts += listing(result.rows)
        if name in ("train", "step"):
            texts.append(_picture(result, result.path.with_suffix(".png"), link))
    return texts + _missing(results, name)


BLOCKS: dict[str, Callable[[Sequence[Result], Link], list[str]]] = {
    "quickstart": quickstart,
    "quickstart-header": quickstart_header,
    "loader": loader,
    "loader-all": loader_all,
    "data": data,
    "prepare": prepare,
    "synth": synth,
    "train": train,
    "train-all": train_all,
    "step": step,
    "operations": operations,
    "ceilings": ceilings,
    "decode": decode,
    "faults": faults,
    "predict": predict,
    "scaling": scaling,
    "scaling-paper": scaling_paper,
    "answers": answers,
    "seeds": seeds,
    "memory": memory,
    "cards": cards,
    "cards-all": cards_all,
    "report": report,
    "ablation": ablation,
    "pretraining": pretraining,
}
