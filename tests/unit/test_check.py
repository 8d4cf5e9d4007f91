"""`fastddr check`: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from photographs import LAYOUTS, SET, draw, folders, labelled, official, photos
from rich.console import Console

from fastddr.__main__ import main
from fastddr.config import Config, SplitConfig
from fastddr.data import manifest, prepare, problems, source, survey
from fastddr.data.crop import Recipe
from fastddr.errors import UserError


def check(*arguments: object) -> int:
    return main(["check", *map(str, arguments)])


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = check(*arguments, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return official(tmp_path / "DDR-dataset")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_clean_set_in_every_layout(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = LAYOUTS[name](tmp_path / "set")
    code, found = as_json(capsys, root)
    assert code == 0
    assert found["layout"] == name
    assert found["problems"] == []
    assert found["fingerprint"] == manifest.read(root).fingerprint
    graded = [photo.grade for photo in SET if photo.split != "test" or name != "gdrbench"]
    for grade in range(5):
        assert sum(of_split[str(grade)] for of_split in found["counts"].values()) == graded.count(grade)
    if name in ("official", "folders", "csv"):
        assert found["counts"]["test"] == {"0": 2, "1": 1, "2": 2, "3": 1, "4": 1, "5": 1}
        assert found["notes"] == []
    assert check(root) == 0
    text = capsys.readouterr().out
    assert "No errors: every photograph decodes" in text
    assert ("DDR's own" in text) == (name in ("official", "kaggle", "gdrbench"))
    assert ("by chance (seed 0)" in text) == (name == "kaggle")


def test_errors_are_listed_and_the_list_mends_the_set(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "DR_grading/train/007-0000-000.jpg").write_bytes(b"")
    whole = (data / "DR_grading/train/007-0001-000.jpg").read_bytes()
    (data / "DR_grading/train/007-0001-000.jpg").write_bytes(whole[:-2])
    draw(data / "DR_grading/train/007-0002-000.jpg", 99, progressive=True)
    (data / "DR_grading/test/007-0019-000.jpg").unlink()
    listed = tmp_path / "bad.csv"
    code, found = as_json(capsys, data, "--fix-list", listed)
    assert code == 1
    assert [(p["path"], p["kind"], p["severity"]) for p in found["problems"]] == [
        ("test/007-0019-000.jpg", "missing", "error"),
        ("train/007-0000-000.jpg", "empty", "error"),
        ("train/007-0001-000.jpg", "truncated", "error"),
        ("train/007-0002-000.jpg", "progressive", "note"),
    ]
    assert found["problems"][3]["reason"] == "it is a progressive JPEG"
    assert found["problems"][0]["reason"] == "test.txt, line 1: there is no such photograph"
    assert problems.read_list(listed) == {p["path"] for p in found["problems"] if p["severity"] == "error"}
    assert found["progressive"] == pytest.approx(1 / (len(SET) - 2))
    assert check(data) == 1
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for said in (
        "3 errors. Training stops at them",
        "the file is empty",
        "breaks off in the middle",
        "progressive JPEG",
    ):
        assert said in text
    assert check(data, "--exclude", listed) == 0
    capsys.readouterr()
    data = data.rename(tmp_path / "[old]")  # which rich would take for markup
    listed.unlink()
    check(data, "--fix-list", listed)
    assert f"--data '{data}' --exclude {listed}" in capsys.readouterr().out.replace("\n", "")


def test_the_command_that_a_refusal_names_lists_all(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table shows the first of each kind."""
    monkeypatch.chdir(tmp_path)
    data = data.rename(tmp_path / "my set")
    bad = {f"train/007-000{number}-000.jpg" for number in range(5)}
    for path in bad:
        (data / "DR_grading" / path).write_bytes(b"")
    with pytest.raises(UserError, match=r"4 more like it.*lists all") as refused:
        manifest.read(data)
    command = shlex.split(str(refused.value).split("`")[1])
    assert main(command[1:]) == 1
    said = capsys.readouterr().out + "".join(path.read_text() for path in tmp_path.glob("*.csv"))
    assert {path for path in bad if path in said} == bad


def lists(command: str, list_: Path) -> frozenset[str]:
    """What the command lists that a sentence names."""
    _, *words = shlex.split(command)
    list_.unlink(missing_ok=True)
    main([*words[: words.index("--fix-list")], "--fix-list", str(list_)])
    return problems.read_list(list_)


def test_commands_that_are_named_look_beyond_the_same_links(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `--follow-links` all photographs behind them would be errors."""
    shutil.copytree(data, tmp_path / "set", copy_function=lambda source, target: os.symlink(source, target))
    for label in (tmp_path / "set" / "DR_grading").glob("*.txt"):
        label.unlink()
        shutil.copy(data / "DR_grading" / label.name, label)
    torn = "train/007-0000-000.jpg"
    (data / "DR_grading" / torn).write_bytes(b"")
    links, bad = str(tmp_path / "set"), tmp_path / "bad.csv"
    for do in (
        lambda: manifest.of(survey.take(links, follow_links=True)),
        lambda: prepare.run(links, tmp_path / "out", Recipe(48), follow_links=True, sheet=0, workers=1),
    ):
        with pytest.raises(UserError, match="lists all") as refused:
            do()
        assert lists(str(refused.value).split("`")[1], bad) == {torn}
    capsys.readouterr()
    assert check(links, "--follow-links") == 1
    assert lists(capsys.readouterr().out.splitlines()[-1].partition(": ")[2], bad) == {torn}
    bad.unlink()
    assert check(links, "--follow-links", "--fix-list", bad) == 1
    assert f"train --data {links} --follow-links --exclude {bad}" in capsys.readouterr().out


def test_commands_that_are_named_leave_out_what_was_left_out_by_hand(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training takes one list: the new one takes the place of the old one."""
    torn, blurred = "train/007-0000-000.jpg", "train/007-0001-000.jpg"
    (data / "DR_grading" / torn).write_bytes(b"")
    hand, bad = tmp_path / "by hand.txt", tmp_path / "bad.csv"
    hand.write_text(f"{blurred}\n")
    config = replace(Config(), data=str(data), exclude=str(hand))
    with pytest.raises(UserError, match="lists all") as refused:
        source.open_data(config, Console(quiet=True))
    assert lists(str(refused.value).split("`")[1], bad) == {torn, blurred}
    capsys.readouterr()
    assert main(["prepare", str(data), str(tmp_path / "out"), "--exclude", str(hand), "--sheet", "0"]) == 2
    assert lists(capsys.readouterr().err.split("`")[1], bad) == {torn, blurred}
    capsys.readouterr()
    assert check(data, "--exclude", hand) == 1
    assert lists(capsys.readouterr().out.splitlines()[-1].partition(": ")[2], bad) == {torn, blurred}
    bad.unlink()
    assert check(data, "--exclude", hand, "--fix-list", bad) == 1
    assert capsys.readouterr().out.rstrip().endswith(f"train --data {data} --exclude {bad}")
    assert bad.read_text().count(blurred) == 1
    assert check(data, "--exclude", bad) == 0


def test_the_command_that_a_refusal_names_draws_the_same_splits(tmp_path: Path) -> None:
    """Which copies of a picture stand in two splits depends on the draw."""
    data = labelled(tmp_path / "set")
    rows = (data / "labels.csv").read_text().splitlines()
    (data / "labels.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows))
    for number in range(0, len(SET) - 1, 2):
        draw(data / "photographs" / SET[number + 1].name, SET[number].number)
    told = []
    for seed in (0, 1):
        splitting = SplitConfig(seed=seed, test_share=0.4)
        seen = survey.take(data, splitting)
        seen.decode(seen.undecoded(), 1)
        with pytest.raises(UserError, match="lists all") as refused:
            manifest.of(seen)
        wanted = survey.bad_paths(seen.problems())
        assert lists(str(refused.value).split("`")[1], tmp_path / f"{seed}.csv") == wanted
        told.append(wanted)
    assert told[0] != told[1]


def test_a_check_looks_again_though_size_and_time_are_the_same(data: Path) -> None:
    """Rot on a disk changes neither."""
    import os

    path = data / "DR_grading/train/007-0000-000.jpg"
    assert check(data) == 0
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-2] + b"\0\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert check(data) == 1


def test_what_cannot_be_read_at_all_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare").mkdir()
    folders(tmp_path / "set")
    for arguments, said in [
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path / "bare",), "no known layout"),
        ((tmp_path / "set", "--exclude", tmp_path / "no.csv"), "this list cannot be read"),
        ((tmp_path / "set", "--fix-list", tmp_path / "no" / "bad.csv"), "bad.csv: its folder is not there; make it"),
        ((tmp_path / "bare", "--fix-list", tmp_path / "bad.csv"), "no known layout"),
        ((tmp_path / "set", "--splitting.test-share", "0.9"), "must leave photographs for train and valid"),
    ]:
        assert check(*arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("fastddr: ")
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "bad.csv").exists(), "an empty list would leave out nothing, and say nothing"


def test_a_set_of_one_split_can_be_checked_but_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path, [photo for photo in SET if photo.split == "test"])
    code, found = as_json(capsys, root)
    assert code == 0
    assert list(found["counts"]) == ["test"]
    with pytest.raises(UserError, match=r"the split 'train' is missing; the photographs are in test alone"):
        manifest.read(root)


def test_help_is_for_users(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("check", "prepare", "synth"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert "noqa" not in capsys.readouterr().out


def test_photographs_of_every_shape_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders(tmp_path)
    draw(root / "train/0/big.png", 70, size=(300, 200))
    draw(root / "train/0/full.jpg", 71, subsampling=0)
    _, found = as_json(capsys, root)
    assert found["sizes"][0] == {"width": 40, "height": 32, "photographs": len(SET) + 1}
    assert found["sizes"][1] == {"width": 300, "height": 200, "photographs": 1}
    assert found["formats"] == {"JPEG": len(SET) + 1, "PNG": 1}
    assert found["sampling"] == {"4:2:0": len(SET), "4:4:4": 1}
    check(root)
    text = capsys.readouterr().out
    assert "40×32 (97%), 300×200 (3%); short side 32 to 200, median 32 px" in text
    assert "JPEG 97%, PNG 3%" in text


def test_the_last_line_says_what_training_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a word it would seem to take the ungradable ones too."""
    root = labelled(tmp_path)
    labels = root / "labels.csv"
    assert check(root) == 0
    text = capsys.readouterr().out
    assert "Training takes 25 and leaves out 2 ungradable ones (--ungradable class takes them)." in text
    draw(root / "photographs" / "unknown.jpg", 90)
    labels.write_text(labels.read_text() + "photographs/unknown.jpg,,train\n")
    assert check(root) == 0
    assert "class takes them) and 1 without a grade." in capsys.readouterr().out
    labels.write_text("".join(line for line in labels.read_text().splitlines(True) if ",5," not in line))
    assert check(root) == 0
    assert "Training takes 25 and leaves out 1 without a grade." in capsys.readouterr().out
    assert check(folders(tmp_path / "graded", [photo for photo in SET if photo.grade < 5])) == 0
    assert "decodes, and training takes them all." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("grades", "lacking"),
    [({"train": [0, 1], "valid": [5]}, "valid"), ({"train": [0, 1], "test": [2]}, "valid"),
     ({"train": [5], "valid": [0]}, "train"), ({"test": [0, 1]}, "train and valid")],
)  # fmt: skip
def test_the_last_line_says_what_training_lacks(
    grades: dict[str, list[int]], lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path, photos(grades))
    assert check(root) == 0
    said = "Training needs gradable photographs in train and valid, and there are none in"
    assert f"No errors: every photograph decodes. {said} {lacking}.\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="the split"):
        manifest.read(root).ids(lacking)


def test_a_list_replaces_no_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torn, blurred = "train/007-0000-000.jpg", "train/007-0001-000.jpg"
    (data / "DR_grading" / torn).write_bytes(b"")
    Path("bad.csv").symlink_to("real.csv")
    assert check(data, "--fix-list", "bad.csv") == 1
    assert Path("bad.csv").is_symlink()
    assert problems.read_list("real.csv") == {torn}
    with Path("real.csv").open("a") as stream:
        stream.write(f"{blurred}\n")
    before = Path("real.csv").read_text()
    capsys.readouterr()
    assert check(data, "--fix-list", "bad.csv") == 2
    assert "bad.csv: it is there already; give a new name for the list, or remove it." in capsys.readouterr().err
    assert check(data) == 1
    assert capsys.readouterr().out.endswith(" --fix-list bad-2.csv\n"), "what is named can be given"
    # Somebody writes something there while photographs are decoded.
    real = survey.Survey.problems
    monkeypatch.setattr(survey.Survey, "problems", lambda seen: (Path("new.csv").write_text("mine"), real(seen))[1])
    assert check(data, "--fix-list", "new.csv") == 2
    assert (Path("real.csv").read_text(), Path("new.csv").read_text()) == (before, "mine")
