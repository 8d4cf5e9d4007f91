"""What needs a card of the benchmarks of the training step: events, half precision, CUDA graphs, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests_support import BENCHMARKS, environment

pytestmark = pytest.mark.gpu


def rows_of(script: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows that a rehearsal of a script writes."""
    command = [sys.executable, "-B", str(BENCHMARKS / script), "--tiny", "--rounds", "5", "--out", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=900, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def test_ceilings_of_the_card(tmp_path: Path) -> None:
    found = {row["name"]: row for row in rows_of("ceilings.py", tmp_path / "r.json", "--no-decode")}
    assert set(found) == {"copy", "matmul, fp32", "matmul, tf32", "matmul, bf16", "matmul, fp16"}
    assert all(row["median"] > 0 for row in found.values())


def test_operations_of_the_card(tmp_path: Path) -> None:
    rows = rows_of("operations.py", tmp_path / "r.json")
    operations = [row for row in rows if row["kind"] == "operation"]
    assert [row for row in rows if row["kind"] == "failed"] == []
    assert {row["dtype"] for row in operations} == {"bf16", "fp16"}
    # Twelve depthwise operations, three pointwise ones, BatchNorm and GELU; in two layouts and two kinds of numbers.
    assert len(operations) == (12 + 3 + 2 + 2) * 4
    assert all(row["median"] > 0 and row["roofline_share"] > 0 for row in operations)
    assert len([row for row in rows if row["kind"] == "ratio"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_steps_in_all_modes(tmp_path: Path, precision: str) -> None:
    rows = rows_of(
        "step.py", tmp_path / "r.json", "--precisions", precision, "--models", "convmixer-16-1-k3-p8", "resnet",
        "--modes", "eager", "deterministic", "compile", "max-autotune", "--layouts", "NCHW", "NHWC",
    )  # fmt: skip
    assert [row for row in rows if row["kind"] == "failed"] == []
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 2 * (2 + 2 + 4 + 4)
    for row in steps:
        assert row["median"] > 0
        assert row["peak_gib"] >= 0
        assert "share_of_matmul" in row
    assert {row["numbers"] for row in rows if "numbers" in row} == {"tf32" if precision == "fp32" else precision}
