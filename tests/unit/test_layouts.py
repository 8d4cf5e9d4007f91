"""Every form in which DDR and its kin lie on disk."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from photographs import GRADE, LAYOUTS, SET, SPLIT, draw, folders, gdrbench, official, seen, write_csv
from tests_support import unlistable

from fastddr.data import layouts
from fastddr.errors import UserError


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("above", [0, 1], ids=["itself", "parent"])
def test_every_layout_from_its_folder_and_from_the_one_above(name: str, above: int, tmp_path: Path) -> None:
    LAYOUTS[name](tmp_path / "home" / "set")
    found = layouts.find([tmp_path / "home" / "set", tmp_path / "home"][above])
    assert found.layout == name
    kept = {
        photo.name
        for photo in SET
        if not (photo.grade == 5 and name in ("kaggle", "gdrbench"))
        and not (photo.split == "test" and name == "gdrbench")
    }
    assert seen(found) == {name: GRADE[name] for name in kept}
    if name != "kaggle":
        assert seen(found, "split") == {name: SPLIT[name] for name in kept}
    assert all((found.root / entry.path).is_file() for entry in found.entries)
    assert not found.problems


def test_ddr_as_it_is_unpacked_from_three_places(tmp_path: Path) -> None:
    """Beside DR_grading lie two folders that are cut into splits too, and are not ours."""
    root = official(tmp_path / "DDR-dataset")
    for other in ("lesion_segmentation", "lesion_detection"):
        for split in ("train", "valid", "test"):
            draw(root / other / split / "image" / "007-0001-000.jpg")
    roots = {layouts.find(place).root for place in (root, root / "DR_grading", tmp_path)}
    assert roots == {root / "DR_grading"}


def test_two_sets_side_by_side_are_one_sentence_that_names_them(tmp_path: Path) -> None:
    folders(tmp_path / "two")
    official(tmp_path / "one")
    with pytest.raises(UserError, match=r"several data sets lie below it \(two, one/DR_grading\)"):
        layouts.find(tmp_path)
    folders(tmp_path / "three")
    with pytest.raises(UserError, match=r"several data sets lie below it \(three, two\)"):
        layouts.find(tmp_path)


def test_what_lies_beside_a_set_and_is_no_other_one_is_passed_over(tmp_path: Path) -> None:
    official(tmp_path / "set")
    run, lists = tmp_path / "runs" / "mine", tmp_path / "deep" / "links" / "boxes"
    for folder in (run, lists):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text("lr: 1\n")
    write_csv(run / "manifest.csv", ["path", "grade"], [["a.jpg", "1"]])
    (lists / "train.txt").write_text("train/a.jpg\n")  # an official set without valid.txt would be an error
    (tmp_path / "deep" / "links" / "set").symlink_to(tmp_path / "set" / "DR_grading")
    assert layouts.find(tmp_path).root == tmp_path / "set" / "DR_grading"


@pytest.mark.parametrize("extension", [".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".tif", ".TIFF"])
def test_extensions_in_any_case(extension: str, tmp_path: Path) -> None:
    official(tmp_path / "one", extension=extension)
    draw(tmp_path / "two" / "train" / "3" / f"a{extension}")
    draw(tmp_path / "three" / "photographs" / f"a{extension}")
    write_csv(tmp_path / "three" / "t.csv", ["id_code", "diagnosis"], [["a", 3]])
    for name, photographs in [("one", len(SET)), ("two", 1), ("three", 1)]:
        found = layouts.find(tmp_path / name)
        assert len(found.entries) == photographs
        assert all((found.root / entry.path).is_file() for entry in found.entries)
        assert not found.problems


def test_photographs_without_a_label_are_orphans(tmp_path: Path) -> None:
    for name, place in [("official", "DR_grading/train"), ("kaggle", "DR_grading/DR_grading"), ("csv", "photographs")]:
        root = LAYOUTS[name](tmp_path / name)
        for orphan in ("007-7447-601.jpg", "007-7449-601.jpg"):
            draw(root / place / orphan)
        found = layouts.find(root)
        assert [(p.kind, os.path.basename(p.path)) for p in found.problems] == [
            ("orphan", "007-7447-601.jpg"),
            ("orphan", "007-7449-601.jpg"),
        ]
        assert any("007-7447-601.jpg" in note and "2 photographs" in note for note in found.notes)


def test_photographs_of_a_test_split_whose_label_file_is_gone_are_orphans(tmp_path: Path) -> None:
    root = official(tmp_path) / "DR_grading"
    (root / "test.txt").unlink()
    found, held_out = layouts.find(tmp_path), sorted(name for name, split in SPLIT.items() if split == "test")
    assert [(p.kind, p.path) for p in found.problems] == [("orphan", f"test/{name}") for name in held_out]
    assert any(f"{len(held_out)} photographs in test/ have no line in test.txt" in note for note in found.notes)


def test_gdrbench_with_more_than_ddr_takes_ddr_and_says_so(tmp_path: Path) -> None:
    gdrbench(gdrbench(tmp_path), name="APTOS")
    found = layouts.find(tmp_path)
    assert all(entry.path.startswith("images/DDR/") for entry in found.entries)
    assert any("only DDR" in note and "APTOS" in note for note in found.notes)
    other = layouts.find(tmp_path / "images" / "APTOS")
    assert all(entry.path.startswith("images/APTOS/") for entry in other.entries)
    gdrbench(tmp_path / "two", name="APTOS")
    gdrbench(tmp_path / "two", name="IDRID")
    with pytest.raises(UserError, match=r"2 sets \(APTOS, IDRID\); give one"):
        layouts.find(tmp_path / "two")


def test_class_folders_without_splits(tmp_path: Path) -> None:
    for number, name in enumerate(["0", "1", "2", "3", "4"] * 2):
        draw(tmp_path / name / f"{number}.jpg", number)
    found = layouts.find(tmp_path)
    assert {entry.split for entry in found.entries} == {None}
    assert Counter(entry.grade for entry in found.entries) == dict.fromkeys(range(5), 2)


def test_photographs_in_no_class_folder_are_orphans(tmp_path: Path) -> None:
    folders(tmp_path)
    loose = ["extra/0/a.jpg", "loose.jpg", "train/0/left/b.jpg", "train/c.jpg"]
    for number, name in enumerate(loose):
        draw(tmp_path / name, 90 + number)
    found = layouts.find(tmp_path)
    assert [(problem.path, problem.kind) for problem in found.problems] == [(name, "orphan") for name in loose]
    assert any("4 photographs lie in no class folder" in note for note in found.notes)


@pytest.mark.parametrize("name", ["official", "gdrbench", "kaggle", "csv"])
def test_a_label_that_differs_from_its_file_in_case_alone(name: str, tmp_path: Path) -> None:
    root = LAYOUTS[name](tmp_path)
    before = seen(layouts.find(root))
    for path in sorted(root.rglob("*.jpg")):
        path.rename(path.with_suffix(".JPG"))
    found = layouts.find(root)
    assert seen(found) == {f"{Path(name).stem}.JPG": grade for name, grade in before.items()}
    assert all((found.root / entry.path).is_file() for entry in found.entries)
    assert not found.problems


def test_what_lies_beside_a_data_set_and_cannot_be_read_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official(tmp_path / "DDR-dataset")
    (tmp_path / "notes.csv").write_bytes("größe;zahl\n".encode("latin-1"))
    (tmp_path / "a").mkdir()
    listdir = os.listdir

    def refuse(folder: Path) -> list[str]:
        if folder.name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    assert layouts.find(tmp_path).layout == "official"


def test_a_class_folder_that_may_not_be_read_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path)
    scandir = os.scandir

    def refuse(folder: Path) -> Any:
        if str(folder).endswith("train/2"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = layouts.find(tmp_path)
    assert [(problem.path, problem.kind) for problem in found.problems] == [("train/2", "unreadable")]


def test_a_folder_that_cannot_be_read_below_a_table_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        draw(tmp_path / f"part{number}" / f"{number}.jpg", number)
    write_csv(tmp_path / "labels.csv", ["path", "grade"], [["0.jpg", 0], ["1.jpg", 1]])
    unlistable(monkeypatch, tmp_path / "part1", errno.EACCES)
    assert f"{tmp_path / 'part1'}: this folder cannot be read" in layouts.find(tmp_path).notes[0]


def test_a_server_that_is_away_for_a_moment_makes_no_other_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path)
    for away in ("train", "train/2"):
        with monkeypatch.context() as patch:
            unlistable(patch, tmp_path / away, errno.ESTALE, once=True)
            with pytest.raises(OSError, match=away):
                layouts.find(tmp_path)


# ------------------------------------------------------------------------------------------ tables


def test_a_link_to_itself_is_one_bad_photograph_of_its_class(tmp_path: Path) -> None:
    root = folders(tmp_path)
    whole = layouts.find(root)
    place = root / whole.entries[0].path
    (place.parent / "loop.jpg").symlink_to("loop.jpg")
    found = layouts.find(root)
    assert len(found.entries) == len(whole.entries) + 1
    assert found.problems == whole.problems, "the folder can be read"


def test_a_table_made_on_windows(tmp_path: Path) -> None:
    draw(tmp_path / "clinic" / "a.jpg", 1)
    draw(tmp_path / "clinic" / "b.jpg", 2)
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfpath;grade\r\nclinic\\a.jpg;3\r\nclinic\\b.jpg;2.0\r\n")
    assert seen(layouts.find(tmp_path)) == {"a.jpg": 3, "b.jpg": 2}
    (tmp_path / "t.csv").write_bytes("path\tgrade\nclinic/a.jpg\t3\nä.jpg\t1\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        layouts.find(tmp_path)


def test_photographs_behind_a_link(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "10_left.jpeg", 1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set" / "DR_grading")
    write_csv(tmp_path / "set" / "trainLabels.csv", ["image", "level"], [["10_left", 2]])
    found = layouts.find(tmp_path / "set")
    assert seen(found) == {"10_left.jpeg": 2}
    assert not found.problems


@pytest.mark.parametrize(
    ("name", "link"),
    [("official", "DR_grading/valid.txt"), ("gdrbench", "splits/DDR_train.txt"), ("csv", "labels.csv")],
)
def test_a_label_file_that_leads_out_is_refused_before_it_is_read(name: str, link: str, tmp_path: Path) -> None:
    data, secret = tmp_path / "set", tmp_path / "secret"
    LAYOUTS[name](data)
    link_at = next(data.rglob(Path(link).name), data / link)
    link_at.rename(secret)
    link_at.symlink_to(secret)
    before = secret.read_text()
    secret.write_text(before.partition("\n")[0] + "\npassword\n")
    with pytest.raises(UserError, match="it is a link that leads out of the data") as caught:
        layouts.find(data)
    assert "password" not in str(caught.value)
    secret.write_text(before)
    assert layouts.find(data, follow_links=True).entries
    # A link within the set is none that leads out, wherever the set lies.
    link_at.unlink()
    secret.rename(data / "real.txt")
    link_at.symlink_to(data / "real.txt")
    (tmp_path / "linked").symlink_to(data)
    assert layouts.find(tmp_path / "linked").entries


def test_of_a_table_beyond_a_link_not_even_the_header_is_told(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password,1\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="no known layout") as caught:
        layouts.find(tmp_path / "set")
    assert "password" not in str(caught.value)


def test_a_pipe_is_no_table_and_a_long_line_is_cut(tmp_path: Path) -> None:
    data = tmp_path / "set"
    LAYOUTS["official"](data)
    with next(data.rglob("train.txt")).open("a") as labels:
        labels.write("x" * 500 + "\n" + "y.jpg " + "9" * 5000 + "\n")
    wrong = [problem.reason for problem in layouts.find(data).problems if problem.kind == "label"]
    assert len(wrong) == 2
    assert max(map(len, wrong)) < 100
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "empty" / "x.csv")
    with pytest.raises(UserError, match="no known layout"):
        layouts.find(tmp_path / "empty")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["DDR-dataset.zip.001", "DDR-dataset.zip.010"],
         "DDR-dataset.zip lies there in parts: join them (`cat DDR-dataset.zip.0* > DDR-dataset.zip`) and unpack it"),
        (["ddr.tar.gz", "notes.txt"], "ddr.tar.gz is an archive: unpack it"),
        (["labels.csv", "a.jpg"], "the header of labels.csv is name;DR level, which is none of those"),
        (["notes.txt"], "like train/0/ or train/mild/."),
    ],
)  # fmt: skip
def test_where_there_is_no_data_set_what_lies_there_is_told(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("name;DR level\na.jpg;0\n")
    with pytest.raises(UserError, match=f"no known layout.*{re.escape(said)}"):
        layouts.find(tmp_path)


def test_a_file_that_is_no_table_is_told_for_what_it_is(tmp_path: Path) -> None:
    for name, said in (
        ("d.zip.003", "lies there in parts"),
        ("d.zip", "is an archive: unpack it, and give the folder"),
        ("t.csv", "should be path,grade[,split][,patient], and is a,b."),
        ("e.csv", "and is empty."),
    ):
        (tmp_path / name).write_text("" if name == "e.csv" else "a,b\n1,2\n")
        with pytest.raises(UserError, match=re.escape(said)):
            layouts.find(tmp_path / name)
