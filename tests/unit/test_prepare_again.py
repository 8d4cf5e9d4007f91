"""`fastddr prepare` started again, on what is bad, and where it may not write."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import photographs
import pytest
from eyes import FEW, damage, eye, folders, official, run, table, told
from eyes import quick as quick  # a fixture of all these tests
from tests_support import content, unlistable

from fastddr import files
from fastddr.data import crop, layouts, output, photograph, survey
from fastddr.data.crop import Recipe
from fastddr.errors import UserError

# ------------------------------------------------------------------------------------------------ again


def forbid(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a photograph was decoded")

    patch.setattr(crop, "find_disc", refuse)
    patch.setattr(photograph, "upright", refuse)
    patch.setattr(photograph, "digest", refuse)


@pytest.mark.parametrize("make", [official, folders])
def test_a_second_run_decodes_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    data = make(tmp_path / "data")
    first = run(data, tmp_path / "out")
    before, times = content(tmp_path / "out"), {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    forbid(monkeypatch)
    second = run(data, tmp_path / "out")
    assert (first.done, first.skipped, second.done, second.skipped, second.removed) == (8, 0, 0, 8, 0)
    assert second.sheets == first.sheets
    assert content(tmp_path / "out") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("make", [official, folders])
def test_what_two_runs_at_once_left_behind_is_put_together(tmp_path: Path, make: Any, missing: bool) -> None:
    """Photographs in sight and out of sight in one folder's name, and perhaps one that is not there yet."""
    data, out = make(tmp_path / "data"), tmp_path / "out"
    run(data, out)
    wanted = content(out)
    one, other, *_ = sorted(path for path in out.rglob("*.jpg") if path.parent.parent != out)
    hidden = out / ".unfinished" / one.relative_to(out)
    hidden.parent.mkdir(parents=True)
    one.rename(hidden)
    if missing:
        other.unlink()
    assert run(data, out).done == missing
    assert content(out) == wanted


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    data, out = official(tmp_path / "data"), tmp_path / "out"
    run(data, out)
    script = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(out / "prepared" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another `fastddr prepare` is at this folder; wait until it has ended"):
            run(data, out)
        other.communicate()
    assert run(data, out).skipped == 8


def test_a_run_holds_its_folder_until_it_ends(tmp_path: Path) -> None:
    data, out = official(tmp_path / "data"), tmp_path / "out"
    script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", script, str(out / "prepared" / ".lock")]
    codes = []
    run(data, out, on_progress=lambda *_: codes.append(subprocess.run(command, capture_output=True).returncode))
    assert codes == [1] * 8
    assert subprocess.run(command).returncode == 0


def test_what_was_checked_before_is_not_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = official(tmp_path / "data")
    seen = survey.take(data)
    seen.decode(seen.undecoded(), 1)
    monkeypatch.setattr(photograph, "digest", lambda _: pytest.fail("hashed again"))
    assert run(data, tmp_path / "out").done == 8


def test_what_is_decoded_here_is_known_to_a_survey_so_training_does_not_decode_it_again(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    assert len(survey.take(data).undecoded()) == 8
    run(data, tmp_path / "out")
    assert survey.take(data).undecoded() == []


def test_only_new_and_changed_photographs_are_made_and_gone_ones_are_removed(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    run(data, tmp_path / "out")
    (tmp_path / "out" / "train" / "0" / "foreign.txt").write_text("stays")
    eye(data / "train" / "1" / "new.jpg", 40)
    eye(data / "train" / "0" / "n0.jpg", 41)
    (data / "test" / "0" / "n6.jpg").unlink()
    done = run(data, tmp_path / "out")
    assert (done.done, done.skipped, done.removed) == (2, 6, 1)
    assert not (tmp_path / "out" / "test" / "0").exists(), "an empty folder would be left"
    (tmp_path / "out" / "train" / "0" / "foreign.txt").unlink()
    run(data, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_nothing_is_there_that_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folders(tmp_path / "data")
    real = crop.append

    def killed(journal: str, row: crop.Row) -> None:
        if row.path.endswith("n2.jpg"):
            raise RuntimeError
        real(journal, row)

    monkeypatch.setattr(crop, "append", killed)
    with pytest.raises(RuntimeError):
        run(data, tmp_path / "out")
    monkeypatch.undo()
    (data / "train/2/n2.jpg").unlink()
    run(data, tmp_path / "out")
    run(data, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_journal_may_be_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folders(tmp_path / "data")
    real = crop.append

    def torn(journal: str, row: crop.Row) -> None:
        real(journal, row)
        if row.path == "train/1/n1.jpg":  # the third
            with open(journal, "r+b") as stream:
                stream.truncate(os.path.getsize(journal) - 9)
            raise RuntimeError

    def killed(journal: str, row: crop.Row) -> None:
        if row.path == "valid/1/n4.jpg":  # the fifth
            raise RuntimeError
        real(journal, row)

    for append in (torn, killed):
        monkeypatch.setattr(crop, "append", append)
        with pytest.raises(RuntimeError):
            run(data, tmp_path / "out")
    monkeypatch.undo()
    assert run(data, tmp_path / "out").done == 4, "the line after the torn one counts"
    run(data, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_labels_follow_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = official(tmp_path / "data")
    run(data, tmp_path / "out")
    labels = data / "DR_grading" / "train.txt"
    labels.write_text(labels.read_text().replace("n0.jpg 0", "n0.jpg 4"))
    forbid(monkeypatch)
    done = run(data, tmp_path / "out")
    assert done.done == 0
    assert told(tmp_path / "out") == told(data)
    assert told(tmp_path / "out")["train/n0"][0] == 4


def test_labels_that_are_saved_anew_meanwhile_are_not_taken(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    labels = data / "DR_grading" / "train.txt"

    def save(*_: int) -> None:
        labels.write_text(labels.read_text().replace("n0.jpg 0", "n0.jpg 4"))

    with pytest.raises(UserError, match=r"train\.txt, line 1: the label file was changed meanwhile; run again"):
        run(data, tmp_path / "out", on_progress=save)
    assert not list((tmp_path / "out").rglob("*.txt")), "it is not finished"
    assert run(data, tmp_path / "out").done == 0
    assert told(tmp_path / "out")["train/n0"][0] == 4


def test_a_lost_output_is_made_again(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    run(data, tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out/DR_grading/train/n0.jpg").unlink()
    (tmp_path / "out/DR_grading/train/n1.jpg").write_bytes(b"half")
    assert run(data, tmp_path / "out").done == 2
    assert content(tmp_path / "out") == before
    # So is what the table does not tell, emptied, torn in the middle or in its last row, or written over.
    table = tmp_path / "out" / "prepared" / "prepared.csv"
    text = table.read_text()
    lines = text.splitlines(keepends=True)
    for torn, lost in (
        ("", len(lines) - 1),
        (text[:-9], 1),
        ("".join([*lines[:-2], '"', *lines[-2:]]), 2),
        ("".join([*lines[:-2], "x" + lines[-2].replace(",", ",x", 3), lines[-1]]), 1),
    ):
        table.write_text(torn)
        assert run(data, tmp_path / "out").done == lost
        assert content(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------ faults


def test_bad_photographs_stop_it_when_all_the_rest_is_done(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    whole = (data / "DR_grading/train/n1.jpg").read_bytes()
    damage(data / "DR_grading/train/n1.jpg")
    (data / "DR_grading/valid/n4.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"train/n1\.jpg: train\.txt, line 2: it breaks off .*\(1 more like it\).*--on-bad exclude"
    ) as error:
        run(data, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*.txt"))
    assert len([p for p in (tmp_path / "out").rglob("n*.jpg") if p.is_file()]) == 6
    (data / "DR_grading/train/n1.jpg").write_bytes(whole)
    eye(data / "DR_grading/valid/n4.jpg", 4)
    assert run(data, tmp_path / "out").done == 2
    run(data, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("layout", ["official", "kaggle", "gdrbench", "folders", "csv"])
def test_an_unfinished_output_is_not_taken_for_a_set(tmp_path: Path, layout: str) -> None:
    data = photographs.LAYOUTS[layout](tmp_path / "data", FEW)
    first = survey.take(data).entries[0].path
    file = survey.take(data).root / first
    whole = file.read_bytes()
    damage(file)
    with pytest.raises(UserError, match="fetch it again"):
        run(data, tmp_path / "out")
    with pytest.raises(UserError, match="no known layout"):
        layouts.find(tmp_path / "out")
    file.write_bytes(whole)
    run(data, tmp_path / "out")
    assert told(tmp_path / "out") == told(data)
    before = content(tmp_path / "out")
    damage(file)
    with pytest.raises(UserError, match="fetch it again"):
        run(data, tmp_path / "out")
    assert content(tmp_path / "out") == before, "what was whole stays whole"


def test_bad_photographs_and_lines_are_left_out_and_listed(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    damage(data / "DR_grading/train/n1.jpg")
    (data / "DR_grading/valid/n4.jpg").unlink()
    with (data / "DR_grading/train.txt").open("a") as stream:
        stream.write("no line\nn3.jpg 0\n")
    done = run(data, tmp_path / "out", on_bad="exclude")
    assert sorted(problem.kind for problem in done.bad) == ["doubled", "label", "missing", "truncated"]
    with (tmp_path / "out/prepared/excluded.csv").open(newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert [row["path"] for row in listed] == ["train.txt, line 5", "train/n1.jpg", "train/n3.jpg", "valid/n4.jpg"]
    assert (tmp_path / "out/DR_grading/train.txt").read_text() == "n0.jpg 0\nn2.jpg 2\n"
    assert (tmp_path / "out/DR_grading/valid.txt").read_text() == "n5.jpg 2\n"
    assert len(table(tmp_path / "out")) == 5
    again = run(data, tmp_path / "out", on_bad="exclude")
    assert (again.done, again.skipped, again.removed) == (0, 5, 0)
    with pytest.raises(UserError, match="on-bad exclude"):
        run(data, tmp_path / "out")


@pytest.mark.parametrize("lost", ["missing", "truncated"])
def test_a_test_split_that_is_lost_whole_is_left_out_with_its_label_file(lost: str, tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    whole = told(data)
    shutil.copytree(data / "DR_grading/test", tmp_path / "kept")
    for file in (data / "DR_grading/test").iterdir():
        file.unlink() if lost == "missing" else damage(file)
    done = run(data, tmp_path / "out", on_bad="exclude")
    assert ([problem.kind for problem in done.bad], done.done) == ([lost] * 2, 6)
    assert told(tmp_path / "out") == {path: about for path, about in whole.items() if about[1] != "test"}
    shutil.copytree(tmp_path / "kept", data / "DR_grading/test", dirs_exist_ok=True)
    run(data, tmp_path / "out", on_bad="exclude")
    assert told(tmp_path / "out") == whole


def test_a_photograph_that_became_bad_is_removed(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    run(data, tmp_path / "out")
    damage(data / "train/0/n0.jpg")
    done = run(data, tmp_path / "out", on_bad="exclude")
    assert (done.done, done.removed) == (0, 1)
    assert "train/0/n0" not in told(tmp_path / "out")


def test_leaks_are_no_reason_to_leave_out(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    shutil.copy(data / "train/0/n0.jpg", data / "test/0/leak.jpg")
    assert run(data, tmp_path / "out").done == 9
    assert any(problem.kind == "picture-in-two-splits" for problem in survey.take(data).problems())
    assert run(data, tmp_path / "out").bad == ()


def test_a_set_without_a_usable_photograph_is_refused(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    for file in data.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of its photographs can be used"):
        run(data, tmp_path / "out", on_bad="exclude")


@pytest.mark.parametrize("inside", ["out in data", "data in out", "same", "link", "out in a split"])
def test_the_output_may_not_overlap_the_source(tmp_path: Path, inside: str) -> None:
    data = official(tmp_path / "above" / "data")
    (tmp_path / "link").symlink_to(data)
    before = content(tmp_path)
    out = {
        "out in data": data / "out",
        "data in out": tmp_path / "above",
        "same": data,
        "link": tmp_path / "link" / "out",
        "out in a split": data / "DR_grading" / "train",
    }[inside]
    with pytest.raises(UserError, match="outside of the data set"):
        run(data, out)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("recipe", "said"), [(Recipe(48), "size 32, not 48"), (Recipe(32, "png"), "format jpeg, not png")]
)
def test_other_settings_are_refused(tmp_path: Path, recipe: Recipe, said: str) -> None:
    data = official(tmp_path / "data")
    run(data, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match=said):
        run(data, tmp_path / "out", recipe=recipe)
    assert content(tmp_path / "out") == before


def test_foreign_folders_files_and_sets_are_refused(tmp_path: Path) -> None:
    data = official(tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    with pytest.raises(UserError, match=r"mine: it is not empty"):
        run(data, tmp_path / "mine")
    with pytest.raises(UserError, match="this is a file"):
        run(data, tmp_path / "mine" / "letter.txt")
    (tmp_path / "empty").mkdir()
    run(data, tmp_path / "empty")
    other = official(tmp_path / "other")
    for file in (other / "DR_grading").rglob("n*.jpg"):
        file.rename(file.with_name(f"o{file.name}"))
    for labels in (other / "DR_grading").glob("*.txt"):
        labels.write_text(labels.read_text().replace("n", "on"))
    with pytest.raises(UserError, match="another data set"):
        run(other, tmp_path / "empty")
    with pytest.raises(UserError, match="layout official, not folders"):
        run(folders(tmp_path / "folders"), tmp_path / "empty")
    (tmp_path / "empty/prepared/settings.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        run(data, tmp_path / "empty")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "mine" / "DR_grading" / "train" / "n0.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    unlistable(monkeypatch, tmp_path / "mine", code)
    with pytest.raises(OSError, match="mine"):
        output.Output(tmp_path / "mine", "").open({})
    assert own.read_bytes() == b"mine"
    assert not (tmp_path / "mine" / "prepared").exists()


def test_what_leads_out_of_a_folder_from_elsewhere_is_left_alone(tmp_path: Path) -> None:
    data, out, victim = folders(tmp_path / "data"), tmp_path / "out", tmp_path / "victim"
    run(data, out)
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    before = content(victim)
    settings, table = out / "prepared/settings.json", out / "prepared/prepared.csv"
    journal = out / "prepared/journal-0.jsonl"
    row = table.read_text().splitlines()[1].split(",")

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            run(data, out, on_bad="exclude")
        assert content(victim) == before

    for path in (str(victim / "thesis.txt"), "../victim/thesis.txt"):
        written = settings.read_text()
        settings.write_text(json.dumps(json.loads(written) | {"labels": [path]}))
        refused("its tables name files outside of it")
        settings.write_text(written)
        written = table.read_text()
        table.write_text(written + ",".join([path, *row[1:]]) + "\n")
        refused("its tables name files outside of it")
        table.write_text(written)
        journal.write_text(json.dumps([path, *row[1:]]) + "\n")
        refused("its tables name files outside of it")
        journal.unlink()
    for link in (out / ".unfinished", out / "train" / "9", out / "prepared" / "journal-0.jsonl"):
        link.symlink_to(victim / "thesis.txt" if link == journal else victim)
        refused("makes no links")
        link.unlink()
    # But OUT itself may be one.
    (tmp_path / "link").symlink_to(out)
    assert run(data, tmp_path / "link").skipped == 8


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="--size 8"):
        Recipe(8)
    with pytest.raises(UserError, match="--size 9000"):
        Recipe(9000)
    with pytest.raises(UserError, match="--sheet -1"):
        run(Path("nowhere"), Path("out"), sheet=-1)


def test_a_full_disk_is_one_sentence_and_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = official(tmp_path / "data")
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("n3.jpg"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"n3\.jpg: it cannot be used \(No space left on device\); make room") as error:
        run(data, tmp_path / "out", workers=1)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*.part"))
    monkeypatch.undo()
    assert run(data, tmp_path / "out").done == 5
    run(data, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_full_disk_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = official(tmp_path / "data")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "put", full)
    with pytest.raises(UserError, match=r"settings\.json: it cannot be used \(No space left"):
        run(data, tmp_path / "out")
    monkeypatch.undo()

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "OUT/.unfinished")

    monkeypatch.setattr(output.Output, "hide", read_only)
    with pytest.raises(UserError, match=r"unfinished: .*Read-only file system.*what is done is not done again"):
        run(data, tmp_path / "out")
    monkeypatch.undo()
    assert run(data, tmp_path / "out").done == 8
