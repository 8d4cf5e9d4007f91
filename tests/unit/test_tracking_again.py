"""Trackers of a run that goes on: no step is doubled or missing, whatever was killed, uploaded or moved."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tests_support import ROOT, lines
from trackers import alone as alone  # a fixture of all these tests
from trackers import events, history, inspect, offline_files, start

from fastddr.config import TrackingConfig
from fastddr.errors import UserError
from fastddr.tracking import METRICS, Tracker, read, truncate_to, wandb_run


def test_an_id_of_wandb_that_a_kill_left_empty_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "id.txt"
    file.touch()
    made = wandb_run._with_id(wandb_run._read_id(file), file)
    assert (len(made.id), made.project) == (8, "")
    again = wandb_run._with_id(wandb_run._read_id(file), file)
    assert (again, file.read_text()) == (made, f"{made.id}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["id.txt"]


def test_wandb_offline_is_one_run_over_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a login it goes offline, says so in one line, and stays in the run folder."""
    run, said, picture = tmp_path / "run", [], tmp_path / "curves.png"
    Image.new("RGB", (8, 6), "red").save(picture)
    tracker = start(run, said, wandb=True, log_code=True)
    tracker.log({"train/loss": 0.5}, step=4, epoch=1)
    tracker.finish()
    tracker = start(run, said, wandb=True, log_code=True, resume_step=4)
    tracker.log({"train/loss": 0.25, "train/nan": math.nan}, step=5, epoch=1)
    tracker.log_image("report/curves", picture, 5)
    tracker.log({"final/test_qwk": 0.5}, step=5, epoch=1)
    tracker.finish()
    assert capfd.readouterr() == ("", "")
    assert len(said) == 2
    assert tracker.wandb.commands == (f"wandb leet {run}/wandb", f"wandb sync {run}/wandb/offline-run-*")
    view, sync = tracker.wandb.commands
    assert said[0] == f"W&B: offline (not logged in); see it with: {view}; upload later with: {sync}"
    assert "WANDB_DATA_DIR" not in os.environ
    files = offline_files(run)
    assert len(files) == 2
    assert [b'"code_path"' in path.read_bytes() for path in files] == [True, True]
    first, second = (inspect(path) for path in files)
    assert first["run_id"] == second["run_id"] == (run / "wandb" / "id.txt").read_text().strip()
    assert first["summary"]["train/loss"] == 0.5
    assert (second["summary"]["train/loss"], second["summary"]["step"]) == (0.25, 5)
    assert list(run.glob("wandb/offline-run-*/files/media/images/report/curves*.png"))
    assert second["project"] == "fastddr-tests"


#: Logs steps 1 to 8 of a run, validates at the 4th and the 8th, and is killed, before or after W&B has written that.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from fastddr.config import TrackingConfig
from fastddr.tracking import Tracker

options = TrackingConfig(project="fastddr-tests", wandb=True, tensorboard=True, log_code=False)
tracker = Tracker.start(Path(sys.argv[1]), {}, options=options, resume_step=None, say=print)
for step in range(1, 9):
    tracker.log({"train/loss": step / 10, "train/images_per_second": step}, step=step, epoch=step / 4)
    if step % 4 == 0:
        tracker.log({"valid/qwk": 6.4 / step}, step=step, epoch=step / 4)
    if step == 5:
        tracker.sync()  # a checkpoint
if sys.argv[2] == "late":
    tracker._copies[0]._run.finish()  # W&B's part of it alone, as 15 s would have brought it about
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_no_step_is_doubled_or_missing_in_a_tracker_after_a_kill(tmp_path: Path, when: str) -> None:
    """The checkpoint was at step 5: what is later comes again, and what is earlier may have been lost."""
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(run), when], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -9
    tracker = start(run, wandb=True, tensorboard=True, resume_step=5)
    for step in range(6, 11):
        tracker.log({"train/loss": step / 10, "train/images_per_second": step}, step=step, epoch=step / 4)
        if step == 8:
            tracker.log({"valid/qwk": 0.8}, step=step, epoch=2)
    tracker.finish()
    files = offline_files(run)
    assert len(files) == (2 if when == "late" else 1)
    assert len(list(run.glob("wandb/replaced-offline-run-*"))) == 2 - len(files), "it has no row"
    parts = [history(path) for path in files]
    rows = [row for part in parts for row in part]
    own = [row["_step"] for row in rows]
    assert own == sorted(set(own)), "W&B would drop what steps back"
    steps, validated = list(range(1, 11)), [(4, 1.6), (8, 0.8)]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(s, s / 10) for s in steps]
    assert [(row["step"], row["valid/qwk"]) for row in rows if "valid/qwk" in row] == validated
    assert [row["epoch"] for row in rows if "train/loss" in row] == [s / 4 for s in steps]
    summary = inspect(files[-1])["summary"]
    assert summary["valid/qwk"] == {"max": 1.6}
    whole = 10 / sum(1 / rate for rate in steps)
    assert summary["train/images_per_second"] == {"mean": pytest.approx(whole)}, "photographs by seconds"
    read = events(run)
    assert [event.step for event in read.Scalars("train/loss")] == steps
    assert [event.step for event in read.Scalars("valid/qwk")] == [4, 8]
    # A copy that comes later gets all of it, with the times at which it was logged.
    (run / "wandb").rename(tmp_path / "wandb")
    (run / "tensorboard").rename(tmp_path / "tensorboard")
    start(run, wandb=True, tensorboard=True, resume_step=10).finish()
    times = [line["time"] for line in lines(run)]
    again = [row for path in offline_files(run) for row in history(path)]
    assert [row["_timestamp"] for row in again] == times
    assert [event.wall_time for event in events(run).Scalars("train/loss")] == [
        line["time"] for line in lines(run) if "train/loss" in line
    ]


def test_no_validation_is_doubled_that_comes_again(tmp_path: Path) -> None:
    """The checkpoint was taken when the epoch had ended, before its validation was saved."""
    run = tmp_path / "run"
    for attempt in range(2):
        run.mkdir(exist_ok=True)
        options = TrackingConfig(project="fastddr-tests", wandb=True, tensorboard=True, log_code=False)
        resume = {"resume_step": None} if not attempt else {"resume_step": 2, "validated": False}
        tracker = Tracker.start(run, {}, options=options, say=lambda line: None, **resume)
        if not attempt:
            tracker.log({"train/loss": 1.0}, step=2, epoch=1)
        tracker.log({"valid/qwk": 0.5}, step=2, epoch=1)
        tracker.log({"final/test_qwk": 0.5}, step=2, epoch=1)
        tracker.finish()
    rows = [row for path in offline_files(run) for row in history(path)]
    assert [sum(name in row for row in rows) for name in ("train/loss", "valid/qwk", "final/test_qwk")] == [1, 1, 1]
    read = events(run)
    assert [len(read.Scalars(name)) for name in ("train/loss", "valid/qwk", "final/test_qwk")] == [1, 1, 1]


@pytest.mark.parametrize("failed", [False, True])
def test_a_report_that_fails_half_way_leaves_none_of_its_pictures(tmp_path: Path, failed: bool) -> None:
    run, picture = tmp_path / "run", tmp_path / "curves.png"
    Image.new("RGB", (8, 6), "red").save(picture)
    for attempt in range(2):
        tracker = start(run, wandb=True, resume_step=None if not attempt else 5)
        if not attempt:
            tracker.log({"train/loss": 0.5}, step=5, epoch=1)
        tracker.log_image("report/curves", picture, 5)
        if attempt:
            tracker.log({"final/test_qwk": 0.5}, step=5, epoch=1)
        tracker.finish(failed=failed and not attempt)
    first, second = ([set(row) for row in history(path)] for path in offline_files(run))
    assert not any("report/curves._type" in names for names in first)
    (row,) = second
    assert {"report/curves._type", "final/test_qwk"} <= row


def test_parts_that_were_uploaded_and_deleted_are_not_sent_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracker = start(run, wandb=True)
    tracker.log({"train/loss": 0.5}, step=1, epoch=1)
    tracker.finish()
    (file,) = offline_files(run)
    shutil.rmtree(file.parent)
    tracker = start(run, wandb=True, resume_step=1)
    tracker.log({"train/loss": 0.25}, step=2, epoch=2)
    tracker.finish()
    assert [row["step"] for path in offline_files(run) for row in history(path)] == [2]


def test_another_project_has_none_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"type": "run", "run": {"project": "a"}}, {"type": "history", "history": {"step": {"num": 6}}}]
    read = SimpleNamespace(returncode=0, stdout="\n".join(map(json.dumps, records)))
    monkeypatch.setattr(wandb_run.subprocess, "run", lambda *_, **__: read)
    part = tmp_path / "wandb" / "offline-run-1" / "run-x.wandb"
    part.parent.mkdir(parents=True)
    assert [wandb_run._next_of([part], project) for project in ("a", "b")] == [7, 0]
    for kept, known in (("x 7 a", [7, 0]), ("x 7", [0, 0]), ("y 7 a", [0, 0])):
        (tmp_path / "wandb" / "next.txt").write_text(f"{kept}\n")
        for project, steps in zip("ab", known, strict=True):
            copy = wandb_run.WandbRun(tmp_path, {}, TrackingConfig(project=project))
            copy._run = SimpleNamespace(id="x")
            assert copy._known() == steps


def test_a_part_that_cannot_be_read_is_said_and_ends_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    run, said = tmp_path / "run", list[str]()
    tracker = start(run, wandb=True)
    tracker.log({"train/loss": 0.5}, step=1, epoch=1)
    tracker.finish()
    (file,) = offline_files(run)
    file.write_bytes(b"rubbish" + file.read_bytes())
    finish, ended = wandb.Run.finish, list[int]()

    def ends(begun: Any, exit_code: int) -> None:
        ended.append(exit_code)
        finish(begun, exit_code=exit_code)

    monkeypatch.setattr(wandb.Run, "finish", ends)
    tracker = start(run, said, wandb=True, resume_step=1)
    tracker.log({"train/loss": 0.25}, step=2, epoch=2)
    tracker.finish()
    (line,) = said
    assert line.startswith("W&B is off from here on, metrics.jsonl goes on: ")
    assert f"{file.name} cannot be read (" in line
    assert line.endswith("wandb away to begin anew at W&B.")
    assert ended == [1], "the run that was begun"
    assert "WANDB_DATA_DIR" not in os.environ
    assert [line["step"] for line in lines(run)] == [1, 2]


def test_a_line_nested_too_deeply_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000 + '\n{"step": 1}\n')
    for look in (read, lambda path: truncate_to(path, 1)):
        with pytest.raises(UserError, match="line 1: not a line of figures"):
            look(file)


def test_a_line_that_has_no_more_than_a_step_or_nothing_is_no_obstacle(tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n\n{"step": 1, "my/own": 1}\n{"step": 2, "train/loss": 0.5}\n')
    tracker = start(run, said, wandb=True, tensorboard=True, resume_step=2)
    tracker.finish()
    assert len(said) == 1
    assert said[0].startswith("W&B: offline")
    assert [row["step"] for path in offline_files(run) for row in history(path)] == [2]
    assert [event.step for event in events(run).Scalars("train/loss")] == [2]


def test_a_replay_that_fails_ends_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = tmp_path / "run", list[str]()
    tracker = start(run, tensorboard=True)
    tracker.log({"train/loss": 0.5}, step=1, epoch=1)
    tracker.finish()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no room")

    monkeypatch.setattr("fastddr.tracking.boards.TensorBoard.log", fail)
    tracker = start(run, said, tensorboard=True, resume_step=1)
    tracker.log({"train/loss": 0.25}, step=2, epoch=2)
    tracker.finish()
    assert said == ["TensorBoard is off from here on, metrics.jsonl goes on: no room"]


def test_online_the_server_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that were never uploaded get another name; the run has all their rows again. Where the end fails, how far
    this life came is not known."""
    run = tmp_path / "run"
    tracker = start(run, wandb=True)
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step=step, epoch=step)
    tracker.finish()
    (file,) = offline_files(run)
    sent: list[tuple[int, int]] = []

    def lost(exit_code: int) -> None:
        raise ConnectionResetError("no service")

    server = SimpleNamespace(
        offline=False, url="https://wandb.example/run", id="id", entity="lab", project="sweeps", starting_step=6,
        define_metric=lambda *_, **__: None,
        log=lambda row, step, commit: sent.append((row["step"], step)), summary={}, finish=lost,
    )  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb_run.WandbRun, "_init", lambda self, mode: server)
    tracker = start(run, wandb=True, resume_step=2)
    tracker.log({"train/loss": 0.5}, step=3, epoch=3)
    tracker.finish()
    assert sent == [(2, 6), (3, 9)], "the server had the row of step 1"
    assert (run / "wandb" / "next.txt").read_text() == "id 6 sweeps\n"
    assert (run / "wandb" / "id.txt").read_text() == "id lab sweeps\n", "an agent of a sweep names a run itself"
    server.id, server.entity = "di", None
    start(run, wandb=True).finish()
    assert (run / "wandb" / "id.txt").read_text() == "di\n", "a project is kept with its place alone"
    (run / "wandb" / "id.txt").write_text("id lab sweeps\n")
    asked: dict[str, Any] = {}
    monkeypatch.undo()
    monkeypatch.setattr("wandb.init", lambda **options: asked.update(options))
    again = wandb_run.WandbRun(run, {}, TrackingConfig())
    again._init("online")
    assert [asked[name] for name in ("id", "entity", "project")] == ["id", "lab", "sweeps"], "and goes on there"
    assert asked["settings"].finish_timeout_raises
    assert [path.name for path in run.glob("wandb/*offline-run-*")] == [f"replaced-{file.parent.name}"]
