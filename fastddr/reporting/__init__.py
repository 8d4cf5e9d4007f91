"""What a run found, as files that a person reads: RUN/report/.

    report.md  metrics.json  predictions.csv  curves.png  confusion_matrix.png  reliability.png  worst.png

Each file is written beside and renamed, so a kill leaves no half of one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastddr.data import problems
from fastddr.data.problems import Problem
from fastddr.evaluation.metrics import SplitResult, figures, intervals
from fastddr.reporting import plots, tables
from fastddr.tracking import METRICS

__all__ = ["read_metrics", "summary", "write"]

#: The split scored for the last weights beside the best: in the figures, not in predictions.csv.
LAST = "valid_last"


def write(
    run_dir: Path,
    splits: Mapping[str, SplitResult],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    *,
    root: Path | None = None,
    left_out: Sequence[Problem] = (),
    folder: Path | None = None,
) -> Path:
    """Write RUN/report/, or another folder, and return the path of its report.md.

    `splits` holds any of train, valid, test and `valid_last` (valid under the last weights). `facts` is shown
    in its order, label and value, and a mapping as a value in one line; `notes` are sentences. Paths of
    photographs are taken below `root` where they are relative. The curves come from RUN/metrics.jsonl, if it
    is there. `left_out` are the photographs and labels that were not used. Raises OSError when a file cannot be
    written; a photograph that cannot be opened is a grey tile.
    """
    report = folder or Path(run_dir) / "report"
    report.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for name, split in splits.items():
        values = figures(split.logits, split.grades)
        found[name] = {"weights": split.weights, **values, "ci": intervals(values["confusion_matrix"])}
    logged = read_metrics(run_dir)
    shown = {name: values for name, values in found.items() if name in ("valid", "test")} or found
    pictures = {"curves.png": plots.curves(logged)} if plots.has_curves(logged) else {}
    pictures["confusion_matrix.png"] = plots.confusion(shown)
    pictures["reliability.png"] = plots.reliability({name: splits[name] for name in shown})
    if shown:
        name = "test" if "test" in shown else next(iter(shown))
        pictures["worst.png"] = plots.worst(name, splits[name], root)
    for name, picture in pictures.items():
        _put(report / name, picture)
    _put(report / "metrics.json", (json.dumps(found, allow_nan=False, indent=1) + "\n").encode())
    _put(report / "predictions.csv", _predictions(splits).encode())
    text = tables.markdown(Path(run_dir).resolve().name, found, facts, notes, list(pictures), left_out)
    if left_out:
        _put(report / "left_out.csv", problems.write_list(left_out).encode("utf-8", "surrogateescape"))
    _put(report / "report.md", text.encode())
    return report / "report.md"


def summary(
    run_dir: Path,
    *,
    sync_command: str | None = None,
    tensorboard: bool = True,
    console: Console | None = None,
    folder: Path | None = None,
) -> None:
    """Print the main figures of metrics.json in RUN/report/, or in another folder, and what to type next."""
    run_dir = Path(run_dir)
    report = folder or run_dir / "report"
    found = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    for name in found:
        table.add_column(_column(name), justify="right", no_wrap=True)
    for label, cells in tables.rows(found, short=True):
        table.add_row(label, *cells)
    commands = [("report", shlex.quote(str(report / "report.md")))]
    if tensorboard:
        commands.append(("curves", f"tensorboard --logdir {shlex.quote(str(run_dir.parent))}"))
    if sync_command:
        commands.append(("upload", sync_command))
    next_lines = Text("\n").join(Text.assemble((f"{word:8}", "dim"), command) for word, command in commands)
    body = Group(table, Text(), *_weights(found), Text(), Text(tables.DISCLAIMER, style="dim"))
    panel = Panel(body, title=run_dir.resolve().name, title_align="left", expand=False, padding=(1, 2))
    console = console or Console()
    console.print(panel)
    # Outside the frame and unbroken, so that they can be copied whole.
    console.print(next_lines, soft_wrap=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of RUN/metrics.jsonl; none where there is no such file."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _weights(found: Mapping[str, Mapping[str, Any]]) -> list[Text]:
    """A line for each set of weights: which splits it was scored on."""
    groups: dict[str, list[str]] = {}
    for name, values in found.items():
        groups.setdefault(values["weights"], []).append(_column(name))
    return [Text.assemble((f"{', '.join(splits)}: ", "dim"), weights) for weights, splits in groups.items()]


def _column(name: str) -> str:
    return "valid (last)" if name == LAST else name


def _predictions(splits: Mapping[str, SplitResult]) -> str:
    """`path,split,grade,predicted,p0,...`: a row a photograph in the order of ids, p in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = next((split.logits.shape[1] for split in splits.values()), 0)
    writer.writerow(["path", "split", "grade", "predicted", *(f"p{grade}" for grade in range(classes))])
    for name, split in splits.items():
        if name == LAST:
            continue
        probabilities = split.logits.detach().cpu().double().softmax(1).tolist()
        predicted, grades = split.logits.argmax(1).tolist(), split.grades.tolist()
        for row in split.ids.argsort().tolist():
            values = [repr(value) for value in probabilities[row]]
            writer.writerow([split.paths[row], name, grades[row], predicted[row], *values])
    return text.getvalue()


def _put(path: Path, content: bytes) -> None:
    """The file as a whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)
