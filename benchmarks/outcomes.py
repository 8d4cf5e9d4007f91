"""The generated texts of what trainings end in and what they take: scores, seeds, memory, and many GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import accounts
import machines
import plots
from stored import Result
from wording import Link, figure, number, said, source, table


def report(results: Sequence[Result], link: Link) -> list[str]:
    """The 2022 report's models."""
    texts = []
    for result in machines.of(results, "report"):
        rows = result.measured
        pretrained = next((row for row in reversed(rows) if row["pretraining"]), rows[-1])
        texts.append(f"**{result.hardware}.** {' '.join(accounts.sentences([pretrained]))} {source(result, link)}")
        texts += [accounts.accuracies(rows), accounts.details(rows), accounts.expenses(rows)]
    return texts + machines.missing(results, "report")


def ablation(results: Sequence[Result], link: Link) -> list[str]:
    """A baseline and one change at a time."""
    return _ablated(machines.of(results, "ablation"), link) + machines.missing(results, "ablation")


def pretraining(results: Sequence[Result], link: Link) -> list[str]:
    """The same of one change: a model that begins at ImageNet weights."""
    missing = "Not measured yet: `benchmarks/ablation.py` with `--also` and `--out ablation-pretraining_....json`."
    return _ablated(machines.of(results, "ablation-pretraining"), link) or [missing]


def _ablated(results: Sequence[Result], link: Link) -> list[str]:
    texts = []
    for result in results:
        first = result.measured[0]
        of = "synthetic photographs" if first["data"] == "synthetic" else f"the data `{first['data']}`"
        # Of five values or fewer the interval of the median is their whole range, and of few it holds less than 95 %.
        known = "its 95 % interval" if first["n"] > 5 else "their range"
        texts.append(
            f"**{result.hardware}.** One change at a time on {of}: median of {first['n']} "
            f"seeds with {known}, differences seed by seed. {accounts.caution(first['valid'])} "
            f"{source(result, link)}"
        )
        texts += [accounts.changes(result.rows), machines.picture(result, result.path.with_suffix(".png"), link)]
    return texts


def seeds(results: Sequence[Result], link: Link) -> list[str]:
    """Numbers of ranks beside seeds."""
    texts = []
    for result in machines.of(results, "seeds"):
        about = f"**{result.hardware}.** {accounts.between_ranks(result.rows)} {source(result, link)}"
        texts += [about, accounts.ranks(result.rows)]
    return texts + machines.missing(results, "seeds")


def memory(results: Sequence[Result], link: Link) -> list[str]:
    """Measured peaks beside predicted ones."""
    texts = []
    for result in machines.of(results, "memory"):
        command, pretended = result.record["command"], result.record["machine"].get("pretended_card", False)
        # On a CPU the models are others than those that people train, where none are named.
        tiny = "--tiny" in command or not (result.gpu or pretended)
        small = " of small models" if tiny and "--models" not in command else ""
        where = "" if result.gpu else " on a pretended card, under `tests/card/run.py`" if pretended else " on a CPU"
        texts.append(f"**{result.hardware}.** Peak memory of a training step{small}{where}, measured by "
                     f"{source(result, link)}")  # fmt: skip
        texts += accounts.peaks(result.rows)
    return texts + machines.missing(results, "memory")


def cards(results: Sequence[Result], link: Link) -> list[str]:
    """README's second picture: memory against the size of the card. A prediction is of no machine: one is enough."""
    found = machines.of(results, "cards")
    if not found:
        return [machines.not_yet("cards")]
    unseen = "What no trace sees, such as CUDA's context, is a declared allowance, not measured."
    about = f"Predicted by {source(found[0], link)} {unseen}"
    return [f"![{plots.SHOWN['cards']}]({link(found[0].path.with_suffix('.png'))})", about]


def cards_all(results: Sequence[Result], link: Link) -> list[str]:
    """The same as a table."""
    tables = [accounts.cards(result.rows) for result in machines.of(results, "cards")[:1]]
    return [*tables, cards(results, link)[-1]]


def scaling(results: Sequence[Result], link: Link) -> list[str]:
    """Speed, efficiency and share of communication by number of ranks."""
    texts = []
    for result in machines.of(results, "scaling"):
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
    return texts + machines.missing(results, "scaling")


def scaling_paper(results: Sequence[Result], link: Link) -> list[str]:
    """Larger machines, worked out and not measured."""
    found = machines.of(results, "scaling-paper")[:1]
    if not found:
        return [machines.not_yet("scaling").replace(".py`", ".py --paper`")]
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
