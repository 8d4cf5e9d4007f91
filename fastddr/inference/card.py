"""The model card of an exported model: on what it was trained, how well it grades, what it is for, and what not."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddr import files
from fastddr.config import Config
from fastddr.data import manifest
from fastddr.data.crop import Recipe
from fastddr.data.grades import ICDR, REFERABLE
from fastddr.data.problems import in_markdown
from fastddr.errors import UserError
from fastddr.inference.formats import Deployed
from fastddr.inference.restore import Restored
from fastddr.reporting import tables
from fastddr.runs import data_name


@dataclass(frozen=True)
class Known:
    """What a run's own files say of it: read before the export, which is long."""

    data: list[str]
    """Paragraphs on what it was trained on."""
    figures: Mapping[str, Any]
    """Of metrics.json, by split: those of the exported weights."""
    rows: list[list[str]]
    """The figures as a table."""


def read(restored: Restored) -> Known:
    """What the card takes from the run's folder.

    Raises:
        UserError: its manifest.csv or metrics.json is broken.
    """
    file = restored.run.path / "report" / "metrics.json"
    try:
        found = _metrics(file, restored)
        rows = [[label, *cells] for label, cells in tables.rows(found)] if found else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise UserError(
            f"{file}: these are no figures of a report; `fastddr report` makes them again, and without them the card "
            "says that there are none."
        ) from None
    return Known(_data(restored), found, rows)


def markdown(
    restored: Restored, known: Known, deployed: Deployed, recipe: Recipe | str | None, about: Mapping[str, Any]
) -> str:
    """The text of the card.

    `recipe`: how the run's photographs were prepared, in words where it is not known. `about`: what was exported and
    how it was checked; its keys are those of export.json.
    """
    config, run = restored.config, restored.run
    parts = [f"# {in_markdown(run.path.resolve().name)}: {config.model}", f"**{tables.DISCLAIMER}**"]
    parts += [
        f"A grader of diabetic retinopathy from fundus photographs, trained by fastddr. Weights: {restored.weights}, "
        f"{restored.parameters:,} parameters. It gives the probability of each of {config.num_classes} classes: "
        + ", ".join(f"{grade} {name}" for grade, name in enumerate(tables.names(config.num_classes)))
        + f". Referable means grade {REFERABLE} ({ICDR[REFERABLE]}) or worse."
    ]
    parts += ["## Input and output", _input(deployed, recipe, about)]
    parts += ["## Data", *known.data]
    found = known.figures
    if found:
        lines = [["", *map(tables.title, found)], *known.rows]
        parts += ["## Figures", tables.table(lines[0], lines[1:])]
        parts += [
            "In brackets: 95 % intervals over the photographs, as the run's report has them"
            + ("" if about["window"] == about["reported"] else f", which graded by the window `{about['reported']}`")
            + _averaged(found)
            + ". They hold for the split named; the splits of a data set differ in kind."
            + (f" {tables.FLATTERED}" if about["grading"] is not None else "")
        ]
    else:
        parts += ["## Figures", "The run's report (report/metrics.json) has none of these weights on valid or test."]
    parts += [
        "## Intended use",
        "Research on grading and on training methods, and comparison with other models on the same split. It is not "
        "validated for diagnosis, screening or triage, and no decision about a patient may rest on it.",
        "## Limits",
        "- It knows photographs like those that it was trained on: their cameras, fields, preparation and population. "
        "On others its figures are unknown until they are measured.\n"
        "- It sees diabetic retinopathy alone: no macular oedema as such, no glaucoma, no other disease.\n"
        "- It gives a grade to anything, also to a photograph that cannot be graded"
        + (", though ungradable is one of its classes.\n" if config.num_classes > len(ICDR) else ".\n")
        + "- Rare grades have wide intervals; look at the recall of each grade in the run's report.\n"
        "- Probabilities are those of the network; how well they are calibrated stands in the run's report.",
        "## Check",
        f"Before this file was kept it was read back and run on {about['photographs']} photographs "
        f"({about['checked_on']}): its probabilities differed from those of the run's own evaluation by at most "
        f"{about['difference']:.1e} "
        f"(allowed: {about['allowed']:.0e}).",
    ]
    return "\n\n".join(parts) + "\n"


def _input(deployed: Deployed, recipe: Recipe | str | None, about: Mapping[str, Any]) -> str:
    if isinstance(recipe, str):
        prepared = f"prepared {recipe}"
    else:
        cropped = f"cropped to the disc of the retina as `fastddr prepare` does ({recipe})"
        prepared = cropped if recipe else "not prepared (raw)"
    size, canvas = deployed.size, deployed.canvas
    windows = f"the mean over nine windows of {size} px" if len(deployed.places) > 1 else f"the middle {size} px window"
    lines = [
        f"- Photographs: {prepared}, upright (EXIF applied), scaled with antialiasing so that the short side is "
        f"{canvas} px: the canvas.",
        f"- What is graded: {windows} of the canvas.",
    ]
    if about["format"] == "safetensors":
        gives = "logits" if about["grading"] is None else "one value, which the thresholds in export.json make a grade"
        lines.append(
            f"- `{about['file']}` holds the weights alone; images are RGB, normalised with mean "
            f"{list(deployed.config.augment.mean)} and standard deviation {list(deployed.config.augment.std)} of "
            f"values in 0-1, (b, 3, h, w) in float32, and the model gives {gives}."
        )
    else:
        lines.append(
            f"- `{about['file']}` takes `canvas`, uint8 RGB (b, h, w, 3) with any b, and any h and w of at least "
            f"{size}; windows and normalisation are inside. It gives `probabilities`, float32 (b, "
            f"{deployed.config.num_classes})."
        )
    return "\n".join(lines)


def _averaged(found: Mapping[str, Any]) -> str:
    """What is to be said where the run's report has the mean over several views, as `views.told` has it."""
    said = {values["weights"].rpartition(", ")[2] for values in found.values()}
    views = [words for words in said if words.endswith(" averaged")]
    return f"; the run took each photograph's {views[0]} views, and this file sees one" if views else ""


def _data(restored: Restored) -> list[str]:
    """What it was trained on: split sizes by grade, from the run's manifest.

    Raises:
        UserError: it is broken.
    """
    try:
        if not restored.run.manifest.is_file():
            return ["The run has no manifest.csv, so its photographs are not known."]
        counts: dict[str, Counter[str]] = {}
        for photograph in manifest.rows(restored.run.manifest):
            if None in photograph.values():
                raise ValueError("a row is cut off")
            counts.setdefault(photograph["split"], Counter())[photograph["grade"]] += 1
        grades = sorted({grade for of_split in counts.values() for grade in of_split}, key=int)
    except (OSError, csv.Error, KeyError, ValueError):
        raise UserError(
            f"{restored.run.manifest}: this is no list of a run's photographs, or it is cut off; restore it, or move "
            "it away, and the card says that they are not known."
        ) from None
    names = {str(k): f"{k} {name}" for k, name in enumerate(tables.names(6))} | {"-1": "unknown"}
    head = ["split", *(names.get(grade, grade) for grade in grades)]
    body = [[split, *(f"{of_split[grade]:,}" for grade in grades)] for split, of_split in counts.items()]
    said = _used(restored.config)
    data = in_markdown(data_name(Path(restored.config.data)))
    return [f"Data: {data}, fingerprint {restored.fingerprint}. {said}", tables.table(head, body)]


def _used(config: Config) -> str:
    return "Grade 5 is a class." if config.num_classes > len(ICDR) else "Photographs of grade 5 were left out."


def _metrics(file: Path, restored: Restored) -> dict[str, Any]:
    """Figures of the exported weights by split, from the run's report; none where it has none."""
    try:
        found = files.parse(file.read_bytes())
    except FileNotFoundError:
        return {}
    splits = [name for name in ("valid", "valid_last", "test") if name in found]
    # Behind their name may stand why the last ones are the best, and of how many views the figures are.
    return {name: found[name] for name in splits if found[name]["weights"].startswith(restored.weights)}
