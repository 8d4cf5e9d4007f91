"""Two ranks share the work of a command, and agree about it. To start ranks takes longer than what most of them do, so
that these have many commands.

They are as of two machines: each has a folder, copies of the data, lists and a cache of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import photographs
import pytest
import torch
from tests_support import content, forked, launch, table, train

from fastddr import load_preset, models
from fastddr.__main__ import main
from fastddr.data import crop, prepare, survey

SCRIPT = """
import contextlib, io, json, os, sys
from pathlib import Path
from fastddr import ranks
from fastddr.__main__ import main
from fastddr.data import crop, prepare
from fastddr.errors import UserError

starts, data, out = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
os.chdir(str(ranks.rank()))
os.environ["FASTDDR_CACHE"] = str(Path("cache").absolute())
number = len(list(Path().glob("told-*")))
told, prepared = {}, []


def run(size=32, **settings):
    try:
        done = prepare.run(data, out, crop.Recipe(size), sheet=4, **settings)
        prepared.append([done.done, done.skipped, len(done.bad)])
    except UserError as error:
        prepared.append(str(error))


for name, arguments in starts[number].items():
    heard, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(printed):
        code = main(arguments)
    said = [line for line in heard.getvalue().splitlines() if line.startswith("fastddr:")]
    told[name] = [code, said, printed.getvalue()]

if number == 0:
    real = crop._write
    if ranks.rank() == 1:
        def full(*_):
            raise OSError(28, "No space left on device")
        crop._write = full
    run()                       # one rank's disk is full
    crop._write = real
    run()                       # a photograph is bad
    run(on_bad="exclude")
    run(on_bad="exclude")
    run(size=48)                # other settings
    told["prepared"] = prepared
Path(f"told-{number}").write_text(json.dumps(told))
"""


class Told(NamedTuple):
    """What the two ranks were told: by command the exit code, our sentences, and what was printed."""

    ranks: list[dict[str, Any]]
    folder: Path
    run: Path
    torn: list[str]


def copies(tiny: Path, folder: Path) -> list[str]:
    """Three sets for each rank, and one for both. Names of those that break off in `rotten`."""
    for rank in ("0", "1"):
        # Copies of as many bytes each, of which one machine's is no picture by its header.
        for name in ("same", "rotten", "other"):
            shutil.copytree(tiny, folder / rank / name)
    names = sorted(path.name for path in (tiny / "DR_grading" / "test").glob("*.jpg"))
    rotten = folder / "1" / "rotten" / "DR_grading" / "test" / names[0]
    rotten.write_bytes(bytes(rotten.stat().st_size))
    torn = [f"test/{name}" for name in names[2:]]
    spoiled = Path(shutil.copytree(tiny, folder / "DDR-dataset"))
    every_other = sorted((spoiled / "DR_grading" / "valid").glob("*.jpg"))[::2]
    for path in (*(folder / rank / "rotten" / "DR_grading" / name for rank in "01" for name in torn), *every_other):
        path.write_bytes(path.read_bytes()[:-2])
    labels = folder / "1" / "other" / "DR_grading" / "train.txt"
    labels.write_text(f"{labels.read_text()}more.jpg 0\n")
    (folder / "0" / "list.csv").write_text(f"test/{names[0]}\n")
    (folder / "0" / "only").symlink_to("same")
    torch.save(models.from_config(load_preset("quickstart"), print).state_dict(), folder / "0" / "w.pth")
    return torn


@pytest.fixture(scope="module")
def told(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("ranks")
    torn = copies(tiny, folder)
    prepare.run(str(tiny), folder / "masters", crop.Recipe(96), sheet=3, workers=1)
    run = train(folder / "masters", folder / "run", "--epochs", "1", "--lr", "0.01")
    graded = [line.split() for line in (tiny / "DR_grading" / "test.txt").read_text().splitlines()]
    (folder / "raw").mkdir()
    for name, grade in graded:
        if grade != "5":
            shutil.copy(tiny / "DR_grading" / "test" / name, folder / "raw")
    bad = photographs.official(folder / "data") / "DR_grading" / "test" / "007-0020-000.jpg"
    bad.write_bytes(bad.read_bytes()[:-40])
    commands: dict[str, list[str]] = {
        "check spoiled": ["check", str(folder / "DDR-dataset"), "--json"],
        "check only": ["check", "only"],
        "check list": ["check", "same", "--exclude", "list.csv"],
        "check other": ["check", "other"],
        "check rotten": ["check", "rotten", "--json"],
        "prepare list": ["prepare", "same", str(folder / "nothing"), "--exclude", "list.csv"],
    }
    # These leave the other ranks at their end.
    lasts: list[dict[str, list[str]]] = [
        {"predict": ["predict", str(run), str(folder / "raw"), "--out", str(folder / "g.csv"), "--batch-size", "4"]},
        {
            "train only": ["train", "--data", "only", "--run-dir", str(folder / "none")],
            "train init": ["train", "--data", "same", "--run-dir", str(folder / "none"), "--init", "w.pth"],
            "train spoiled": ["train", "--data", str(folder / "DDR-dataset"), "--run-dir", str(folder / "none")],
        },
    ]
    starts, script = json.dumps([commands, *lasts]), folder / "go.py"
    script.write_text(SCRIPT)
    done = forked("2,2,2", script, starts, str(folder / "data"), str(folder / "out"), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [[folder / rank / f"told-{number}" for number in range(3)] for rank in "01"]
    both = [dict(pair for file in of for pair in json.loads(file.read_text()).items()) for of in files]
    return Told(both, folder, run, torn)


@pytest.mark.slow
def test_check_on_two_ranks_says_what_one_says(
    told: Told, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = told.folder / "DDR-dataset"
    found = json.loads(told.ranks[0]["check spoiled"][2])
    assert len(found["problems"]) == 6
    monkeypatch.setenv("FASTDDR_CACHE", str(told.folder / "0" / "cache"))
    assert survey.take(spoiled).undecoded() == [], "rank 0 keeps what both found"
    monkeypatch.setenv("FASTDDR_CACHE", str(told.folder / "one"))
    assert main(["check", str(spoiled), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_photograph(told: Told) -> None:
    [_, [one], _], [_, [other], _] = (of["train spoiled"] for of in told.ranks)
    assert one == other
    assert "it breaks off in the middle" in one
    assert "(5 more like it)" in one
    assert not (told.folder / "none").exists()


@pytest.mark.slow
def test_machines_with_other_copies_and_lists_agree_or_stop(told: Told) -> None:
    one, other = told.ranks
    for name in ("check only", "check list", "check other", "prepare list", "train only", "train init"):
        assert one[name][0] == other[name][0] == 2, name
        assert name == "check other" or one[name][1] == other[name][1]
    assert "only: there is no such folder" in one["check only"][1][0]
    assert "list.csv: this list cannot be read" in one["check list"][1][0]
    assert "the ranks see different photographs" in one["check other"][1][0]
    assert "list.csv: this list cannot be read" in one["prepare list"][1][0]
    assert "only: there is no such folder" in one["train only"][1][0]
    assert "w.pth: there is no such file" in one["train init"][1][0]
    code, _, printed = one["check rotten"]
    assert code == 1
    found = {problem["path"] for problem in json.loads(printed)["problems"]}
    assert found >= set(told.torn), "each photograph is decoded by one of them"


@pytest.mark.slow
def test_two_ranks_prepare_what_one_prepares_and_are_told_the_same(told: Told, tmp_path: Path) -> None:
    one, other = (of["prepared"] for of in told.ranks)
    assert one == other
    assert "No space left on device" in one[0]
    assert "007-0020-000.jpg" in one[1]
    assert one[2:4] == [[0, 26, 1], [0, 26, 1]]
    assert "size 32, not 48" in one[4]
    data = str(told.folder / "data")
    prepare.run(data, tmp_path / "one", crop.Recipe(32), sheet=4, on_bad="exclude", workers=1)
    assert content(told.folder / "out") == content(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_two_ranks_score_as_one_does_and_write_one_table(told: Told, verb: str, tmp_path: Path) -> None:
    if verb == "evaluate":
        # As a user does. 13 photographs at 3 a rank: of the last three each, one rank has padding alone.
        options = ["--split", "test", "--batch-size", "3"]
        done = launch(2, "fastddr", verb, str(told.run), *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert [of[verb][0] for of in told.ranks] == [0, 0], [of[verb] for of in told.ranks]
    wanted = [row for row in table(told.run / "report" / "predictions.csv") if row["split"] == "test"]
    [found] = told.run.glob("evaluations/*/predictions.csv") if verb == "evaluate" else [told.folder / "g.csv"]
    rows = table(found)
    names = [Path(row["path"]).name for row in wanted]
    assert [Path(row["path"]).name for row in rows] == (names if verb == "evaluate" else sorted(names))
    grades = {Path(row["path"]).name: float(row["p0"]) for row in wanted}
    for row in rows:
        assert float(row["p0"]) == pytest.approx(grades[Path(row["path"]).name], abs=1e-6)
