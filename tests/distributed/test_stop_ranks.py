"""Two ranks that are asked to stop agree on the step."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tests_support import first_checkpoint, job

from fastddr import checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "signal"])
def test_two_ranks_stop_at_the_same_step(how: str, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(tiny, tmp_path) as process:
        first_checkpoint(process, tmp_path)
        if how == "file":
            (run / "STOP").touch()
        else:
            # To the launcher alone, as a scheduler does; it tells the ranks, one after the other.
            process.send_signal(signal.SIGTERM)
        process.wait(100)
    text = (tmp_path / "said").read_text()
    found = json.loads((run / "status.json").read_text())
    assert found["state"] == "preempted", text[-3000:]
    assert found["reason"] == ("the file STOP" if how == "file" else "SIGTERM")
    saved = checkpoints.load(run / "checkpoints" / "last")
    assert saved.state["progress"]["step"] == found["step"] > 0
    assert f"stopped at step {found['step']}" in text
