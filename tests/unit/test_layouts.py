"""Every form in which DDR and its kin lie on disk."""

from __future__ import annotations

import errno
import importlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from photographs import LAYOUTS, SET, draw, folders, gdrbench, official, write_csv
from tests_support import unlistable

from fastddr.config import SplitConfig
from fastddr.data import layouts, splits
from fastddr.data.layouts import Entry, Listing
from fastddr.errors import UserError

GRADE = {photo.name: photo.grade for photo in SET}
SPLIT = {photo.name: photo.split for photo in SET}


def seen(found: Listing, what: str = "grade") -> dict[str, Any]:
    """File name to grade, or to another field."""
    named = {os.path.basename(entry.path): getattr(entry, what) for entry in found.entries}
    assert len(named) == len(found.entries)
    return named


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
    unlistable(monkeypatch, tmp_path / "train", errno.ESTALE, once=True)
    with pytest.raises(OSError, match="train"):
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


def test_eyepacs_by_its_header_with_patients(tmp_path: Path) -> None:
    names = [f"{patient}_{side}" for patient in (10, 13, 15, 16, 17) for side in ("left", "right")]
    for number, name in enumerate(names):
        draw(tmp_path / "train" / f"{name}.jpeg", number)
    write_csv(tmp_path / "trainLabels.csv", ["image", "level"], [[name, 2] for name in names])
    write_csv(tmp_path / "sampleSubmission.csv", ["image", "level"], [["1_left", 0]])
    found = layouts.find(tmp_path)
    assert found.layout == "eyepacs"
    assert seen(found, "patient")["10_right.jpeg"] == "10"
    assert {entry.split for entry in found.entries} == {None}
    divided, _ = splits.assign(found, SplitConfig())
    of_patient = {(entry.patient, entry.split) for entry in divided}
    assert len(of_patient) == 5, "both eyes of a patient are in one split"


def test_eyepacs_with_the_grades_of_its_test_split(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "10_left.jpeg", 1)
    draw(tmp_path / "test" / "1_left.jpeg", 2)
    write_csv(tmp_path / "trainLabels.csv", ["image", "level"], [["10_left", 2]])
    write_csv(tmp_path / "retinopathy_solution.csv", ["image", "level", "Usage"], [["1_left", 0, "Public"]])
    assert seen(layouts.find(tmp_path), "split") == {"10_left.jpeg": "train", "1_left.jpeg": "test"}


def test_aptos_with_test_photographs_that_have_no_grade(tmp_path: Path) -> None:
    draw(tmp_path / "train_images" / "000c1434d8d7.png", 1)
    draw(tmp_path / "test_images" / "0005cfc8afb6.png", 2)
    write_csv(tmp_path / "train.csv", ["id_code", "diagnosis"], [["000c1434d8d7", 2]])
    write_csv(tmp_path / "test.csv", ["id_code"], [["0005cfc8afb6"]])
    write_csv(tmp_path / "sample_submission.csv", ["id_code", "diagnosis"], [["0005cfc8afb6", 0]])
    found = layouts.find(tmp_path)
    assert found.layout == "aptos"
    assert seen(found) == {"000c1434d8d7.png": 2}
    assert not found.problems
    for grade in (0, 1):
        draw(tmp_path / "test" / str(grade) / "a.png", grade)
    (note,) = layouts.find(tmp_path).notes
    assert note == (
        "3 photographs lie in folders of which train.csv names none, and are not read: test/0/, test/1/, test_images/."
    )


def test_idrid_whose_names_stand_in_both_splits(tmp_path: Path) -> None:
    """Its tables lie beside its photographs, have empty columns, and number both splits from 001."""
    home = tmp_path / "B. Disease Grading"
    header = ["Image name", "Retinopathy grade", "Risk of macular edema ", "", ""]
    for letter, word, grade in [("a", "Training", 3), ("b", "Testing", 4)]:
        draw(home / "1. Original Images" / f"{letter}. {word} Set" / "IDRiD_001.jpg", grade)
        name = f"{letter}. IDRiD_Disease Grading_{word} Labels.csv"
        write_csv(home / "2. Groundtruths" / name, header, [["IDRiD_001", grade, 1, "", ""], ["", "", "", "", ""]])
    for place in (home, tmp_path):
        found = layouts.find(place)
        assert found.layout == "idrid"
        assert sorted((entry.path.split("/")[-2], entry.grade, entry.split) for entry in found.entries) == [
            ("a. Training Set", 3, "train"),
            ("b. Testing Set", 4, "test"),
        ]
    # Without it, the other of its name must not take its place.
    (home / "1. Original Images" / "b. Testing Set" / "IDRiD_001.jpg").unlink()
    (problem,) = layouts.find(home).problems
    assert (problem.path, problem.kind) == ("1. Original Images/a. Training Set/IDRiD_001.jpg", "doubled")
    assert problem.reason.startswith("IDRiD_001 is of grade 4 by 2. Groundtruths/b. IDRiD_")
    assert problem.reason.endswith("or is one of two photographs of this name, of which the other is missing")


def test_messidor_2_by_its_header(tmp_path: Path) -> None:
    for number, name in enumerate(["a.png", "b.JPG", "c.png"]):
        draw(tmp_path / "IMAGES" / name, number)
    header = ["image_id", "adjudicated_dr_grade", "adjudicated_dme", "adjudicated_gradable"]
    for no in ("0", "0.0", "0.00", "False", "no"):
        rows = [["a.png", "2.0", "0.0", "1"], ["b.JPG", "0.0", "0.0", "1.0"], ["c.png", "0", "", no]]
        write_csv(tmp_path / "messidor_data.csv", header, rows)
        found = layouts.find(tmp_path)
        assert found.layout == "messidor2"
        assert seen(found) == {"a.png": 2, "b.JPG": 0, "c.png": 5}
    write_csv(tmp_path / "messidor_data.csv", header, [*rows[:2], ["c.png", "0", "", "ungradable"]])
    (problem, *_) = layouts.find(tmp_path).problems
    assert (problem.path, problem.kind) == ("messidor_data.csv, line 4", "grade")


def test_our_own_table_by_file_with_odd_names(tmp_path: Path) -> None:
    names = ["a b.jpg", "naïve ü.jpg", "two\nlines.jpg", 'comma, quote".jpg']
    for number, name in enumerate(names):
        draw(tmp_path / "all" / name, number)
    rows = [[f"all/{name}", grade, "training", "p"] for grade, name in enumerate(names)]
    write_csv(tmp_path / "mine.csv", ["path", "grade", "split", "patient"], rows)
    found = layouts.find(tmp_path / "mine.csv")
    assert seen(found) == {name: grade for grade, name in enumerate(names)}
    assert {(entry.split, entry.patient) for entry in found.entries} == {("train", "p")}
    assert not found.problems


def test_an_empty_grade_is_unknown_and_noted(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", 1)
    draw(tmp_path / "b.jpg", 2)
    draw(tmp_path / "c.jpg", 3)
    write_csv(tmp_path / "t.csv", ["path", "grade"], [["a.jpg", 3], ["b.jpg", ""], ["c.jpg", -1]])
    found = layouts.find(tmp_path)
    assert seen(found) == {"a.jpg": 3, "b.jpg": -1, "c.jpg": -1}
    assert [(p.path, p.kind) for p in found.problems] == [("b.jpg", "unlabelled"), ("c.jpg", "unlabelled")]


def test_a_table_whose_photographs_all_lie_elsewhere(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / "photos" / f"{number}.png", number)
    rows = [[f"{number}.png", number] for number in range(3)]
    write_csv(tmp_path / "labels" / "l.csv", ["path", "grade"], rows)
    for place in (tmp_path / "labels", tmp_path / "labels" / "l.csv"):
        with pytest.raises(UserError, match=r"none of the 3 photographs that l\.csv names.*holds both the table"):
            layouts.find(place)
    assert len(layouts.find(tmp_path).entries) == 3
    write_csv(tmp_path / "labels" / "l.csv", ["path", "grade"], [[f"images/{number}.JPG", 1] for number in range(3)])
    with pytest.raises(UserError, match=r"images/0\.JPG is not there, but photos/0\.png is: mend the names"):
        layouts.find(tmp_path)
    # One that is there is enough, and so is a link to nothing: each of the others has an error of its own.
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.JPG").symlink_to("gone")
    assert len(layouts.find(tmp_path).entries) == 3


def test_a_table_whose_photographs_all_lie_in_several_folders(tmp_path: Path) -> None:
    """EyePACS made smaller lies beside EyePACS cropped, each in a folder of a folder."""
    for number, home in enumerate(["resized/resized", "cropped/cropped"]):
        draw(tmp_path / home / "10_left.jpeg", number)
        draw(tmp_path / home / "10_right.jpeg", number)
    draw(tmp_path / "cropped" / "cropped" / "10_right.png")
    write_csv(tmp_path / "trainLabels.csv", ["image", "level"], [["10_left", 1], ["10_right.jpeg", 2]])
    with pytest.raises(UserError, match=r"names lies in several folders \(cropped/cropped, resized/resized\); put the"):
        layouts.find(tmp_path / "trainLabels.csv")
    (tmp_path / "trainLabels.csv").rename(tmp_path / "resized" / "resized" / "trainLabels.csv")
    assert seen(layouts.find(tmp_path / "resized" / "resized")) == {"10_left.jpeg": 1, "10_right.jpeg": 2}


@pytest.mark.parametrize(
    ("photographs", "label_file", "header", "row"),
    [
        ("eye/{}/{}_{}.jpeg", "eye/labels/trainLabels.csv", "image,level", "{1}_{2}"),
        ("export/photos/{1}/{2}.jpg", "export/tables/labels.csv", "path,grade", "photos/{1}/{2}.jpg"),
    ],
)
def test_folders_like_splits_or_grades_hide_no_table(
    photographs: str, label_file: str, header: str, row: str, tmp_path: Path
) -> None:
    named = [("train" if n < 9 else "test", n, side) for n in range(1, 13) for side in ("left", "right")]
    for number, one in enumerate(named):
        draw(tmp_path / photographs.format(*one), number)
    home = tmp_path / label_file.partition("/")[0]
    # Of a header that is not known, or in a form that is not: what the folders seem to be, and the table.
    (tmp_path / label_file).parent.mkdir()
    for file, wrong in ((label_file, "patient_id,image_id"), (f"{label_file[:-4]}.xlsx", "other form: save it as CSV")):
        (tmp_path / file).write_text(f"{wrong}\n")
        with pytest.raises(UserError, match=rf"no grade|is empty.*{wrong}"):
            layouts.find(home)
        (tmp_path / file).unlink()
    (tmp_path / label_file).write_text("\n".join([header, *(f"{row.format(*one)},{one[1] % 5}" for one in named)]))
    for place in (home, tmp_path):
        found = layouts.find(place)
        assert found.root == home
        assert len(found.entries) == len(named)
        assert not found.problems


def test_a_misspelt_grade_is_told_from_the_folder_above_and_beside_another_set(tmp_path: Path) -> None:
    folders(tmp_path / "mine")
    (tmp_path / "mine" / "train" / "2").rename(tmp_path / "mine" / "train" / "moderrate")
    for _ in range(2):
        with pytest.raises(UserError, match=r"mine/train/moderrate: this class folder is no grade"):
            layouts.find(tmp_path)
        LAYOUTS["csv"](tmp_path / "other")


def test_numbered_folders_beside_a_table_that_is_not_read(tmp_path: Path) -> None:
    for number in range(10):
        draw(tmp_path / "site" / str(1 + number % 5) / f"{number}.jpg", number)
    assert any("No photograph is of grade 0" in note for note in layouts.find(tmp_path).notes)
    for file in ("grades.csv", "site/grades.xlsx"):
        (tmp_path / file).write_text("file,dr_grade\n0.jpg,0\n")
        said = rf"site: its folders 1, 2, 3, 4, 5 may be grades or mere numbers, and {Path(file).name} beside them"
        with pytest.raises(UserError, match=said):
            layouts.find(tmp_path)
        draw(tmp_path / "site" / "0" / "10.jpg", 10)
        found = layouts.find(tmp_path)
        assert len(found.entries) == 11, "all of 0-4 are grades"
        assert found.notes == []
        (tmp_path / "site" / "0" / "10.jpg").unlink()
        (tmp_path / file).unlink()


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("path,Grade,grade ", "Grade and grade"),
        ("path,grade,Path", "path and Path"),
        ("path,grade,split,Split", "split and Split"),
        ("path,grade,patient,patient", "patient and patient"),
        ("path,grade,Patient,patient_id", "Patient and patient_id"),
        ("image_id,adjudicated_dr_grade,adjudicated_gradable,adjudicated gradable",
         "adjudicated_gradable and adjudicated gradable"),
    ],
)  # fmt: skip
def test_two_columns_that_mean_the_same_are_refused(header: str, columns: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"{header}\na.jpg,0,1,1\n")
    for place in (tmp_path, tmp_path / "labels.csv"):
        with pytest.raises(UserError, match=rf"labels\.csv: its columns {columns}.* keep the right one"):
            layouts.find(place)


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        (["a.jpg", "7", ""], "grade", "grade '7' of a.jpg"),
        (["a.jpg", "cat", ""], "grade", "'cat'"),
        (["a.jpg", "- 1", ""], "grade", "'- 1'"),
        (["a.jpg", "1?", ""], "grade", "'1?'"),
        (["a.jpg", "4+", ""], "grade", "'4+'"),
        (["a.jpg", "None", ""], "grade", "'None' of a.jpg may mean that there is none"),
        (["3", "a.jpg", "1", "train"], "label", "4 cells under 3 headings"),
        (["a\0.jpg", "1", ""], "label", "cannot hold a NUL"),
        ([], "label", "name of the photograph is empty"),
        (["", "1", ""], "label", "name of the photograph is empty"),
        (["../a.jpg", "1", ""], "label", "leads out of the folder"),
        (["/etc/a.jpg", "1", ""], "label", "leads out of the folder"),
        (["a.jpg", "1", "holdout"], "label", "the split 'holdout' of a.jpg"),
        (["b.jpg", "1", "train"], "doubled", "of grade 0 by labels.csv, line 2 and of grade 1 by labels.csv, line 3"),
        (["twice", "1", "train"], "ambiguous", "twice may be one/twice.jpg, two/twice.jpg"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row: list[str], kind: str, said: str, tmp_path: Path) -> None:
    for number, name in enumerate(["a.jpg", "b.jpg", "one/twice.jpg", "two/twice.jpg"]):
        draw(tmp_path / name, number)
    # The name last, so that a short row lacks it.
    rows = [["train", 0, "b.jpg"], row[::-1] or ["train"]]
    write_csv(tmp_path / "labels.csv", ["split", "grade", "path"], rows)
    (problem, *_) = [p for p in layouts.find(tmp_path / "labels.csv").problems if p.kind != "orphan"]
    assert problem.kind == kind
    assert said in problem.reason
    assert problem.severity == "error"
    assert "line 3" in problem.path + problem.reason


def test_a_name_that_many_photographs_bear_is_sought_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs by patient, whose table has no more than `left.jpg`: rows times photographs would be days."""
    draw(tmp_path / "left.jpg", 0)
    for number in range(50):
        home = tmp_path / "photos" / ("test" if number == 7 else "train") / f"{number:02d}"
        home.mkdir(parents=True)
        os.link(tmp_path / "left.jpg", home / "left.jpg")
    (tmp_path / "left.jpg").unlink()
    asked: list[list[str]] = []
    # The package has a function of this module's name.
    table = importlib.import_module("fastddr.data.layouts.table")
    split_in = table._split_in

    def counted(names: list[str]) -> str | None:
        asked.append(names)
        return split_in(names)

    monkeypatch.setattr(table, "_split_in", counted)
    rows = [["left.jpg", 1, "train"]] * 49 + [["left.jpg", 2, "test"]]
    write_csv(tmp_path / "labels.csv", ["path", "grade", "split"], rows)
    found = layouts.find(tmp_path / "labels.csv")
    assert [(entry.path, entry.split) for entry in found.entries] == [("photos/test/07/left.jpg", "test")]
    wrong = [problem.reason for problem in found.problems if problem.kind == "ambiguous"]
    photographs = [f"photos/train/{number:02d}/left.jpg" for number in range(3)]
    assert wrong == [f"left.jpg may be {', '.join(photographs)}, …"] * 49
    assert len(asked) == 50, "each folder once"


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
    with pytest.raises(UserError, match="this label file is a link that leads out of the data") as caught:
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
        (["a.JPG"], "photographs lie in it, and no labels beside them"),
        (["lesion_segmentation"], "DDR's part with lesions, and the photographs with grades are in its DR_grading"),
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


def test_tables_that_do_not_tell_which_is_which(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        write_csv(tmp_path / name, ["path", "grade"], [["a.jpg", 1]])
    with pytest.raises(UserError, match=r"several label tables \(one.csv, two.csv\)"):
        layouts.find(tmp_path)
    write_csv(tmp_path / "three.csv", ["a", "b"], [])
    with pytest.raises(UserError, match="no label table"):
        layouts.find(tmp_path / "three.csv")
    write_csv(tmp_path / "four.csv", ["path", "grade"], [])
    with pytest.raises(UserError, match="is empty"):
        layouts.find(tmp_path / "four.csv")


def test_some_rows_without_a_split_are_refused(tmp_path: Path) -> None:
    entries = [Entry("a.jpg", 0, "train", None, "t.csv", 2, "a"), Entry("b.jpg", 0, None, None, "t.csv", 3, "b")]
    with pytest.raises(UserError, match=r"t.csv, line 3: b has no split"):
        splits.assign(Listing("csv", tmp_path, entries), SplitConfig())
