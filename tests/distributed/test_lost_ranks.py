"""A rank that ends or freezes ends the job, soon and with its reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from reference import needs_dali
from tests_support import SMALL, first_checkpoint, forked, job, lines, report, task

from fastddr import checkpoints
from fastddr.data import manifest
from fastddr.evaluation.grading import Grading


def rank(number: int, cwd: Path) -> int:
    """The process of a rank of the job that runs in this folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd") != str(cwd):
                continue
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={number}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"there is no rank {number}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_lost_rank_ends_the_job(how: str, tiny: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    with job(tiny, tmp_path, "--rank-timeout-minutes", "0.1") as process:
        first_checkpoint(process, tmp_path)
        lost, began = rank(1, tmp_path), time.monotonic()
        os.kill(lost, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        while json.loads((run / "status.json").read_text())["state"] == "running":
            assert time.monotonic() - began < 30, said.read_text()[-3000:]
            time.sleep(0.1)
        if how == "frozen":
            os.kill(lost, signal.SIGKILL)  # the launcher gives it half a minute
        process.wait(30)
    text, status = said.read_text(), json.loads((run / "status.json").read_text())
    expected = "another rank ended without a word" if how == "killed" else "rank 1 did not answer in time"
    assert f"fastddr: {expected}" in text
    assert "Traceback" not in text.partition("fastddr: ")[0], "nothing stands before the reason"
    assert status["state"] == "failed"
    assert expected in status["reason"]
    assert checkpoints.load(run / "checkpoints" / "last").state["progress"]["step"] <= status["step"]


@needs_dali
@pytest.mark.slow
def test_the_reason_of_one_rank_is_told_by_the_other(tiny: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny, tmp_path / "DDR-dataset"))
    found = manifest.read(data)
    # The first photograph of the first step that falls to rank 1.
    first = task(found, seed=0, batch_size=8, accumulation=2, rank=1, world=2).requests(0)
    bad = Path(found.files()[first.id[0, 0]])
    bad.write_bytes(bad.read_bytes()[:-200])
    with job(data, tmp_path, "--check", "header", "--loader", "dali") as process:
        process.wait(200)
    text, status = (tmp_path / "said").read_text(), json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].startswith("RankLost: rank 1 ended: UserError: ")
    assert bad.name in status["reason"]
    assert f"fastddr: {bad}" in text, "rank 1 says it itself"
    assert "Traceback" not in text.partition("torch/distributed/elastic")[0]


#: Rank 0 is longer at the last checkpoint and at the report than a rank may be silent in training.
LONG_END = """
import sys, time
from fastddr import ranks, saving, train, trainer

def slow(real):
    def done(*arguments, **keywords):
        if ranks.rank() == 0:
            time.sleep(9)
        return real(*arguments, **keywords)
    return done

trainer.write_final = slow(trainer.write_final)
saving.Saver.flush = slow(saving.Saver.flush)
sys.exit(train.main())
"""


@pytest.mark.slow
def test_a_rank_that_writes_what_is_left_of_a_regression_is_not_taken_for_frozen(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(LONG_END)
    small = [*SMALL, "--micro-batch-size", "2", "--rank-timeout-minutes", "0.1"]
    regression = ["--loss.name", "mse", "--lr", "0.02"]
    done = forked(2, script, "--data", str(tiny), "--run-dir", "run", *small, *regression, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    # The thresholds were fitted on the gathered valid split, under the weights of rank 0; the report's scoring agrees.
    best = checkpoints.load(run / "checkpoints" / "best").state["progress"]
    [line] = [line for line in lines(run) if line["step"] == best["step"] and "valid/qwk" in line]
    assert report(run)["valid"]["qwk"] == pytest.approx(line["valid/qwk"])
    assert tuple(best["grading"]["thresholds"]) != Grading().thresholds


#: Rank 1 says nothing when the ranks tell each other something.
SILENT = """
import os, sys, time
from fastddr import ranks

ranks.join(cpu=True)
if sys.argv[1] == "frozen":
    ranks.expect(0.02)
if ranks.rank() == 0:
    try:
        with ranks.watched():
            ranks.gather([0])
    except ranks.RankLost as lost:
        print(lost)
    finally:
        open("told", "w").close()
elif sys.argv[1] == "frozen":
    while not os.path.exists("told"):
        time.sleep(0.1)
else:
    ranks.tell("it had enough")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"), [("frozen", "rank 1 did not answer in time"), ("ended", "rank 1 ended: it had enough")]
)
def test_a_rank_that_does_not_take_part_in_what_they_say_is_named(how: str, said: str, tmp_path: Path) -> None:
    """Also by a call, which goes another way than that in which was waited in vain."""
    script = tmp_path / "silent.py"
    script.write_text(SILENT)
    done = forked(2, script, how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(said)
