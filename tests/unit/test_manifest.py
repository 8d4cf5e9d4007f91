"""The manifest: the official layout and class folders, and errors that name file and line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from photographs import draw
from tests_support import TINY

from fastddr.data import manifest
from fastddr.errors import UserError


def test_the_official_layout_from_both_folders(tiny: Path) -> None:
    above, inside = manifest.read(tiny), manifest.read(tiny / "DR_grading")
    assert above.path == inside.path
    assert above.fingerprint == inside.fingerprint
    assert above.counts() == {split: list(counts) for split, counts in TINY.items()}
    assert set(above.width.tolist()) == {80}
    assert all(Path(file).stat().st_size == size for file, size in zip(above.files(), above.size, strict=True))


def test_ungradable_photographs_are_counted_left_out_and_said(tiny: Path) -> None:
    found = manifest.read(tiny)
    assert len(found) == sum(map(sum, TINY.values()))
    assert [len(found.ids(split)) for split in manifest.SPLITS] == [sum(TINY[s][:5]) for s in manifest.SPLITS]
    assert (found.grade[found.ids("train")] < 5).all()
    assert "2 ungradable photographs (grade 5) are counted but left out: 1 in train, 1 in test." in found.notes


def test_class_folders_by_number_and_by_name(tmp_path: Path) -> None:
    for split, folder in [
        ("train", "0"),
        ("train", "Mild NPDR"),
        ("train", "2_moderate"),
        ("Val", "pdr"),
        ("test", "5"),
    ]:
        draw(tmp_path / split / folder / "a b.JPG")
    draw(tmp_path / "test" / "severe" / "b.png", size=(20, 50))
    found = manifest.read(tmp_path)
    assert dict(zip(found.path, found.grade.tolist(), strict=True)) == {
        "train/0/a b.JPG": 0,
        "train/2_moderate/a b.JPG": 2,
        "train/Mild NPDR/a b.JPG": 1,
        "Val/pdr/a b.JPG": 4,
        "test/5/a b.JPG": 5,
        "test/severe/b.png": 3,
    }
    assert set(found.split) == {"train", "valid", "test"}
    assert (found.width[-1], found.height[-1]) == (20, 50)


@pytest.mark.parametrize(
    ("name", "grade"),
    [("3", 3), ("Grade 2", 2), ("2_moderate", 2), ("4 - Proliferative DR", 4), ("No_DR", 0), ("severe-npdr", 3)],
)
def test_names_of_class_folders(tmp_path: Path, name: str, grade: int) -> None:
    for split in ("train", "valid", "test"):
        draw(tmp_path / split / name / "a.jpg")
    assert manifest.read(tmp_path).grade.tolist() == [grade] * 3


@pytest.mark.parametrize("name", ["mild_2", "mild v2", "no_dr (1)", "0_1", "1st", "2_severe", "6", "12", "cat"])
def test_a_class_folder_that_could_mean_two_grades_is_refused(tmp_path: Path, name: str) -> None:
    for split in ("train", "valid", "test"):
        draw(tmp_path / split / name / "a.jpg")
    with pytest.raises(UserError, match="no grade"):
        manifest.read(tmp_path)


def test_files_that_are_no_photographs_are_a_note(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        draw(tmp_path / split / "0" / "a.jpg")
    draw(tmp_path / "train" / "0" / "b.webp")
    assert any("b.webp" in note for note in manifest.read(tmp_path).notes)


def test_a_test_split_without_a_gradable_photograph_is_a_note(copy: Path) -> None:
    labels = copy / "DR_grading" / "test.txt"
    labels.write_text("".join(f"{line.split()[0]} 5\n" for line in labels.read_text().splitlines()))
    found = manifest.read(copy)
    assert not found.has("test")
    assert any("no gradable photograph" in note for note in found.notes)


@pytest.mark.parametrize("by", ["on_bad", "exclude"])
def test_a_test_split_that_was_left_out_whole_is_a_note(by: str, copy: Path) -> None:
    photographs = sorted((copy / "DR_grading" / "test").iterdir())
    exclude = frozenset(f"test/{file.name}" for file in photographs if by == "exclude")
    for file in photographs if by == "on_bad" else ():
        file.write_bytes(b"")
    notes = manifest.read(copy, on_bad="exclude", exclude=exclude).notes
    assert sum("so nothing is scored on it" in note for note in notes) == 1


def test_fingerprint_changes_with_name_grade_bytes_and_split(copy: Path) -> None:
    folder = copy / "DR_grading"
    seen = {manifest.read(copy).fingerprint}
    labels = (folder / "train.txt").read_text().splitlines()
    name, grade = labels[0].split()

    (folder / "train.txt").write_text("\n".join([f"{name} {(int(grade) + 1) % 5}", *labels[1:]]))
    seen.add(manifest.read(copy).fingerprint)
    before = manifest.read(copy)
    lines = (folder / "train.txt").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join(reversed(lines)))
    after = manifest.read(copy)
    assert (after.fingerprint, after.path) == (before.fingerprint, before.path), "the order of lines does not matter"
    assert after.grade.tolist() == before.grade.tolist()
    (folder / "train" / name).write_bytes((folder / "train" / name).read_bytes() + b"\0")
    seen.add(manifest.read(copy).fingerprint)
    (folder / "train" / name).rename(folder / "train" / f"x{name}")
    (folder / "train.txt").write_text("\n".join([f"x{name} {grade}", *labels[1:]]))
    seen.add(manifest.read(copy).fingerprint)
    assert len(seen) == 4


def test_csv_has_every_row_and_the_fingerprint(tiny: Path) -> None:
    found = manifest.read(tiny)
    lines = found.to_csv().splitlines()
    assert lines[0] == f"# fingerprint: {found.fingerprint}"
    assert lines[1] == "# prepared: null"
    assert lines[2] == "id,path,split,grade,width,height,bytes,patient"
    assert lines[3] == f"0,{found.path[0]},train,{found.grade[0]},80,80,{found.size[0]},"
    assert found.patients is None
    assert len(lines) == len(found) + 3


def test_photographs_of_one_name_are_known_by_their_folders(tmp_path: Path) -> None:
    """In another form they may have another extension, and those of a name of their own another folder."""
    rows = ["0,1/left.jpg,train,2", "1,2/left.jpg,test,2", "2,2/alone.png,valid,0"]
    (tmp_path / "manifest.csv").write_text("# fingerprint: x\n" + "\n".join(["id,path,split,grade", *rows]) + "\n")
    known = manifest.splits_by_name(tmp_path / "manifest.csv")
    assert known[manifest.named("1/left.png", 2, folders=True)] == "train"
    assert known[manifest.named("2/left.png", 2, folders=True)] == "test"
    assert known[manifest.named("elsewhere/alone.jpg", 0)] == "valid"
    assert len(known) == 3


def spoil(folder: Path, what: str) -> None:
    labels = folder / "train.txt"
    lines = labels.read_text().splitlines()
    match what:
        case "grade 7":
            lines[4] = lines[4].split()[0] + " 7"
        case "negative":
            lines[4] = lines[4].split()[0] + " -1"
        case "doubled":
            lines.append(lines[0])
        case "another folder":
            lines[1] = "../test/" + next(p.name for p in (folder / "test").iterdir()) + " 1"
        case "not a line":
            lines[1] = "justaname.jpg"
        case "empty split":
            lines = []
        case "no label file":
            (folder / "valid.txt").unlink()
        case "no folder":
            shutil.rmtree(folder / "test")
        case "only ungradable":
            lines = [line.split()[0] + " 5" for line in lines]
    labels.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("grade 7", ["train.txt, line 5", "grade 7"]),
        ("negative", ["train.txt, line 5", "-1"]),
        ("doubled", ["train.txt, line 29", "line 1"]),
        ("not a line", ["train.txt, line 2", "justaname.jpg"]),
        ("another folder", ["train.txt, line 2", "is a path"]),
        ("empty split", ["train.txt", "empty"]),
        ("no label file", ["valid.txt", "missing"]),
        ("no folder", ["test/", "missing"]),
        ("only ungradable", ["train", "no gradable"]),
    ],
)
def test_a_wrong_set_is_one_sentence_that_names_the_offender(copy: Path, what: str, said: list[str]) -> None:
    spoil(copy / "DR_grading", what)
    with pytest.raises(UserError) as caught:
        manifest.read(copy).ids("train")
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        manifest.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be opened"):
        manifest.read("x" * 5000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        manifest.read(tmp_path / "file")
    with pytest.raises(UserError, match="no known layout"):
        manifest.read(tmp_path)
    draw(tmp_path / "train" / "0" / "a.jpg")
    with pytest.raises(UserError, match="'valid' is missing"):
        manifest.read(tmp_path)
    draw(tmp_path / "valid" / "cat" / "a.jpg")
    with pytest.raises(UserError, match=r"cat: this class folder is no grade"):
        manifest.read(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"both val/ and valid/|both valid/ and val/"):
        manifest.read(tmp_path)
