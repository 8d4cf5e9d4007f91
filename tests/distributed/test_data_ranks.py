"""Two processes share the work on a data set, and agree about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests_support import ROOT, launch

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
    done = launch(2, "fastddr", "check", str(spoiled), "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert len(found["problems"]) == 6
    assert survey.take(spoiled).undecoded() == [], "rank 0 keeps what both found"
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "one"))
    assert main(["check", str(spoiled), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_photograph(spoiled: Path, tmp_path: Path) -> None:
    done = launch(2, ROOT / "fastddr" / "train.py", "--data", str(spoiled), "--run-dir", "run", cwd=tmp_path)
    ours = [line for line in done.stderr.splitlines() if line.startswith("fastddr:")]
    assert len(ours) == 2
    assert ours[0] == ours[1]
    assert "it breaks off in the middle" in ours[0]
    assert "(5 more like it)" in ours[0]
    assert not (tmp_path / "run").exists()
