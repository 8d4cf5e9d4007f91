"""Two ranks that are asked to stop agree on the step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests_support import ROOT, SMALL

from fastddr import checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "signal"])
def test_two_ranks_stop_at_the_same_step(how: str, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(ROOT / "fastddr" / "train.py"), "--data", str(tiny), "--run-dir", str(run), *SMALL,
               "--micro-batch-size", "2", "--epochs", "100000"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, env=environment)
    try:
        ends = time.monotonic() + 200
        while not (run / "checkpoints" / "last").exists():
            assert time.monotonic() < ends, (tmp_path / "said").read_text()[-3000:]
            assert process.poll() is None, (tmp_path / "said").read_text()[-3000:]
            time.sleep(0.1)
        if how == "file":
            (run / "STOP").touch()
        else:
            # To the launcher alone, as a scheduler does; it tells the ranks, one after the other.
            process.send_signal(signal.SIGTERM)
        process.wait(100)
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "said").read_text()
    found = json.loads((run / "status.json").read_text())
    assert found["state"] == "preempted", text[-3000:]
    assert found["reason"] == ("the file STOP" if how == "file" else "SIGTERM")
    saved = checkpoints.load(run / "checkpoints" / "last")
    assert saved.state["progress"]["step"] == found["step"] > 0
    assert f"stopped at step {found['step']}" in text
