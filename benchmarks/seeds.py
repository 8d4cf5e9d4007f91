"""How far apart two seeds end, and whether another number of ranks makes more of a difference than another seed.

    python benchmarks/seeds.py                                   # all GPUs beside one; two ranks beside one on a CPU
    python benchmarks/seeds.py --ranks 1 2 4 8 --preset report-convmixer --flags="--data masters --epochs 20"

The global batches are the same on any number of ranks, but in training BatchNorm takes its statistics over what one
rank holds at once. So the weights differ, and the question is by how much. Every number of ranks trains with every
seed; its last epoch is scored on valid. The difference to the fewest ranks is taken seed by seed, and stands beside the
difference between two seeds of these, over all pairs.

A run that is done is not made again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accounts
import harness
import script
import torch
import whole
from accounts import COMPARED

from fastddr import cli
from fastddr.errors import UserError
from fastddr.ranks import available_cores


@dataclass
class Options(script.Output):
    """Train on several numbers of ranks with several seeds."""

    ranks: tuple[int, ...] = ()
    """By default one and all GPUs; on a CPU one and two."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Of the runs; at least 5."""
    preset: str = "quickstart"
    """Where settings start."""
    flags: str = ""
    """Further flags of `train.py` for all runs: --flags="--data masters"."""
    folder: Path = Path("runs/seeds")
    """Where the runs go. A second start goes on there."""


def numbers(options: Options) -> tuple[int, ...]:
    """The numbers of ranks to compare, the fewest first.

    Raises:
        UserError: there are not so many here, or only one number to compare, or too few seeds.
    """
    gpus = torch.cuda.device_count()
    most = gpus or max(2, available_cores())
    ranks = tuple(sorted(set(options.ranks or (1, gpus or 2))))
    if len(ranks) < 2:
        raise UserError("--ranks: give two numbers of ranks at least; on one GPU there is nothing to compare.")
    if ranks[0] < 1 or ranks[-1] > most:
        raise UserError(f"--ranks {' '.join(map(str, ranks))}: this machine runs 1 to {most} ranks.")
    if len(set(options.seeds)) < 5:
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: give at least 5, for an interval of the median.")
    return ranks


def common(options: Options) -> list[str]:
    """The flags of all runs but for the seed. Valid alone is compared, so test stays unseen."""
    quiet = ["--evaluation.no-test", "--tracking.no-wandb", "--tracking.no-tensorboard"]
    return ["--preset", options.preset, *options.flags.split(), *quiet]


def row(ranks: int, seeds: Sequence[int], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one number of ranks, seed by seed."""
    values = {key: [float(valid[key]) for valid in found] for key in COMPARED}
    return {
        "name": f"{ranks} rank{'s' * (ranks > 1)}", "kind": "ranks", "ranks": ranks, "seeds": list(seeds),
        "valid": found[0]["n"], "values": values,
        "spreads": {key: harness.spread(one) for key, one in values.items()},
        **harness.spread(values["loss"]), "unit": "valid loss",
    }  # fmt: skip


def _apart(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    return harness.spread([abs(one - other) for one, other in pairs])


def compared(found: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its difference to the fewest ranks, seed by seed, and how far apart any two seeds of those end."""
    pairs = {key: list(zip(found["values"][key], base["values"][key], strict=True)) for key in COMPARED}
    return {
        **found, "to": base["name"],
        "difference": {key: harness.spread([one - other for one, other in both]) for key, both in pairs.items()},
        "apart": {key: _apart(both) for key, both in pairs.items()},
        "seeds_apart": {key: _apart(itertools.combinations(base["values"][key], 2)) for key in COMPARED},
    }  # fmt: skip


def main(options: Options) -> None:
    """Run what is not run yet, print and write.

    Raises:
        UserError: a run could not be trained.
    """
    ranks, seeds = numbers(options), tuple(dict.fromkeys(options.seeds))
    cli.parse(common(options), "--flags")
    harness.check_folder(options.folder, "--folder")
    harness.begin()
    found: dict[int, list[Mapping[str, Any]]] = {count: [] for count in ranks}
    rows: list[dict[str, Any]] = []
    about = {"preset": options.preset, "flags": options.flags}
    with harness.writing("seeds", rows, options.out, wandb=options.wandb):
        for number, seed in enumerate(seeds, 1):
            for count in ranks:
                run = options.folder / f"ranks{count}-seed{seed}"
                wrong = whole.train(run, [*common(options), "--seed", str(seed)], ranks=count)
                if wrong is not None:
                    raise UserError(f"{run} could not be trained: {wrong}")
                figures = whole.figures(run)
                valid = figures.get("valid_last") or figures["valid"]
                # Where kappa is not defined, nothing was learnt.
                found[count].append({**valid, "qwk": valid["qwk"] or 0.0})
                said = ", ".join(f"{name} {found[count][-1][key]:.4f}" for key, name in COMPARED.items())
                harness.say(f"{count} rank(s), seed {seed}: {said} on valid")
            # As of a race: so many tell something, should it be stopped.
            if number >= harness.LEAST_ROUNDS:
                base, *others = (row(count, seeds[:number], found[count]) for count in ranks)
                rows[:] = [{**base, **about}, *({**compared(one, base), **about} for one in others)]
        harness.say(f"{accounts.ranks(rows)}\n\n{accounts.between_ranks(rows)}")


if __name__ == "__main__":
    script.run(main, Options)
