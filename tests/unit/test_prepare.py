"""`fastddr prepare`: crops, layouts, labels and contact sheets."""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import pytest
from eyes import FEW, damage, eye, folders, official, run, table, told
from eyes import quick as quick  # a fixture of all these tests
from PIL import Image, JpegImagePlugin
from tests_support import content

from fastddr.data import crop, layouts, photograph, sheet, survey
from fastddr.data.crop import Recipe
from fastddr.errors import UserError


@pytest.fixture
def real() -> None:
    """Asks for the real finder of the disc."""


# ------------------------------------------------------------------------------------------------ pixels


def test_an_output_is_a_square_jpeg_of_full_quality_without_exif(tmp_path: Path) -> None:
    run(folders(tmp_path / "data"), tmp_path / "out")
    with Image.open(tmp_path / "out" / "train" / "0" / "n0.jpg") as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "JPEG")
        assert JpegImagePlugin.get_sampling(image) == 0
        assert {max(steps) for steps in image.quantization.values()} == {1}, "quality 100"
        assert not image.getexif()
        assert "exif" not in image.info


def test_png_keeps_every_level_of_the_crop(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    run(data, tmp_path / "out", recipe=Recipe(32, "png"))
    row = table(tmp_path / "out")[0]
    left, top, side = int(row["left"]), int(row["top"]), int(row["side"])
    with Image.open(tmp_path / "out" / row["path"]) as image:
        source = photograph.upright(str(data / row["source"]))
        wanted = source.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.LANCZOS)
        assert (image.format, np.asarray(image).tolist()) == ("PNG", np.asarray(wanted).tolist())


def test_a_disc_off_the_centre_is_in_the_centre_of_the_output(tmp_path: Path, real: None) -> None:
    data = folders(tmp_path / "data")
    eye(data / "train" / "0" / "off.jpg", 9, (160, 100), centre=(100, 52), radius=38)
    run(data, tmp_path / "out", recipe=Recipe(128, "png"))
    row = next(row for row in table(tmp_path / "out") if row["path"].endswith("off.png"))
    assert row["method"] == "edge"
    with Image.open(tmp_path / "out" / row["path"]) as image:
        lit = np.argwhere(np.asarray(image).max(axis=2) > 60)
    (top, left), (bottom, right) = lit.min(axis=0), lit.max(axis=0)
    assert abs((left + right) / 2 - 63.5) < 3
    assert abs((top + bottom) / 2 - 63.5) < 3
    assert 118 < right - left <= 128


def test_what_lies_outside_the_photograph_is_black(tmp_path: Path, real: None) -> None:
    data = folders(tmp_path / "data")
    eye(data / "train" / "0" / "flat.jpg", 9, (160, 80), radius=60)
    run(data, tmp_path / "out", recipe=Recipe(120, "png"))
    row = next(row for row in table(tmp_path / "out") if row["path"].endswith("flat.png"))
    assert int(row["top"]) < 0
    with Image.open(tmp_path / "out" / row["path"]) as image:
        pixels = np.asarray(image)
    above = -int(row["top"]) / int(row["side"]) * 120
    assert above > 10
    assert (pixels[: int(above) - 4] == 0).all()
    assert (pixels[120 - int(above) + 5 :] == 0).all()
    assert pixels[60, 60].min() > 60


@pytest.mark.parametrize(
    ("left", "top", "side", "size"),
    [(0, 0, 90, 32), (-13, -40, 170, 64), (10, 3, 50, 120), (-300, -300, 700, 32), (7, -20, 64, 64)],
)
def test_a_cut_by_strips_is_the_cut_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, left: int, top: int, side: int, size: int
) -> None:
    monkeypatch.setattr(crop, "_STRIP", 17)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    whole = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    assert crop.cut(image, left, top, side, size).tobytes() == whole.tobytes()


def test_an_output_is_upright(tmp_path: Path, real: None) -> None:
    data = folders(tmp_path / "data")
    eye(data / "train" / "0" / "turned.png", 9, orientation=6)
    eye(data / "train" / "0" / "upright.png", 9)
    run(data, tmp_path / "out", recipe=Recipe(64, "png"))
    with (
        Image.open(tmp_path / "out/train/0/turned.png") as turned,
        Image.open(tmp_path / "out/train/0/upright.png") as upright,
    ):
        difference = np.asarray(turned).astype(int) - np.asarray(upright.rotate(-90))
        assert np.abs(difference).mean() < 3


# ------------------------------------------------------------------------------------------------ layouts and labels


@pytest.mark.parametrize("format", ["jpeg", "png"])
@pytest.mark.parametrize("layout", sorted(photographs.LAYOUTS))
def test_every_layout_reads_back_the_same(tmp_path: Path, layout: str, format: crop.Format) -> None:
    data = photographs.LAYOUTS[layout](tmp_path / "data", FEW)
    before = content(data)
    done = run(data, tmp_path / "out", recipe=Recipe(32, format))
    assert content(data) == before, "the source is not touched"
    assert done.done == len(survey.take(data).entries)
    extension = ".png" if format == "png" else ".jpg"
    assert all(Path(e.path).suffix == extension for e in survey.take(tmp_path / "out").entries)
    assert (survey.take(tmp_path / "out").root, survey.take(tmp_path / "out").layout) == (
        done.root,
        survey.take(data).layout,
    )
    assert not survey.take(tmp_path / "out").problems()
    if any("another split" in note for note in done.notes):  # drawn splits see other names
        assert (layout, format) == ("kaggle", "png")
        assert {k: v[0] for k, v in told(tmp_path / "out").items()} == {k: v[0] for k, v in told(data).items()}
    else:
        assert told(tmp_path / "out") == told(data)


def test_class_folders_without_splits(tmp_path: Path) -> None:
    for number in range(9):
        eye(tmp_path / "data" / str(number % 3) / f"n{number}.jpg", number)
    done = run(tmp_path / "data", tmp_path / "out")
    assert done.root == tmp_path / "out" / "photographs"
    assert told(tmp_path / "out") == told(tmp_path / "data")


def test_a_label_table_as_data_and_patients(tmp_path: Path) -> None:
    rows = []
    for number in range(8):
        eye(tmp_path / "data" / "in" / f"n{number}.png", number)
        rows.append([f"left{number}", f"n{number}", number % 3, f"p{number // 2}", "train" if number < 4 else "valid"])
    file = tmp_path / "data" / "labels.csv"
    photographs.write_csv(file, ["note, with comma", "path", "grade", "patient", "split"], rows)
    run(file, tmp_path / "out")
    assert (tmp_path / "out" / "labels.csv").read_bytes() == file.read_bytes(), "names without extension stay"
    assert told(tmp_path / "out") == told(file)
    assert {patient for _, _, patient in told(tmp_path / "out").values()} == {"p0", "p1", "p2", "p3"}


def test_photographs_beside_their_table(tmp_path: Path) -> None:
    rows = []
    for number in range(18):
        eye(tmp_path / "data" / f"{number}_left.jpeg", number)
        rows.append([f"{number}_left", number % 3])
    photographs.write_csv(tmp_path / "data" / "trainLabels.csv", ["image", "level"], rows)
    file = tmp_path / "data" / "0_left.jpeg"
    whole = file.read_bytes()
    damage(file)
    with pytest.raises(UserError, match="fetch it again"):
        run(tmp_path / "data", tmp_path / "out")
    with pytest.raises(UserError, match="no known layout"):
        layouts.find(tmp_path / "out")
    file.write_bytes(whole)
    run(tmp_path / "data", tmp_path / "out")
    assert told(tmp_path / "out") == told(tmp_path / "data")
    assert told(tmp_path / "out")["3_left"][2] == "3", "the patient"


def test_tables_beside_the_folder_of_their_photographs(tmp_path: Path) -> None:
    data = tmp_path / "data" / "B. Grading"
    for number, name in enumerate(["a. Training Set", "b. Testing Set"]):
        rows = []
        for place in range(9 + number):
            eye(data / "1. Original Images" / name / f"IDRiD_{place}.jpg", 10 * number + place)
            rows.append([f"IDRiD_{place}", place % 3, 0, ""])
        header = ["Image name", "Retinopathy grade", "Risk of macular edema ", ""]
        photographs.write_csv(data / "2. Groundtruths" / f"{name[:-4]} Labels.csv", header, rows)
    run(tmp_path / "data", tmp_path / "out")
    assert told(tmp_path / "out") == told(tmp_path / "data")
    assert len(told(tmp_path / "out")) == 19


def test_a_text_file_keeps_its_lines_its_order_and_its_breaks(tmp_path: Path) -> None:
    data = official(tmp_path / "data", ".png")
    labels = data / "DR_grading" / "train.txt"
    (data / "DR_grading" / "train" / "n1.png").rename(data / "DR_grading" / "train" / "n 1.PNG")
    labels.write_bytes(b"\xef\xbb\xbfn3.png 0\r\n\r\n  n 1.PNG\t1\r\nn0.png 0\nn2.png  2")
    run(data, tmp_path / "out", exclude=frozenset({"train/n0.png"}))
    written = (tmp_path / "out" / "DR_grading" / "train.txt").read_bytes()
    assert written == b"\xef\xbb\xbfn3.jpg 0\r\n\r\n  n 1.jpg\t1\r\nn2.jpg  2"
    assert [e.path for e in survey.take(tmp_path / "out").entries if e.split == "train"] == [
        "train/n 1.jpg",
        "train/n2.jpg",
        "train/n3.jpg",
    ]


def test_a_table_keeps_its_columns_and_its_order(tmp_path: Path) -> None:
    rows = []
    for number in (5, 4, 3, 2, 1, 0):
        path = f"in/n{number}{'.png' if number % 2 else '.JPEG'}"
        eye(tmp_path / "data" / path, number)
        rows.append([path, f"a, {number}", "train" if number > 2 else "valid", number % 3])
    photographs.write_csv(tmp_path / "data" / "labels.csv", ["path", "eye", "split", "grade"], rows)
    run(tmp_path / "data", tmp_path / "out", exclude=frozenset({"in/n4.JPEG"}))
    with (tmp_path / "out" / "labels.csv").open(newline="") as stream:
        header, *found = list(csv.reader(stream))
    assert header == ["path", "eye", "split", "grade"]
    wanted = [[row[0].replace(".png", ".jpg"), row[1], row[2], str(row[3])] for row in rows if "n4" not in str(row[0])]
    assert found == wanted


def test_a_name_that_a_new_extension_makes_ambiguous_becomes_a_path(tmp_path: Path) -> None:
    for number, path in enumerate(["a/x.png", "b/x.jpg", "b/y.jpg", "b/z.jpg"]):
        eye(tmp_path / "data" / path, number)
    rows = [["x.png", 0, "train"], ["x.jpg", 1, "valid"], ["y.jpg", 2, "train"], ["z", 3, "valid"]]
    photographs.write_csv(tmp_path / "data" / "labels.csv", ["path", "grade", "split"], rows)
    run(tmp_path / "data", tmp_path / "out")
    assert told(tmp_path / "out") == told(tmp_path / "data")
    assert (tmp_path / "out" / "labels.csv").read_text().splitlines()[1:] == [
        "a/x.jpg,0,train", "b/x.jpg,1,valid", "y.jpg,2,train", "z,3,valid",
    ]  # fmt: skip


def test_photographs_without_a_grade_are_prepared_and_orphans_are_not(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    eye(data / "DR_grading" / "train" / "orphan.jpg", 20)
    eye(data / "DR_grading" / "train" / "ungradable.jpg", 21)
    with (data / "DR_grading" / "train.txt").open("a") as stream:
        stream.write("ungradable.jpg 5\n")
    run(data, tmp_path / "out")
    assert (tmp_path / "out/DR_grading/train/ungradable.jpg").exists()
    assert not (tmp_path / "out/DR_grading/train/orphan.jpg").exists()


def test_two_sources_of_one_output_are_refused(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    eye(data / "train" / "0" / "n0.png", 30)
    with pytest.raises(UserError, match=r"n0\.jpg and train/0/n0\.png would both become train/0/n0\.jpg"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(data, tmp_path / "out", exclude=frozenset({"train/0/n0.png"}))


# ------------------------------------------------------------------------------------------------ sheets and the rest


def test_sheets_show_the_least_confident_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    real = sheet.draw

    def draw(root: Path, rows: Any, threads: int) -> Any:
        shown.append([row.confidence for row in rows])
        return real(root, rows, threads)

    monkeypatch.setattr(sheet, "draw", draw)
    monkeypatch.setattr(sheet, "_PAGE", 3)
    data = folders(tmp_path / "data")
    Image.new("RGB", (60, 60)).save(data / "train/0/black.jpg")
    done = run(data, tmp_path / "out", sheet=5)
    assert [page.name for page in done.sheets] == ["sheet-001.jpg", "sheet-002.jpg"]
    assert shown[0] == sorted((row["confidence"] for row in table(tmp_path / "out")), key=float)[:5]
    for page in done.sheets:
        with Image.open(page) as image:
            pixels = np.asarray(image).astype(int)
        green = (pixels[..., 1] > pixels[..., 0] + 80) & (pixels[..., 1] > pixels[..., 2] + 80)
        assert green.sum() > 100, "circles are drawn"
    assert len(run(data, tmp_path / "out", sheet=2).sheets) == 1
    assert not (tmp_path / "out/prepared/sheet-002.jpg").exists()
    assert run(data, tmp_path / "out", sheet=0).sheets == ()
    assert run(data, tmp_path / "out", sheet=0).done == 0
    assert not list((tmp_path / "out/prepared").glob("*.jpg"))


def test_a_sheet_names_a_photograph_as_a_list_of_exclude_does(tmp_path: Path) -> None:
    for name in ("ab.png", "cd.png"):
        eye(tmp_path / name)
    of_ab = crop.Row("ab.jpg", "ab.png", 1, 1, 0, 0, 64, "32", "32", "30", "0.5", "edge")

    def page(row: crop.Row) -> bytes:
        (found,) = sheet.draw(tmp_path, [row], 1)
        return found

    assert page(of_ab._replace(path="other.jpg")) == page(of_ab)
    assert page(of_ab._replace(source="cd.png")) != page(of_ab), "the same picture under another name"


def test_names_of_our_own_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(["sheet-001.jpg", "b.jpg", "c.jpg", "d.jpg"]):
        eye(tmp_path / "data" / "in" / name, number)
    rows = [["sheet-001.jpg", 0, "train"], ["b.jpg", 0, "train"], ["c.jpg", 0, "valid"], ["d.jpg", 0, "valid"]]
    photographs.write_csv(tmp_path / "data" / "labels.csv", ["path", "grade", "split"], rows)
    with pytest.raises(UserError, match=r"sheet-001\.jpg: it bears a name"):
        run(tmp_path / "data", tmp_path / "out")
    (tmp_path / "data" / "in").rename(tmp_path / "data" / "prepared")
    with pytest.raises(UserError, match="it bears a name"):
        run(tmp_path / "data", tmp_path / "out", exclude=frozenset({"prepared/sheet-001.jpg"}))


def test_progress_counts_what_is_to_be_done(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    told_: list[tuple[int, int]] = []
    run(data, tmp_path / "out", on_progress=lambda done, total: told_.append((done, total)))
    assert told_ == [(n, 8) for n in range(1, 9)]


def test_names_that_are_not_unicode_and_very_long_ones(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    odd = os.fsencode(data / "train" / "0") + b"/\xff.jpg"
    try:
        shutil.copy(os.fsencode(data / "train/0/n0.jpg"), odd)
    except OSError:
        pytest.skip("this file system takes Unicode names alone")
    eye(data / "train" / "1" / f"{'x' * 251}.jpg", 50)
    bad = run(data, tmp_path / "out", sheet=20, on_bad="exclude")
    assert ([problem.kind for problem in bad.bad], bad.done) == (["encoding"], 9)
    for name in ("excluded.csv", "absent.csv"):
        assert b'"train/0/\xff.jpg"' in (tmp_path / "out" / "prepared" / name).read_bytes()
    assert [entry.path for entry in layouts.find(tmp_path / "out").absent] == ["train/0/\udcff.jpg"]
    assert run(data, tmp_path / "out", sheet=20, on_bad="exclude").skipped == 9


@pytest.mark.parametrize("name", ["a\nb\x07 é.jpg", "\udcff.jpg", "\n.jpg", "\u2028\u202e\x7f.jpg", "目" * 80 + ".jpg"])
def test_a_sheet_shows_any_name(tmp_path: Path, name: str) -> None:
    eye(tmp_path / "a.jpg")
    row = crop.Row(f"train/{name}", "a.jpg", 1, 1, 0, 0, 90, "60.00", "45.00", "36.00", "0.5000", "edge")
    (page,) = sheet.draw(tmp_path, [row], 1)
    with Image.open(io.BytesIO(page)) as image:
        assert min(image.size) > 200


def test_odd_names_are_on_the_sheets_and_in_the_tables(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    odd = ["a\nb é.jpg", "c\rd.jpg", "e\x07\x1b.jpg", 'f", g.jpg', "目 h.jpg"]
    for number, name in enumerate(odd, 20):
        eye(data / "train" / "0" / name, number)
    left_out = frozenset({"train/0/c\rd.jpg", "train/0/a\nb é.jpg"})
    done = run(data, tmp_path / "out", sheet=20)
    assert (done.done, len(done.sheets)) == (13, 1)
    assert sorted(row["path"] for row in table(tmp_path / "out")) == sorted(e.path for e in survey.take(data).entries)
    again = run(data, tmp_path / "out", sheet=20)
    assert (again.done, again.skipped) == (0, 13)
    assert told(tmp_path / "out") == told(data)
    assert run(data, tmp_path / "out", sheet=20, exclude=left_out).removed == 2
    assert {entry.path for entry in layouts.find(tmp_path / "out").absent} == left_out


def test_an_error_about_an_odd_name_is_one_line(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    for number, extension in enumerate(["jpg", "png"], 20):
        eye(data / "train" / "0" / f"a\nb.{extension}", number)
    with pytest.raises(UserError, match="would both become") as error:
        run(data, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_out_holds_neither_times_nor_places(tmp_path: Path) -> None:
    for place in ("a", "b"):
        run(official(tmp_path / place / "data"), tmp_path / place / "out")
    assert content(tmp_path / "a" / "out") == content(tmp_path / "b" / "out")
    for file in (tmp_path / "a" / "out").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, real: None) -> None:
    data = official(tmp_path / "data")
    one = run(data, tmp_path / "one", workers=1)
    two = run(data, tmp_path / "two", workers=2)
    assert (one.done, two.done) == (8, 8)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert not [name for name in content(tmp_path / "one") if name.startswith(".") or "journal" in name]
