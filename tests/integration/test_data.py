"""Training meets the data sets that people have: other layouts, bad photographs, ungradable ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from photographs import folders, kaggle, photos
from tests_support import TINY, TINY_SIZE, report, settings, table, train

from fastddr.__main__ import main
from fastddr.data import photograph, synthetic
from fastddr.errors import UserError
from fastddr.trainer import Trainer

#: Enough of each grade for windows of 64 px from an 80 px canvas.
GRADES = {"train": [0, 1, 2, 3, 4] * 4, "valid": [0, 1, 2, 3, 4] * 2, "test": [0, 1, 2, 3, 4] * 2}


def spoil(copy: Path, split: str, number: int, end: int | None) -> Path:
    """Cut a photograph off: behind its last scan (`end` -2), or to nothing (0). Its name in the set."""
    path = sorted((copy / "DR_grading" / split).glob("*.jpg"))[number]
    path.write_bytes(path.read_bytes()[:end])
    return path.relative_to(copy / "DR_grading")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_photograph_stops_a_run_before_its_first_step(split: str, copy: Path, tmp_path: Path) -> None:
    """Even one that would be decoded only at the end of the last epoch, and that nobody checked before."""
    bad = spoil(copy, split, 3, -2)
    with pytest.raises(UserError) as caught:
        train(copy, tmp_path / "run")
    assert str(bad) in str(caught.value)
    assert "it breaks off in the middle" in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_bad_photographs_are_left_out_and_listed_and_the_run_can_go_on(copy: Path, tmp_path: Path) -> None:
    bad = [spoil(copy, "train", 3, -2), spoil(copy, "valid", 2, 0), spoil(copy, "test", 1, -2)]
    run = train(copy, tmp_path / "run", "--on-bad", "exclude", "--epochs", "1")
    text = (run / "report" / "report.md").read_text()
    assert "## Left out" in text
    for path in bad:
        assert f"| {path} |" in text
    rows = table(run / "report" / "left_out.csv")
    assert sorted((row["path"], row["kind"]) for row in rows) == sorted(
        (str(path), kind) for path, kind in zip(bad, ["truncated", "empty", "truncated"], strict=True)
    )
    figures = report(run)
    for split, path in zip(TINY, bad, strict=True):
        labels = (copy / "DR_grading" / f"{split}.txt").read_text().splitlines()
        assert figures[split]["n"] == sum(TINY[split][:5]) - (f"{path.name} 5" not in labels)
    manifest = (run / "manifest.csv").read_text()
    assert not any(str(path) in manifest for path in bad)


def test_a_list_does_the_same_as_leaving_out_what_is_bad(copy: Path, tmp_path: Path) -> None:
    spoil(copy, "train", 3, -2)
    assert main(["check", str(copy), "--fix-list", str(tmp_path / "bad.csv")]) == 1
    one = train(copy, tmp_path / "one", "--epochs", "1", "--exclude", str(tmp_path / "bad.csv"))
    two = train(copy, tmp_path / "two", "--epochs", "1", "--on-bad", "exclude")
    assert (one / "manifest.csv").read_text() == (two / "manifest.csv").read_text()


def test_a_checked_set_is_not_decoded_again(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["check", str(copy)]) == 0
    monkeypatch.setattr(photograph, "digest", None)
    with Trainer(settings(copy, tmp_path / "run")) as trainer:
        assert trainer.manifest.has("test")


def test_headers_alone_where_they_are_asked_for(copy: Path, tmp_path: Path) -> None:
    bad = spoil(copy, "train", 3, -2)
    with pytest.raises(UserError, match=str(bad)):
        train(copy, tmp_path / "run", "--check", "header")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_run_goes_on_only_with_the_same_photographs(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_report", lambda self: None)
        train(copy, tmp_path / "run", "--epochs", "1")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    spoil(copy, "train", 3, 0)
    with pytest.raises(UserError, match="the file is empty"):
        train(copy, tmp_path / "run", "--epochs", "1")
    with pytest.raises(UserError, match="not those that this run began with"):
        train(copy, tmp_path / "run", "--epochs", "1", "--on-bad", "exclude")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_ungradable_as_a_sixth_class(tiny: Path, tmp_path: Path) -> None:
    run = train(tiny, tmp_path / "run", "--ungradable", "class", "--epochs", "1")
    figures = report(run)
    assert {split: figures[split]["n"] for split in TINY} == {split: sum(TINY[split]) for split in TINY}
    assert [sum(row) for row in figures["test"]["confusion_matrix"]] == list(TINY["test"])
    text = (run / "report" / "report.md").read_text()
    assert "Six classes: 2 ungradable photographs" in text
    assert "5 Ungradable" in text
    [row, *_] = table(run / "report" / "predictions.csv")
    assert list(row) == ["path", "split", "grade", "predicted", *(f"p{c}" for c in range(6))]
    with pytest.raises(UserError, match="ungradable was 'class' and is now 'exclude'"):
        train(tiny, tmp_path / "run", "--epochs", "1")


def test_a_copy_without_splits_is_split_and_the_report_says_how(tmp_path: Path) -> None:
    root = kaggle(tmp_path / "set", photos(GRADES))
    run = train(root, tmp_path / "run", "--epochs", "1", "--batch-size", "4", "--canvas", "80")
    text = (run / "report" / "report.md").read_text()
    assert "The set has no splits: 30% for test were drawn by chance (seed 0), stratified by grade" in text
    figures = report(run)
    assert {split: figures[split]["n"] for split in TINY} == {"train": 20, "valid": 10, "test": 10}
    with pytest.raises(UserError, match=r"splitting.seed was 0 and is now 1"):
        train(root, tmp_path / "run", "--epochs", "1", "--batch-size", "4", "--splitting.seed", "1")


def test_a_name_that_is_no_utf_8_is_left_out_to_the_end(tmp_path: Path) -> None:
    root = folders(tmp_path / "set", photos(GRADES))
    place = root / "train" / "0"
    try:
        os.rename(sorted(place.iterdir())[0], os.fsencode(place) + b"/f\xfcr.jpg")
    except OSError:
        pytest.skip("this file system takes no such name")
    run = train(root, tmp_path / "run", "--epochs", "1", "--batch-size", "4", "--on-bad", "exclude")
    assert "train/0/f?r.jpg | encoding" in (run / "report" / "report.md").read_text()
    assert b"train/0/f\xfcr.jpg" in (run / "report" / "left_out.csv").read_bytes()


def test_odd_names_pass_the_whole_way(tmp_path: Path) -> None:
    root = folders(tmp_path / "a set", photos(GRADES))
    name = "an ünusual\nname.jpg"
    place = root / "test" / "0"
    os.rename(sorted(place.iterdir())[0], place / name)
    run = train(root, tmp_path / "run", "--epochs", "1", "--batch-size", "4")
    assert f"test/0/{name}" in {row["path"] for row in table(run / "report" / "predictions.csv")}


def test_patients_reach_the_intervals(tmp_path: Path) -> None:
    data = synthetic.generate(tmp_path / "set", counts=TINY, size=TINY_SIZE, workers=1, layout="csv")
    run = train(data, tmp_path / "run", "--epochs", "1")
    tests = [row for row in table(run / "report" / "predictions.csv") if row["split"] == "test"]
    patients = {row["patient"] for row in tests}
    assert "" not in patients
    assert len(patients) < len(tests)
    found = report(run)["test"]
    assert (found["ci"]["patients"], found["n"]) == (len(patients), len(tests))
    text = (run / "report" / "report.md").read_text()
    assert f"{len(tests)} of {len(patients)} patients |" in text
    assert "whole patients are drawn" in text
    assert main(["report", str(run)]) == 0
    assert (run / "report" / "report.md").read_text() == text
    assert f",{tests[0]['patient']}\n" in (run / "manifest.csv").read_text()
