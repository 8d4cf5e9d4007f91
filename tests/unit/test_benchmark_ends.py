"""Benchmarks that are stopped, that cannot write, or of which a part is missing: what is kept and what is told."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import BENCHMARKS, environment

from fastddr.errors import UserError
from fastddr.loaders import dali_decoder


def script(tmp_path: Path, code: str) -> list[str]:
    file = tmp_path / "script.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{code}")
    return [sys.executable, str(file)]


#: Measures a row, and then waits to be stopped.
STOPPED = """
import time
from pathlib import Path
import harness
rows = []
with harness.writing("x", rows, Path(sys.argv[1])):
    rows.append({"name": "a", "kind": "x", **harness.spread([1.0] * 5), "unit": "s"})
    print("measured", flush=True)
    time.sleep(60)
"""


def test_what_was_measured_before_a_signal_is_written(tmp_path: Path) -> None:
    with subprocess.Popen([*script(tmp_path, STOPPED), str(tmp_path / "r.json")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while b"measured" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    [place] = tmp_path.glob("*.json")
    assert place.name == "r-incomplete.json"
    record = json.loads(place.read_text())
    assert (len(record["rows"]), record["complete"]) == (1, False)


def test_where_a_result_cannot_be_written_nothing_is_measured(load: Any, tmp_path: Path) -> None:
    harness = load("harness")
    (tmp_path / "file").touch()
    for out, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "r.txt", r"ends in \.json"),
        (tmp_path / "file" / "r.json", "cannot be written to: it is a file; give another --out"),
    ):
        with pytest.raises(UserError, match=said), harness.writing("x", [], out):
            pytest.fail("it was begun")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["ablation", "answers", "cards", "data", "operations", "predict", "quickstart", "report", "seeds", "step",
             "synth"],
)  # fmt: skip
def test_the_default_place_is_looked_at_before_anything_is_measured(
    name: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout of somebody else's, for one."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(load("harness"), "place", lambda *_, **__: tmp_path / "file" / "r.json")
    monkeypatch.setattr(load("harness"), "begin", lambda *_: None)
    module = load(name)
    given = {"ablation": {"folder": tmp_path}, "report": {"folder": tmp_path}, "seeds": {"ranks": (1, 2)}}
    with pytest.raises(UserError, match="cannot be written to: it is a file; give another --out"):
        module.main(module.Options(**given.get(name, {})))


@pytest.mark.parametrize(
    ("name", "flag"), [("ablation", "folder"), ("report", "folder"), ("seeds", "folder"), ("suite", "out")]
)
def test_a_folder_that_cannot_be_written_to_is_told(name: str, flag: str, load: Any, tmp_path: Path) -> None:
    file, module = tmp_path / "file", load(name)
    file.touch()
    with pytest.raises(UserError, match=f"^{file} cannot be written to: it is a file; give another --{flag}"):
        module.main(module.Options(**{flag: file}))


def test_rounds_before_a_stop_are_kept(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = load("answers"), []

    def seconds(*_: Any) -> float:
        asked.append(1)
        if len(asked) == 11:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(answers, "seconds", seconds)
    monkeypatch.setattr(load("harness"), "begin", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        answers.main(answers.Options(out=tmp_path / "r.json"), {"small": (("--vram", "8"), 20.0)})
    record = json.loads((tmp_path / "r-incomplete.json").read_text())
    assert {row["name"]: row["n"] for row in record["rows"]} == dict.fromkeys(
        ("help of predict", "small", "small, again"), 3
    )
    assert not record["complete"]


def test_where_no_run_could_be_trained_that_is_the_reason(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load("harness"), "begin", lambda *_: None)
    monkeypatch.setattr(load("whole"), "train", lambda *_: "no memory")
    for name, given, said in (
        ("ablation", {"changes": ("mse",)}, "^The baseline could not be trained: no memory"),
        ("report", {"quick": True, "arms": ("cnn-2",)}, "^No model could be trained"),
    ):
        module = load(name)
        with pytest.raises(UserError, match=said):
            module.main(module.Options(out=tmp_path / "r.json", folder=tmp_path / "runs", **given))


def test_where_too_few_runs_are_asked_for_nothing_is_written(load: Any, tmp_path: Path) -> None:
    out, few = tmp_path / "r.json", {"rounds": 4}
    for name, asked in (("quickstart", {"seeds": 0}), ("synth", few), ("data", few), ("answers", few)):
        module = load(name)
        with pytest.raises(UserError, match=r"^--\w+ \d: (give it at least 1|an interval wants at least 5)"):
            module.main(module.Options(out=out, **asked))
    assert not out.exists()


def test_runs_that_are_too_short_to_be_killed_are_refused(load: Any, tmp_path: Path) -> None:
    faults = load("faults")
    with pytest.raises(UserError, match="--steps 8: give at least 9"):
        faults.main(faults.Options(steps=8, out=tmp_path / "r.json"))


def test_a_rehearsal_is_not_published(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = load("harness")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    assert harness.place("step").parent == tmp_path / "results"
    row = {"name": "a", "kind": "step", **harness.spread([1.0] * 5), "unit": "s"}
    with harness.writing("memory", [row], None, tiny=True) as written:
        pass
    assert written.path.parent == Path("runs") / "benchmarks"
    assert written.path.exists()


def test_a_trial_that_fails_is_left_out_of_the_rounds(load: Any) -> None:
    harness = load("harness")
    turns = iter(range(100))

    def breaks() -> float:
        if next(turns) == 2:
            raise RuntimeError("no\n  memory.")
        return 1.0

    told: list[tuple[str, str]] = []
    trials = {"one": lambda: 1.0, "breaks": breaks, "other": lambda: 2.0}
    found = harness.interleaved(trials, 5, on_failure=lambda name, why: told.append((name, why)))
    assert found == {"one": [1.0] * 5, "other": [2.0] * 5}
    assert told == [("breaks", "no memory")]
    turns = iter(range(100))
    with pytest.raises(RuntimeError):
        harness.interleaved(trials, 5)


#: Asks an object in a process of its own for what goes well, for what fails, and for what ends its process.
HALTING = """
import os
import signal
import time
import psutil
from halted import Halted
from fastddr.errors import UserError

class Thing:
    def fine(self, number): return number + 1
    def wrong(self): raise ValueError("a wrong\\n value")
    def slow(self): time.sleep(1)
    def die(self): os._exit(7)
    def close(self): pass

class Slow(Thing):
    def close(self): time.sleep(600)

def broken():
    raise OSError("no such card")

def attempt(do):
    try:
        return str(do())
    except (UserError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"

def stopped_while_asking(thing):
    def stop(*_): raise SystemExit(143)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        thing.ask("slow")
    except SystemExit:
        return halted(thing)

def stopped_while_closing(thing):
    pid = thing._process.pid
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        thing.close()
    except SystemExit:
        return psutil.pid_exists(pid)

def halted(thing):
    process, ends = psutil.Process(thing._process.pid), time.monotonic() + 10
    while process.status() != "stopped" and time.monotonic() < ends:
        time.sleep(0.01)
    return process.status()

if __name__ == "__main__":
    thing = Halted("thing", Thing)
    print(attempt(lambda: thing.ask("fine", 1)))
    print(attempt(lambda: thing.ask("wrong")))
    print(halted(thing))
    print(attempt(lambda: thing.ask("fine", 2)))
    print(stopped_while_asking(thing))
    thing._signal(signal.SIGCONT)
    print(thing._receive())
    print(attempt(lambda: thing.ask("die")))
    thing.close()
    print(attempt(lambda: thing.ask("fine", 3)))
    print(attempt(lambda: Halted("broken", broken)))
    print(stopped_while_closing(Halted("slow", Slow)))
"""


def test_what_fails_in_a_halted_process_is_told_and_not_the_end(tmp_path: Path) -> None:
    around = environment() | {"FASTDDR_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(script(tmp_path, HALTING), capture_output=True, text=True, timeout=200, env=around)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2",
        "UserError: ValueError: a wrong value",
        "stopped",
        "3",
        "stopped",
        "None",
        "RuntimeError: the process of thing has died (7)",
        "RuntimeError: the process of thing is not there any more",
        "UserError: OSError: no such card",
        "False",
    ]
    assert "Traceback" in done.stderr, "where it happened is there for whoever looks for it"
    assert list((tmp_path / "cache").iterdir()) == []


def test_folders_of_killed_benchmarks_are_removed(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    here = platform.node()
    mine = Path(load("halted").own_cache())
    left = ["synthetic", f"benchmark-{os.getppid()}-{here}-abc", f"benchmark-{ended.pid}-elsewhere-abc"]
    for name in (f"benchmark-{ended.pid}-{here}-abc", *left):
        (tmp_path / name / "inside").mkdir(parents=True)
    again = Path(load("halted").own_cache())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, again.name, *left])


def test_without_dali_there_is_no_decoder_to_compare(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = load("decode")
    monkeypatch.setattr(load("sources"), "roots", lambda *_: [("tiny", tmp_path)])
    monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    monkeypatch.setattr(decode, "in_process", lambda *_: pytest.fail("a process was begun for it"))
    decode.main(decode.Options(out=tmp_path / "r.json"))
    found = load("stored").read(tmp_path / "r-incomplete.json")
    assert [row["failed"] for row in found.rows] == ["NVIDIA DALI is not installed"]
    assert not [sentence for sentence in load("diagnosis").tell({"decode": found}, []) if "decoder" in sentence]


def test_a_decoder_that_hangs_is_a_row(load: Any) -> None:
    assert load("decode").in_process(["none", 32, "", 8, 5, 8, 2], 0.01) == {"failed": "no answer within 0 s"}
    assert "none" in load("decode").in_process(["none", 32, "", 8, 5, 8, 2], 60)["failed"]


@pytest.mark.parametrize(("cards", "seen"), [(0, "7"), (1, ""), (2, "7")])
def test_two_ranks_that_have_one_card_train_on_the_cpu(
    cards: int, seen: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL takes no card twice."""
    victims = load("victims")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    given: list[dict[str, str]] = []
    monkeypatch.setattr(victims.subprocess, "Popen", lambda command, env, **_: given.append(env))
    runs = victims.Runs("photographs", 1, tmp_path)
    runs.start(tmp_path / "run", ranks=2)
    runs.start(tmp_path / "run", ranks=1)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in given] == [seen, "7"]


def test_errors_are_one_line(load: Any) -> None:
    harness = load("harness")
    assert harness.sentence(UserError("no\n room.")) == "no room"
    assert harness.sentence(AssertionError()) == "AssertionError"
    assert os.linesep not in harness.sentence(RuntimeError("a\nb"))


def test_of_two_ranks_on_one_card_it_is_said_that_they_trained_on_the_cpu(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = load("faults")

    class Runs:
        scratch = tmp_path

        def start(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(wait=lambda: 0)

        def first_checkpoint(self, *_: Any) -> None:
            pass

        wait = first_checkpoint

    monkeypatch.setattr(faults, "processes", lambda run, rank: [0])
    monkeypatch.setattr(faults.os, "kill", lambda *_: None)
    for cards, where in ((0, ""), (1, ", on the CPU"), (2, "")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        names = [row["name"] for row in faults.ranks(faults.Options(), Runs())]
        assert names[0] == f"a rank is killed{where}: the reason is told"
        assert names[3] == f"a rank is frozen{where} (timeout 15 s): all has ended"
        assert faults._where(1) == ""


def test_what_a_spoilt_step_must_not_change_is_all_that_is_learnt(load: Any) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    averaged = torch.nn.Linear(2, 1)
    trainer = SimpleNamespace(bare_model=model, ema=averaged, optimizer=optimizer)
    found = load("faults")._learnt(trainer)
    for name in ("model weight", "ema weight", "moments 0 exp_avg", "moments 1 exp_avg_sq"):
        assert name in found
    averaged.weight.data.zero_()
    assert found["ema weight"].any(), "a copy"
