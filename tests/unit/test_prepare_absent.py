"""What `fastddr prepare` leaves out: where splits are drawn it still counts."""

from __future__ import annotations

import csv
from pathlib import Path

import photographs
import pytest
from eyes import damage, eye, folders, official, run
from eyes import quick as quick  # a fixture of all these tests
from photographs import labelled
from tests_support import content

from fastddr.__main__ import main
from fastddr.config import SplitConfig
from fastddr.data import crop, layouts, survey
from fastddr.data.crop import Recipe
from fastddr.errors import UserError

MANY = photographs.photos({"train": [0, 1, 2, 3, 4] * 8})
#: All that is said where splits are drawn as from the source.
LEFT_OUT = ("1 photographs are left out, as --exclude lists them.",)


def splits(data: Path, seed: int) -> dict[str, str | None]:
    """By path without the extension."""
    return {e.path.rpartition(".")[0]: e.split for e in survey.take(data, SplitConfig(seed=seed)).entries}


def listed(out: Path) -> list[list[str]]:
    with (out / "prepared" / "absent.csv").open(newline="") as stream:
        return list(csv.reader(stream))


def patients(root: Path) -> Path:
    rows = []
    for number in range(40):
        eye(root / f"{number // 2}_{('left', 'right')[number % 2]}.jpeg", number)
        rows.append([f"{number // 2}_{('left', 'right')[number % 2]}", number // 2 % 5])
    photographs.write_csv(root / "trainLabels.csv", ["image", "level"], rows)
    return root


@pytest.mark.parametrize("format", ["jpeg", "png"])
@pytest.mark.parametrize("layout", ["kaggle", "class folders", "patients"])
def test_splits_are_drawn_as_from_the_source(tmp_path: Path, layout: str, format: crop.Format) -> None:
    data = tmp_path / "data"
    if layout == "kaggle":
        photographs.kaggle(data, MANY)
    elif layout == "patients":
        patients(data)
    else:
        for photo in MANY:
            eye(data / str(photo.grade) / photo.name, photo.number)
    before = {seed: splits(data, seed) for seed in (0, 1)}
    entries = survey.take(data).entries
    # Three of a grade and not of one split, so that the draw would be another without them.
    bad, excluded, other = (next(e.path for e in entries if e.split == split) for split in ("test", "train", "valid"))
    for path in (bad, other):
        damage(survey.take(data).root / path)
    exclude = frozenset({excluded})
    done = run(data, tmp_path / "out", recipe=Recipe(32, format), on_bad="exclude", exclude=exclude)
    assert done.notes == LEFT_OUT
    header, *rows = listed(tmp_path / "out")
    assert header == ["path", "grade", "patient"]
    of = {e.path: e for e in entries}
    wanted = [of[path] for path in sorted([bad, excluded, other])]
    assert rows == [[crop.name_of(e.path, format), str(e.grade), e.patient or ""] for e in wanted], "sorted"
    for seed in (0, 1):
        after = splits(tmp_path / "out", seed)
        assert len(after) == len(before[seed]) - len(wanted)
        assert after == {path: before[seed][path] for path in after}, f"seed {seed}"
    again = run(data, tmp_path / "out", recipe=Recipe(32, format), on_bad="exclude", exclude=exclude)
    assert (again.done, again.removed, again.notes) == (0, 0, LEFT_OUT)


def test_the_official_test_split_is_that_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddr.data.splits._DDR_ALL", (8, 8, 8, 8, 8))
    monkeypatch.setattr("fastddr.data.splits.DDR", {"test": dict.fromkeys(range(5), 3)})
    data = photographs.kaggle(tmp_path / "data", MANY)
    before = splits(data, 0)
    bad, excluded = (next(e.path for e in survey.take(data).entries if e.split == s) for s in ("test", "train"))
    damage(data / bad)
    assert run(data, tmp_path / "out", on_bad="exclude", exclude=frozenset({excluded})).notes == LEFT_OUT
    assert any("official test split of DDR was restored" in note for note in survey.take(tmp_path / "out").notes)
    after = splits(tmp_path / "out", 0)
    assert after == {path: before[path] for path in after}
    assert len(after) == 38


def test_a_prepared_set_prepared_again_draws_as_the_first(tmp_path: Path) -> None:
    data = photographs.kaggle(tmp_path / "data", MANY)
    first, second = (survey.take(data).entries[place].path for place in (0, 30))
    run(data, tmp_path / "one", exclude=frozenset({first}))
    done = run(tmp_path / "one", tmp_path / "two", recipe=Recipe(16, "png"), exclude=frozenset({second}))
    assert done.notes == LEFT_OUT
    assert [row[0] for row in listed(tmp_path / "two")[1:]] == sorted(crop.name_of(p, "png") for p in (first, second))
    for seed in (0, 1):
        after, before = splits(tmp_path / "two", seed), splits(data, seed)
        assert after == {path: before[path] for path in after}


def test_what_is_read_and_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody can say it later: what has no label is not in the new set."""
    data = labelled(tmp_path / "data")
    photographs.draw(data / "photographs" / "orphan.jpg", 90)
    first = survey.take(data).entries[0].path
    (tmp_path / "list.csv").write_text(f"{first}\nphotographs/misspelt.jpg\n")
    command = ["prepare", str(data), str(tmp_path / "out"), "--size", "32", "--exclude", str(tmp_path / "list.csv")]
    for _ in range(2):
        assert main(command) == 0
        said = capsys.readouterr().out
        assert f"note: {LEFT_OUT[0]} 1 more of that list are not in the set." in said
        assert "note: 1 photographs have no row in labels.csv and are left out: photographs/orphan.jpg." in said


def test_the_list_of_the_source_holds_for_the_new_set(tmp_path: Path) -> None:
    """Where photographs are no JPEGs, they have other names there."""
    for number, name in enumerate(("one.tif", "one.png", "two.png", "three.JPG", "four.png")):
        eye(tmp_path / "data" / name, number)
    rows = [[name, 0, "train"] for name in ("one.tif", "one.png", "two.png", "three.JPG", "four.png")]
    photographs.write_csv(tmp_path / "data" / "labels.csv", ["path", "grade", "split"], rows)
    gone = frozenset({"one.tif", "two.png"})
    run(tmp_path / "data", tmp_path / "out", exclude=gone)

    def left(*exclude: str) -> set[str]:
        return {entry.path for entry in survey.take(tmp_path / "out", exclude=frozenset(exclude)).entries}

    all_ = {"one.jpg", "three.JPG", "four.jpg"}
    assert left(*gone) == all_, "none of them is here any more, and one.jpg is another one"
    assert left("two.png") == all_, "as in a set of JPEGs"
    assert left("four.png") == left("four.jpg") == all_ - {"four.jpg"}
    with pytest.raises(UserError, match="none of its 1 paths is a photograph"):
        left("five.png")
    with pytest.raises(UserError, match=r"line 'four.png,blurred' holds more than the path"):
        left("four.png,blurred", "two.png")


def test_nothing_left_out_is_no_list(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    run(data, tmp_path / "out", exclude=frozenset({"train/0/n0.jpg"}))
    assert [row[0] for row in listed(tmp_path / "out")[1:]] == ["train/0/n0.jpg"]
    run(data, tmp_path / "out")
    assert not (tmp_path / "out" / "prepared" / "absent.csv").exists()
    run(data, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_two_of_one_name_are_two_in_the_list(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    for number, extension in enumerate(("png", "tif"), 40):
        eye(data / "train" / "0" / f"n0.{extension}", number)
    run(data, tmp_path / "out", exclude=frozenset({"train/0/n0.png", "train/0/n0.tif"}))
    assert [row[0] for row in listed(tmp_path / "out")[1:]] == ["train/0/n0.png", "train/0/n0.tif"]


@pytest.mark.parametrize("make", [official, folders, photographs.kaggle])
def test_the_list_is_not_taken_for_a_set(tmp_path: Path, make: object) -> None:
    assert callable(make)
    data = make(tmp_path / "data")
    seen = survey.take(data)
    exclude = frozenset({seen.entries[0].path})
    run(data, tmp_path / "out", exclude=exclude)
    assert layouts.find(tmp_path / "out").layout == seen.layout
    damage(seen.root / seen.entries[1].path)
    (survey.take(tmp_path / "out").root / seen.entries[2].path).unlink()
    with pytest.raises(UserError, match="fetch it again"):
        run(data, tmp_path / "out", exclude=exclude)
    with pytest.raises(UserError, match="no known layout"):
        layouts.find(tmp_path / "out")


def test_all_left_out_is_one_sentence(tmp_path: Path) -> None:
    for number in range(6):
        eye(tmp_path / "data" / str(number % 3) / f"n{number}.jpg", number)
    exclude = frozenset(entry.path for entry in survey.take(tmp_path / "data").entries)
    with pytest.raises(UserError, match="none of its photographs can be used"):
        run(tmp_path / "data", tmp_path / "out", exclude=exclude)


@pytest.mark.parametrize(
    "text",
    ["path,grade\na.jpg,1\n", "path,grade,patient\na.jpg,,\n", "path,grade,patient\na.jpg",
     f"path,grade,patient\n{'x' * 200_000},1,\n"],
)  # fmt: skip
def test_a_broken_list_of_what_is_left_out_is_one_sentence(tmp_path: Path, text: str) -> None:
    data = folders(tmp_path / "data")
    (data / "prepared").mkdir()
    (data / "prepared" / "absent.csv").write_text(text)
    with pytest.raises(UserError, match=r"absent\.csv, line [12]: this is not a row"):
        layouts.find(data)
    outside = tmp_path / "outside.csv"
    (data / "prepared" / "absent.csv").rename(outside)
    (data / "prepared" / "absent.csv").symlink_to(outside)
    with pytest.raises(UserError, match=r"absent\.csv: it is a link that leads out of the data"):
        layouts.find(data)
