"""What a run found, as files that a person reads: RUN/report/.

    report.md  metrics.json  predictions.csv  curves.png  confusion_matrix.png  roc.png  reliability.png  worst.png

and about.json, what else is in report.md, so that `again` can make it anew.

Each file is written beside and renamed, so a kill leaves no half of one.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastddr import files
from fastddr.data import problems
from fastddr.data.problems import Problem
from fastddr.evaluation import bootstrap
from fastddr.evaluation.calibration import temperature as fitted
from fastddr.evaluation.metrics import SplitResult, confidence, figures
from fastddr.reporting import predictions, tables
from fastddr.reporting.predictions import LAST
from fastddr.tracking import METRICS, read

__all__ = ["ABOUT", "summary", "write"]

ABOUT = "about.json"


def write(
    run_dir: Path,
    splits: Mapping[str, SplitResult],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    *,
    root: Path | None = None,
    left_out: Sequence[Problem] = (),
    folder: Path | None = None,
    temperature: float | None = None,
    fit: bool = True,
    title: str | None = None,
    predicted: bool = True,
    vector: str | None = None,
) -> Path:
    """Write RUN/report/, or another folder, and return the path of its report.md.

    `splits` holds one or more of train, valid, test and `valid_last` (valid under the last weights). `facts` is shown
    in its order, label and value, and a mapping as a value in one line; `notes` are sentences. Paths of
    photographs are taken below `root` where they are relative. The curves come from RUN/metrics.jsonl, if it
    is there. `left_out` are the photographs and labels that were not used. The temperature for calibrated
    probabilities is fitted on valid where that is among the splits, else it is `temperature`, if there is one; with
    `fit` false, for photographs that are not the run's, none is fitted. `title` is by default the run's name.
    Predictions are written unless they are there already (`predicted` false). `vector`, "pdf" or "svg", draws all
    pictures but that of the photographs a second time, for print. Raises OSError when a file cannot be written; a
    photograph that cannot be opened is a grey tile.
    """
    # With them comes matplotlib, which a run has no use for until it ends.
    from fastddr.reporting import plots, ranked

    report = folder or Path(run_dir) / "report"
    report.mkdir(parents=folder is not None, exist_ok=True)  # that of a run that is gone is not made anew
    if fit and "valid" in splits and len(splits["valid"].grades):
        temperature = fitted(splits["valid"].logits, splits["valid"].grades)
    found = {}
    for name, split in splits.items():
        own = name == LAST and len(split.grades)  # valid under other weights has a temperature of its own
        found[name] = _figures(split, fitted(split.logits, split.grades) if own else temperature)
    logged = read(Path(run_dir) / METRICS)
    shown = {name: splits[name] for name in splits if name in ("valid", "test")} or dict(splits)
    # Which epoch is the best is more than its kappa: of equal ones the loss decides, of six classes macro F1.
    told = (re.match(r"best \(step \d+, epoch (\d+)\)", split.weights) for split in splits.values())
    best = next((int(match[1]) for match in told if match), None)
    pictures: dict[str, Callable[[str], bytes]] = {}
    if plots.has_curves(logged):
        pictures["curves.png"] = lambda kind: plots.curves(logged, best, tables.measured(facts), kind)
    pictures["confusion_matrix.png"] = lambda kind: plots.confusion({name: found[name] for name in shown}, kind)
    pictures["roc.png"] = lambda kind: ranked.curves(shown, found, kind)
    pictures["reliability.png"] = lambda kind: plots.reliability(shown, found, temperature, kind)
    of = "test" if "test" in shown else next(iter(shown))
    pictures["worst.png"] = lambda _: plots.worst(of, splits[of], root)
    title = title or Path(run_dir).resolve().name
    about = {
        "run": title,
        "facts": facts,
        "notes": list(notes),
        "weights": {name: split.weights for name, split in splits.items()},
        "root": None if root is None else str(Path(root).absolute()),
        "temperature": temperature,
        "fit": fit,
    }
    files.put(report / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    files.put(report / "metrics.json", (json.dumps(found, allow_nan=False, indent=1) + "\n").encode())
    if left_out:
        files.put(report / "left_out.csv", problems.write_list(left_out).encode("utf-8", "surrogateescape"))
    if predicted:
        if LAST in splits:
            files.put(report / predictions.LAST_FILE, predictions.dump({LAST: splits[LAST]}))
        # Behind all else of which `again` makes a report: by this file it knows that there is one.
        these = {name: split for name, split in splits.items() if name != LAST}
        files.put(report / predictions.FILE, predictions.dump(these))
    text = tables.markdown(title, found, facts, notes, list(pictures), left_out)
    files.put(report / "report.md", text.encode())
    # Last: a picture that cannot be drawn takes no figures with it.
    for name, draw in pictures.items():
        files.put(report / name, draw("png"))
        if vector is not None and name != "worst.png":
            files.put((report / name).with_suffix(f".{vector}"), draw(vector))
    return report / "report.md"


def _figures(split: SplitResult, temperature: float | None) -> dict[str, Any]:
    """What metrics.json has of a split."""
    # In one order, whatever the split's: the samples are drawn by row.
    order = split.ids.argsort()
    logits, grades = split.logits[order], split.grades[order]
    values = figures(logits, grades)
    patients = None if split.patients is None else [split.patients[row] for row in order.tolist()]
    found = {
        "weights": split.weights, **values, "ci": bootstrap.intervals(logits, grades, values, patients=patients)
    }  # fmt: skip
    if temperature is not None:
        cooled = confidence(logits / temperature, grades)
        found["calibrated"] = {"temperature": temperature, "ece": cooled["ece"], "loss": cooled["loss"]}
    if values["n"]:
        of_grades = [sum(row) for row in values["confusion_matrix"]]
        most = max(of_grades)
        found["baseline"] = {"grade": of_grades.index(most), "accuracy": most / values["n"]}
    return found


def summary(
    run_dir: Path,
    *,
    wandb_commands: tuple[str | None, str | None] = (None, None),
    tensorboard: bool = True,
    console: Console | None = None,
    folder: Path | None = None,
) -> None:
    """Print the main figures of the report in RUN/report/, or in another folder, and what to type next."""
    run_dir = Path(run_dir)
    report = folder or run_dir / "report"
    found = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    title = json.loads((report / ABOUT).read_text(encoding="utf-8"))["run"]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in found:
        table.add_column(_column(name), justify="right", overflow="fold", min_width=len("100.0 %"))
    for label, cells in tables.rows(found, short=True):
        table.add_row(label, *cells)
    commands = [("report", shlex.quote(str(report / "report.md")))]
    if tensorboard:
        commands.append(("curves", f"tensorboard --logdir {shlex.quote(str(run_dir.parent))}"))
    # To see an offline W&B run in the terminal, and to upload it.
    commands += [(word, command) for word, command in zip(("view", "upload"), wandb_commands, strict=True) if command]
    next_lines = [Text.assemble((f"{word:8}", "dim"), command) for word, command in commands]
    constant = [Text(said, style="yellow") for said in tables.constant(found)]
    under = [*_weights(found), *constant, Text(), Text(tables.DISCLAIMER, style="dim"), *next_lines]
    console = console or Console(markup=False, emoji=False)
    # Unbroken, so that no figure is cut off, and commands can be copied whole.
    console.print(Text(title), Text(), table, Text(), *under, sep="\n", soft_wrap=True)


def _weights(found: Mapping[str, Mapping[str, Any]]) -> list[Text]:
    """A line for each set of weights: which splits it was scored on."""
    groups: dict[str, list[str]] = {}
    for name, values in found.items():
        groups.setdefault(values["weights"], []).append(_column(name))
    return [Text.assemble((f"{', '.join(splits)}: ", "dim"), weights) for weights, splits in groups.items()]


def _column(name: str) -> str:
    return "valid (last)" if name == LAST else name
