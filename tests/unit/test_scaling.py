"""Scaling: figures that two ranks find, and those on paper."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests_support import BENCHMARKS

from fastddr.errors import UserError


@pytest.mark.slow
def test_two_ranks_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "scaling_2-core-cpu_2026-01-01.json"
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--ranks", "1", "2", "--model", "convmixer-16-1-k3-p8"]
    command += ["--image-size", "32", "--batch-size", "4", "--steps", "1", "--rounds", "5", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 8
    for kind in ("strong", "weak"):
        one, two = (rows[f"{kind} scaling, {ranks}"] for ranks in ("1 rank", "2 ranks"))
        assert (one["batch_size"], two["batch_size"]) == (4, 4 if kind == "strong" else 8)
        assert all(row["n"] == 5 and row["low"] > 0 and row["unit"] == "images/s" for row in (one, two))
        assert rows[f"{kind} scaling, 2 ranks: efficiency"]["unit"] == "of linear"
        assert 0 <= rows[f"{kind} scaling, 2 ranks: communication"]["median"] < 1


@pytest.fixture
def job(load: Callable[[str], Any]) -> Any:
    return load("ranked").Job(
        ranks=(1, 2), model="convmixer-64-4-k5-p8", batch_size=8, image_size=64, precision="fp32", rounds=5, steps=1,
        threads=1,
    )  # fmt: skip


def test_efficiency_and_communication_are_taken_round_by_round(load: Callable[[str], Any], job: Any) -> None:
    # A round in which the machine is half as fast changes no ratio.
    slow = [1.0, 1.0, 2.0, 1.0, 1.0]
    seconds = {
        "strong-1": [8 * s for s in slow], "strong-2": [5 * s for s in slow], "strong-2-alone": [4 * s for s in slow],
        "weak-1": [8 * s for s in slow], "weak-2": [10 * s for s in slow], "weak-2-alone": [11 * s for s in slow],
    }  # fmt: skip
    rows = {row["name"]: row for row in load("scaling").rows(job, {"seconds": seconds, "bytes": 2_000_000})}

    def figures(name: str) -> tuple[float, float, float]:
        return tuple(rows[name][key] for key in ("median", "low", "high"))

    assert rows["strong scaling, 2 ranks"]["median"] == 8 / 5
    assert rows["weak scaling, 2 ranks"]["median"] == 16 / 10
    assert figures("strong scaling, 2 ranks: efficiency") == pytest.approx((0.8, 0.8, 0.8))
    assert figures("weak scaling, 2 ranks: efficiency") == pytest.approx((0.8, 0.8, 0.8))
    assert figures("strong scaling, 2 ranks: communication") == pytest.approx((0.2, 0.2, 0.2))
    assert figures("weak scaling, 2 ranks: communication") == (0, 0, 0), "noise is no communication"
    assert rows["weak scaling, 1 rank"]["model"] == "ConvMixer 64/4 k5 p8"
    assert rows["weak scaling, 1 rank"]["gradient_mb"] == 2


@pytest.mark.parametrize(("ranks", "batch", "rounds", "said"), [
    ((1, 64), 64, 5, r"--ranks 1 64: this machine has 2 core\(s\), so at most 2 ranks"),
    ((1, 2), 3, 5, "--batch-size 3 cannot be divided by each of 1, 2 ranks"),
    ((1, 2), 4, 3, "--rounds 3: an interval wants at least 5"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...], batch: int, rounds: int,
    said: str,
) -> None:  # fmt: skip
    scaling = load("scaling")
    monkeypatch.setattr(scaling, "available_cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=said):
        scaling.main(scaling.Options(ranks=ranks, batch_size=batch, rounds=rounds))


def test_powers_of_two_up_to_the_gpus(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = load("scaling")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    found = scaling.job(scaling.Options())
    assert (found.ranks, found.precision, found.model) == ((1, 2, 4, 8), "bf16", "convmixer-512-12-k9-p8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="there is one GPU here"):
        scaling.job(scaling.Options())


# --------------------------------------------------------------------------------------------------------------- paper


def test_the_parameters_on_paper_are_those_of_the_model(load: Callable[[str], Any]) -> None:
    paper, networks = load("paper"), load("networks")
    for model in paper.MODELS:
        m = model.mixer
        network = networks.build(f"convmixer-{m.dim}-{m.depth}-k{m.kernel}-p{m.patch}", 64 // m.patch * m.patch)
        assert model.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_an_all_reduce_on_paper(load: Callable[[str], Any]) -> None:
    paper = load("paper")
    model = paper.MODELS[0]
    fast, slow = paper.NETWORKS
    size = 4 * model.parameters
    assert model.all_reduce(8, slow) == model.all_reduce(8, fast) == pytest.approx(2 * 7 / 8 * size / 450e9)
    # Two machines: the ring goes through the network, 12.5 GB/s, and there is one doubling.
    assert model.all_reduce(16, slow) == pytest.approx(2 * 15 / 16 * size / 12.5e9 + 50e-6)
    assert model.all_reduce(1024, fast) == pytest.approx(2 * 1023 / 1024 * size / 400e9 + 7 * 10e-6)
    # 50 or 33 passes of two bytes; the least that a step takes is what memory needs.
    moved = 64 * 33 * 2 * (256 // 8) ** 2 * 512 * 12
    assert model.step(64) == pytest.approx(moved / 3.35e12)
