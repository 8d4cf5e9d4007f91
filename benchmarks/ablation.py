"""What each part of a recipe is worth: a baseline, and one change at a time, over several seeds.

    python benchmarks/ablation.py                                            # a hard synthetic set
    python benchmarks/ablation.py --data DDR-masters --preset report-convmixer --epochs 30
    python benchmarks/ablation.py --changes lr-up mse --also "mse-ema: --loss.name mse --optimizer.ema-decay 0.99"

The report of 2022 tuned batch size, crop and learning rate on valid; these are among the changes, beside the parts of
the recipe. Kappa on valid of the best epoch counts, the median over the seeds; the difference to the baseline is taken
seed by seed. Test is not scored: nothing may be chosen by it. A run that is done is not made again.

Into the folder of the runs: `ablation.md` with the table, and `ablation.png` with kappa and loss of valid by epoch.

The synthetic set is in DDR's own proportions, in which one photograph in fifty is grade 3, and not the flatter one of
the quickstart. A gain on it says nothing of real photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import accounts
import harness
import plots
import script
import torch
import whole

from fastddr import cli
from fastddr.config import Config
from fastddr.errors import UserError

BASELINE = "baseline"
#: Photographs of the hard synthetic set.
HARD = 2400
#: By name, the flags that a change adds to the baseline's; values are the baseline's times something.
CHANGES: dict[str, Callable[[Config], list[str]]] = {
    "batch-up": lambda base: ["--batch-size", str(base.batch_size * 2)],
    "batch-down": lambda base: ["--batch-size", str(base.batch_size // 2)],
    "crop-smaller": lambda base: ["--image-size", str(max(32, base.image_size * 3 // 4 // 32 * 32))],
    "crop-whole": lambda base: ["--canvas", str(base.image_size)],
    "lr-up": lambda base: ["--lr", f"{base.lr * 3:g}"],
    "lr-down": lambda base: ["--lr", f"{base.lr / 3:g}"],
    "no-augmentation": lambda _: ["--augment.policy", "none"],
    "fundus": lambda _: ["--augment.policy", "fundus"],
    "mixup": lambda _: ["--augment.mixup", "0.2"],
    "cutmix": lambda _: ["--augment.cutmix", "1"],
    "smoothing": lambda _: ["--loss.label-smoothing", "0.1"],
    "inverse": lambda _: ["--loss.class-weights", "inverse"],
    "effective": lambda _: ["--loss.class-weights", "effective"],
    "mse": lambda _: ["--loss.name", "mse"],
    "ema": lambda _: ["--optimizer.ema-decay", "0.99"],
    "sgd": lambda base: ["--optimizer.name", "sgd", "--lr", f"{base.lr * 10:g}"],
    "no-decay": lambda _: ["--optimizer.weight-decay", "0"],
}


@dataclass
class Options(script.Output):
    """Run a baseline and one change at a time."""

    data: str = "synthetic"
    """Folder of the photographs, or `synthetic`."""
    photographs: int = HARD
    """Size of the synthetic set, in DDR's proportions."""
    preset: str | None = None
    """The baseline; by default report-convmixer on a GPU, quickstart on a CPU."""
    flags: str = ""
    """More flags of `train.py` for the baseline, and so for all: --flags="--lr 0.001"."""
    changes: tuple[str, ...] = tuple(CHANGES)
    """Which of the known changes."""
    also: tuple[str, ...] = ()
    """Changes of your own, each `NAME: FLAGS`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs; at least 3."""
    epochs: int | None = None
    """Of every run; by default the preset's."""
    folder: Path | None = None
    """Where the runs go; by default runs/ablation-DATA. A second start goes on there."""


def baseline(options: Options) -> list[str]:
    """The flags of all runs but for the seed."""
    preset = options.preset or ("report-convmixer" if torch.cuda.is_available() else "quickstart")
    made = ["--synthetic.photographs", str(options.photographs)] if options.data == "synthetic" else []
    epochs = ["--epochs", str(options.epochs)] if options.epochs is not None else []
    quiet = ["--evaluation.no-test", "--tracking.no-wandb", "--tracking.no-tensorboard"]
    return ["--preset", preset, "--data", options.data, *made, *epochs, *quiet, *options.flags.split()]


def chosen(options: Options, base: Config) -> dict[str, list[str]]:
    """The flags that each change adds, the baseline's first; what changes nothing is left out, and said.

    Raises:
        UserError: there is no such change, or a change that cannot be.
    """
    unknown = [name for name in options.changes if name not in CHANGES]
    if unknown:
        raise UserError(f"--changes {' '.join(unknown)}: known are {', '.join(CHANGES)}.")
    found = {name: CHANGES[name](base) for name in options.changes}
    for text in options.also:
        name, colon, flags = text.partition(":")
        if not colon or not flags.strip() or name in found or not name.replace("-", "").isalnum():
            raise UserError(f"--also {text!r}: give NAME: FLAGS, the name new and of letters, digits and dashes.")
        found[name] = flags.split()
    for name, flags in list(found.items()):
        if cli.parse([*baseline(options), *flags], f"change {name}") == base:
            harness.say(f"{name}: the baseline has it already; left out")
            del found[name]
    return {BASELINE: [], **found}


def row(name: str, flags: list[str], seeds: tuple[int, ...], options: Options, folder: Path) -> dict[str, Any]:
    """Train a change with every seed; its figures on valid, seed by seed."""
    kappas, accuracies, minutes, curves = [], [], [], []
    for seed in seeds:
        run = folder / f"{name}-seed{seed}"
        wrong = whole.train(run, [*baseline(options), *flags, "--seed", str(seed)])
        if wrong is not None:
            return {"name": name, "flags": " ".join(flags), "failed": wrong}
        valid = whole.figures(run)["valid"]
        kappas.append(valid["qwk"] or 0.0)
        accuracies.append(valid["accuracy"])
        curves.append(whole.scored(run))
        minutes += [cost["minutes"] for cost in [whole.costs(run)] if "minutes" in cost]
        harness.say(f"{name}, seed {seed}: kappa {kappas[-1]:.3f}, accuracy {accuracies[-1]:.1%} on valid")
    return {
        "name": name, "kind": "change", "flags": " ".join(flags), "seeds": list(seeds), "kappas": kappas,
        "baseline": name == BASELINE, "valid": valid["n"], "data": Path(options.data).name,
        "accuracy": harness.spread(accuracies), **({"minutes": median(minutes)} if minutes else {}),
        **harness.spread(kappas), "unit": "QWK", "curves": curves,
    }  # fmt: skip


def compared(found: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its difference to the baseline, seed by seed."""
    if "failed" in found or "failed" in base:
        return dict(found)
    apart = [one - other for one, other in zip(found["kappas"], base["kappas"], strict=True)]
    return {**found, "difference": harness.spread(apart)}


def main(options: Options) -> int:
    """Run what is not run yet, print and write; exit code 1 if a change could not be trained."""
    seeds = tuple(dict.fromkeys(options.seeds))
    if len(seeds) < 3:
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: give at least 3, one alone decides nothing.")
    base = cli.parse(baseline(options), "baseline")
    folder = options.folder or Path("runs") / f"ablation-{Path(options.data).name}"
    changes = chosen(options, base)
    harness.check_folder(folder, "--folder")
    harness.begin()
    rows: list[dict[str, Any]] = []
    with harness.writing("ablation", rows, options.out, wandb=options.wandb):
        for name, flags in changes.items():
            found = row(name, flags, seeds, options, folder)
            if "failed" in found:
                if name == BASELINE:
                    raise UserError(f"The baseline could not be trained: {found['failed']}")
                harness.say(f"{name}: not trained: {found['failed']}")
            rows.append(compared(found, rows[0] if rows else found))
    picture = plots.save(plots.changes(rows), f"{base.model} on {rows[0]['data']}", folder / "ablation.png")
    text = f"{accounts.changes(rows)}\n\n{accounts.caution(rows[0]['valid'])}\n\n![Valid by epoch]({picture.name})\n"
    (folder / "ablation.md").write_text(text, encoding="utf-8")
    harness.say(text)
    harness.say(f"written to {folder / 'ablation.md'}")
    return int(any("failed" in found for found in rows))


if __name__ == "__main__":
    script.run(main, Options)
