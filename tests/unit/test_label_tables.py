"""Label tables: those of known data sets, and one's own."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
from photographs import LAYOUTS, draw, folders, seen, write_csv

from fastddr.config import SplitConfig
from fastddr.data import layouts, splits
from fastddr.data.layouts import Entry, Listing, common
from fastddr.errors import UserError


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
        write_csv(tmp_path / "messidor_data.csv", header, [rows[0], ["b.JPG", "3", "", "1"], rows[2]])
        assert layouts.find(tmp_path).notes == [], "by its column, and on no scale that may begin at 1"
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
    for place, way_out in (("labels", "holds both the table"), ("labels/l.csv", r"copy l\.csv into the folder above")):
        with pytest.raises(UserError, match=rf"none of the 3 photographs that l\.csv names.*{way_out}"):
            layouts.find(tmp_path / place)
    assert len(layouts.find(tmp_path).entries) == 3
    # Beside another table that folder is refused; a copy is read, and advised from the first.
    write_csv(tmp_path / "labels" / "m.csv", ["path", "grade"], rows)
    for place in (tmp_path, tmp_path / "labels"):
        with pytest.raises(UserError, match=r"several label tables .*copy one into the folder above its photographs"):
            layouts.find(place)
    write_csv(tmp_path / "l.csv", ["path", "grade"], rows)
    assert len(layouts.find(tmp_path / "l.csv").entries) == 3
    write_csv(tmp_path / "m.csv", ["path", "grade"], rows)
    with pytest.raises(UserError, match=r"several label tables .*give one as --data FILE\.csv, or name them"):
        layouts.find(tmp_path)
    for file in ("l.csv", "m.csv", "labels/m.csv"):
        (tmp_path / file).unlink()
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


def test_one_name_in_every_folder_is_soon_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`7/fundus.jpg`: each row may mean each photograph, and of some thousands that took hours."""
    for number in range(60):
        draw(tmp_path / str(number) / "fundus.jpg", number)
    write_csv(tmp_path / "labels.csv", ["path", "grade"], [["fundus.jpg", 1]] * 60)
    module, asked = importlib.import_module("fastddr.data.layouts.table"), [0]
    real = module._below
    monkeypatch.setattr(module, "_below", lambda *of: (asked.append(1), real(*of))[1])
    with pytest.raises(UserError, match=r"names lies in several folders \(0, 1, 10, …\); put the"):
        layouts.find(tmp_path)
    assert sum(asked) < 60


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
    for number, word in enumerate(["mild", "moderate", "severe", "proliferative", "ungradable"], 1):
        (tmp_path / "site" / str(number)).rename(tmp_path / "site" / word)
    assert max(seen(layouts.find(tmp_path)).values()) == 5
    assert not any("No photograph is of grade 0" in note for note in layouts.find(tmp_path).notes), (
        "words begin nowhere"
    )


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
    split_in = common.split_in

    def counted(names: list[str]) -> str | None:
        asked.append(names)
        return split_in(names)

    monkeypatch.setattr(common, "split_in", counted)
    rows = [["left.jpg", 1, "train"]] * 49 + [["left.jpg", 2, "test"]]
    write_csv(tmp_path / "labels.csv", ["path", "grade", "split"], rows)
    found = layouts.find(tmp_path / "labels.csv")
    assert [(entry.path, entry.split) for entry in found.entries] == [("photos/test/07/left.jpg", "test")]
    wrong = [problem.reason for problem in found.problems if problem.kind == "ambiguous"]
    photographs = [f"photos/train/{number:02d}/left.jpg" for number in range(3)]
    assert wrong == [f"left.jpg may be {', '.join(photographs)}, …"] * 49
    assert len(asked) == 50, "each folder once"


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
