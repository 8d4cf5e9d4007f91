"""Slips that would lose something, or change a figure without a word."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

from fastddr import __main__ as command
from fastddr import cli, ranks
from fastddr.data import layouts, output, problems, survey
from fastddr.data.photos import Photo
from fastddr.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from fastddr.inference import predict, restore
from fastddr.inference.flags import Predict


def class_folders(tiny: Path, folder: Path) -> Path:
    """The set in folders of classes."""
    for split in ("train", "valid", "test"):
        for line in (tiny / "DR_grading" / f"{split}.txt").read_text().splitlines():
            name, grade = line.split()
            place = folder / split / grade
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny / "DR_grading" / split / name, place)
    return folder


def test_a_table_of_predictions_is_no_truth(tiny: Path, tmp_path: Path) -> None:
    """`fastddr predict RUN .` puts its table beside the class folders."""
    data = class_folders(tiny, tmp_path / "data")
    before = survey.take(str(data))
    answer = predict.Answer(
        tuple(Photo(path=entry.path) for entry in before.entries), torch.eye(5)[[2] * len(before.entries)]
    )
    with (data / "grades.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(predict.rows(answer, 5))
    after = survey.take(str(data))
    assert after.layout == before.layout
    assert [(e.path, e.grade, e.split) for e in after.entries] == [(e.path, e.grade, e.split) for e in before.entries]
    with pytest.raises(UserError, match="no label table"):
        layouts.find(str(data / "grades.csv"))


def test_a_list_of_errors_replaces_no_other_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("path,grade\na.jpg,1\n")
    assert command.main(["check", str(tiny), "--fix-list", str(labels)]) == EXIT_USER_ERROR
    assert "it is there already; give a new name for the list" in capsys.readouterr().err
    assert labels.read_text() == "path,grade\na.jpg,1\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epochs", "3x"], "--epochs 3x: give a whole number alone, like 8."),
        (["--loading.threads", "2 x"], "--loading.threads 2 x: give a whole number alone, like 8."),
        (["--micro-batch-size", "1.5"], "--micro-batch-size 1.5: give a whole number alone, like 8, or auto."),
        (["--lr", "abc"], "--lr abc: give a number alone, like 8 or 0.5."),
        (["--max-hours", "2'h"], "--max-hours 2'h: give a number alone, like 8 or 0.5."),
        (["--optimizer.betas", "0.9", "x"], "--optimizer.betas 0.9 x: give numbers alone, like 0.9 0.999."),
    ],
)
def test_what_is_no_number_is_told_in_plain_words(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.parse(flags, "test")
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "arguments",
    [
        "train --data {}",
        "train --data . --run-dir {}",
        "train --data . --run-dir run --init {}",
        "train --data . --run-dir run --init run:{}",
        "train --data . --run-dir run --exclude {}",
        "check {}",
        "prepare {} masters",
        "prepare . {}",
    ],
)
def test_a_home_that_is_none_is_one_sentence(
    arguments: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "~nobody-of-this-name/x"
    monkeypatch.chdir(tiny)
    assert command.main(arguments.format(place).split()) == EXIT_USER_ERROR
    said = f"fastddr: {place}: there is no home folder for this `~` here; give the path without it.\n"
    assert capsys.readouterr().err == said
    assert not Path("run").exists()
    with pytest.raises(UserError, match="no home folder"):
        restore.load(place)


def test_a_list_lies_where_the_tilde_says(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.csv").write_text(survey.take(str(tiny)).entries[0].path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert problems.read_list("~/bad.csv") == {survey.take(str(tiny)).entries[0].path}


def test_a_heat_map_bears_the_number_of_its_photograph_in_the_table() -> None:
    photographs = [Photo(path="a.jpg"), Photo(path="b.jpg", kind="empty"), Photo(path=f"{'long' * 60}.jpg")]
    found = [path.name for path in predict.overlays(Path("maps"), photographs)]
    assert found == ["00001-a.heat.png", f"00003-{'long' * 10}.heat.png"]


def test_settings_of_a_model_that_is_not_trained_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    cli.parse(["--resnet.depth", "50"], "test")
    assert "--resnet.depth is not used: it is of resnet, and the model is convmixer" in capsys.readouterr().err
    cli.parse(["--model", "resnet", "--resnet.depth", "50"], "test")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "more", "said"),
    [
        (["--synthetic.photographs", "40"], ["--data", "x"], "the synthetic set, and the data are x"),
        (["--optimizer.momentum", "0.5"], [], "sgd, and the optimizer is adamw"),
        (["--optimizer.betas", "0.9", "0.99"], ["--optimizer.name", "sgd"], "adam and adamw, and the optimizer is sgd"),
        (["--loss.beta", "0.5"], ["--loss.class-weights", "inverse"],
         "the class weights `effective`, and they are `inverse`"),
        (["--loading.store-gib=2"], ["--loader", "dali"], "the loader resident, and the loader is dali"),
        (["--loading.regions", "never"], ["--loader", "resident"], "the loader dali, and the loader is resident"),
        (["--loading.jpeg-engines"], ["--loader", "torchvision"],
         "the loaders dali and resident, and the loader is torchvision"),
    ],
)  # fmt: skip
def test_a_flag_without_effect_is_named(
    flags: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.parse([*flags, *more], "test")
    name = flags[0].partition("=")[0]
    assert capsys.readouterr().err == f"fastddr: {name} is not used: it is of {said}\n"


def test_a_table_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph = tmp_path / "photograph.jpg"
    photograph.write_bytes(b"\xff\xd8")
    asked = Predict(run=tmp_path, photographs=(str(photograph),), out=photograph, overwrite=True)
    with pytest.raises(UserError, match="this file is no table of grades"):
        predict._free(asked, "center")
    asked.out.write_text("path,grade,name,referable,p0\n")
    predict._free(asked, "center")

    def refuse(**place: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"nothing can be written there \(Permission denied\)"):
        predict._free(asked, "center")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "somewhere", "--fixlist", "x"], "unknown argument '--fixlist'; did you mean '--fix-list'?"),
        (["prepare", "a", "b", "c"], "unknown argument 'c'; flags begin with two dashes, see --help."),
        (["prepare", "a", "b", "--size", "big"], "--size"),
        (["synth", "--count", "40"], "OUT"),
        (["evaluate", "run", "--splitt=valid"], "unknown argument '--splitt'; did you mean '--split'?"),
        (["compare", "a", "b", "--zzzz"], "unknown argument '--zzzz'; see --help."),
        (["predict", "run", "a.jpg", "--explian", "x"], "unknown argument '--explian'; did you mean '--explain'?"),
        (["export", "run", "--format", "onx"], "onnx"),
        (["plan", "--vram", "much"], "--vram"),
    ],
)
def test_a_verbs_wrong_flag_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == EXIT_USER_ERROR
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("fastddr: ")
    assert told.err.count("\n") == 1
    assert said in told.err


def test_ctrl_c_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastddr.verbs.main", interrupted)
    assert command.main(["check", "somewhere"]) == EXIT_INTERRUPTED
    assert "fastddr: interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted; a run that has begun goes on"),
        (ranks.RankLost("rank 1 ended: KeyError"), 1, "rank 1 ended: KeyError"),
        (UserError("no such thing."), EXIT_USER_ERROR, "no such thing."),
    ],
)
def test_how_training_ends_is_its_exit_code(
    ending: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(*_: object) -> object:
        raise ending

    for of_a_process in ("fastddr.ranks.die_with_parent", "fastddr.terminal.to_nobody"):
        monkeypatch.setattr(of_a_process, lambda: None)
    monkeypatch.setattr("fastddr.trainer.Trainer", ends)
    assert command.main(["train"]) == code
    assert f"fastddr: {said}" in capsys.readouterr().err
