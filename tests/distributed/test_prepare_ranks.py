"""`fastddr prepare` on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import photographs
import pytest
from tests_support import content, forked

from fastddr.data import prepare
from fastddr.data.crop import Recipe

# Several runs in one launch: what each rank was told goes into a file.
SCRIPT = """
import json, os, sys
from pathlib import Path
from fastddr import ranks
from fastddr.data import crop, prepare
from fastddr.errors import UserError

data, out = sys.argv[1], Path(sys.argv[2])
told = []


def run(size=32, **settings):
    try:
        done = prepare.run(data, out / "out", crop.Recipe(size), sheet=4, **settings)
        told.append([done.done, done.skipped, len(done.bad)])
    except UserError as error:
        told.append(str(error))


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
(out / f"rank-{ranks.rank()}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_two_ranks_make_what_one_makes_and_are_told_the_same(tmp_path: Path) -> None:
    data = photographs.official(tmp_path / "data")
    entry = data / "DR_grading" / "test" / "007-0020-000.jpg"
    entry.write_bytes(entry.read_bytes()[:-40])
    (tmp_path / "go.py").write_text(SCRIPT)
    done = forked(2, tmp_path / "go.py", str(data), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert told == other
    assert "No space left on device" in told[0]
    assert "007-0020-000.jpg" in told[1]
    assert told[2:4] == [[0, 26, 1], [0, 26, 1]]
    assert "size 32, not 48" in told[4]
    prepare.run(str(data), tmp_path / "one", Recipe(32), sheet=4, on_bad="exclude", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "one")
