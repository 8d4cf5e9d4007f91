"""What a model said of each photograph, as CSV: written with a report, read for another one or for a comparison."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddr import files
from fastddr.errors import UserError
from fastddr.evaluation.metrics import SplitResult

FILE = "predictions.csv"
#: Valid under the last weights, which a report has beside valid under the best.
LAST_FILE, LAST = "predictions_last.csv", "valid_last"


def dump(splits: Mapping[str, SplitResult]) -> bytes:
    """`path,split,grade,predicted,p0,...`: a row a photograph in the order of ids, p in full precision.

    Where a patient is known, `patient` stands last.
    """
    classes = next((split.logits.shape[1] for split in splits.values()), 0)
    known = any(split.patients is not None for split in splits.values())
    rows: list[list[Any]] = [[*_head(classes), *(["patient"] if known else [])]]
    for name, split in splits.items():
        probabilities = split.logits.detach().cpu().double().softmax(1).tolist()
        predicted, grades = split.logits.argmax(1).tolist(), split.grades.tolist()
        for row in split.ids.argsort().tolist():
            values = [repr(value) for value in probabilities[row]]
            if known:
                values.append("" if split.patients is None else split.patients[row])
            rows.append([split.paths[row], name, grades[row], predicted[row], *values])
    # A file's name may hold bytes that are no text.
    return files.table(rows).encode("utf-8", "surrogateescape")


def load(file: Path, weights: Mapping[str, str]) -> dict[str, SplitResult]:
    """The splits of a CSV that `dump` wrote; their logits are the logarithms of the probabilities.

    `weights` says which weights spoke, by split.

    Raises:
        UserError: the file is not there, or not such a CSV; with its line.
    """
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            head, *rows = list(csv.reader(stream)) or [[]]
    except (OSError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error}); name a run that has ended, or an evaluation.") from None
    known = head[-1:] == ["patient"]
    classes = len(head) - 4 - known
    if head[: len(head) - known] != _head(classes) or classes < 2:
        raise UserError(f"{file}: this is not a list of predictions (path,split,grade,predicted,p0,...).")
    if not rows:
        raise UserError(f"{file}: it holds no row; score the run anew.")
    found: dict[str, list[tuple[str, int, list[float], str]]] = {}
    for number, row in enumerate(rows, 2):
        try:
            path, split, grade, _, *rest = row
            patient = rest.pop() if known and rest else ""
            probabilities = [float(value) for value in rest]
            known_grade = 0 <= int(grade) < classes
            if len(probabilities) != classes or not known_grade or not all(0 <= p < np.inf for p in probabilities):
                raise ValueError
            found.setdefault(split, []).append((path, int(grade), probabilities, patient))
        except ValueError:
            raise UserError(f"{file}, line {number}: this is not a row of predictions; score the run anew.") from None
    splits = {}
    for split, entries in found.items():
        paths, grades, values, patients = zip(*entries, strict=True)
        # The logarithm of a probability that is too small for double precision is that of the smallest one.
        logits = np.log(np.maximum(np.array(values), np.finfo(np.float64).tiny))
        splits[split] = SplitResult(
            torch.from_numpy(logits),
            torch.tensor(grades),
            torch.arange(len(paths)),
            paths,
            weights.get(split, "unknown"),
            patients if known else None,
        )
    return splits


def _head(classes: int) -> list[str]:
    return ["path", "split", "grade", "predicted", *(f"p{grade}" for grade in range(classes))]
