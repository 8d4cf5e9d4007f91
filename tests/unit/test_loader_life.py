"""The life of a loader: left early, begun again, interrupted, forked, closed and forgotten, without anything left."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reference import REAL, needs_dali
from tests_support import ROOT, same, task

from fastddr import loaders
from fastddr.data import manifest
from fastddr.errors import UserError

ALL = [*REAL, "replay"]
PROC = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc (Linux only)")


@pytest.mark.parametrize("name", ALL)
def test_leaving_early_and_beginning_again_is_safe(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found, prefetch=3))
    whole = list(loader.epoch(0))
    for stop in (1, 2, 5):
        for k, batch in enumerate(loader.epoch(0)):
            assert same(batch, whole[k])
            if k + 1 == stop:
                break
        assert all(same(a, b) for a, b in zip(loader.epoch(0), whole, strict=True))
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.epoch(0)


@pytest.mark.parametrize("name", ALL)
def test_a_second_iterator_ends_the_first_loudly(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found))
    whole = list(loader.epoch(0))
    first = loader.epoch(0)
    next(first)
    assert all(same(a, b) for a, b in zip(loader.epoch(0), whole, strict=True))
    with pytest.raises(RuntimeError, match="newer epoch"):
        next(first)
    # Both asked for before either begins.
    other = list(loader.epoch(1))
    first, second, late = loader.epoch(0), loader.epoch(1), loader.epoch(1)
    assert same(next(first), whole[0])
    assert all(same(a, b) for a, b in zip(second, other, strict=True))
    with pytest.raises(RuntimeError, match="newer epoch"):
        next(first)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(late)


@PROC
def test_a_signal_to_all_processes_of_a_run_takes_no_batch_away(found: manifest.Manifest) -> None:
    """A launcher's SIGTERM: the trainer saves and ends, for which it may need the batch that it waits for."""
    loader = loaders.build("torchvision", task(found, threads=2))
    whole = list(loader.epoch(0))
    batches = loader.epoch(0)
    assert same(next(batches), whole[0])
    children = [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    below = [int(one) for child in children
             for one in Path(f"/proc/{child}/task/{child}/children").read_text().split()]  # fmt: skip
    assert len(below) >= 2, "the workers"
    # By another process: what the trainer itself sends is how it ends them.
    subprocess.run(["kill", "-TERM", *map(str, (*children, *below))], check=True)
    assert all(same(a, b) for a, b in zip(batches, whole[1:], strict=True))
    assert all(same(a, b) for a, b in zip(loader.epoch(0), whole, strict=True))
    loader.close()


@pytest.mark.parametrize("name", REAL)
def test_closing_is_quiet_though_a_bad_photograph_is_on_its_way(
    name: str, tmp_path: Path, found: manifest.Manifest
) -> None:
    files = found.files()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"junk")
    files[5] = str(bad)
    # `resident` waits for all that it makes ahead, and says then what is bad in it; what it decodes ahead is quiet.
    ahead = 1 if name == "resident" else 3
    loader = loaders.build(name, task(found, files=files, ids=np.arange(8), train=False, prefetch=ahead))
    next(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("name", ALL)
def test_an_error_in_the_loop_leaves_a_loader_that_can_be_used(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found))
    whole = list(loader.epoch(0))

    def fails() -> None:
        for number, _ in enumerate(loader.epoch(0)):
            if number == 1:
                raise ValueError("of the loop")

    for _ in range(2):
        with pytest.raises(ValueError, match="of the loop"):
            fails()
        assert all(same(a, b) for a, b in zip(loader.epoch(0), whole, strict=True))
    loader.close()


@pytest.mark.parametrize("name", ALL)
def test_closing_within_an_epoch_ends_it_loudly(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found))
    epoch = loader.epoch(0)
    next(epoch)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(epoch)
    assert loader.gradient_state.active_dataloader is None


@needs_dali
@pytest.mark.parametrize("call", ["feed_input", "schedule_run", "outputs"])
@pytest.mark.parametrize("after", [True, False])
def test_ctrl_c_within_dali_mixes_no_batches_up(call: str, after: bool, found: manifest.Manifest) -> None:
    """Before or after the call did its work: nobody knows which batches are on their way then."""
    loader = loaders.build("dali", task(found))
    whole = list(loader.epoch(0))
    pipeline = loader._pipeline  # type: ignore[attr-defined]
    plain, calls = getattr(pipeline, call), itertools.count()

    def interrupted(*arguments: Any, **named: Any) -> Any:
        third = next(calls) == 2
        result = plain(*arguments, **named) if after or not third else None
        if third:
            raise KeyboardInterrupt
        return result

    setattr(pipeline, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(loader.epoch(0))
    assert all(same(a, b) for a, b in zip(loader.epoch(0), whole, strict=True))
    loader.close()


# ------------------------------------------------------------------------------------------ in processes of their own

#: What all scripts begin with: a loader of four at a time, with two threads or workers.
BEGIN = """
import gc, json, multiprocessing, os, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from fastddr import loaders
from fastddr.data import manifest
from tests_support import task

def build():
    return loaders.build(sys.argv[1], task(manifest.read(sys.argv[2]), threads=2))

def spawned():
    loader = build()
    count = len(list(loader.epoch(0)))
    loader.close()
    sys.exit(0 if count == 6 else 3)

def forked(how, loader, epoch):
    for attempt in (lambda: next(epoch), lambda: loader.epoch(0)):
        try:
            attempt()
            os._exit(4)
        except RuntimeError:
            pass
    if how == "closes":
        loader.close()
    del loader, epoch
    gc.collect()

def count():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    of = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            of.append(stat.read_text().rpartition(")")[2].split())
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "children": sum(int(fields[1]) == os.getpid() for fields in of),
        "mib": int(status["VmRSS"].split()[0]) / 1024,
    }

def counted():
    # The least of several: threads that feed a queue end some time after it.
    found = []
    for _ in range(5):
        gc.collect()
        found.append(count())
        time.sleep(0.1)
    return {what: min(each[what] for each in found) for what in found[0]}
"""

SCRIPTS = {
    # Epochs without end, for Ctrl-C.
    "endless": """
loader = build()
for number in range(10**9):
    for batch in loader.epoch(number):
        pass
    if number == 0:
        print("running", flush=True)
""",
    # A fork ends as a whole interpreter does, letting go of everything, and then the interpreter in the midst of an
    # epoch: nobody has closed anything.
    "forgotten": """
import warnings
loader = build()
list(loader.epoch(0))
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of a fork beside threads
# Not with worker processes: Python itself ends the parent's daemons there.
child = os.fork() if sys.argv[1] != "torchvision" else None
if child == 0:
    sys.exit(0)
for _ in range(200):
    ended, status = os.waitpid(child, os.WNOHANG) if child else (True, 0)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    sys.exit("the fork hangs")
if status:
    sys.exit(f"the fork ended with {status}")
epoch = loader.epoch(1)
next(epoch)
print("left", flush=True)
""",
    # The parent forks within an epoch and goes on with it.
    "forking": """
loader = build()
list(loader.epoch(0))
epoch = loader.epoch(0)
next(epoch)
codes = []
for how in ("closes", "forgets"):
    child = multiprocessing.get_context("fork").Process(target=forked, args=(how, loader, epoch))
    child.start()
    child.join(20)
    codes.append(child.exitcode)
    child.kill()
child = multiprocessing.get_context("spawn").Process(target=spawned)
child.start()
child.join(60)
codes.append(child.exitcode)
child.kill()
codes.append(sum(1 for _ in epoch))
loader.close()
print(json.dumps(codes))
# Then again and again: each loader is left early, and the next is made.
loader = build()
def leave(epochs):
    for number in range(epochs):
        for k, batch in enumerate(loader.epoch(number)):
            if k == number % 4:
                break
leave(5)
found = {"before": counted()}
leave(10)
found["after 10 epochs"] = counted()
loader.close()
def rebuild(times):
    for _ in range(times):
        loader = build()
        for batch in loader.epoch(0):
            break
        loader.close()
        del loader, batch
rebuild(1)
found["closed"] = counted()
rebuild(4)
found["after 4 loaders"] = counted()
print(json.dumps(found))
""",
}


class Script:
    """A script in a session of its own, so that all of its processes can be found."""

    def __init__(self, which: str, name: str, data: Path, folder: Path) -> None:
        file = folder / "script.py"
        # Workers import the script, and must not begin it again.
        main = textwrap.indent(SCRIPTS[which], "    ")
        file.write_text(f'{BEGIN}\nif __name__ == "__main__":\n{main}')
        command = [sys.executable, str(file), name, str(data), str(Path(__file__).parents[1])]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __enter__(self) -> Script:
        return self

    def end(self, seconds: float = 60) -> tuple[int, str, str]:
        """Its exit code and what it said."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def left(self, seconds: float = 5) -> list[str]:
        """Processes of its session that are there yet, after some time to end."""
        there: list[str] = []
        for _ in range(int(seconds * 10)):
            there = []
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    _, _, fields = stat.read_text().rpartition(")")
                    state, session = fields.split()[0], int(fields.split()[3])
                    if session == self.process.pid and state != "Z":
                        there.append(stat.with_name("cmdline").read_text().replace("\0", " "))
                except (FileNotFoundError, ProcessLookupError):
                    continue
            if not there:
                break
            time.sleep(0.1)
        return there

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@PROC
@pytest.mark.parametrize("name", REAL)
def test_ctrl_c_ends_everything(name: str, tiny: Path, tmp_path: Path) -> None:
    with Script("endless", name, tiny, tmp_path) as script:
        assert script.process.stdout is not None
        assert script.process.stdout.readline() == "running\n"
        # To all of its processes, as a terminal does.
        os.killpg(script.process.pid, signal.SIGINT)
        code, _, err = script.end(20)
        assert code == -signal.SIGINT, err
        assert err.count("KeyboardInterrupt") == 1, "one traceback, and none of a worker"
        assert script.left() == []


def test_a_shared_memory_too_small_for_the_batches_is_refused(
    found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch would wait for ever. 2 workers with 2 batches each and 2 at the consumer: 6 of 4 images of 48 KiB."""
    real = os.statvfs
    free = 6 * 4 * 48 * 1024

    def small(path: str) -> Any:
        return SimpleNamespace(f_bavail=free // 1024, f_frsize=1024) if path == "/dev/shm" else real(path)

    monkeypatch.setattr(os, "statvfs", small)
    wanted = task(found, threads=2, prefetch=None)
    loaders.build("torchvision", wanted).close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"/dev/shm: 1.1 MiB .*0.6 MiB are free.*--shm-size 5m.*--loading.threads"):
        loaders.build("torchvision", wanted)
    loaders.build("torchvision", task(found, threads=1, prefetch=1)).close()
    free = 0
    loaders.build("torchvision", task(found, threads=0)).close()


@PROC
def test_a_kill_leaves_no_process(tiny: Path, tmp_path: Path) -> None:
    """Only this loader has processes of its own."""
    with Script("endless", "torchvision", tiny, tmp_path) as script:
        assert script.process.stdout is not None
        assert script.process.stdout.readline() == "running\n"
        script.process.kill()
        script.process.wait()
        assert script.left(15) == []


@PROC
@pytest.mark.parametrize("name", REAL)
def test_a_fork_and_an_interpreter_end_without_close(name: str, tiny: Path, tmp_path: Path) -> None:
    with Script("forgotten", name, tiny, tmp_path) as script:
        assert script.end(60) == (0, "left\n", "")
        assert script.left() == []


@PROC
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_forks_and_spawned_processes_do_not_hang_or_disturb_and_nothing_grows(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    """A forked child is refused by its parent's loader and can close or forget it; a spawned one makes its own.

    Files, threads, processes and memory over 10 epochs that are left early and over 4 loaders.
    """
    with Script("forking", name, tiny, tmp_path) as script:
        code, out, err = script.end(240)
        assert code == 0, err
        codes, seen = map(json.loads, out.splitlines())
        assert codes == [0, 0, 0, 5], "three children, and the rest of the parent's epoch"
        for one, other in (("before", "after 10 epochs"), ("closed", "after 4 loaders")):
            # A batch that is on its way between processes has a file of its own; a leak would be 10 or 4 of them.
            for what, slack in (("files", 3), ("threads", 0), ("children", 0)):
                assert seen[other][what] <= seen[one][what] + slack, (what, seen)
            assert seen[other]["mib"] <= seen[one]["mib"] + 12, seen
        assert script.left() == []
