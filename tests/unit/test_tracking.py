"""Every record of a run read back by another program than the one that wrote it."""

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

import numpy as np
import pytest
import torch
from PIL import Image
from tests_support import ROOT

from fastddr.config import TrackingConfig
from fastddr.errors import UserError
from fastddr.tracking import Answers, Mistake, Tracker, truncate_to, wandb_run

MAIN, OTHER = SimpleNamespace(is_main_process=True), SimpleNamespace(is_main_process=False)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, no network, no home: W&B has only what a test gives it."""
    for name in [name for name in os.environ if name.startswith("WANDB") and "SERVICE" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def start(run: Path, said: list[str] | None = None, accelerator: Any = MAIN, **options: Any) -> Tracker:
    run.mkdir(parents=True, exist_ok=True)
    resume_step = options.pop("resume_step", None)
    asked = {"project": "fastddr-tests", "wandb": False, "tensorboard": False, "log_code": False, **options}
    say = said.append if said is not None else lambda line: None
    return Tracker.start(
        accelerator, run, {"model": {"name": "cnn"}, "seed": 1}, say=say, options=TrackingConfig(**asked),
        resume_step=resume_step,
    )  # fmt: skip


def lines(run: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_a_line_is_flat_json_and_there_at_once(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.log({"train/loss": torch.tensor(0.5), "valid/qwk": None, "train/lr": np.float32(0.25)}, step=3, epoch=0.5)
    tracker.log({"train/loss": math.nan, "train/grad": math.inf, "n": np.int64(7)}, step=4, epoch=1)
    first, second = lines(tmp_path)  # before finish: a kill loses no line
    assert first.pop("time") > 1.7e9
    assert first == {"step": 3, "epoch": 0.5, "train/loss": 0.5, "valid/qwk": None, "train/lr": 0.25}
    assert {k: second[k] for k in ("train/loss", "train/grad", "n")} == {
        "train/loss": None,
        "train/grad": None,
        "n": 7,
    }
    tracker.finish()
    tracker.finish()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = start(tmp_path / "run", accelerator=OTHER, wandb=True, tensorboard=True)
    tracker.log({"train/loss": 1.0}, step=1, epoch=0)
    tracker.log_image("report/curves", tmp_path / "none.png", 1)
    tracker.finish()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_resume_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    for step in range(1, 6):
        tracker.log({"train/loss": step / 10}, step=step, epoch=0)
    tracker.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')  # killed in the middle of a line
    tracker = start(tmp_path, resume_step=3)
    tracker.log({"train/loss": 0.0}, step=4, epoch=0)
    tracker.finish()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    start(tmp_path).finish()  # begun anew, without a checkpoint: nothing is kept
    assert lines(tmp_path) == []


def test_truncating_counts_and_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_to(path, 3) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')  # the last without its end of line
    assert truncate_to(path, 3) == 1
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert truncate_to(path, 3) == 0
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    for line in ("rubbish", "[]", '{"step": null}', "{}"):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(UserError, match="line 2"):
            truncate_to(path, 3)


def test_a_validation_that_comes_again_is_not_doubled(tmp_path: Path) -> None:
    """The checkpoint was taken when the epoch had ended, before its validation was saved."""
    path = tmp_path / "metrics.jsonl"
    written = ['{"step": 2, "valid/qwk": 0.1}\n', '{"step": 4, "train/loss": 1}\n', '{"step": 4, "valid/qwk": 0.5}\n']
    path.write_text("".join(written))
    assert truncate_to(path, 4) == 0
    assert truncate_to(path, 4, validated=False) == 1
    assert path.read_text() == "".join(written[:2])


def test_a_disk_that_is_full_is_told_once(tmp_path: Path) -> None:
    """The line that could not be written stays in the stream, and fails again when that is closed."""
    stream = Path("/dev/full").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115  # the tracker closes it
    tracker = Tracker(stream, [], print)
    with pytest.raises(OSError, match="No space left"):
        tracker.log({"train/loss": 1.0}, step=1, epoch=0.5)
    tracker.finish(failed=True)
    tracker.finish(failed=True)


def test_an_id_of_wandb_that_a_kill_left_empty_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "id.txt"
    file.touch()
    made = wandb_run._run_id(file)
    assert len(made) == 8
    assert (wandb_run._run_id(file), file.read_text()) == (made, f"{made}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["id.txt"]


def test_events_of_a_run_that_begins_anew_hide_what_it_left(tmp_path: Path) -> None:
    """It was killed before its first checkpoint."""
    for loss in (9.0, 1.0):
        tracker = start(tmp_path / "run", tensorboard=True)
        tracker.log({"train/loss": loss}, step=1, epoch=0.5)
        tracker.finish()
    assert [event.value for event in events(tmp_path / "run").Scalars("train/loss")] == [1.0]


@pytest.mark.parametrize("where", ["fastddr.tracking.boards.TensorBoard", "fastddr.tracking.WandbRun"])
def test_a_tracker_whose_packages_do_not_fit_does_not_stop_the_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_: Any) -> None:
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr(where, unfit)
    said: list[str] = []
    tracker = start(tmp_path / "run", said, wandb="Wandb" in where, tensorboard="Board" in where)
    tracker.log({"train/loss": 1.0}, step=1, epoch=0.5)
    tracker.finish()
    assert len(said) == 1
    assert "Descriptors" in said[0]
    assert len(lines(tmp_path / "run")) == 1


def test_tensorboard_is_read_back_and_a_resume_hides_what_is_redone(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    Image.new("RGB", (8, 6), "red").save(picture)
    tracker = start(tmp_path / "run", tensorboard=True)
    for step in (1, 2, 3):
        tracker.log({"train/loss": step / 4, "valid/qwk": None}, step=step, epoch=step)
    tracker.log_image("report/curves", picture, 3)
    tracker.finish()
    read = events(tmp_path / "run")
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [(e.width, e.height) for e in read.Images("report/curves")] == [(8, 6)]
    tracker = start(tmp_path / "run", tensorboard=True, resume_step=1)
    tracker.log({"train/loss": 9.0}, step=2, epoch=2)
    tracker.finish()
    assert [(e.step, e.value) for e in events(tmp_path / "run").Scalars("train/loss")] == [
        (1, 0.25),
        (2, 9.0),
    ]


def test_wandb_offline_is_one_run_over_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a login it goes offline, says so in one line, and stays in the run folder."""
    run, said, picture = tmp_path / "run", [], tmp_path / "curves.png"
    Image.new("RGB", (8, 6), "red").save(picture)
    tracker = start(run, said, wandb=True)
    tracker.log({"train/loss": 0.5}, step=4, epoch=1)
    tracker.finish()
    tracker = start(run, said, wandb=True, resume_step=4)
    tracker.log({"train/loss": 0.25, "train/nan": math.nan}, step=5, epoch=1)
    tracker.log_image("report/curves", picture, 5)
    tracker.log({"final/test_qwk": 0.5}, step=5, epoch=1)
    tracker.finish()
    assert capfd.readouterr() == ("", "")
    assert len(said) == 2
    assert said[0] == (
        f"W&B: offline (not logged in); see it with: {tracker.view_command}; upload later with: {tracker.sync_command}"
    )
    assert tracker.sync_command == f"wandb sync {run}/wandb/offline-run-*"
    assert tracker.view_command == f"wandb leet {run}/wandb"
    assert "WANDB_DATA_DIR" not in os.environ
    files = offline_files(run)
    assert len(files) == 2
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
from types import SimpleNamespace
from fastddr.config import TrackingConfig
from fastddr.tracking import Tracker

options = TrackingConfig(project="fastddr-tests", wandb=True, tensorboard=True, log_code=False)
tracker = Tracker.start(
    SimpleNamespace(is_main_process=True), Path(sys.argv[1]), {}, options=options, resume_step=None, say=print
)
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
    assert (summary["valid/qwk"], summary["train/images_per_second"]) == ({"max": 1.6}, {"mean": 5.5})
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
        tracker = Tracker.start(MAIN, run, {}, options=options, say=lambda line: None, **resume)
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


def test_a_line_that_has_no_more_than_a_step_is_no_obstacle(tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1, "my/own": 1}\n{"step": 2, "train/loss": 0.5}\n')
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
    """Parts that were never uploaded get another name; the run has all their rows again."""
    run = tmp_path / "run"
    tracker = start(run, wandb=True)
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step=step, epoch=step)
    tracker.finish()
    (file,) = offline_files(run)
    sent: list[tuple[int, int]] = []
    server = SimpleNamespace(
        offline=False, url="https://wandb.example/run", id="id", starting_step=6, define_metric=lambda *_, **__: None,
        log=lambda row, step, commit: sent.append((row["step"], step)), summary={}, finish=lambda exit_code: None,
    )  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb_run.WandbRun, "_init", lambda self, mode: server)
    tracker = start(run, wandb=True, resume_step=2)
    tracker.log({"train/loss": 0.5}, step=3, epoch=3)
    tracker.finish()
    assert sent == [(2, 6), (3, 9)], "the server had the row of step 1"
    assert [path.name for path in run.glob("wandb/*offline-run-*")] == [f"replaced-{file.parent.name}"]


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
        Mistake("a.jpg", photograph, 0, 4, 0.9), Mistake("b|b.jpg", tmp_path / "photos" / "b.jpg", 2, 1, 0.5)
    ]  # fmt: skip
    return Answers("test", grades, probabilities, ["No DR", "Mild", "Moderate", "Severe", "Proliferative"], worst)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("photographs", [False, True])
def test_wandb_has_curves_tables_and_artifacts(tmp_path: Path, photographs: bool) -> None:
    """Read back from the offline run; no photograph is in it unless that is asked for."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (run / "checkpoints" / "best").symlink_to("step-00000010")
    (run / "checkpoints" / "last").symlink_to("step-00000010")
    (run / "manifest.csv").write_text("path\n")
    said: list[str] = []
    options = {"log_images": photographs, "group": "seeds", "log_code": True, "checkpoints": "upload"}
    tracker = start(run, said, wandb=True, **options)
    tracker.log({"valid/qwk": 0.5, "valid/loss": 1.5, "train/loss": 2.0}, step=5, epoch=1)
    tracker.log({"valid/qwk": 0.25, "valid/loss": 1.25, "train/loss": 1.0}, step=10, epoch=2)
    tracker.log_answers(the_answers(tmp_path), 10)
    tracker.log({"final/test_qwk": 0.5}, step=10, epoch=2)
    tracker.log_manifest(run / "manifest.csv")
    tracker.log_checkpoints(run / "checkpoints")
    tracker.finish()
    assert len(said) == 1, said
    (file,) = offline_files(run)
    found = inspect(file)["summary"]
    assert found["valid/qwk"] == {"max": 0.5}
    assert found["valid/loss"] == {"min": 1.25}
    assert found["train/loss"] == lines(run)[-2]["train/loss"] == 1.0
    for name in ("confusion_matrix_table", "pr_table", "roc_table", "worst"):
        assert found[f"test/{name}"]["_type"].startswith("table"), name
    (table,) = run.glob("wandb/offline-run-*/files/media/table/test/worst*.json")
    rows = json.loads(table.read_text())["data"]
    assert [row[:4] for row in rows] == [["a.jpg", "No DR", "Proliferative", 0.9], ["b|b.jpg", "Moderate", "Mild", 0.5]]
    assert [len(row) for row in rows] == [5 if photographs else 4] * 2
    staged = [path for path in run.glob("wandb/**/*") if path.is_file()]
    pictures = [path for path in staged if path.read_bytes()[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")]
    assert bool(pictures) == photographs
    records = file.read_bytes()
    for word in (b"seeds", b"checkpoint-", b"manifest-", b"best", b"step-00000010", b"fastddr-code"):
        assert word in records, word
    assert list(run.glob("wandb/artifacts/staging/*")), "the bytes are staged in the run folder"


def test_checkpoints_are_named_and_not_copied_unless_asked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "best").mkdir(parents=True)
    (run / "checkpoints" / "best" / "model.safetensors").write_bytes(b"w" * 100_000)
    (run / "manifest.csv").write_text("path\n")
    said: list[str] = []
    tracker = start(run, said, wandb=True)
    tracker.log_manifest(run / "manifest.csv")
    tracker.log_checkpoints(run / "checkpoints")  # there is no `last`
    tracker.finish()
    assert len(said) == 1, said
    staged = sum(path.stat().st_size for path in run.glob("wandb/**/*") if path.is_file())
    assert staged < 100_000
    (file,) = offline_files(run)
    assert b"checkpoint-" in file.read_bytes()


def test_tensorboard_has_curves_and_mistakes(tmp_path: Path) -> None:
    tracker = start(tmp_path / "run", tensorboard=True)
    tracker.log_answers(the_answers(tmp_path), 10)
    tracker.log_manifest(tmp_path / "nothing")
    tracker.finish()
    read = events(tmp_path / "run")
    assert not read.Tags()["images"]
    curves = {tag for tag in read.Tags()["tensors"] if "/pr " in tag}
    assert curves == {"test/pr 0 No DR", "test/pr 1 Mild", "test/pr 2 Moderate", "test/pr 4 Proliferative"}
    text = read.Tensors("test/worst/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "b\\|b.jpg | Moderate | Mild | 50%" in text
    config = read.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"name": "cnn"' in config
    tracker = start(tmp_path / "other", tensorboard=True, log_images=True)
    (tmp_path / "photos" / "a.jpg").rename(tmp_path / "a.jpg")
    (tmp_path / "photos").rmdir()
    tracker.log_answers(the_answers(tmp_path), 10)
    tracker.finish()
    images = [events(tmp_path / "other").Images(tag)[0] for tag in ("test/worst 01", "test/worst 02")]
    assert [(image.width, image.height) for image in images] == [(512, 341), (512, 512)]


def test_wandb_that_cannot_come_online_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 2)
    said: list[str] = []
    tracker = start(tmp_path, said, wandb=True)
    tracker.log({"train/loss": 0.5}, step=1, epoch=1)
    tracker.finish(failed=True)
    wandb.teardown()
    assert len(said) == 1
    assert said[0].startswith("W&B: offline (could not come online: ")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_lost_wandb_service_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error derives straight from Exception."""
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError

    def lost(*_: object, **__: object) -> None:
        raise WandbServiceConnectionError("no service")

    monkeypatch.setattr("wandb.init", lost)
    said: list[str] = []
    tracker = start(tmp_path, said, wandb=True)
    tracker.log({"train/loss": 0.5}, step=1, epoch=1)
    tracker.finish()
    assert len(said) == 1
    assert "W&B is off" in said[0]
    assert '"train/loss": 0.5' in (tmp_path / "metrics.jsonl").read_text()


def test_wandb_mode_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said: list[str] = []
    start(tmp_path, said, wandb=True).finish()
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), ConnectionResetError("Connection lost")])
def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tmp_path: Path, error: OSError) -> None:
    said: list[str] = []
    tracker = start(tmp_path, said, tensorboard=True)

    def fail(*_: Any) -> None:
        raise error

    tracker._copies[0].log = fail  # type: ignore[method-assign]
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step=step, epoch=0)
    tracker.finish()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert said == [f"TensorBoard is off from here on, metrics.jsonl goes on: {error}"]


def test_a_tracker_that_cannot_start_is_said_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where a folder should be")
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    tracker = start(tmp_path / "run", said, wandb=True, tensorboard=True)
    tracker.log({"train/loss": 0.5}, step=1, epoch=0)
    tracker.finish()
    assert len(lines(tmp_path / "run")) == 1
    assert [line.split(":")[0] for line in said] == [
        "W&B is off",
        "TensorBoard is off from here on, metrics.jsonl goes on",
    ]


def test_no_key_lies_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "f00d" * 10
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    tracker = start(tmp_path / "run", said, wandb=True)
    tracker.log({"train/loss": 1.0}, step=1, epoch=0)
    tracker.finish()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert [str(file) for file in files if key.encode() in file.read_bytes()] == []
    out = capfd.readouterr()
    assert key not in out.out + out.err + "".join(said)
