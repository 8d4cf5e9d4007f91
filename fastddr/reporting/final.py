"""The end of a run: its report, its pictures in the trackers, and the line that test was scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastddr import reporting
from fastddr.config import Config
from fastddr.data.manifest import SPLITS, Manifest
from fastddr.evaluation.metrics import SplitResult, figures
from fastddr.reporting.facts import facts
from fastddr.runs import RunFolder
from fastddr.runtime import Runtime
from fastddr.tracking import Tracker


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
    step: int,
    epoch: int,
) -> None:
    """Write report/ and log the final figures; on rank 0.

    Args:
        results: by split, under the best weights, and `valid_last` under the last.
        parameters: of the model.
        weights: which the best ones are, in words.
        step, epoch: where training ended.
    """
    ordered = {name: results[name] for name in (*SPLITS, "valid_last") if name in results}
    logged = reporting.read_metrics(run.path)
    about = facts(config, manifest, runtime, parameters, logged)
    text = reporting.write(run.path, ordered, about, manifest.notes, root=manifest.root, left_out=manifest.left_out)
    for picture in sorted(text.parent.glob("*.png")):
        # Thumbnails of patients' eyes stay in the run folder; trackers may be public.
        if picture.stem != "worst":
            tracker.log_image(f"report/{picture.stem}", picture, step)
    final: dict[str, Any] = {}
    for name in SPLITS:
        if name not in ordered:
            continue
        values = figures(ordered[name].logits, ordered[name].grades)
        shown = {key: values[key] for key in ("loss", "accuracy", "qwk")}
        final |= {f"final/{name}_{key}": value for key, value in shown.items()}
        if name == "test":
            run.append_test_scoring({"by": "train", "weights": weights, "n": values["n"], **shown})
    tracker.log(final, step=step, epoch=epoch)
