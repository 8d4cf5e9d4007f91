"""Photographs without labels: what is found, what is wrong with them, and their masters in the cache."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs import draw, official, write_csv
from tests_support import unlistable

from fastddr import ranks
from fastddr.data import cache, crop, manifest, masters, photos, prepare
from fastddr.data.crop import Recipe
from fastddr.data.problems import read_list
from fastddr.errors import UserError
from fastddr.inference import predict

RECIPE = Recipe(48)


def silent(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(["b.jpg", "a.JPG", "below/c.png", ".hidden.jpg", ".hidden/d.jpg"]):
        draw(tmp_path / "eyes" / name, number, format="PNG" if name.endswith("png") else "JPEG")
    (tmp_path / "eyes" / "notes.txt").write_text("no photograph")
    return tmp_path / "eyes"


def names(found: photos.Found, folder: Path) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in found.paths]


def test_folders_globs_files_and_lists(folder: Path) -> None:
    found = photos.find([str(folder)])
    assert names(found, folder) == ["a.JPG", "b.jpg", "below/c.png"]
    assert found.notes == ("1 files are passed over: no photographs by their names.",)
    assert names(photos.find([f"{folder}/*"]), folder) == ["a.JPG", "b.jpg", "below/c.png"]
    assert names(photos.find([f"{folder}/**/*.png"]), folder) == ["below/c.png"]
    assert names(photos.find([f"{folder}/notes.txt"]), folder) == ["notes.txt"], "what is named by itself is taken"
    write_csv(folder / "some.csv", ["grade", "path"], [["1", "below/c.png"], ["2", "gone.jpg"]])
    assert names(photos.find([str(folder / "some.csv")]), folder) == ["below/c.png", "gone.jpg"]
    (folder / "semicolons.csv").write_text("grade;path\n1;b.jpg\n")
    assert names(photos.find([str(folder / "semicolons.csv")]), folder) == ["b.jpg"]
    assert read_list(folder / "semicolons.csv") == {"b.jpg"}
    (folder / "spaced.csv").write_text('grade, Path\n1, b.jpg\n2, "below/c.png"\n')
    assert names(photos.find([str(folder / "spaced.csv")]), folder) == ["b.jpg", "below/c.png"]
    assert read_list(folder / "spaced.csv") == {"b.jpg", "below/c.png"}
    assert names(photos.find([f"{folder}/s*.csv"]), folder) == ["b.jpg", "below/c.png", "gone.jpg"], "lists"
    (folder / "bare.csv").write_text("b.jpg\na.JPG\nclinic 1, left.jpg\n")
    assert names(photos.find([str(folder / "bare.csv")]), folder) == ["b.jpg", "a.JPG", "clinic 1, left.jpg"]


def test_heat_maps_below_the_photographs_are_passed_over(folder: Path) -> None:
    (own,) = predict.overlays(folder / "heat", [photos.Photo(str(folder / "b.jpg"))])
    draw(own, 9, format="PNG")
    for name in (str(folder), f"{folder}/**"):
        found = photos.find([name])
        assert names(found, folder) == ["a.JPG", "b.jpg", "below/c.png"]
        assert "heat maps of --explain (*.heat.png) are passed over." in found.notes[1]
    assert photos.find([str(own)]).paths == (str(own),), "what is named by itself is taken"


def test_a_folder_below_that_cannot_be_read_is_not_left_out_in_silence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlistable(monkeypatch, folder / "below", errno.EACCES)
    for named in (str(folder), f"{folder}/**/*.png", f"{folder}/*/*.png", f"{folder}/*"):
        with pytest.raises(PermissionError, match="below"):
            photos.find([named])
    monkeypatch.undo()
    (folder / "lost+found").mkdir()  # of the system, which lets nobody look
    unlistable(monkeypatch, folder / "lost+found", errno.EACCES)
    assert names(photos.find([f"{folder}/*/*.png"]), folder) == ["below/c.png"]


def test_a_photograph_that_is_named_twice_counts_once(folder: Path) -> None:
    found = photos.find([str(folder / "b.jpg"), str(folder), str(folder / "below" / ".." / "b.jpg")])
    assert names(found, folder) == ["b.jpg", "a.JPG", "below/c.png"]
    assert found.notes[-1] == "2 photographs were named twice and count once."


def test_what_is_not_there_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.csv").write_text("path,grade\n,1\n")
    (tmp_path / "other.csv").write_text("file,grade\na.jpg,1\n")
    (tmp_path / "quoted.csv").write_text('"file","grade"\n"a.jpg","1"\n')
    (tmp_path / "quote.csv").write_text('path,grade\na.jpg,"1\nb.jpg,2\n')
    (tmp_path / "wide.csv").write_text("path\na.jpg\n", encoding="utf-16")
    for name, said in (
        ("gone", "no such photograph"), ("empty", "no photograph here"), ("torn.csv", "row 2 has no"),
        ("other.csv", "none of its columns is called path"), ("quote.csv", "cannot be read"),
        ("quoted.csv", "none of its columns is called path"),
        ("wide.csv", "holds NULs, as in UTF-16"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            photos.find([str(tmp_path / name)])
    with pytest.raises(UserError, match="cannot be read"):
        read_list(tmp_path / "quote.csv")
    (tmp_path / "labels.csv").write_text('path,grade,seen by\na.jpg,1,"me\nb.jpg,2,me\n')
    with pytest.raises(UserError, match="save it as CSV anew"):
        manifest.read(tmp_path / "labels.csv")


def test_a_bad_photograph_keeps_its_place_and_gets_its_reason(folder: Path) -> None:
    whole = (folder / "a.JPG").read_bytes()
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("words")
    paths = [str(folder / name) for name in ("torn.jpg", "b.jpg", "gone.jpg", "words.jpg", "below/c.png")]
    for recipe in (None, RECIPE):
        found, _ = photos.ready(paths, recipe, silent)
        assert [photo.path for photo in found] == paths
        assert [photo.kind for photo in found] == ["truncated", "", "missing", "text", ""]
        assert all(bool(photo.kind) == bool(photo.reason) for photo in found)
        assert [(photo.width, photo.height) for photo in found if not photo.kind] == (
            [(40, 32), (40, 32)] if recipe is None else [(48, 48), (48, 48)]
        )


def test_a_photograph_that_goes_while_others_are_prepared_is_a_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else empties the folder, or its server is away at one try."""
    paths, make = [str(folder / name) for name in ("a.JPG", "b.jpg")], masters.make

    def later(*given: Any) -> Any:
        os.unlink(paths[0])
        return make(*given)

    monkeypatch.setattr(masters, "make", later)
    found, _ = photos.ready(paths, RECIPE, silent)
    assert [(photo.kind, photo.reason) for photo in found] == [("missing", "there is no such photograph"), ("", "")]
    monkeypatch.undo()
    look, tries = os.stat, list[str]()

    def away(place: Any, *given: Any, **more: Any) -> Any:
        if place == paths[1]:
            tries.append(place)
            if len(tries) == 1:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), place)
        return look(place, *given, **more)

    monkeypatch.setattr(os, "stat", away)
    assert masters.make(paths[1:], RECIPE)[paths[1]].kind == ""
    assert len(tries) > 1


def test_a_master_that_lost_its_bytes_with_the_power_is_made_again(folder: Path) -> None:
    (made,) = masters.make([str(folder / "b.jpg")], RECIPE).values()
    before = Path(made.master).read_bytes()
    os.truncate(made.master, 0)
    assert masters.make([str(folder / "b.jpg")], RECIPE) == {made.file: made}
    assert Path(made.master).read_bytes() == before


def test_masters_are_those_of_prepare_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = official(tmp_path / "raw")
    prepare.run(str(source), tmp_path / "masters", Recipe(48), sheet=0, workers=1)
    raw = sorted((source / "DR_grading" / "test").glob("*.jpg"))
    found, said = photos.ready([str(path) for path in raw], RECIPE, silent)
    assert said == [f"preparation: {len(raw)} photographs cropped to the retina (48 px, jpeg), as the run's were"]
    given = photos.ready([str(path) for path in raw], RECIPE, silent, given=True)
    assert given == (found, [said[0].replace("as the run's were", "as was asked for")])
    assert photos.ready([], None, silent, given=True)[1] == ["no preparation: as was asked for"]
    for path, photo in zip(raw, found, strict=True):
        assert Path(photo.file).read_bytes() == (tmp_path / "masters/DR_grading/test" / path.name).read_bytes()
        assert Path(photo.file).is_relative_to(cache.folder())
    monkeypatch.setattr("fastddr.data.crop.master", None)
    assert photos.ready([str(path) for path in raw], RECIPE, silent)[0] == found, "none is made again"
    monkeypatch.undo()
    # As large as before, as one may well be that was repaired.
    os.utime(raw[0], ns=(0, raw[0].stat().st_mtime_ns + 1))
    after = photos.ready([str(raw[0])], RECIPE, silent)[0]
    assert after[0].file != found[0].file, "a changed photograph is another one"


def test_two_machines_may_make_a_master_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one cache, and processes of the same number."""
    file, replace = str(folder / "b.jpg"), os.replace
    other: list[masters.Made] = []

    def meanwhile(*paths: str) -> None:
        monkeypatch.undo()
        other.extend(masters.make([file], RECIPE).values())
        replace(*paths)

    monkeypatch.setattr(os, "replace", meanwhile)
    found = masters.make([file], RECIPE)
    assert [*found.values()] == other
    assert not [path for path in Path(other[0].master).parent.iterdir() if path.suffix not in (".jpg", ".png")]


@pytest.mark.parametrize("this", [0, 1])
def test_machines_may_have_caches_of_their_own(folder: Path, this: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(folder / "b.jpg")
    monkeypatch.setattr(ranks, "machine", lambda: this)
    monkeypatch.setattr(ranks, "on_all", lambda do: do())
    there = (1 - this, masters.Made(file, "/scratch/other/b.jpg"))
    monkeypatch.setattr(ranks, "gather", lambda mine: [*mine, there] if this == 0 else [there, *mine])
    (made,) = masters.make([file], RECIPE).values()
    assert Path(made.master).is_relative_to(cache.folder())


@pytest.mark.parametrize("this", [0, 1])
def test_what_one_machine_cannot_use_is_left_out_on_all(
    folder: Path, this: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the machines grade different photographs, and name one by the grade of its neighbour."""
    paths = [str(folder / name) for name in ("a.JPG", "b.jpg", "below/c.png")]
    os.unlink(paths[this])
    kinds = [(paths[place], "missing" if place == 1 - this else "") for place in range(3)]
    there = [(1 - this, masters.Made(path, "" if kind else "/scratch/other", kind)) for path, kind in kinds]
    monkeypatch.setattr(ranks, "machine", lambda: this)
    monkeypatch.setattr(ranks, "on_all", lambda do: do())
    monkeypatch.setattr(ranks, "gather", lambda mine: mine and (mine + there if this == 0 else there + mine))
    found, _ = photos.ready(paths, RECIPE, silent)
    assert [photo.kind for photo in found] == ["missing", "missing", ""]


def test_ranks_share_the_same_photographs_though_one_is_gone_for_one_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(folder / name) for name in ("a.JPG", "b.jpg", "below/c.png")]
    os.unlink(paths[0])
    other = [(0, masters.Made(path, "/cache/other")) for path in paths[1::2]]  # which still saw all of them
    monkeypatch.setattr(ranks, "local_world", lambda: 2)
    monkeypatch.setattr(ranks, "on_all", lambda do: do())
    monkeypatch.setattr(ranks, "gather", lambda mine: mine and [*mine, *other])
    found, _ = photos.ready(paths, RECIPE, silent)
    assert [photo.kind for photo in found] == ["missing", "", ""]


@pytest.mark.parametrize(("photograph", "expected"), [(0o600, 0o600), (0o644, 0o644), (0o440, 0o640)])
def test_a_master_is_for_those_who_may_read_the_photograph(folder: Path, photograph: int, expected: int) -> None:
    file = folder / "b.jpg"
    file.chmod(photograph)
    (made,) = masters.make([str(file)], RECIPE).values()
    assert Path(made.master).stat().st_mode & 0o777 == expected


@pytest.mark.parametrize(("photograph", "expected"), [(0o640, 0o600), (0o644, 0o644), (0o664, 0o644)])
def test_another_group_than_the_photographs_gets_what_anybody_gets(
    tmp_path: Path, photograph: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    with (tmp_path / "file").open("w") as stream:
        own = os.fstat(stream.fileno())
        # Mode and group are the first and the sixth of what stat says.
        cache.share(stream.fileno(), os.stat_result((photograph, *own[1:5], own.st_gid + 1, *own[6:])))
    assert (tmp_path / "file").stat().st_mode & 0o777 == expected


def test_masters_are_not_prepared_again(tmp_path: Path) -> None:
    prepare.run(str(official(tmp_path / "raw")), tmp_path / "out", Recipe(48), sheet=2, workers=1)
    there = photos.find([str(tmp_path / "out")])
    assert not any("sheet" in path for path in there.paths), "contact sheets are no photographs"
    (tmp_path / "out" / "@eaDir").mkdir()  # a disk station's previews
    shutil.copy(there.paths[0], tmp_path / "out" / "@eaDir" / "x.jpg")
    for pattern in ("out/**/*.jpg", "o*/**", "ou*/*/*/*.jpg", "out//*"):
        assert sorted(photos.find([str(tmp_path / pattern)]).paths) == sorted(there.paths)
    for pattern in ("out/prepared/s*.jpg", "o*/prepared/s*.jpg"):
        assert photos.find([str(tmp_path / pattern)]).paths, "what is named by itself is taken"
    found, said = photos.ready(there.paths, RECIPE, silent)
    assert [photo.file for photo in found] == list(there.paths)
    assert said == [f"no preparation of {len(found)} photographs: they are masters of `fastddr prepare` already"]
    assert photos.ready(there.paths, replace(RECIPE, size=64), silent)[1][-1].startswith("note: ")
    earlier = photos.ready(there.paths, replace(RECIPE, version=1), silent)[1][-1]
    assert earlier.endswith("made otherwise than the run's, which are 48 px, jpeg, by version 1 of `fastddr prepare`")
    assert photos.ready(there.paths, None, silent)[1][-1].startswith("note: ")


def test_a_manifest_says_how_its_photographs_were_prepared(tmp_path: Path) -> None:
    source = official(tmp_path / "raw")
    prepare.run(str(source), tmp_path / "out", Recipe(48), sheet=0, workers=1)
    for data, wanted in ((source, None), (tmp_path / "out", RECIPE)):
        file = tmp_path / "manifest.csv"
        file.write_text(manifest.read(data).to_csv())
        assert masters.of_run(file) == wanted
        text = file.read_text()
        file.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("# prep")))
        for silent_one in (file, tmp_path / "gone.csv"):
            with pytest.raises(UserError, match="does not say whether"):
                masters.of_run(silent_one)
    assert len(list(csv.reader(text.splitlines()))) == text.count("\n")


@pytest.mark.parametrize(
    "wrong", [{"format": "x/../../evil"}, {"format": ["jpeg"]}, {"size": 30000}, {"size": -5}, {"size": True},
              {"size": float("nan")}, {"prepare": "x"}],
)  # fmt: skip
def test_a_manifest_chooses_neither_places_nor_memory(wrong: dict[str, Any], tmp_path: Path) -> None:
    told = {"prepare": 2, "size": 48, "format": "jpeg"} | wrong
    (tmp_path / "manifest.csv").write_text(f"# prepared: {json.dumps(told)}\npath\n")
    with pytest.raises(UserError, match=r"manifest\.csv: what it says of `fastddr prepare` cannot be read"):
        masters.of_run(tmp_path / "manifest.csv")


def test_masters_of_another_version_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=f"version {crop.VERSION + 1} of `fastddr prepare`"):
        masters.make([str(folder / "b.jpg")], replace(RECIPE, version=crop.VERSION + 1))


def test_photographs_that_changed_since_they_were_looked_at_are_named(folder: Path) -> None:
    paths = [str(folder / name) for name in ("a.JPG", "b.jpg", "below/c.png")]
    listed, _ = photos.ready(paths, None, silent)
    known = photos.as_manifest(listed)
    known = replace(known, size=np.array([os.path.getsize(path) for path in paths]))
    assert photos.again(listed) == listed
    assert known.changed() == []
    with open(paths[0], "ab") as stream:
        stream.write(b"\0")
    os.unlink(paths[1])
    assert [photo.kind for photo in photos.again(listed)] == ["changed", "missing", ""]
    assert [photo.path for photo in photos.again(listed)] == paths
    assert known.changed() == list(known.path[:2])
    assert known.changed(np.array([1, 2])) == [known.path[1]]
