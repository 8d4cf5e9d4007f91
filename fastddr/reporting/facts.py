"""The facts of a run, as its report shows them: label to value, in the order of the reader's questions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fastddr.config import Config
from fastddr.config.sections import POLICIES, AugmentConfig, LossConfig
from fastddr.data.manifest import Manifest
from fastddr.meters import MEMORY, RATE, WAIT, code_state, of_training, versions
from fastddr.runs import data_name
from fastddr.runtime import Runtime


def facts(
    config: Config,
    manifest: Manifest,
    runtime: Runtime,
    parameters: int,
    logged: Sequence[Mapping[str, Any]],
    *,
    began_at: str | None,
    grading: Mapping[str, Any] | None,
    ended: Mapping[str, float] = MappingProxyType({}),
    skipped: int = 0,
    overflowed: int = 0,
    resumed: bool = False,
) -> dict[str, Any]:
    """What was trained, on what, how, how fast and with how much memory.

    Args:
        logged: the run's metrics.jsonl; may be empty.
        began_at: what was taken of `--init` (`RunFolder.began_at`).
        grading: of a regression (`evaluation.grading`).
        ended: peaks of memory once all splits were scored (`meters.memory`), which no line of training has.
        skipped, overflowed: steps that were left out (`runs.Progress`).
        resumed: whether earlier starts did a part of it, on other devices or by other commands maybe.
    """

    def values(key: str) -> list[float]:
        return [line[key] for line in logged if isinstance(line.get(key), int | float)]

    of = " at the last start" if resumed else ""
    gpu = f" ({torch.cuda.get_device_name(runtime.device)})" if runtime.device.type == "cuda" else ""
    shown: dict[str, Any] = {
        f"Command{of}": command(sys.argv),
        "Model": {"name": config.model, **config.model_settings, "parameters": f"{parameters:,}"},
        "Begins at": (began_at or config.init or "random weights").removeprefix("init "),
        "Preset": config.preset,
        "Data": data_name(manifest.root),
        "Layout": manifest.layout,
        "Photographs by grade 0-5": {
            split: " / ".join(map(str, counts)) for split, counts in manifest.counts().items()
        },
        "Fingerprint of the data": manifest.fingerprint,
        "Window": f"{config.image_size} px of a {config.canvas} px canvas; evaluated: {config.evaluation.field}",
        "Training": {
            "epochs": config.epochs,
            "batch": config.batch_size,
            "optimizer": config.optimizer.name,
            "lr": config.lr,
            "schedule": config.optimizer.schedule,
            "warm-up": config.optimizer.warmup_ratio,
            "weight decay": config.optimizer.weight_decay,
            "clipped at": config.optimizer.clip_norm,
            "EMA": config.optimizer.ema_decay,
        },
        "Loss": {"name": config.loss.name, **_other(config.loss, LossConfig(config.loss.name))},
        "Augmentation": {"policy": config.augment.policy, **_other(config.augment, POLICIES[config.augment.policy])},
        "Seed": str(config.seed),  # to be copied, so without separators
        f"Device{of}": f"{runtime.device.type}{gpu}, {runtime.world} rank(s), {runtime.threads} threads each",
        "Precision": config.precision,
        "Loader": config.loader,
    }
    if grading is not None:
        shown["Thresholds between the grades, fitted on valid"] = grading["thresholds"]
        shown["Spread of the values, fitted on valid"] = grading["sigma"]
    if skipped:
        shown["Steps left out, loss or gradient not finite"] = f"{skipped} (bad_steps.jsonl names the photographs)"
    if overflowed:
        shown["Steps left out by float16's scaler"] = overflowed
    if rates := of_training(logged, RATE):
        shown["Images per second"] = f"{rates.mean:.1f} on the whole, {rates.median:.1f} in the median step"
    if waits := of_training(logged, WAIT):
        shown["Data wait, share of the time"] = f"{waits.mean:.1%} on the whole, {waits.median:.1%} in the median step"
    for key, label in MEMORY.items():
        if peaks := values(key):
            shown[label] = f"{max(peaks):.2f} GiB"
            if key in ended:
                shown[label] += f" in training, {max(*peaks, ended[key]):.2f} GiB with the scoring at its end"
    return shown | {f"Versions{of}": versions(), "Code at the last start": code_state() or "not a checkout of git"}


def command(argv: Sequence[str]) -> str:
    """The command line as it can be typed in any folder, however fastddr was started; or that it was from Python."""
    program = Path(argv[0])
    typed = {"__main__.py": ["fastddr"], "train.py": ["fastddr", "train"]}
    ours = typed.get(program.name) if program.parent.name == "fastddr" else None
    if ours is None and program.name != "fastddr":
        # A script of the user's can be typed; a notebook's kernel and a prompt cannot.
        script = getattr(sys.modules["__main__"], "__file__", None)
        return "from Python" if script is None else f"from Python, {shlex.join([program.name, *argv[1:]])}"
    return shlex.join([*(ours or [program.name]), *argv[1:]])


def _other(settings: LossConfig | AugmentConfig, usual: LossConfig | AugmentConfig) -> dict[str, Any]:
    """The settings that are not as usual."""
    common = asdict(usual)
    return {key.replace("_", " "): value for key, value in asdict(settings).items() if value != common[key]}
