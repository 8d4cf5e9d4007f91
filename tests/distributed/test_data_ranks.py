"""Two processes share the work on a data set, and agree about it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from tests_support import ROOT, forked

from fastddr import load_preset, models
from fastddr.__main__ import main
from fastddr.data import survey


@pytest.fixture
def spoiled(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set in which every other photograph of valid breaks off."""
    copy = Path(shutil.copytree(tiny, tmp_path / "DDR-dataset"))
    for path in sorted((copy / "DR_grading" / "valid").glob("*.jpg"))[::2]:
        path.write_bytes(path.read_bytes()[:-2])
    return copy


@pytest.mark.slow
def test_check_on_two_ranks_says_what_one_says(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "two"))
    done = forked(2, "fastddr", "check", str(spoiled), "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert len(found["problems"]) == 6
    assert survey.take(spoiled).undecoded() == [], "rank 0 keeps what both found"
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "one"))
    assert main(["check", str(spoiled), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_photograph(spoiled: Path, tmp_path: Path) -> None:
    done = forked(2, ROOT / "fastddr" / "train.py", "--data", str(spoiled), "--run-dir", "run", cwd=tmp_path)
    ours = [line for line in done.stderr.splitlines() if line.startswith("fastddr:")]
    assert len(ours) == 2
    assert ours[0] == ours[1]
    assert "it breaks off in the middle" in ours[0]
    assert "(5 more like it)" in ours[0]
    assert not (tmp_path / "run").exists()


# Ranks of two machines, each with a copy of the data and lists of its own: several commands in one launch.
MACHINES = """
import contextlib, io, json, os, sys
from pathlib import Path
from fastddr import ranks
from fastddr import load_preset, models
from fastddr.__main__ import main

home = Path(sys.argv[1]) / str(ranks.rank())
os.chdir(home)
os.environ["FASTDDR_CACHE"] = str(home / "cache")
told = []
for arguments in json.loads(sys.argv[2]):
    heard, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(printed):
        code = main(arguments)
    told.append([code, [line for line in heard.getvalue().splitlines() if line.startswith("fastddr:")]])
    if "--json" in arguments and code < 2 and ranks.rank() == 0:
        told[-1].append([problem["path"] for problem in json.loads(printed.getvalue())["problems"]])
(home / "told.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_machines_with_other_copies_and_lists_agree_or_stop(tiny: Path, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        shutil.copytree(tiny, tmp_path / rank / "same")
        # Copies of as many bytes each, of which one machine's is no picture by its header.
        shutil.copytree(tiny, tmp_path / rank / "rotten")
        shutil.copytree(tiny, tmp_path / rank / "other")
    names = sorted(path.name for path in (tiny / "DR_grading" / "test").glob("*.jpg"))
    rotten = tmp_path / "1" / "rotten" / "DR_grading" / "test" / names[0]
    rotten.write_bytes(bytes(rotten.stat().st_size))
    torn = [f"test/{name}" for name in names[2:]]
    for rank in ("0", "1"):
        for name in torn:
            path = tmp_path / rank / "rotten" / "DR_grading" / name
            path.write_bytes(path.read_bytes()[:-2])
    labels = tmp_path / "1" / "other" / "DR_grading" / "train.txt"
    labels.write_text(f"{labels.read_text()}more.jpg 0\n")
    (tmp_path / "0" / "list.csv").write_text(f"test/{names[0]}\n")
    (tmp_path / "0" / "only").symlink_to("same")
    torch.save(models.from_config(load_preset("quickstart"), print).state_dict(), tmp_path / "0" / "w.pth")
    commands = [
        ["check", "only"],
        ["check", "same", "--exclude", "list.csv"],
        ["check", "other"],
        ["check", "rotten", "--json"],
        ["prepare", "same", str(tmp_path / "out"), "--exclude", "list.csv"],
        ["train", "--data", "only", "--run-dir", str(tmp_path / "run")],
        ["train", "--data", "same", "--run-dir", str(tmp_path / "run"), "--init", "w.pth"],
    ]
    (tmp_path / "go.py").write_text(MACHINES)
    began = time.monotonic()
    done = forked(2, tmp_path / "go.py", str(tmp_path), json.dumps(commands), cwd=tmp_path)
    assert time.monotonic() - began < 150, "none waits for another"
    assert done.returncode == 0, done.stderr[-3000:]
    told, other = (json.loads((tmp_path / rank / "told.json").read_text()) for rank in "01")
    for number in (0, 1, 2, 4, 5, 6):
        assert told[number][0] == other[number][0] == 2
        assert number == 2 or told[number] == other[number]
    assert "only: there is no such folder" in told[0][1][0]
    assert "list.csv: this list cannot be read" in told[1][1][0]
    assert "the ranks see different photographs" in told[2][1][0]
    assert "list.csv: this list cannot be read" in told[4][1][0]
    assert "only: there is no such folder" in told[5][1][0]
    assert "w.pth: there is no such file" in told[6][1][0]
    assert told[3][0] == 1
    assert set(told[3][2]) >= set(torn), "each photograph is decoded by one of them"
