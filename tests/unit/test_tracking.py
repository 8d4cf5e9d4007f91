"""Every record of a run read back by another program than the one that wrote it."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests_support import lines
from trackers import alone as alone  # a fixture of all these tests
from trackers import events, inspect, offline_files, start, the_answers

from fastddr.config import TrackingConfig
from fastddr.errors import UserError
from fastddr.tracking import Tracker, read, truncate_to, wandb_run
from fastddr.tracking.wandb_run import WandbRun


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


@pytest.mark.parametrize("replaced", [False, True])
def test_figures_that_nobody_finds_any_more_are_told(tmp_path: Path, replaced: bool) -> None:
    tracker = start(tmp_path)
    tracker.log({"train/loss": 1.0}, step=1, epoch=0)
    tracker.sync()
    (tmp_path / "metrics.jsonl").unlink()
    if replaced:
        (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError) as told:
        tracker.sync()
    assert told.value.filename == str(tmp_path / "metrics.jsonl")
    tracker.finish()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker.silent()
    tracker.log({"train/loss": 1.0}, step=1, epoch=0)
    tracker.log_image("report/curves", tmp_path / "none.png", 1)
    tracker.finish()
    tracker.sync()
    assert list(tmp_path.iterdir()) == []


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


def test_truncating_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_to(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')  # the last without its end of line
    for _ in range(2):
        truncate_to(path, 3)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for line in ("rubbish", '{"step": 2, "ep', "[]", '{"step": null}', "{}"):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}} \n')
        with pytest.raises(UserError, match="line 2"):
            truncate_to(path, 3)
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
            read(path)
    path.write_text('{"step": 1}\n{"step": 2')
    assert read(path) == [{"step": 1}]


def test_a_validation_that_comes_again_is_not_doubled(tmp_path: Path) -> None:
    """The checkpoint was taken when the epoch had ended, before its validation was saved."""
    path = tmp_path / "metrics.jsonl"
    written = ['{"step": 2, "valid/qwk": 0.1}\n', '{"step": 4, "train/loss": 1}\n', '{"step": 4, "valid/qwk": 0.5}\n']
    path.write_text("".join(written))
    truncate_to(path, 4)
    assert path.read_text() == "".join(written)
    truncate_to(path, 4, validated=False)
    assert path.read_text() == "".join(written[:2])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_is_told_once(tmp_path: Path) -> None:
    """The line that could not be written stays in the stream, and fails again when that is closed."""
    stream = Path("/dev/full").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115  # the tracker closes it
    tracker = Tracker(stream, [], print)
    with pytest.raises(OSError, match="No space left"):
        tracker.log({"train/loss": 1.0}, step=1, epoch=0.5)
    tracker.finish(failed=True)
    tracker.finish(failed=True)


def test_events_of_a_run_that_begins_anew_hide_what_it_left(tmp_path: Path) -> None:
    """It was killed before its first checkpoint."""
    for loss in (9.0, 1.0):
        tracker = start(tmp_path / "run", tensorboard=True)
        tracker.log({"train/loss": loss}, step=1, epoch=0.5)
        tracker.finish()
    assert [event.value for event in events(tmp_path / "run").Scalars("train/loss")] == [1.0]


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("fastddr.tracking.boards.TensorBoard", TypeError("Descriptors cannot be created directly")),
        ("fastddr.tracking.WandbRun", TypeError("Descriptors cannot be created directly")),
        ("wandb.init", Exception("no service")),  # from which wandb's error of a lost service derives straight
    ],
)
def test_a_tracker_that_fails_as_it_starts_does_not_stop_the_run(
    where: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(where, fails)
    said: list[str] = []
    board = "Board" in where
    tracker = start(tmp_path / "run", said, wandb=not board, tensorboard=board)
    tracker.log({"train/loss": 1.0}, step=1, epoch=0.5)
    tracker.finish()
    [line] = said
    assert line.startswith("TensorBoard is off" if board else "W&B is off")
    assert str(error) in line
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
    assert [row[:4] for row in rows] == [
        ["a.jpg", "No DR", "Proliferative", 0.9],
        ["b|<b>.jpg", "Moderate", "Mild", 0.5],
    ]
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


def test_wandb_without_a_home_that_can_be_written_to_keeps_its_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.delenv("WANDB_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.csv").write_text("path\n")
    said: list[str] = []
    tracker = start(run, said, wandb=True)
    tracker.log_manifest(run / "manifest.csv")
    tracker.finish()
    assert len(said) == 1, said
    (file,) = offline_files(run)
    assert b"manifest-" in file.read_bytes()
    assert "WANDB_CACHE_DIR" not in os.environ


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
    assert r"b\|\<b\>.jpg | Moderate | Mild | 50% |" in text
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


def test_wandb_mode_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said: list[str] = []
    start(tmp_path, said, wandb=True).finish()
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.delenv("WANDB_MODE")
    disabled = SimpleNamespace(settings=SimpleNamespace(mode="disabled"))  # as after the command `wandb disabled`
    monkeypatch.setattr("wandb.setup", lambda settings: disabled)
    start(tmp_path, said, wandb=True).finish()
    assert said == []
    assert "WANDB_DATA_DIR" not in os.environ


@pytest.mark.parametrize("place", ["_start", "log"])
def test_ctrl_c_while_wandb_begins_leaves_nothing_behind(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own beginning, and while it gets the earlier rows."""
    ended: list[int] = []

    def begin(run: WandbRun) -> wandb_run.Begun:
        run._put("WANDB_DATA_DIR", tmp_path)
        run._run = SimpleNamespace(finish=lambda exit_code: ended.append(exit_code), id="a", url=None, offline=False)
        if place == "_start":
            raise KeyboardInterrupt
        return wandb_run.Begun("W&B: online")

    def log(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(WandbRun, "_start", begin)
    monkeypatch.setattr(WandbRun, "log", log)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, wandb=True, resume_step=1)
    assert ended == [1]
    assert "WANDB_DATA_DIR" not in os.environ


@pytest.mark.parametrize(
    ("asked", "variable", "project"), [("mine", "other", "mine"), (None, "other", "other"), (None, None, "fastddr")]
)
def test_the_project_and_the_name_at_wandb(
    asked: str | None, variable: str | None, project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_PROJECT", variable)
        monkeypatch.setenv("WANDB_NAME", "a name")
    found = wandb_run.WandbRun(tmp_path, {}, TrackingConfig(project=asked))
    assert (found._project, found._name) == (project, tmp_path.name if variable is None else "a name")


@pytest.mark.parametrize("error", [OSError("No space left on device"), ConnectionResetError("Connection lost")])
def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tmp_path: Path, error: OSError) -> None:
    said: list[str] = []
    tracker = start(tmp_path, said, tensorboard=True)

    def fail(*_: Any) -> None:
        raise error

    board, ended = tracker._copies[0], list[bool]()
    close = board.finish

    def finish(failed: bool) -> None:
        ended.append(failed)
        close(failed)
        raise error

    board.log, board.finish = fail, finish  # type: ignore[method-assign]
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step=step, epoch=0)
    tracker.finish()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert said == [f"TensorBoard is off from here on, metrics.jsonl goes on: {error}"]
    assert ended == [True], "it is ended, and once"


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
        "W&B is off from here on, metrics.jsonl goes on",
        "TensorBoard is off from here on, metrics.jsonl goes on",
    ]


def test_no_key_lies_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

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
    wandb.teardown()  # it keeps WANDB_MODE
