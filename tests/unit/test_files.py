"""Files that may lie in somebody else's folder: nothing is written through a link that was put there."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastddr import files, runs, tracking
from fastddr.data import manifest, output
from fastddr.data.photos import Photo
from fastddr.errors import UserError
from fastddr.evaluation.metrics import SplitResult
from fastddr.inference import predict
from fastddr.inference.flags import Predict
from fastddr.reporting import predictions
from fastddr.tracking import copies


def graded(file: Path, overwrite: bool = False) -> None:
    predict._write(Predict(run=file.parent, out=file, overwrite=overwrite), predict.Answer((), None), 5)


WRITERS: dict[str, Callable[[Path], object]] = {
    "settings.json": lambda file: output.put(file, b"new"),
    "config.yaml": lambda file: runs.RunFolder(file.parent).write(file, "new"),
    "id.txt": lambda file: copies.write_line(file, "new"),
    "metrics.jsonl": lambda file: tracking.truncate_to(file, 0),
    "grades.csv": lambda file: [file.unlink(), graded(file)],
}


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link_beside(name: str, tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "run" / name
    victim.write_text("years of work")
    file.parent.mkdir()
    file.write_text('{"step": 1}\n')
    for ending in ("tmp", "part", str(os.getpid())):
        file.with_name(f".{name}.{ending}").symlink_to(victim)
    WRITERS[name](file)
    assert victim.read_text() == "years of work"
    assert "step" not in file.read_text()


def test_a_file_is_made_anew_with_the_rights_of_the_old_one_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, link = tmp_path / "old", tmp_path / ("x" * 250), tmp_path / "link"
    old.write_text("old")
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        for file in (old, new):
            files.put(file, b"new")
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in (old, new)] == [0o640, 0o640]
    link.symlink_to(old)
    files.put(link, b"own")
    assert (old.read_text(), link.read_text(), link.is_symlink()) == ("new", "own", False)
    monkeypatch.setattr(files, "uuid4", lambda: SimpleNamespace(hex="0" * 32))
    (tmp_path / ".new.00000000.part").symlink_to(old)
    with pytest.raises(FileExistsError):
        files.put(tmp_path / "new", b"evil")
    assert old.read_text() == "new"


def test_what_came_to_bear_a_files_name_meanwhile_stays(tmp_path: Path) -> None:
    """Since the place was looked at, which may be hours ago."""
    new, other = tmp_path / "new.csv", tmp_path / "other.csv"
    graded(new)
    with pytest.raises(UserError, match="it is there already; give another name, or --overwrite"):
        graded(new)
    graded(new, overwrite=True)
    other.write_text("mine")
    for overwrite, said in ((False, "it is there already"), (True, "this file is no table of grades")):
        with pytest.raises(UserError, match=said):
            graded(other, overwrite)
    assert (new.read_text()[:5], other.read_text()) == ("path,", "mine")
    assert sorted(tmp_path.iterdir()) == [new, other], "nothing is left beside"


def test_a_carriage_return_in_a_name_tears_no_table(tmp_path: Path) -> None:
    """Which Python before 3.13 leaves bare. Tables without one keep their bytes."""
    name, number = "a\rb.jpg", np.array([0])
    seen = manifest.Manifest(tmp_path, (name,), number, ("test",), number, number, number, ("",), ())
    result = SplitResult(torch.eye(5)[:1], torch.tensor([0]), torch.arange(1), [name], "best")
    out = tmp_path / "grades.csv"
    bad = predict.Answer((Photo(name, kind="missing", reason="gone"),), None)
    predict._write(Predict(run=tmp_path, out=out), bad, 5)
    written = [
        seen.to_csv().encode(),
        predictions.dump({"test": result}),
        out.read_bytes(),
        files.table([["path"], [name]]).encode(),
    ]
    for table in written:
        *_, row = csv.reader(io.StringIO(table.decode(), newline=""))
        assert name in row
    assert files.table([["path", "n"], ["a,b", 1]]) == 'path,n\n"a,b",1\n'
