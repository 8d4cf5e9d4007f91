"""The end of a run: its report, its pictures in the trackers, and the line that test was scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddr import reporting
from fastddr.config import Config
from fastddr.data.manifest import SPLITS, Manifest
from fastddr.data.problems import one_line
from fastddr.evaluation.metrics import SplitResult, figures
from fastddr.reporting import tables
from fastddr.reporting.facts import facts
from fastddr.runs import Progress, RunFolder
from fastddr.runtime import Runtime
from fastddr.tracking import Answers, Mistake, Tracker, read

#: Mistakes that the trackers list.
WORST = 50


def write_final(
    run: RunFolder,
    results: Mapping[str, SplitResult],
    config: Config,
    manifest: Manifest,
    runtime: Runtime,
    tracker: Tracker,
    *,
    parameters: int,
    weights: str,
    peaks: Mapping[str, float],
    progress: Progress,
    resumed: bool,
) -> None:
    """Note that test was scored, write report/ and log the final figures; on rank 0.

    Args:
        results: by split, under the best weights, and `valid_last` under the last.
        parameters: of the model.
        weights: which the best ones are, in words.
        peaks: of memory, of all ranks, once all were scored (`meters.memory`).
        progress: where training ended, with the grading of the best weights.
        resumed: whether this start went on with an earlier one.

    Raises:
        OSError: it cannot be written, or the run's folder is another's by now.
    """
    run.check_place()
    if "test" in results:
        # Before anything can fail: it was scored, whatever becomes of its report.
        test = results["test"]
        run.append_test_scoring("train", weights, "test", figures(test.logits, test.grades), manifest.fingerprint)
    ordered = {name: results[name] for name in (*SPLITS, "valid_last") if name in results}
    about = facts(
        config, manifest, runtime, parameters, read(run.metrics), began_at=run.began_at(), grading=progress.grading,
        ended=peaks, skipped=progress.skipped, overflowed=progress.overflowed, resumed=resumed,
    )  # fmt: skip
    notes = [*manifest.notes, *_changed(manifest), *([] if progress.grading is None else [tables.FLATTERED])]
    text = reporting.write(run.path, ordered, about, notes, root=manifest.root, left_out=manifest.left_out)
    found = json.loads((text.parent / "metrics.json").read_text(encoding="utf-8"))
    for picture in sorted(text.parent.glob("*.png")):
        # Thumbnails of patients' eyes stay in the run folder; trackers may be public.
        if picture.stem != "worst":
            tracker.log_image(f"report/{picture.stem}", picture, progress.step)
    final: dict[str, Any] = {name.replace("memory/", "final/"): peak for name, peak in peaks.items()}
    for name in SPLITS:
        if name not in ordered:
            continue
        if name != "train":
            tracker.log_answers(answers(name, ordered[name], manifest.root), progress.step)
        shown = {key: found[name][key] for key in ("loss", "accuracy", "qwk")}
        final |= {f"final/{name}_{key}": value for key, value in shown.items()}
    tracker.log(final, step=progress.step, epoch=progress.epoch)
    tracker.log_manifest(run.manifest)
    tracker.log_checkpoints(run.checkpoints)


def _changed(manifest: Manifest) -> list[str]:
    """The sentence about photographs that are not as they were any more; none where all are."""
    found = manifest.changed()
    if not found:
        return []
    return [
        f"{len(found):,} photographs were changed or removed since this start looked at them, like "
        f"{one_line(found[0])}: training and figures may be of either content, and manifest.csv has the old bytes."
    ]


def answers(name: str, split: SplitResult, root: Path) -> Answers:
    """What the trackers are told of a split."""
    from fastddr.reporting import plots

    order, predicted, confidence = plots.mistakes(split)
    grades = split.grades.numpy()
    worst = [
        Mistake(
            one_line(split.paths[row]), root / split.paths[row], int(grades[row]), int(predicted[row]),
            float(confidence[row]),
        )
        for row in order[:WORST]
    ]  # fmt: skip
    probabilities = split.logits.detach().cpu().double().softmax(1).numpy()
    return Answers(name, grades, probabilities, tables.names(probabilities.shape[1]), worst)
