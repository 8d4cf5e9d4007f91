"""Starts trackers alone, without login and network, and reads their records back by other programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastddr.config import TrackingConfig
from fastddr.tracking import Answers, Mistake, Tracker


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, no network, no home: W&B has only what a test gives it."""
    forget_wandb(monkeypatch, tmp_path)


def forget_wandb(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """As on a machine where W&B was never used, also in this process, which keeps the first settings that it reads."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    for name in [name for name in os.environ if name.startswith("WANDB") and "SERVICE" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home / "cache"))


def start(run: Path, said: list[str] | None = None, **options: Any) -> Tracker:
    run.mkdir(parents=True, exist_ok=True)
    resume_step = options.pop("resume_step", None)
    asked = {"project": "fastddr-tests", "wandb": False, "tensorboard": False, "log_code": False, **options}
    say = said.append if said is not None else lambda line: None
    return Tracker.start(
        run, {"model": {"name": "cnn"}, "seed": 1}, say=say, options=TrackingConfig(**asked),
        resume_step=resume_step,
    )  # fmt: skip


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def history(path: Path) -> list[dict[str, Any]]:
    """The rows in an offline part of a run, of W&B's own step too."""
    program = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    found = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    records = [json.loads(line) for line in found.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def offline_files(run: Path) -> list[Path]:
    """The offline parts of a run, oldest first, whole: W&B's service may write on after `finish`, until it is ended."""
    import wandb

    wandb.teardown()
    return sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def inspect(path: Path) -> dict[str, Any]:
    program = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(path)]
    found = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(found.stdout)


def the_answers(tmp_path: Path) -> Answers:
    """40 photographs of 5 grades, none of grade 3; two mistakes, one of which cannot be opened."""
    photograph = tmp_path / "photos" / "a.jpg"
    photograph.parent.mkdir(parents=True)
    Image.new("RGB", (900, 600), (200, 80, 20)).save(photograph)
    rng = np.random.default_rng(0)
    grades = np.array([0, 1, 2, 4] * 10)
    probabilities = rng.dirichlet(np.ones(5), 40)
    worst = [
        Mistake("a.jpg", photograph, 0, 4, 0.9), Mistake("b|<b>.jpg", tmp_path / "photos" / "b.jpg", 2, 1, 0.5)
    ]  # fmt: skip
    return Answers("test", grades, probabilities, ["No DR", "Mild", "Moderate", "Severe", "Proliferative"], worst)
