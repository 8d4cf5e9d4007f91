"""The figures as Markdown, and the words that reports use for grades, splits and rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastddr.data.grades import ICDR, REFERABLE
from fastddr.data.problems import Problem, in_markdown
from fastddr.evaluation.bootstrap import FEWEST
from fastddr.evaluation.calibration import at_bound
from fastddr.evaluation.ranking import ENDPOINTS

DISCLAIMER = "Research use only; not a medical device."
#: A note where the photographs include those that a regression's thresholds were fitted to.
FLATTERED = "The thresholds between the grades were fitted on valid, so the figures of valid flatter a little."
#: What a regression minimises.
SQUARED = "squared error"
#: So many of the photographs that were left out stand in report.md; all in left_out.csv.
LISTED = 100

Figures = Mapping[str, Any]

#: Label, place in the figures, and whether it is read in per cent.
RATES = (
    ("Accuracy", ("accuracy",), True),
    ("Accuracy of one grade for all", ("baseline", "accuracy"), True),
    ("Quadratic-weighted kappa", ("qwk",), False),
    ("Macro F1", ("macro_f1",), False),
    ("Balanced accuracy", ("balanced_accuracy",), True),
    ("AUC, one grade against the rest", ("auc",), False),
    ("Average precision, one grade against the rest", ("average_precision",), False),
    ("Referable: sensitivity", ("referable", "sensitivity"), True),
    ("Referable: specificity", ("referable", "specificity"), True),
    ("Referable: AUC", ("referable", "auc"), False),
    ("Expected calibration error", ("ece",), True),
    ("Expected calibration error, at the temperature", ("calibrated", "ece"), True),
    ("Cross-entropy (nats)", ("loss",), False),
    ("Accuracy without ungradable", ("without_ungradable", "accuracy"), True),
    ("Macro F1 without ungradable", ("without_ungradable", "macro_f1"), False),
)
#: The same of each endpoint.
ENDPOINT_RATES = (
    ("sensitivity", "sensitivity", True),
    ("specificity", "specificity", True),
    ("AUC", "auc", False),
    ("average precision", "average_precision", False),
    ("sensitivity at a specificity of 90 %", "sensitivity_at_specificity_90", True),
    ("specificity at a sensitivity of 90 %", "specificity_at_sensitivity_90", True),
)
ENDPOINT_NAMES = {"any": "Any retinopathy", "referable": "Referable", "severe": "Severe"}
#: The rates that the terminal shows, and what it calls them.
SHORT = {
    "Accuracy": "accuracy",
    "Quadratic-weighted kappa": "kappa (QWK)",
    "Balanced accuracy": "balanced acc.",
    "Referable: sensitivity": "sensitivity",
    "Referable: specificity": "specificity",
}


def names(classes: int) -> list[str]:
    """What the grades are called: ICDR names for five, with ungradable for six, else their numbers."""
    if classes in (len(ICDR), len(ICDR) + 1):
        return [*ICDR, "Ungradable"][:classes]
    return [f"Grade {grade}" for grade in range(classes)]


def title(split: str) -> str:
    """A split as a heading: "valid (last weights)" for valid_last."""
    return "valid (last weights)" if split == "valid_last" else split


def measured(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of what the figures of training are, by their keys in metrics.jsonl, as far as the facts of a run tell it."""
    loss = facts.get("Loss")
    if not isinstance(loss, Mapping):
        return {}
    if loss.get("name") == "mse":
        return {
            "train/loss": SQUARED, "valid/loss": "cross-entropy",
            "train/accuracy": "rounded values", "valid/accuracy": "fitted thresholds",
        }  # fmt: skip
    if loss.get("name") != "cross_entropy":
        return {}
    changed = [word for key, word in (("class weights", "weighted"), ("label smoothing", "smoothed")) if key in loss]
    return {
        "train/loss": f"{', '.join(changed)} cross-entropy".lstrip(),
        "valid/loss": "cross-entropy",
    }


def of_patients(ci: Mapping[str, Any]) -> str:
    """` of 120 patients`, where they are known."""
    unnamed = f" and {ci['unnamed']:,} without a name" if "unnamed" in ci else ""
    return f" of {ci['patients']:,} patients{unnamed}" if "patients" in ci else ""


def rows(found: Mapping[str, Figures], *, short: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Lines of the main table: a label, and a cell a split; `short`, some of them and without intervals."""
    counted = [f"{values['n']:,}{'' if short else of_patients(values.get('ci', {}))}" for values in found.values()]
    yield "photographs" if short else "Photographs", counted
    for label, keys, per_cent in RATES:
        if short and label not in SHORT:
            continue
        cells = []
        for values in found.values():
            interval = None if short else at(values["ci"], keys)
            cells.append(cell(at(values, keys), interval, per_cent))
        if any(text != "–" for text in cells):
            yield SHORT[label] if short else label, cells
    if not short:
        yield "Weights", [values["weights"] for values in found.values()]


def cell(value: float | None, interval: Sequence[float] | None = None, per_cent: bool = True) -> str:
    """ "76.2 % (75.2–77.4)", or "0.757 (0.741–0.774)", or "–" for what is undefined."""
    if value is None:
        return "–"
    scale, digits, unit = (100, 1, " %") if per_cent else (1, 3, "")
    text = f"{value * scale:.{digits}f}{unit}"
    if interval is not None:
        low, high = (f"{bound * scale:.{digits}f}" for bound in interval)
        text += f" ({low}–{high})"
    return text


def markdown(
    name: str,
    found: Mapping[str, Figures],
    facts: Mapping[str, Any],
    notes: Sequence[str],
    pictures: Sequence[str],
    left_out: Sequence[Problem] = (),
) -> str:
    """The text of report.md."""
    titles = [title(split) for split in found]
    parts = [f"# {in_markdown(name)}", f"**{DISCLAIMER}**", "## Figures"]
    parts.append(table(["", *titles], [[label, *cells] for label, cells in rows(found)]))
    if any("baseline" in values for values in found.values()):
        parts.append(
            "One grade for all: to give every photograph the most frequent grade of its split has that accuracy, and a "
            "kappa of 0."
        )
    parts += constant(found)
    known = any("patients" in values.get("ci", {}) for values in found.values())
    alike = (
        "Where patients are known (the line of photographs says it), whole patients are drawn, and of fewer "
        f"than {FEWEST} only shares and balanced accuracy have intervals; else photographs count as independent"
        if known else
        "Photographs count as independent, so with several of one patient the truth is wider"
    )  # fmt: skip
    parts.append(
        "In brackets: 95 % intervals over the photographs, Wilson's for accuracy, recall, sensitivity and specificity, "
        "for balanced accuracy from the recalls', else by a percentile bootstrap (operating points at 90 %: the wider "
        "of both), which is too narrow of few photographs of a grade: [1, 1] is no certainty. "
        f"{alike}; "
        "the chance of another training seed is left out. The calibration error has no interval, and is larger "
        "of few photographs. Means over grades leave out grades "
        f"without a photograph. Referable: grade {REFERABLE} or worse. The splits of a data set differ in "
        "kind: compare models on one split, never one model across splits."
    )
    fitted = {v["weights"]: v["calibrated"]["temperature"] for v in found.values() if "calibrated" in v}
    temperatures = {
        weights: f"{value:.3f}{' (the bound of its search)' * at_bound(value)}" for weights, value in fitted.items()
    }
    if temperatures:
        told = "; ".join(f"{value} for {in_markdown(weights)}" for weights, value in temperatures.items())
        parts.append(
            f"Temperature, fitted on the run's valid: {told}. The calibrated probabilities are the softmax of the "
            "logits over it; no other figure here uses them."
        )
    if notes:
        parts += ["## Notes", "\n".join(f"- {in_markdown(note)}" for note in notes)]
    if left_out:
        shown = left_out[:LISTED]
        more = (
            f" {len(left_out) - LISTED:,} more are in [left_out.csv](left_out.csv)." if len(left_out) > LISTED else ""
        )
        parts += ["## Left out", f"{len(left_out):,} photographs or labels were not used.{more}"]
        parts.append(table(["File", "Kind", "Why"], [[p.path, p.kind, p.reason] for p in shown], left=3))
    if "curves.png" in pictures:
        parts += ["## Training", "![Loss, accuracy and kappa by epoch](curves.png)"]
        of = measured(facts)
        unlike = [
            f"{name.capitalize()} on train: {of[f'train/{name}']}, on valid: {of[f'valid/{name}']}."
            for name in ("loss", "accuracy")
            if of.get(f"train/{name}") != of.get(f"valid/{name}")
        ]
        if unlike:
            parts.append(" ".join([*unlike, "There train and valid do not compare."]))
    if found:
        parts += ["## Recall of each grade", _recall(found)]
    if any(values["endpoints"] for values in found.values()):
        parts += ["## Endpoints", _endpoints(found)]
        parts.append(
            "Sensitivity and specificity are of the predicted grade. The operating points at 90 % take their threshold "
            "from these very photographs; a threshold to work with is chosen on valid."
        )
    if "roc.png" in pictures:
        parts.append("![ROC and precision-recall curves](roc.png)")
    parts += ["## Confusion matrices", "Rows are the truth, columns the prediction."]
    if "confusion_matrix.png" in pictures:
        parts.append("![Confusion matrices](confusion_matrix.png)")
    for split, values in found.items():
        parts += [f"### {in_markdown(title(split))}", _matrix(values["confusion_matrix"])]
    if "reliability.png" in pictures:
        parts += ["## Calibration", "![Accuracy against confidence](reliability.png)"]
    if "worst.png" in pictures:
        parts += ["## The worst mistakes", "![The worst mistakes](worst.png)"]
    if facts:
        parts += ["## The run", table(["", ""], [[key, _fact(value)] for key, value in facts.items()])]
    parts += ["## Files", "[metrics.json](metrics.json), [predictions.csv](predictions.csv)"]
    return "\n\n".join(parts) + "\n"


def constant(found: Mapping[str, Figures]) -> list[str]:
    """A sentence where a model gives one grade to all photographs of valid, or of the split that was scored alone."""
    split = "valid" if "valid" in found else next(iter(found), None)
    if split is None:
        return []
    matrix = found[split]["confusion_matrix"]
    given = [grade for grade, column in enumerate(zip(*matrix, strict=True)) if sum(column)]
    # Of photographs of two grades that were scored alone, a sound model may give them all the same one.
    if len(given) != 1 or sum(any(row) for row in matrix) < (2 if split == "valid" else 3):
        return []
    said = f"The model gives grade {given[0]} to every photograph of {split}"
    # Of others the reason may be another, like photographs that were not prepared.
    why = (
        ": it has learned nothing yet; train it for more epochs or at another learning rate, or begin at pretrained "
        "weights (--init)" if split == "valid" else ""
    )  # fmt: skip
    return [f"{said}{why}."]


def _recall(found: Mapping[str, Figures]) -> str:
    body = []
    for grade, grade_name in enumerate(names(max(len(values["recall"]) for values in found.values()))):
        line = [f"{grade} {grade_name}"]
        for values in found.values():
            count = sum(values["confusion_matrix"][grade])
            line.append(f"{cell(values['recall'][grade], values['ci']['recall'][grade])} of {count:,}")
        body.append(line)
    return table(["Grade", *(title(split) for split in found)], body)


def _endpoints(found: Mapping[str, Figures]) -> str:
    body = []
    for name, least in ENDPOINTS.items():
        for label, key, per_cent in ENDPOINT_RATES:
            cells = []
            for values in found.values():
                place = ("endpoints", name, key)
                text = cell(at(values, place), at(values["ci"], place), per_cent)
                truth = [sum(row) for row in values["confusion_matrix"]]
                of = {"sensitivity": truth[least : len(ICDR)], "specificity": truth[:least]}.get(key)
                cells.append(text if of is None or text == "–" else f"{text} of {sum(of):,}")
            body.append([f"{ENDPOINT_NAMES[name]} (grade ≥ {least}): {label}", *cells])
    return table(["", *(title(split) for split in found)], body)


def _matrix(matrix: Sequence[Sequence[int]]) -> str:
    labels = [f"{grade} {name}" for grade, name in enumerate(names(len(matrix)))]
    body = [[label, *(f"{n:,}" for n in row)] for label, row in zip(labels, matrix, strict=True)]
    return table(["truth ↓ predicted →", *labels], body, bold=True)


def table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1, *, bold: bool = False) -> str:
    """A Markdown table: the first `left` columns to the left, the others to the right if there are several.

    With `bold` the cells below the first heading are.
    """
    rule = [":--"] * left + [":--" if len(head) == 2 else "--:"] * (len(head) - left)
    lines = [[in_markdown(text) for text in line] for line in body]
    if bold:
        lines = [[f"**{first}**", *rest] for first, *rest in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ([in_markdown(text) for text in head], rule, *lines))


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(inner)}" for key, inner in value.items())
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Sequence):
        return ", ".join(_fact(inner) for inner in value)
    return str(value)


def at(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What lies at a path of keys; None where one is missing or None."""
    found: Any = values
    for key in keys:
        found = None if found is None else found.get(key)
    return found
