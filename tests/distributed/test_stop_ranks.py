"""Two ranks that are asked to stop agree on the step, and any number of ranks goes on from there."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from tests_support import SMALL, first_checkpoint, forked, job, lines, train, weights

from fastddr import checkpoints


@pytest.mark.slow
def test_two_ranks_that_hear_a_signal_stop_at_the_same_step(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(tiny, tmp_path) as process:
        first_checkpoint(process, tmp_path)
        # To the launcher alone, as a scheduler does; it tells the ranks, one after the other.
        process.send_signal(signal.SIGTERM)
        process.wait(100)
    text = (tmp_path / "said").read_text()
    found = json.loads((run / "status.json").read_text())
    assert found["state"] == "preempted", text[-3000:]
    assert found["reason"] == "SIGTERM"
    saved = checkpoints.load(run / "checkpoints" / "last")
    assert saved.state["progress"]["step"] == found["step"] > 0
    assert f"stopped at step {found['step']}" in text


#: One rank alone has a reason: at the first start rank 0 finds the file, and later the hours of rank 1 are over.
ASKED = """
import sys
from fastddr import ranks, train
from fastddr.trainer import Trainer

fit = Trainer.fit

def asked(self):
    if self.progress.step == 1 and ranks.rank() == 0:
        self.run.stop.touch()
    if self.progress.step > 1 and ranks.rank() == 1:
        self.stopping._ends = 0
    fit(self)

Trainer.fit = asked
sys.exit(train.main())
"""


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_with_a_run(tiny: Path, tmp_path: Path) -> None:
    """One rank begins, two go on twice, and one ends it: on a model without BatchNorm, as one rank alone does."""
    run, script = tmp_path / "run", tmp_path / "asked.py"
    script.write_text(ASKED)
    small = ("--model", "cnn", "--batch-size", "4", "--micro-batch-size", "2")
    alone = train(tiny, tmp_path / "alone", *small)
    train(tiny, run, *small, "--max-hours", "1e-9")
    told = ("--data", str(tiny), "--run-dir", "run", *SMALL, *small, "--max-hours", "9")
    done = forked("2,2", script, *told, cwd=tmp_path)
    assert re.findall(r"(resumed|stopped) at step (\d+)(?: \((.*?)\))?", done.stdout) == [
        ("resumed", "1", ""), ("stopped", "3", "the file STOP"),
        ("resumed", "3", ""), ("stopped", "5", "max_hours 9"),
    ], done.stderr[-3000:]  # fmt: skip
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    train(tiny, run, *small)
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    logged, wanted = lines(run), lines(alone)
    assert [line["step"] for line in logged] == [line["step"] for line in wanted], "none is doubled or missing"
    for name in ("train/loss", "valid/loss", "final/test_loss"):
        losses = [line[name] for line in logged if name in line]
        assert losses == pytest.approx([line[name] for line in wanted if name in line], rel=2e-5)
    one, other = weights(run), weights(alone)
    for name, tensor in other.items():
        # Where a gradient is rounding alone, Adam makes a whole step of it.
        least = 1e-2 * float(tensor.abs().max()) if "exp_avg" in name else 1e-3
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=least)
