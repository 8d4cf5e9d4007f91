"""Benchmarks that are stopped, and of which a part fails or dies: the figures of the rest are kept."""

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
from tests_support import environment, task

from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders import dali_decoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(tmp_path: Path, code: str) -> list[str]:
    file = tmp_path / "script.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{code}")
    return [sys.executable, str(file)]


#: Measures a row, and then ends in the way that it is told.
ENDING = """
import time
from pathlib import Path
import harness
rows, (out, how) = [], sys.argv[1:]
with harness.writing("x", rows, Path(out)) as written:
    assert written.path == Path(out)
    if how == "nothing":
        rows.append({"name": "a", "kind": "x", "failed": "why"})
        written.save()
    elif how != "at once":
        rows.append({"name": "a", "kind": "x", **harness.spread([1.0] * 5), "unit": "s"})
    print("measured", flush=True)
    if how == "stopped":
        time.sleep(60)
    if how not in ("done", "nothing"):
        raise RuntimeError("it broke")
"""


@pytest.mark.parametrize(
    ("how", "code", "rows"),
    [("done", 0, 1), ("fails", 1, 1), ("stopped", 128 + signal.SIGTERM, 1), ("at once", 1, 0), ("nothing", 1, 0)],
)
def test_what_was_measured_is_written_however_it_ends(how: str, code: int, rows: int, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [*script(tmp_path, ENDING), str(out), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "measured" not in said:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        if how == "stopped":
            process.send_signal(signal.SIGTERM)
        # Not `communicate`, which leaves out what came together with the last line that was read.
        assert process.stderr is not None
        after, error = process.stdout.read(), process.stderr.read()
    assert process.returncode == code, error
    assert ("it broke" in error) == (how in ("fails", "at once"))
    assert (f"Nothing was measured, so no result is written to {out}." in after + error) == (rows == 0)
    assert [path.name for path in tmp_path.iterdir() if "json" in path.name] == ["r.json"] * rows
    if rows:
        record = json.loads(out.read_text())
        assert len(record["rows"]) == rows
        assert record["complete"] == (how == "done")


def test_where_a_result_cannot_be_written_nothing_is_measured(load: Any, tmp_path: Path) -> None:
    harness = load("harness")
    (tmp_path / "file").touch()
    for out, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "r.txt", r"ends in \.json"),
        (tmp_path / "file" / "r.json", "cannot be written"),
    ):
        with pytest.raises(UserError, match=said), harness.writing("x", [], out):
            pytest.fail("it was begun")
        with pytest.raises(UserError, match=said):
            harness.begin(out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_no_run_is_asked_for_nothing_is_written(load: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    for name, nothing in (("quickstart", {"seeds": 0}), ("synth", {"rounds": 0}), ("data", {"rounds": 0})):
        module = load(name)
        with pytest.raises(UserError, match=r"^--\w+ 0: (give it at least 1|an interval wants at least 5)"):
            module.main(module.Options(out=out, **nothing))
    assert not out.exists()


def test_a_rehearsal_is_not_published(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = load("harness")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    assert harness.place("step").parent == tmp_path / "results"
    row = {"name": "a", "kind": "step", **harness.spread([1.0] * 5), "unit": "s"}
    with harness.writing("memory", [row], None, tiny=True) as written:
        pass
    also = harness.write("step", [row], None, tiny=True)
    for path in (written.path, also):
        assert path.parent == Path("runs") / "benchmarks"
        assert path.exists()


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
from halted import Halted
from fastddr.errors import UserError

class Thing:
    def fine(self, number): return number + 1
    def wrong(self): raise ValueError("a wrong\\n value")
    def die(self): os._exit(7)
    def close(self): pass

def broken():
    raise OSError("no such card")

def attempt(do):
    try:
        return str(do())
    except (UserError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"

if __name__ == "__main__":
    thing = Halted("thing", Thing)
    print(attempt(lambda: thing.ask("fine", 1)))
    print(attempt(lambda: thing.ask("wrong")))
    print(attempt(lambda: thing.ask("fine", 2)))
    print(attempt(lambda: thing.ask("die")))
    thing.close()
    print(attempt(lambda: thing.ask("fine", 3)))
    print(attempt(lambda: Halted("broken", broken)))
"""


def test_what_fails_in_a_halted_process_is_told_and_not_the_end(tmp_path: Path) -> None:
    around = environment() | {"FASTDDR_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(script(tmp_path, HALTING), capture_output=True, text=True, timeout=200, env=around)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2",
        "UserError: ValueError: a wrong value",
        "3",
        "RuntimeError: the process of thing has died (7)",
        "RuntimeError: the process of thing is not there any more",
        "UserError: OSError: no such card",
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


class Turns:
    """A loader or a training loop that takes turns, and fails where it is told to."""

    def __init__(self, spec: Any, wanted: Any = None, fails_at: int | None = None) -> None:
        self.spec, self.task, self.fails_at = spec, wanted, fails_at
        self.turns, self.closed = 0, False
        self.about = {"micro_batch_size": 4}
        self.memory, self.warmth = (0, 0), SimpleNamespace(vram=None, first_epoch=None)
        self.first = SimpleNamespace(images=8, seconds=1.0)

    def __call__(self, seconds: float = 0) -> float:
        self.turns += 1
        if self.turns == self.fails_at:
            raise RuntimeError("its process has died (-11)")
        return 100.0

    def warm(self) -> Any:
        if self.fails_at == 0:
            raise RuntimeError("its process has died (-11)")
        return self.first

    def row(self) -> dict[str, Any]:
        return {}

    def cpu_shares(self, cores: int) -> tuple[float, float]:
        return 0.1, 0.0

    def close(self) -> None:
        self.closed = True


ABOUT = {"photographs": "tiny", "policy": "report"}


@pytest.fixture
def panel(load: Any, tiny: Path) -> Any:
    """Loaders that read a few small photographs, before any has begun."""
    loader = load("loader")
    return loader.Panel(task(manifest.read(tiny)), ABOUT, loader.Options(rounds=5))


@pytest.mark.parametrize(("dying", "kind"), [("replay", "ceiling"), ("spdl", "peer")])
@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_loader_that_dies_does_not_take_the_others_along(
    fails_at: int, dying: str, kind: str, load: Any, panel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, trials = load("loader"), load("trials")
    made: dict[str, Turns] = {}

    def trial(spec: Any, wanted: Any) -> Turns:
        made[spec.name] = Turns(spec, wanted, fails_at if spec.name == dying else None)
        return made[spec.name]

    assert loader.Panel._kind(dying) == kind
    monkeypatch.setattr(loader, "Trial", trial)
    for peer in ("torch-pil", "spdl"):
        monkeypatch.setattr(trials.PEERS[peer], "missing", lambda task: None)
    monkeypatch.setattr(dali_decoder, "installed", lambda: True)
    panel.begin([trials.Spec(name) for name in ("dali", "torch-pil", dying, "torchvision-gpu")])
    panel.race()
    panel.compare()
    found = {row["name"]: row["kind"] for row in panel.rows if row["kind"] not in ("ratio", "target")}
    assert found == {"dali": "fastddr", "torch-pil": "peer", dying: "failed"}
    assert [row["name"] for row in panel.rows if row["kind"] == "ratio"] == ["dali / torch-pil, the best peer"]
    assert made[dying].closed
    assert not made["dali"].closed
    failed = next(row for row in panel.rows if row["kind"] == "failed")
    assert failed["failed"] == "its process has died (-11)"


def test_a_peer_that_is_not_installed_has_a_row(load: Any, panel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, trials = load("loader"), load("trials")
    monkeypatch.setattr(loader, "Trial", lambda *_: pytest.fail("it was begun"))
    for peer, why in (("spdl", "SPDL is not installed."), ("torchcodec", "TorchCodec cannot be loaded (why)"),
                      ("torchvision-gpu", "it decodes on a GPU")):  # fmt: skip
        monkeypatch.setattr(trials.PEERS[peer], "missing", lambda task, why=why: why)
    panel.begin([trials.Spec(name) for name in ("spdl", "torchvision-gpu", "torchcodec")])
    assert panel.rows == [
        {"name": "spdl", "kind": "failed", **ABOUT, "failed": "SPDL is not installed"},
        {"name": "torchcodec", "kind": "failed", **ABOUT, "failed": "TorchCodec cannot be loaded (why)"},
    ]


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_training_loop_that_dies_does_not_take_the_others_along(
    fails_at: int, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, recipes = load("train"), load("recipes")
    specs = [recipes.Spec.parse(text) for text in ("fastddr", "report", "timm")]
    made: dict[str, Turns] = {}

    def contender(spec: Any, case: Any) -> Turns:
        made[spec.name] = Turns(spec, fails_at=fails_at if spec.name == "report" else None)
        return made[spec.name]

    monkeypatch.setattr(train, "Contender", contender)
    said: list[str] = []
    about = {"model": "m", "precision": "fp32", "image_size": 32, "batch_size": 8, "device": "cpu"}
    rows = train.race(specs, None, about, 5, None, said.append)
    by_name = {row["name"]: row for row in rows}
    assert by_name["report"]["failed"] == "its process has died (-11)"
    assert by_name["fastddr"]["n"] == by_name["timm"]["n"] == 5
    assert all(runner.closed for runner in made.values())
    assert "report is left out: its process has died (-11)." in said


def test_without_dali_there_is_no_decoder_to_compare(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = load("decode")
    monkeypatch.setattr(load("sources"), "roots", lambda *_: [("tiny", tmp_path)])
    monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    monkeypatch.setattr(decode, "in_process", lambda *_: pytest.fail("a process was begun for it"))
    decode.main(decode.Options(out=tmp_path / "r.json"))
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["failed"] == "NVIDIA DALI is not installed"
    found = load("stored").read(tmp_path / "r.json")
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


def test_a_loop_that_breaks_has_a_row_in_the_race_to_a_kappa(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kappas, recipes = load("kappas"), load("recipes")

    def trained(spec: Any, case: Any, seed: int, highest: float) -> Any:
        if spec.name == "report":
            raise RuntimeError("its process has died (-9)")
        return kappas.Curve(qwk=[0.6], seconds=[2.0])

    monkeypatch.setattr(kappas, "train", trained)
    specs = [recipes.Spec.parse(text) for text in ("fastddr", "report")]
    case = SimpleNamespace(config=SimpleNamespace(epochs=3))
    *_, rows = kappas.race(specs, case, {}, [0.5], [0, 1, 2, 3, 4], lambda line: None)
    assert {row["name"]: row.get("failed") for row in rows} == {
        "fastddr: to kappa 0.5": None,
        "report": "its process has died (-9)",
    }


def test_errors_are_one_line(load: Any) -> None:
    harness = load("harness")
    assert harness.sentence(UserError("no\n room.")) == "no room"
    assert harness.sentence(AssertionError()) == "AssertionError"
    assert os.linesep not in harness.sentence(RuntimeError("a\nb"))


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("stopped_in", [3, 5])
def test_training_loops_that_are_stopped_keep_their_whole_rounds(
    ending: type[BaseException], stopped_in: int, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, recipes = load("train"), load("recipes")

    class Stopped(Turns):
        def __call__(self, seconds: float = 0) -> float:
            if self.spec.name == "report" and self.turns + 1 == stopped_in:
                raise ending
            return super().__call__(seconds)

    monkeypatch.setattr(train, "Contender", lambda spec, case: Stopped(spec))
    specs = [recipes.Spec.parse(text) for text in ("fastddr", "report")]
    about = {"model": "m", "precision": "fp32", "image_size": 32, "batch_size": 8, "device": "cpu"}
    kept: list[dict[str, Any]] = []
    with pytest.raises(ending):
        train.race(specs, None, about, 5, None, lambda line: None, kept.extend)
    found = {row["name"]: row["n"] for row in kept}
    assert found == ({"fastddr": 4, "report": 4, "fastddr / report": 4} if stopped_in == 5 else {}), "two are too few"


def test_a_training_loop_says_what_it_is_before_its_turns(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped in the midst of a turn answers no question any more."""
    train, recipes = load("train"), load("recipes")
    asked: list[str] = []

    def ask(self: Any, question: str, *arguments: object) -> Any:
        asked.append(question)
        said = {"epoch": load("recipe").Epoch(8, 1.0, 0.5), "vram": {}, "about": {"loader": "dali"}, "rest": None}
        return said[question]

    def begin(self: Any, *_: object) -> None:
        self.memory, self._process = (0, 0), SimpleNamespace(pid=os.getpid())

    monkeypatch.setattr(train.Halted, "__init__", begin)
    monkeypatch.setattr(train.Halted, "ask", ask)
    contender = train.Contender(recipes.Spec.parse("fastddr"), None)
    contender.warm()
    contender()
    assert asked == ["epoch", "vram", "about", "rest", "epoch", "rest"], "others have the card while it is halted"
    before = len(asked)
    row = contender.row()
    assert (row["loader"], row["data_wait"]) == ("dali", 0.5)
    assert len(asked) == before


def test_loaders_that_are_stopped_keep_their_whole_rounds(
    load: Any, panel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, trials = load("loader"), load("trials")

    class Stopped(Turns):
        def __call__(self, seconds: float = 0) -> float:
            if self.spec.name == "replay" and self.turns == 3:
                raise SystemExit(143)
            return super().__call__(seconds)

    monkeypatch.setattr(loader, "Trial", Stopped)
    monkeypatch.setattr(dali_decoder, "installed", lambda: True)
    with pytest.raises(SystemExit):
        loader.measure(panel, [trials.Spec(name) for name in ("dali", "replay")])
    assert {row["name"]: row["n"] for row in panel.rows} == {"dali": 3, "replay": 3}


@pytest.mark.parametrize("problem", [RuntimeError("its process\nhas died"), UserError("OSError: no cache.")])
def test_a_loader_whose_profile_fails_is_said_and_the_rest_goes_on(
    problem: Exception, load: Any, panel: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loader, trials = load("loader"), load("trials")

    class Asked(Turns):
        def ask(self, question: str, *arguments: object) -> Any:
            if self.spec.name == "resident":
                raise problem
            return load("stages").Stages({"read": [100.0] * 5}, [])

    monkeypatch.setattr(loader, "Trial", Asked)
    monkeypatch.setattr(panel, "limits", lambda: None)
    loader.measure(panel, [trials.Spec(name) for name in ("resident", "torchvision")])
    names = [row["name"] for row in panel.rows]
    assert {"resident", "torchvision", "torchvision: read"} <= set(names)
    said = capsys.readouterr().out
    for what in ("the profile of resident", "resident kernel alone", "resident store alone, uint8"):
        assert f"{what} is left out: {load('harness').sentence(problem)}." in said


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
    averaged = SimpleNamespace(module=torch.nn.Linear(2, 1))
    trainer = SimpleNamespace(bare_model=model, ema=averaged, optimizer=optimizer)
    found = load("faults")._learnt(trainer)
    for name in ("model weight", "ema weight", "moments 0 exp_avg", "moments 1 exp_avg_sq"):
        assert name in found
    averaged.module.weight.data.zero_()
    assert found["ema weight"].any(), "a copy"
