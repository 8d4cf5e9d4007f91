"""`fastddr prepare`: label tables and text files that were written on other machines."""

from __future__ import annotations

import shutil
from pathlib import Path

import photographs
import pytest
from eyes import eye, official, run, told
from eyes import quick as quick  # a fixture of all these tests

from fastddr.data import layouts, relabel, survey
from fastddr.data.crop import name_of
from fastddr.data.relabel import Kept


@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_a_table_keeps_what_separates_its_cells(tmp_path: Path, mark: str) -> None:
    # Excel's line of what separates cells, and a comma that separates none.
    lines, more = [*(["sep=;"] if mark == ";" else []), "path;grade;split;note"], "" if mark == "," else ", b"
    lines[-1] += more
    for number in range(6):
        eye(tmp_path / "data" / "in" / f"n{number}.tif", number)
        lines.append(f"in/n{number}.tif;{number % 3};{'train' if number > 2 else 'valid'};a 1{more}")
    lines.append("in/gone.tif;0;train;")
    (tmp_path / "data" / "labels.csv").write_text("\ufeff" + "\n".join(lines).replace(";", mark) + "\n", "utf-8")
    run(tmp_path / "data", tmp_path / "out", on_bad="exclude")
    wanted = "\n".join(lines[:-1]).replace(".tif", ".jpg").replace(";", mark) + "\n"
    assert (tmp_path / "out" / "labels.csv").read_text() == wanted
    assert told(tmp_path / "out") == {k: v for k, v in told(tmp_path / "data").items() if k != "in/gone"}


def test_a_cell_with_a_lone_carriage_return_is_still_one(tmp_path: Path) -> None:
    for number in range(4):
        eye(tmp_path / "data" / "in" / f"n{number}.png", number)
    rows = [[f"in/n{n}.png", n % 2, "train" if n < 2 else "valid", f"a{chr(13)}b {n}"] for n in range(4)]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in [["path", "grade", "split", "note"], *rows])
    (tmp_path / "data" / "labels.csv").write_bytes(text.encode())
    run(tmp_path / "data", tmp_path / "out")
    assert (tmp_path / "out" / "labels.csv").read_bytes().decode() == text.replace(".png", ".jpg") + "\n"
    assert told(tmp_path / "out") == told(tmp_path / "data")


def test_a_table_made_on_windows_keeps_backslashes_and_case(tmp_path: Path) -> None:
    for number, name in enumerate(["a.jpg", "b.TIF", "c.tif", "d.JPG", "e.png", "f.tif"]):
        eye(tmp_path / "data" / "in" / name, number)
    rows = [
        ["in\\a.jpg", 0, "train"], ["in\\b.tif", 1, "train"], ["in\\c.TIF", 2, "train"], ["D.jpg", 0, "valid"],
        ["E.PNG", 1, "valid"], ["F", 2, "valid"],
    ]  # fmt: skip
    photographs.write_csv(tmp_path / "data" / "labels.csv", ["path", "grade", "split"], rows)
    run(tmp_path / "data", tmp_path / "out")
    assert (tmp_path / "out" / "labels.csv").read_text().splitlines()[1:] == [
        "in\\a.jpg,0,train", "in\\b.jpg,1,train", "in\\c.jpg,2,train", "D.jpg,0,valid", "E.jpg,1,valid", "F,2,valid",
    ]  # fmt: skip
    assert told(tmp_path / "out") == told(tmp_path / "data")


def test_a_text_file_keeps_case(tmp_path: Path) -> None:
    data = official(tmp_path / "data", ".tif")
    labels = data / "DR_grading" / "train.txt"
    labels.write_text("N0.TIF 0\nn1.tif 1\nn2.Tif 2\nn3.tif 0\n")
    (data / "DR_grading" / "train" / "n1.tif").rename(data / "DR_grading" / "train" / "n1.TIF")
    run(data, tmp_path / "out")
    written = (tmp_path / "out" / "DR_grading" / "train.txt").read_text()
    assert written == "N0.jpg 0\nn1.jpg 1\nn2.jpg 2\nn3.jpg 0\n"
    assert told(tmp_path / "out") == told(data)


@pytest.mark.parametrize("make", ["text", "table"])
def test_a_name_in_another_case_stays_clear_beside_one_that_gets_its_extension(tmp_path: Path, make: str) -> None:
    data = official(tmp_path / "data")
    (data / "DR_grading" / "train" / "n0.jpg").rename(data / "DR_grading" / "train" / "n0.JPG")
    eye(data / "DR_grading" / "train" / "n0.png", 40)
    with (data / "DR_grading" / "train.txt").open("a") as stream:
        stream.write("n0.png 4\n")
    wanted = "n0.JPG 0\nn1.jpg 1\nn2.jpg 2\nn3.jpg 0\nn0.jpg 4\n"
    place = Path("DR_grading/train.txt")
    if make == "table":
        rows = []
        for split in ("train", "valid"):
            for line in (data / "DR_grading" / f"{split}.txt").read_text().splitlines():
                rows.append([f"{split}/{line.split()[0]}", line.split()[1], split])
        (data / "DR_grading").rename(tmp_path / "table")
        for labels in (tmp_path / "table").glob("*.txt"):
            labels.unlink()
        shutil.rmtree(tmp_path / "table" / "test")
        data, place = tmp_path / "table", Path("labels.csv")
        photographs.write_csv(data / place, ["path", "grade", "split"], rows)
        wanted = "train/n0.JPG,0,train\ntrain/n1.jpg,1,train\n"
    run(data, tmp_path / "out")
    assert wanted in (tmp_path / "out" / place).read_text()
    read = {entry.path: entry.grade for entry in survey.take(tmp_path / "out").entries}
    assert (read["train/n0.JPG"], read["train/n0.jpg"]) == (0, 4)


@pytest.mark.parametrize(
    "named",
    [
        {"1.tif": "1.tif", "a.jpg.tif": "A.JPG.TIF", "a.png": "A.PNG"},
        {"A/a.jpg.JPG": "a.jpg", "A/a.tif": "a.tif", "A/b.tif": "b"},
    ],
)
def test_a_name_stays_clear_beside_one_that_is_it_without_its_extension(named: dict[str, str], tmp_path: Path) -> None:
    source, out = tmp_path / "data", tmp_path / "out"
    photographs.write_csv(source / "labels.csv", ["path", "grade"], list(zip(named.values(), range(3), strict=True)))
    for path in named:
        photographs.draw(source / path)
    read = layouts.find(source).entries
    assert [entry.path for entry in read] == list(named)
    kept = [Kept(entry, name_of(entry.path, "jpeg")) for entry in read]
    for one in kept:
        photographs.draw(out / one.path)
    (out / "labels.csv").write_bytes(relabel.labels(source, kept)["labels.csv"])
    assert [(entry.path, entry.grade) for entry in layouts.find(out).entries] == [
        (one.path, grade) for grade, one in enumerate(kept)
    ]
