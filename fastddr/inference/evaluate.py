"""`fastddr evaluate RUN`: a run's weights on any split, or on other data, with a report of its own."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from fastddr import ranks, reporting
from fastddr.config import Config
from fastddr.data import manifest, masters, source
from fastddr.data.crop import Recipe
from fastddr.data.manifest import Manifest
from fastddr.errors import UserError
from fastddr.evaluation import grading, views
from fastddr.evaluation.evaluate import score
from fastddr.evaluation.metrics import figures
from fastddr.inference import restore
from fastddr.inference.flags import Evaluate
from fastddr.loaders.run import scoring
from fastddr.reporting import again, tables
from fastddr.reporting.facts import facts
from fastddr.runs import RunFolder, data_name, numbered


def settings(asked: Evaluate) -> Config:
    """The run's configuration, with what is asked for of scoring and of data.

    Raises:
        UserError: there is no such run, a value cannot be, or the run's photographs are not where they were.
    """
    config = restore.settings(asked)
    if asked.data is None and config.data != "synthetic" and not os.path.exists(os.path.expanduser(config.data)):
        raise UserError(
            f"{RunFolder(asked.run).config}: it has the photographs in {config.data}, and there is no such folder; "
            "say with --data where they are now."
        )
    other: dict[str, Any] = {}
    if asked.data is not None:
        other = {"data": asked.data, "exclude": None}
        # What is no whole DDR has no official test split to insist on. The rest of `splitting` stays: the run's own
        # photographs, where they have moved, are known by the splits that it draws, and of a set that shares some with
        # them, fewer of those that were trained on fall into test.
        if config.splitting.test == "official":
            other["splitting"] = replace(config.splitting, test="auto")
    if asked.exclude is not None:
        other["exclude"] = asked.exclude
    return replace(
        config,
        **other,
        on_bad="exclude" if "exclude" in (asked.on_bad, config.on_bad) and asked.data is None else asked.on_bad,
        follow_links=asked.follow_links or config.follow_links,
    )


def evaluate(asked: Evaluate) -> Path | None:
    """Score, print, and write; the folder that was written, None on all ranks but the first.

    Raises:
        UserError: the run, its data or its weights cannot be used.
    """
    config = settings(asked)
    began, restored, console = restore.begin(asked, config)
    run = restored.run
    other = None if asked.data is None else restored.fingerprint
    found = source.open_data(config, console, trained_on=other)
    if asked.data is None and found.fingerprint != restored.fingerprint:
        raise UserError(
            f"{found.root}: these are not the photographs that {asked.run} was trained on (compare {run.manifest}); "
            "restore them, or name them with --data."
        )
    ranks.on_main(lambda: _writable(run))
    temperature = ranks.from_main(lambda: _temperature(run, asked, config))
    # Also where they have moved since, and were named with --data.
    own = found.fingerprint == restored.fingerprint
    split, whole = ranks.from_main(lambda: _split(asked, run, found, own))
    prepared = [] if own else _prepared(run, config, found)
    for line in (*whole, *prepared):
        console.print(f"  {line}")
    weights = restored.weights + views.told(config.evaluation.tta)
    weights += ", nine windows averaged" if config.evaluation.field == "multi" else ""
    ids = _ids(found, split)
    with closing(scoring(config, found, began, ids, lambda line: console.print(f"  {line}"))) as loader:
        result = score(
            began.accelerator, restored.averaged, loader, paths=found.path, weights=weights, patients=found.patients
        )
    restore.check_finite(result, began.precision)
    # The loader takes the window of the size that a photograph had.
    if changed := ranks.from_main(lambda: found.changed(ids)):
        raise UserError(
            f"{found.root / changed[0]}: this photograph ({len(changed)} in all) was changed or removed while it was "
            "scored, so nothing was written; restore it, or give the command again once nobody works on the set."
        )
    if not began.is_main:
        return None
    if not run.config.is_file():  # else its place would be made anew
        raise UserError(
            f"{run.path}: this run was moved or deleted while it was scored, so nothing was written; give the command "
            "again with its new place."
        )
    # How it was trained is the run's; how it was scored is what was asked for, or what `auto` became.
    by: dict[str, Any] = {"precision": began.precision, "loader": loader.name}
    trained = replace(restore.stored(run.path), evaluation=config.evaluation, **by)
    multi = ["multi"] if config.evaluation.field == "multi" else []
    tta = [] if config.evaluation.tta == "none" else [config.evaluation.tta]
    label = "-".join([split, asked.weights, *tta, *multi])
    place = numbered(run.path / "evaluations" / f"{label}-{datetime.now():%Y%m%d-%H%M%S}")
    values = figures(result.logits, result.grades)
    # Of other photographs a scoring of all is none of the run's own test.
    known = _known(run, found, ids)
    tested = split == "test" or (split == "all" and (own or _most(known, ids)))
    if tested and found.has("test"):
        run.append_test_scoring("evaluate", result.weights, split, values, found.fingerprint)
    about = facts(
        trained, found, began, restored.parameters, [], began_at=run.began_at(),
        grading=grading.unwrap(restored.model)[1],
    )  # fmt: skip
    regression = config.loss.name == "mse"
    seen = (
        _seen(split, found, regression) if own else
        [_others(trained, restored.fingerprint), *_alike(known, ids, regression)]
    )  # fmt: skip
    notes = [*found.notes, *whole, *prepared, *seen]
    reporting.write(
        place, {split: result}, about, notes, root=found.root,
        left_out=found.left_out, folder=place, temperature=temperature,
        fit=own, title=f"{run.path.resolve().name}: {label}",
    )  # fmt: skip
    reporting.summary(place, tensorboard=False, console=console, folder=place)
    return place


def _split(asked: Evaluate, run: RunFolder, found: Manifest, own: bool) -> tuple[str, list[str]]:
    """What is scored, and the sentence where nobody asked for all of it.

    That is so of other data than the run's, since none of them was trained on; but where they have a test split of
    their own, or may be the run's own in another form, it is test.
    """
    if asked.split is not None:
        return asked.split, []
    if own or (found.has("test") and not found.test_drawn):
        return "test", []
    ids = _ids(found, "all")
    known = _known(run, found, ids)
    if found.has("test") and _most(known, ids):
        return "test", []
    said = "The set has no test split of its own, so all of its photographs are scored."
    if trained := known["train"]:
        said += f" {trained:,} of them bear names and grades of photographs that the run was trained on."
    return "all", [said]


def _ids(found: Manifest, split: str) -> np.ndarray:
    """Ids of a split, or of all.

    Raises:
        UserError: there are none.
    """
    there = [name for name in manifest.SPLITS if found.has(name)]
    if not there:
        raise UserError(f"{found.root}: it has no gradable photograph in any split, so nothing can be scored.")
    if split != "all" and split not in there:
        raise UserError(
            f"--split {split}: {found.root} has no gradable photograph in it, its gradable photographs are in "
            f"{' and '.join(there)} alone; give --split all."
        )
    return found.ids(split) if split != "all" else np.sort(np.concatenate([found.ids(name) for name in there]))


def _writable(run: RunFolder) -> None:
    """Raise `UserError` where an evaluation would have no place: before the work, which would be for nothing."""
    place = run.path / "evaluations"
    place.mkdir(exist_ok=True)
    with TemporaryFile(dir=place):
        pass


def _prepared(run: RunFolder, config: Config, found: Manifest) -> list[str]:
    """The sentence about other photographs than the run's that were prepared in another way."""
    try:
        own = masters.of_run(run.manifest)
    except UserError:  # nobody knows
        return []
    here = masters.of_folder(found.root)
    if own == here:
        return []
    said = [f"prepared ({recipe})" if recipe else "not prepared" for recipe in (here, own)]
    return [
        f"These photographs are {said[0]}, and those of the run were {said[1]}: the figures are of that difference too."
        + (f" `{_preparing(own, config)}` prepares them." if own and own.version == Recipe.version and not here else "")
    ]


def _preparing(recipe: Recipe, config: Config) -> str:
    """The command that prepares these photographs as the run's were."""
    flags = {"--size": recipe.size, "--format": recipe.format, "--exclude": config.exclude, "--on-bad": config.on_bad}
    usual = {"--size": Recipe.size, "--format": Recipe.format, "--exclude": None, "--on-bad": "raise"}
    more = [f" {flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value != usual[flag]]
    links = " --follow-links" if config.follow_links else ""
    return f"fastddr prepare {shlex.quote(config.data)} FOLDER{''.join(more)}{links}"


def _seen(split: str, found: Manifest, regression: bool) -> list[str]:
    """Sentences about those of a run's own photographs that it has seen."""
    notes = []
    if split == "all":
        trained, scored = (len(_ids(found, split)) for split in ("train", "all"))
        notes.append(f"{trained:,} of these {scored:,} photographs were trained on, so the figures flatter.")
    if split in ("valid", "all") and regression:
        notes.append(tables.FLATTERED)
    return notes


def _others(trained: Config, fingerprint: str) -> str:
    """The sentence about photographs that are not the run's own; `fingerprint` is of those."""
    return (
        "By their fingerprint these are not the photographs that the run was trained on "
        f"({data_name(Path(trained.data))}, fingerprint {fingerprint}): data, layout, grades and "
        "fingerprint below are of what was scored, and what was fitted on valid was on the run's own."
    )


def _known(run: RunFolder, found: Manifest, ids: np.ndarray) -> Counter[str]:
    """How many of these photographs bear names and grades of the run's own, by its split."""
    own = manifest.splits_by_name(run.manifest)
    scored = {
        manifest.named(found.path[row], int(found.grade[row]), folders=folders)
        for row in ids.tolist()
        for folders in (False, True)
    }
    return Counter(own[key] for key in scored if key in own)


def _most(known: Counter[str], ids: np.ndarray) -> bool:
    """Whether most of the photographs may be the run's own in another form."""
    return 2 * known.total() > len(ids)


def _alike(known: Counter[str], ids: np.ndarray, regression: bool) -> list[str]:
    """The sentence where most of the photographs that were scored may be the run's own in another form."""
    seen = known["train"] + regression * known["valid"]
    if not (_most(known, ids) and seen):
        return []
    how = "was trained on or fitted its thresholds to" if regression else "was trained on"
    return [
        f"{seen:,} of these {len(ids):,} photographs bear names and grades of those that the run {how}: if they are "
        "the same in another form, the figures flatter."
    ]


def _temperature(run: RunFolder, asked: Evaluate, config: Config) -> float | None:
    """The temperature that was fitted on valid at the end of the run, where it is of this way of scoring.

    Raises:
        UserError: the run's report cannot be read.
    """
    report, trained = run.path / "report", restore.stored(run.path).evaluation
    same = asked.weights == "best" and replace(trained, batch_size=None) == config.evaluation
    if not same or not (report / reporting.ABOUT).is_file():
        return None
    try:
        found: float | None = again.read_about(report).get("temperature")
    except UserError:
        raise UserError(
            f"{report / reporting.ABOUT}: it cannot be read, and has the temperature that was fitted on valid; put it "
            "back, or remove it, and nothing is calibrated."
        ) from None
    return found


def main(asked: Evaluate) -> int:
    """Run the verb; its exit code."""
    with restore.together(asked):
        evaluate(asked)
    return 0
