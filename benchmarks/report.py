"""Trains what the 2022 report trained, one model after the other, and prints its table beside ours.

    python benchmarks/report.py --data DDR-dataset            # all of it; stop it and start it again as you like
    python benchmarks/report.py --data DDR-dataset --arms cnn-2 convmixer-tuned
    python benchmarks/report.py --quick                       # small, on the synthetic set, in minutes on a CPU

Into `--folder`: a run's folder for each model, `report.md` with the tables, `curves.png` (loss and accuracy by epoch;
the report's figures 4.1 to 4.3 show test, ours show valid, since test is not looked at while training) and
`confusion.png` (its figure 4.4). `story` says what the models are. The report's own figures appear only where the data
are DDR whole.

Test is scored at the best and at the last epoch of each model, because the report's figures are of its last epoch;
nothing is chosen by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import accounts
import harness
import script
import story
import torch
import whole
from rich.console import Console
from safetensors import safe_open
from story import Arm

from fastddr import cli
from fastddr.config import load_preset
from fastddr.data import source
from fastddr.errors import UserError
from fastddr.reporting import plots
from fastddr.runs import RunFolder


@dataclass
class Options(script.Output):
    """Train the report's models and account for them."""

    data: str = "synthetic"
    """Folder of the photographs, or `synthetic`."""
    quick: bool = False
    """Small models and images, a few epochs, on the synthetic set; says nothing of DDR."""
    arms: tuple[str, ...] = ()
    """Which models, by the names of their folders; by default all."""
    pretraining: Literal["auto", "imagenet", "synthetic"] | str = "auto"
    """What the pretrained ConvMixer begins at. `imagenet`: the paper's 768/32 with its weights (another model than the
    one before it). `synthetic`: our own, trained on a second synthetic set. Else what `--init` takes. `auto`: synthetic
    with --quick or without --data, else imagenet."""
    tuned: str = " ".join(story.TUNED)
    """Flags of the tuned ConvMixer, as `ablation.py` found them on valid: --tuned="--lr 0.001"."""
    epochs: int | None = None
    """Of every model; by default the presets' 98."""
    flags: str = ""
    """More flags of `train.py`, for all of them: --flags="--lr 0.001 --batch-size 32"."""
    seed: int = 0
    """Of all runs."""
    last: bool = True
    """Also score train and test at the last epoch."""
    folder: Path | None = None
    """Where everything goes, with --quick the JSON too; by default runs/report-DATA, or runs/report-quick. A second
    start goes on there."""

    @property
    def weights(self) -> str:
        """What `pretraining` becomes."""
        if self.pretraining != "auto":
            return self.pretraining
        return "synthetic" if self.quick or self.data == "synthetic" else "imagenet"


def flags(arm: Arm, options: Options, folder: Path) -> list[str]:
    """The command line of an arm's training, without its folder. Later flags win."""
    found = ["--preset", arm.preset, "--data", options.data, "--seed", str(options.seed), *arm.flags]
    found += story.QUICK if options.quick else ()
    if arm.pretrained:
        # The paper published weights of its own shapes only.
        shape = ["--convmixer.size", "l"] if options.weights == "imagenet" else []
        begin = f"run:{folder / 'pretraining'}" if options.weights == "synthetic" else options.weights
        found += [*shape, "--init", begin]
    if options.quick:
        found += story.QUICK_FLAGS.get(arm.key, ())
    elif arm.tuned:
        found += options.tuned.split()
    found += ["--epochs", str(options.epochs)] if options.epochs is not None else []
    return [*found, *options.flags.split()]


def need_test(options: Options, folder: Path) -> None:
    """Raise `UserError` where test would not be scored: all tables are of it, and training takes hours."""
    config = cli.parse(flags(story.ARMS[0], options, folder), "report.py")
    if not config.evaluation.test:
        raise UserError("--flags: the report's table is of test; leave --evaluation.no-test out.")
    if config.data == "synthetic":
        return
    found = source.open_data(replace(config, check="header"), Console(quiet=True))
    if not found.has("test"):
        raise UserError(f"{found.root}: the report's table is of test, and no photograph there is; add a test split.")


def pretrain(options: Options, folder: Path) -> str | None:
    """Train the ConvMixer that the pretrained ones begin at, on a second synthetic set; what went wrong, or None."""
    arm = next(arm for arm in story.ARMS if arm.key == "convmixer-augmented")
    again = ["--data", "synthetic", "--synthetic.seed", "1", "--seed", str(options.seed + 1)]
    return whole.train(folder / "pretraining", [*flags(arm, options, folder), *again])


def account(arm: Arm, options: Options, folder: Path) -> dict[str, Any]:
    """The row of an arm that is trained."""
    run = folder / arm.key
    config = load_preset(str(run / "config.yaml"))
    found = whole.figures(run)
    same = whole.best_is_last(run)
    for split in ("train", "test"):
        if split in found and options.last:
            found[f"{split}_last"] = found[split] if same else whole.evaluated(run, split, "last")
    keep = ("n", "accuracy", "qwk", "macro_f1", "recall", "confusion_matrix")
    scored = {name: {key: values[key] for key in keep} for name, values in found.items()}
    whole_ddr = story.is_whole_ddr(run, options.data)
    low, high = found["test"]["ci"]["accuracy"]
    return {
        "name": story.QUICK_NAMES.get(arm.key, arm.name) if options.quick else arm.name,
        "arm": arm.key,
        "family": arm.family,
        "data": "synthetic" if options.data == "synthetic" else Path(options.data).name,
        "whole_ddr": whole_ddr,
        "published": arm.published if whole_ddr else {},
        "pretraining": _pretraining(options) if arm.pretrained else "",
        "seed": options.seed,
        "epochs": config.epochs,
        "best_epoch": json.loads((RunFolder(run).checkpoints / "best" / "state.json").read_text())["progress"]["epoch"],
        "parameters": _parameters(run),
        "counts": {split: found[split]["n"] for split in ("train", "valid", "test")},
        **scored,
        **whole.costs(run),
        # The interval is that of the photographs, of one run.
        "median": 100 * found["test"]["accuracy"], "low": 100 * low, "high": 100 * high,
        "unit": "% of test", "n": 1,
    }  # fmt: skip


def _pretraining(options: Options) -> str:
    return {
        "synthetic": "our own, on a second synthetic set of another seed",
        "imagenet": "the paper's ConvMixer-768/32 on ImageNet, a larger model than the ones before it",
    }.get(options.weights, f"--init {Path(options.weights).name}")


def _parameters(run: Path) -> int:
    """Of the model, from its last checkpoint; BatchNorm's statistics are none."""
    with safe_open(RunFolder(run).checkpoints / "last" / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "running_" not in name and "num_batches" not in name]  # noqa: SIM118
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names)


def written(rows: Sequence[dict[str, Any]], failed: Mapping[str, str], folder: Path) -> str:
    """`report.md` and its pictures; its text."""
    families: dict[str, dict[str, Any]] = {}
    for row in rows:
        families.setdefault(row["family"], {})[row["name"]] = whole.logged(folder / row["arm"])
    (folder / "curves.png").write_bytes(accounts.curves(families))
    tuned = next((row for row in reversed(rows) if row["family"] == "ConvMixer"), rows[-1])
    (folder / "confusion.png").write_bytes(plots.confusion({"test": whole.figures(folder / tuned["arm"])["test"]}))
    parts = [
        "# The 2022 report's models",
        *accounts.sentences([tuned]),
        accounts.accuracies(rows),
        accounts.details(rows),
        accounts.expenses(rows),
        *[f"Not trained: {name}: {wrong}" for name, wrong in failed.items()],
        "Loss and accuracy by epoch. The report's figures 4.1 to 4.3 show test; these show valid.",
        "![Loss and accuracy by epoch](curves.png)",
        f"{tuned['name']} on test, best epoch; rows = truth, columns = prediction (the report's 4.4 has them swapped).",
        "![Confusion matrix](confusion.png)",
        "Research use only; not a medical device.",
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def main(options: Options) -> int:
    """Train what is not trained yet, print and write; exit code 1 if a model could not be trained."""
    unknown = set(options.arms) - {arm.key for arm in story.ARMS}
    if unknown:
        raise UserError(f"--arms {' '.join(sorted(unknown))}: known are {', '.join(arm.key for arm in story.ARMS)}.")
    if options.quick and options.data != "synthetic":
        raise UserError("--quick is on the synthetic set; leave --data or --quick out.")
    if options.quick and options.tuned != Options.tuned:
        raise UserError("--quick tunes its small ConvMixer itself; leave --tuned or --quick out.")
    name = "quick" if options.quick else Path(options.data).name
    folder = options.folder or Path("runs") / f"report-{name}"
    need_test(options, folder)
    harness.check_folder(folder, "--folder")
    harness.begin()
    arms, failed = story.of(options.arms), dict[str, str]()
    record: list[dict[str, Any]] = []
    out = options.out or (folder / "report.json" if options.quick else None)
    with harness.writing("report", record, out, wandb=options.wandb):
        if options.weights == "synthetic" and any(arm.pretrained for arm in arms):
            harness.say(f"pretraining: a ConvMixer on a second synthetic set, into {folder / 'pretraining'}")
            if wrong := pretrain(options, folder):
                raise UserError(f"the pretraining failed: {wrong}")
        for arm in arms:
            wrong = whole.train(folder / arm.key, flags(arm, options, folder))
            if wrong is None:
                record.append(account(arm, options, folder))
                harness.say(
                    f"{arm.key}: test {record[-1]['median']:.1f} %, QWK {accounts.or_dash(record[-1]['test']['qwk'])}"
                )
            else:
                failed[arm.name] = wrong
                record.append({"name": arm.name, "failed": wrong})
                harness.say(f"{arm.key}: not trained: {wrong}")
        if len(failed) == len(arms):
            raise UserError("No model could be trained; why stands above.")
    harness.say(written([row for row in record if "failed" not in row], failed, folder))
    harness.say(f"written to {folder / 'report.md'}")
    return int(bool(failed))


if __name__ == "__main__":
    script.run(main, Options)
