"""`fastddr prepare` ended by kill -9: at any moment, and started again, it gives what an undisturbed run gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests_support import ROOT, content

# A process that forks one child for each moment of a run at which the disk changes, and kills it just there. It
# has no threads of its own, and the children need not import anything again.
SCRIPT = """
import io, os, shutil, signal, sys
from pathlib import Path
from fastddr.data import crop, layouts, prepare, sheet, survey
from fastddr.errors import UserError

sheet._SIDE = 40
mode, data, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def run():
    prepare.run(data, out, crop.Recipe(32), sheet=4, workers=1, exclude=frozenset({"train/n0.png"}))


def look():
    "A layout finds nothing, or all of the set and what is left out of it."
    try:
        found = layouts.find(out)
    except UserError:
        return
    if (found.layout, len(found.entries), len(found.absent)) != ("official", 3, 1):
        sys.exit(f"at moment {moment} this is taken for a set: {found}")


def killed_at(moment):
    "Whether a run was killed when it was about to change the disk for so many times."
    child = os.fork()
    if child == 0:
        left = moment

        def counted(real):
            def call(*args, **settings):
                nonlocal left
                if str(out) in str(args[0]) and (real is not open or set("wax") & set(str(args[1:]))):
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                return real(*args, **settings)
            return call

        for name in ("replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        crop.open = io.open = counted(open)  # the journal, and what `pathlib` opens: the photographs
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        sys.exit("a run failed")
    return os.WIFSIGNALED(status)


survey.take(data)  # headers are known from now on
if mode == "each":  # killed at each moment once, and then not disturbed
    moment = 0
    while killed_at(moment):
        look()
        run()
        yielded = os.path.join(os.path.dirname(out), f"ended-{moment}")
        os.rename(out, yielded)
        moment += 1
else:  # killed again and again, a few moments after each start
    moment = 0
    while killed_at(12):
        moment += 1
print(moment)
"""


def eyes(root: Path, photographs: int) -> Path:
    for number in range(photographs):
        split = ("train", "valid", "test")[number % 3]
        lines, columns = np.ogrid[:48, :64]
        inside = np.hypot(lines - 24, columns - 30) < 20
        pixels = inside[..., None] * np.random.default_rng(number).integers(90, 200, 3)
        path = root / "DR_grading" / split / f"n{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        with (root / "DR_grading" / f"{split}.txt").open("a") as stream:
            stream.write(f"{path.name} {number % 5}\n")
    return root


def killed(mode: str, data: Path, out: Path, cache: Path) -> int:
    """How often a run was killed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FASTDDR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode, str(data), str(out)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, str]]]:
    """Sets of 4 and of 24 photographs, and what is made of them."""
    from fastddr.data import crop, prepare, sheet

    found = {}
    for count in (4, 24):
        folder = tmp_path_factory.mktemp(f"of{count}")
        data = eyes(folder / "data", count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sheet, "_SIDE", 40)
            left_out = frozenset({"train/n0.png"})
            prepare.run(str(data), folder / "out", crop.Recipe(32), sheet=4, workers=1, exclude=left_out)
        found[count] = data, content(folder / "out")
    return found


def test_killed_at_any_moment(undisturbed: dict[int, tuple[Path, dict[str, str]]], tmp_path: Path) -> None:
    data, wanted = undisturbed[4]
    times = killed("each", data, tmp_path / "out", tmp_path / "cache")
    assert times > 3 * 4 + 10, "a photograph has four moments"
    for moment in range(times):
        assert content(tmp_path / f"ended-{moment}") == wanted, f"killed at moment {moment}"
    assert content(tmp_path / "out") == wanted


def test_killed_again_and_again(undisturbed: dict[int, tuple[Path, dict[str, str]]], tmp_path: Path) -> None:
    data, wanted = undisturbed[24]
    assert killed("again", data, tmp_path / "out", tmp_path / "cache") > 5
    assert content(tmp_path / "out") == wanted


def test_processes_die_with_the_one_that_is_killed(
    undisturbed: dict[int, tuple[Path, dict[str, str]]], tmp_path: Path
) -> None:
    data, wanted = undisturbed[24]
    script = f"""
import os, signal, time
from pathlib import Path
from fastddr.data import crop, prepare, sheet
if not os.environ.get("WHOLE"):  # in the workers too: the last of three parts is begun as the first is told
    write = crop._write
    crop._write = lambda *what: (time.sleep(0.1), write(*what))
if __name__ == "__main__":
    sheet._SIDE = 40
    def progress(done, total):
        if done == 8 and not os.environ.get("WHOLE"):
            os.kill(os.getpid(), signal.SIGKILL)
    prepare.run({str(data)!r}, Path({str(tmp_path / "out")!r}), crop.Recipe(32), sheet=4, workers=2,
                on_progress=progress, exclude=frozenset({{"train/n0.png"}}))
"""
    (tmp_path / "go.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FASTDDR_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(tmp_path / "go.py")]
    # The pipe is open as long as one of the processes lives: this returns when all of them are dead.
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == -9
    assert 8 <= len(list((tmp_path / "out").rglob("n*.jpg"))) < 23
    assert not (tmp_path / "out" / "DR_grading").exists()
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment | {"WHOLE": "1"})
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert content(tmp_path / "out") == wanted
