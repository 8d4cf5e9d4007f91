"""Whole commands on cards that `tests/card` pretends: PyTorch's own CUDA code runs, and what of ours is for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from card import run as pretending
from tests_support import ROOT, SMALL, environment, lines, status, train, weights

FASTDDR = (sys.executable, "-m", "fastddr")


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that see a card."""
    if (why := pretending.missing()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("card")
    pretending.build(folder)
    seen = environment() | {"CUDA_VISIBLE_DEVICES": "0,1"}
    return pretending.environment(folder, seen)


def said(*command: Any, env: dict[str, str]) -> str:
    """What a command that ends well prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_on_a_card_ends_as_on_the_cpu(cards: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    flags = ["--precision", "fp32", "--augment.policy", "fundus", "--memory.layout", "NHWC"]
    own = weights(train(tiny, tmp_path / "cpu", *flags))
    run = tmp_path / "card"
    printed = said(*FASTDDR, "train", "--data", tiny, "--run-dir", run, *SMALL, *flags, env=cards)
    assert "device cuda" in printed
    assert "loader resident in vram" in printed
    assert max(line.get("memory/peak_allocated_gib", 0) for line in lines(run)) > 0
    for name, value in weights(run).items():
        assert torch.allclose(value.float(), own[name].float(), rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_a_bare_launch_trains_on_all_cards(cards: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", ROOT / "fastddr" / "train.py"]
    flags = ["--data", tiny, "--run-dir", tmp_path / "run", *SMALL, "--epochs", "1"]
    printed = said(*launch, *flags, env=cards | {"CARD_COUNT": "2"})
    assert "× 2 rank(s)" in printed
    assert status(tmp_path / "run")["state"] == "done"


@pytest.mark.slow
def test_the_predicted_peak_is_what_pytorchs_allocator_gives(cards: dict[str, str], tmp_path: Path) -> None:
    """Of a network whose weights fill segments up to rests that are not cut off."""
    out = tmp_path / "memory.json"
    script = [sys.executable, ROOT / "benchmarks" / "memory.py", "--models", "resnet,depth=40", "--batch-sizes", "4"]
    said(*script, "--image-sizes", "64", "--precisions", "bf16", "--recomputed", "False", "--out", out, env=cards)
    (row,) = (row for row in json.loads(out.read_text())["rows"] if row["kind"] == "memory")
    assert abs(row["error"]) < 0.003, row
    assert row["predicted_reserved_gib"] == pytest.approx(row["reserved_gib"], rel=0.03)


def test_plan_is_of_the_card_that_is_here(cards: dict[str, str]) -> None:
    card = {"CARD_NAME": "NVIDIA GeForce RTX 4090", "CARD_GIB": "23.5"}
    printed = said(*FASTDDR, "plan", "--preset", "quickstart", "--image-size", "64", env=cards | card)
    assert "that may be used of 23.5 GiB" in printed
