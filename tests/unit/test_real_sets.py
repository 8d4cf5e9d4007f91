"""What data sets from elsewhere bring along: eyes of one patient, odd tables, links, and folders of a system."""

from __future__ import annotations

import itertools
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from eyes import eye, run, told
from eyes import quick as quick  # a fixture of all these tests
from photographs import draw, folders, gdrbench, kaggle, labelled, official

from fastddr.config import SplitConfig
from fastddr.data import layouts, manifest, photos, problems, splits, survey
from fastddr.data.crop import Recipe
from fastddr.data.layouts import Entry, Listing
from fastddr.data.layouts.common import patient_of
from fastddr.errors import UserError

EYES = [f"{patient}_{side}" for patient in (10, 13, 15, 16, 17) for side in ("left", "right")]


def table(root: Path, header: str, *rows: str, name: str = "labels.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return root


def patients(root: Path) -> dict[str, str | None]:
    return {Path(entry.path).name: entry.patient for entry in layouts.find(root).entries}


# ------------------------------------------------------------------------------------------ patients


def _in_folders(root: Path) -> None:
    for number, name in enumerate(EYES):
        draw(root / str(number % 5) / f"{name}.jpeg", number)


def _in_lists(root: Path) -> None:
    lines: dict[str, list[str]] = {"train": [], "crossval": []}
    for number, name in enumerate(EYES):
        draw(root / "images" / "EYEPACS" / "nodr" / f"{name}.jpeg", number)
        lines["crossval" if number == 9 else "train"].append(f"EYEPACS/nodr/{name}.jpeg 0\n")
    (root / "splits").mkdir()
    for ending, of_list in lines.items():
        (root / "splits" / f"EYEPACS_{ending}.txt").write_text("".join(of_list))


def _in_splits(root: Path) -> None:
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True)
        names = [f"{name}.jpeg" for name in EYES if name.startswith("17") == (split == "valid")]
        for number, name in enumerate(names):
            draw(root / split / name, number)
        (root / f"{split}.txt").write_text("".join(f"{name} 0\n" for name in names))


def _in_a_table(root: Path) -> None:
    for number, name in enumerate(EYES):
        draw(root / "all" / f"{name}.jpeg", number)
    table(root, "id_code,diagnosis", *(f"{name},0" for name in EYES))


@pytest.mark.parametrize("make", [_in_folders, _in_lists, _in_splits, _in_a_table])
def test_names_of_eyepacs_tell_the_patient_in_every_layout(make: Callable[[Path], Path], tmp_path: Path) -> None:
    make(tmp_path / "set")
    assert patients(tmp_path / "set") == {f"{name}.jpeg": name.split("_")[0] for name in EYES}


@pytest.mark.parametrize(
    ("name", "patient"),
    [("10_LEFT.JPG", "10"), ("10_left-600.jpg", "10"), ("10_right-600-FA.jpg", "10")]
    + [("10_left_jpeg.rf.1a2b.jpg", "10"), ("a/10_right (1).png", "10"), ("10_left", "10")]
    + [(name, None) for name in ("10_leftover.jpg", "10_left2.jpg", "x10_left.jpg", "10_left/7.jpg", "7-10_left.jpg")],
)
def test_copies_of_eyepacs_tell_the_patient_too(name: str, patient: str | None) -> None:
    assert patient_of(name) == patient


def test_eyes_of_one_patient_are_drawn_into_one_split_and_told_where_they_are_not(tmp_path: Path) -> None:
    _in_folders(tmp_path / "drawn")
    divided, notes = splits.assign(layouts.find(tmp_path / "drawn"), SplitConfig())
    assert len({(entry.patient, entry.split) for entry in divided}) == 5
    assert "patient by patient" in notes[0]
    _in_lists(tmp_path / "given")
    (bad,) = problems.errors(survey.take(tmp_path / "given").problems())
    assert (bad.path, bad.kind) == ("images/EYEPACS/nodr/17_left.jpeg", "patient-in-two-splits")


@pytest.mark.parametrize("make", [official, kaggle, gdrbench, folders, labelled])
def test_names_of_ddr_tell_no_patient(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert set(patients(make(tmp_path)).values()) == {None}


def test_a_column_of_patients_overrules_names(tmp_path: Path) -> None:
    for name in EYES[:2]:
        draw(tmp_path / f"{name}.jpeg")
    for column in ("patient", "Patient ID"):
        table(tmp_path, f"path,grade,{column}", "10_left.jpeg,0,p7", "10_right.jpeg,0,")
        assert patients(tmp_path) == {"10_left.jpeg": "p7", "10_right.jpeg": None}


@pytest.mark.parametrize(
    ("cell", "patient"),
    [("17", "17"), ("17.0", "17"), ("1.2.840.0", "1.2.840.0"), ("17.5", "17.5"), ("p/3", "p/3"), (" p1 ", "p1")]
    + [("017", "017"), ("#12", "#12"), (unicodedata.normalize("NFD", "Müller"), unicodedata.normalize("NFC", "Müller"))]
    + [(cell, None) for cell in ("", "NA", "n/a", "NaN", "None", "null", "Unknown", "anon", "-")]
    + [(cell, None) for cell in ("#N/A", "#NV", "<NA>", "#REF!")],
)
def test_what_a_cell_says_of_the_patient(cell: str, patient: str | None, tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    table(tmp_path, "path,grade,patient", f"a.jpg,0,{cell}")
    assert patients(tmp_path) == {"a.jpg": patient}


def _drawn(ids: list[str]) -> dict[str, set[str]]:
    entries = [Entry(f"all/{number}-{n}.jpg", n % 5, None, number) for n, number in enumerate(ids)]
    found, _ = splits.assign(Listing("csv", Path("/nowhere"), entries), SplitConfig())
    return {split: {e.patient or "" for e in found if e.split == split} for split in ("valid", "test")}


def test_ordinary_ids_keep_the_split_that_they_always_had() -> None:
    assert _drawn([f"p{number}" for number in range(20)]) == {
        "valid": {"p1", "p13", "p15", "p19", "p2"},
        "test": {"p11", "p14", "p17", "p5", "p8"},
    }


@pytest.mark.parametrize("mark", [".", "/"])
def test_ids_with_dots_and_slashes_are_as_many_places_in_the_draw(mark: str) -> None:
    """Cut like file names, all of these would be one, and the order of the ids would draw."""
    ids = [f"1{mark}2{mark}{number:02d}" for number in range(100)]
    if mark == "/":
        ids = [f"{number:02d}/x" for number in range(100)]
    for of_split in _drawn(ids).values():
        places = sorted(map(ids.index, of_split))
        assert max(b - a for a, b in itertools.pairwise(places)) < 40
        assert len({place // 20 for place in places}) == 5, "spread over all of them"


# ------------------------------------------------------------------------------------------ named twice


def test_a_photograph_in_two_tables_stays_in_the_one_that_is_held_out(tmp_path: Path) -> None:
    for number in range(6):
        draw(tmp_path / f"{number}.jpg", number)
    table(tmp_path, "path,grade", "0.jpg,0", "1.jpg,1", "2.jpg,2", name="train.csv")
    table(tmp_path, "path,grade", "3.jpg,0", "1.jpg,1", name="valid.csv")
    table(tmp_path, "path,grade", "4.jpg,0", "./1.jpg,1", "2.jpg,2", name="test.csv")
    found = problems.errors(layouts.find(tmp_path).problems)
    assert sorted((problem.path, problem.kind) for problem in found) == [
        ("train.csv, line 3", "doubled"),
        ("train.csv, line 4", "doubled"),
        ("valid.csv, line 3", "doubled"),
    ]
    assert any("2.jpg is in test too, by test.csv, line 4" in problem.reason for problem in found)
    with pytest.raises(UserError, match=r"line \d: .*by test\.csv, line \d.*remove one of the two"):
        manifest.read(tmp_path)
    left = manifest.read(tmp_path, on_bad="exclude")
    assert dict(zip(left.path, left.split, strict=True)) == {
        "0.jpg": "train", "3.jpg": "valid", "1.jpg": "test", "2.jpg": "test", "4.jpg": "test",
    }  # fmt: skip
    listed = frozenset(problem.path for problem in found)
    assert manifest.read(tmp_path, exclude=listed).fingerprint == left.fingerprint, "as the list of a check does"


def test_a_photograph_in_two_splits_of_one_table(tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / f"{number}.jpg", number)
    table(tmp_path, "path,grade,split", "0.jpg,0,test", "1.jpg,1,valid", "2.jpg,2,train", "0.jpg,0,train")
    listing = layouts.find(tmp_path)
    assert [p.path for p in listing.problems if p.kind == "doubled"] == ["labels.csv, line 5"]
    assert [(e.path, e.split) for e in listing.entries if e.path == "0.jpg"] == [("0.jpg", "test")]


@pytest.mark.parametrize(
    ("named", "held", "lines"),
    [
        (("train", "train", "test"), "test", 2),
        (("train", "valid", "valid", "test"), "test", 3),
        (("train", "test", "test"), None, 1),
    ],
)
def test_the_order_of_lines_decides_on_no_photograph(
    named: tuple[str, ...], held: str | None, lines: int, tmp_path: Path
) -> None:
    """Held out by one line it stays, however often the splits below name it; by two it is in doubt itself."""
    for number in range(4):
        draw(tmp_path / f"{number}.jpg", number)
    for order in set(itertools.permutations(named)):
        rows = ["0.jpg,0,train", *(f"1.jpg,1,{split}" for split in order), "2.jpg,2,valid", "3.jpg,3,test"]
        table(tmp_path, "path,grade,split", *rows)
        of = [problem.path for problem in layouts.find(tmp_path).problems]
        assert sum(path.startswith("labels.csv, line") for path in of) == lines
        assert ("1.jpg" in of) == (held is None)
        left = manifest.read(tmp_path, on_bad="exclude")
        assert dict(zip(left.path, left.split, strict=True)).get("1.jpg") == held


def test_a_photograph_in_two_lists_of_gdrbench(tmp_path: Path) -> None:
    root = gdrbench(tmp_path)
    of_train, of_valid = (root / "splits" / f"DDR_{name}.txt" for name in ("train", "crossval"))
    line = of_valid.read_text().splitlines()[0]
    of_train.write_text(f"{line}\n{of_train.read_text()}")
    listing = layouts.find(root)
    assert [(p.path, p.kind) for p in listing.problems] == [("splits/DDR_train.txt, line 1", "doubled")]
    assert "by splits/DDR_crossval.txt, line 1" in listing.problems[0].reason
    assert [e.split for e in listing.entries if e.path == f"images/{line.split()[0]}"] == ["valid"]


def test_a_photograph_twice_in_one_split_by_two_tables_is_in_doubt(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / f"{number}.jpg", number)
    table(tmp_path, "path,grade,split", "0.jpg,0,train", "1.jpg,1,valid", name="train.csv")
    table(tmp_path, "path,grade,split", "2.jpg,2,test", "0.jpg,0,train", name="test.csv")
    (problem,) = layouts.find(tmp_path).problems
    assert (problem.path, problem.kind) == ("0.jpg", "doubled")
    assert problem.reason == "train.csv, line 2: 0.jpg stands already in test.csv, line 3"


@pytest.mark.parametrize(("grade", "said"), [("3", "of grade 3"), ("", "without a grade")])
def test_a_photograph_of_two_grades_is_in_doubt_whatever_its_splits(grade: str, said: str, tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / f"{number}.jpg", number)
    rows = ["0.jpg,0,train", "1.jpg,1,valid", "2.jpg,2,test", "3.jpg,0,train", f"0.jpg,{grade},test"]
    (problem,) = problems.errors(layouts.find(table(tmp_path, "path,grade,split", *rows)).problems)
    assert (problem.path, problem.kind) == ("0.jpg", "doubled")
    assert problem.reason == f"0.jpg is {said} by labels.csv, line 6 and of grade 0 by labels.csv, line 2"
    assert "0.jpg" not in manifest.read(tmp_path, on_bad="exclude").path


# ------------------------------------------------------------------------------------------ how names are spelled


def test_a_path_from_here_is_that_path(tmp_path: Path) -> None:
    for number, name in enumerate(["a/b.jpg", "a/c.JPG", "d.jpg", "a/e.jpg"]):
        draw(tmp_path / name, number)
    rows = ["./a/b.jpg,0", "./A/./c.jpg,1", ".\\d.jpg,2", "a//e.jpg,3", "a/b.jpg,0"]
    listing = layouts.find(table(tmp_path, "path,grade", *rows))
    assert [entry.path for entry in listing.entries] == ["a/b.jpg", "a/c.JPG", "d.jpg", "a/e.jpg"]
    assert [(p.path, p.kind) for p in listing.problems] == [("a/b.jpg", "doubled")]


def test_paths_from_here_are_prepared_again_where_one_is_new(tmp_path: Path) -> None:
    rows = [f"./in/n{number}.jpg,{number % 2},{'train' if number < 4 else 'valid'}" for number in range(6)]
    for number in range(6):
        eye(tmp_path / "data" / "in" / f"n{number}.jpg", number)
    table(tmp_path / "data", "path,grade,split", *rows[:-1])
    assert run(tmp_path / "data", tmp_path / "out").done == 5
    table(tmp_path / "data", "path,grade,split", *rows)
    assert run(tmp_path / "data", tmp_path / "out").done == 1
    assert told(tmp_path / "out") == told(tmp_path / "data")
    assert "./in/n0.jpg" in (tmp_path / "out" / "labels.csv").read_text()


@pytest.mark.parametrize("on_disk", ["NFD", "NFC"])
def test_letters_that_macos_takes_apart(on_disk: str, tmp_path: Path) -> None:
    told_, there = "NFC" if on_disk == "NFD" else "NFD", [f"{name}é.png" for name in "abcdef"]
    assert unicodedata.normalize("NFC", there[0]) != unicodedata.normalize("NFD", there[0])
    rows = []
    for number, name in enumerate(there):
        eye(tmp_path / "data" / "Übung" / unicodedata.normalize(on_disk, name), number)
        path = unicodedata.normalize(told_, f"Übung/{name}" if number else name)
        rows.append(f"{path},{number % 2},{'train' if number < 4 else 'valid'}")
    table(tmp_path / "data", "path,grade,split", *rows)
    seen = survey.take(tmp_path / "data")
    assert not problems.errors(seen.problems())
    run(tmp_path / "data", tmp_path / "out")
    assert told(tmp_path / "out") == told(tmp_path / "data")
    root = official(tmp_path / "DDR") / "DR_grading"
    first = next((root / "train").iterdir())
    first.rename(first.with_name(unicodedata.normalize(on_disk, f"é{first.name}")))
    lines = (root / "train.txt").read_text()
    (root / "train.txt").write_text(
        lines.replace(first.name, unicodedata.normalize(told_, f"é{first.name}")), encoding="utf-8"
    )
    assert not problems.errors(survey.take(root).problems())


# ------------------------------------------------------------------------------------------ tables


def test_messidors_own_scale_is_told(tmp_path: Path) -> None:
    draw(tmp_path / "a.tif")
    header = "Image name,Ophthalmologic department,Retinopathy grade,Risk of macular edema "
    listing = layouts.find(table(tmp_path, header, "a.tif,Service Ophtalmologie Lariboisiere,3,0"))
    assert [(entry.path, entry.grade) for entry in listing.entries] == [("a.tif", 3)]
    assert [note for note in listing.notes if "scale of 0-3" in note and "not ICDR grades" in note]
    idrid = layouts.find(table(tmp_path, header.replace("Ophthalmologic department,", ""), "a.tif,3,0"))
    assert idrid.notes == []


def test_lines_that_end_as_on_an_old_mac(tmp_path: Path) -> None:
    for number in range(6):
        eye(tmp_path / "data" / f"n{number}.png", number)
    rows = [f'n{n}.png;{n % 2};{"train" if n < 4 else "valid"};"1,5"' for n in range(6)]
    (tmp_path / "data" / "labels.csv").write_bytes("\r".join(["path;grade;split;note", *rows, ""]).encode())
    (tmp_path / "data" / "other.csv").write_bytes(b'name;"a\rb"\r1;2\r')
    for place in (tmp_path / "data", tmp_path / "data" / "labels.csv"):
        assert [entry.line for entry in layouts.find(place).entries] == [2, 3, 4, 5, 6, 7]
    run(tmp_path / "data", tmp_path / "out")
    assert told(tmp_path / "out") == told(tmp_path / "data")
    with pytest.raises(UserError, match="is no label table; its header should be"):
        layouts.find(tmp_path / "data" / "other.csv")


def test_a_table_with_a_cell_without_end_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f'path,grade\n"a.jpg,{"x" * 200_000}\n')
    with pytest.raises(UserError, match=r"labels\.csv: this table cannot be read \(field larger"):
        layouts.find(tmp_path)


def test_a_link_to_itself_hides_no_folder(tmp_path: Path) -> None:
    root = folders(tmp_path / "data")
    (root / "loop").symlink_to("loop")
    assert len(layouts.find(tmp_path).entries) == len(layouts.find(root).entries) > 0


def test_a_table_that_is_a_link_is_read_where_the_link_is(tmp_path: Path) -> None:
    root = labelled(tmp_path / "set")
    (tmp_path / "versions").mkdir()
    shutil.move(root / "labels.csv", tmp_path / "versions" / "v7.txt")
    (root / "labels.csv").symlink_to(tmp_path / "versions" / "v7.txt")
    (tmp_path / "linked").symlink_to(root)
    with pytest.raises(UserError, match=r"leads out of the data, to .*v7\.txt; .*--follow-links"):
        survey.take(root)  # which somebody else may have made
    for place in (root / "labels.csv", tmp_path / "linked" / "labels.csv", root):
        seen = survey.take(place, follow_links=place == root)
        assert seen.root == root
        assert not problems.errors(seen.problems())
    with pytest.raises(UserError, match="must lie outside of the data set"):
        run(root / "labels.csv", root / "out")
    run(root / "labels.csv", tmp_path / "versions" / "out")


def test_a_list_of_other_paths_where_no_row_can_be_used(tmp_path: Path) -> None:
    table(tmp_path, "path,grade", "../a.jpg,0", "../b.jpg,1")
    with pytest.raises(UserError, match=re.escape("none of its 1 paths is a photograph of")):
        survey.take(tmp_path, exclude=frozenset(["c.jpg"]))


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name", ["__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found"])
def test_folders_of_a_system_hold_no_data(name: str, tmp_path: Path) -> None:
    for number, grade in enumerate("0123401234"):
        draw(tmp_path / "set" / grade / f"{number}.jpg", number)
    draw(tmp_path / "set" / name / "0" / "9.jpg", 90)
    draw(tmp_path / "set" / "0" / name / "9.jpg", 91)
    listing = layouts.find(tmp_path / "set")
    assert len(listing.entries) == 10
    assert listing.problems == []
    assert len(photos.find([str(tmp_path / "set")]).paths) == 10
    official(tmp_path / "top" / "DDR-dataset")
    official(tmp_path / "top" / name)
    assert layouts.find(tmp_path / "top").root.parent.name == "DDR-dataset"


def test_photographs_behind_a_linked_folder_are_predicted_too(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "a.jpg", 1)
    draw(tmp_path / "eyes" / "b.jpg", 2)
    (tmp_path / "eyes" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "eyes")
    found = photos.find([str(tmp_path / "eyes")])
    assert [Path(path).relative_to(tmp_path / "eyes").as_posix() for path in found.paths] == ["b.jpg", "more/a.jpg"]


# ------------------------------------------------------------------------------------------ DDR without splits


def test_ungradable_photographs_are_said_to_be_in_no_restored_test_split() -> None:
    totals = splits._DDR_ALL
    entries = [Entry(f"{grade}-{n}.jpg", grade) for grade, total in enumerate(totals) for n in range(total)]
    more = [Entry(f"5-{n}.jpg", 5) for n in range(7)]
    for there, said in ((entries, False), (entries + more, True)):
        found, notes = splits.assign(Listing("kaggle", Path("/nowhere"), there), SplitConfig())
        assert ("without the 7 ungradable photographs (grade 5), none of which is in it." in notes[0]) == said
        assert not [entry for entry in found if entry.grade == 5 and entry.split == "test"]


def test_many_photographs_are_told_from_masters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos.masters, "of_folder", lambda _: None)
    monkeypatch.setattr(photos, "_sound", lambda paths, _: [photos.Photo(path) for path in paths])
    monkeypatch.setattr(photos, "_prepared", lambda paths, *_: [photos.Photo(path) for path in paths])
    hashed = 0

    class Path_(str):
        """Each look into a set or a dictionary, or into a new one of all, asks for its hash."""

        __slots__ = ()

        def __hash__(self) -> int:
            nonlocal hashed
            hashed += 1
            return super().__hash__()

    paths = [Path_(f"eyes/{number}.jpg") for number in range(500)]
    found, _ = photos.ready(paths, Recipe(48, version=1), lambda *_: None)
    assert [photo.path for photo in found] == paths
    assert 500 < hashed < 20 * 500
