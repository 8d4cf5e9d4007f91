"""Of the loaders and training loops that are compared one fails, dies or is stopped: the others' figures are kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests_support import task

from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders import dali_decoder


class Turns:
    """A loader or a training loop that takes turns, and fails where it is told to."""

    def __init__(self, spec: Any, wanted: Any = None, fails_at: int | None = None) -> None:
        self.spec, self.task, self.fails_at = spec, wanted, fails_at
        self.turns, self.closed = 0, False
        self.about = {"micro_batch_size": 4}
        self.memory, self.warmth = 0, SimpleNamespace(vram=None, first_epoch=None)
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


@pytest.mark.parametrize(("dying", "kind", "fails_at"), [("replay", "ceiling", 0), ("spdl-decode-jpeg", "peer", 3)])
def test_a_loader_that_dies_does_not_take_the_others_along(
    dying: str, kind: str, fails_at: int, load: Any, panel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, trials = load("loader"), load("trials")
    made: dict[str, Turns] = {}

    def trial(spec: Any, wanted: Any) -> Turns:
        made[spec.name] = Turns(spec, wanted, fails_at if spec.name == dying else None)
        return made[spec.name]

    assert loader.Panel._kind(dying) == kind
    monkeypatch.setattr(loader, "Trial", trial)
    for peer in ("torch-pil", "spdl-decode-jpeg"):
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
    monkeypatch.setattr(load("peers"), "find_spec", lambda name: None)
    monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    # Of those the last is for other machines.
    panel.begin([trials.Spec(name) for name in ("spdl-decode-jpeg", "torchcodec", "dali-plain", "torchvision-gpu")])
    monkeypatch.setattr(trials.PEERS["torchcodec"], "missing", lambda task: "TorchCodec cannot be loaded (why).")
    panel.begin([trials.Spec("torchcodec")])
    *absent, broken = panel.rows
    assert [row["name"] for row in absent] == ["spdl-decode-jpeg", "torchcodec", "dali-plain"]
    assert all("not installed" in row["failed"] for row in absent)
    assert broken == {"name": "torchcodec", "kind": "failed", **ABOUT, "failed": "TorchCodec cannot be loaded (why)"}


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


@pytest.mark.parametrize(("ending", "stopped_in"), [(SystemExit, 3), (KeyboardInterrupt, 5)])
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
        self.memory, self._process = 0, SimpleNamespace(pid=os.getpid())

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
    kept: list[dict[str, Any]] = []

    def keep() -> None:
        assert len(panel.trials) == 2
        assert not any(trial.closed for trial in panel.trials.values()), "they may need longer than a suite waits"
        kept.extend(panel.rows)

    with pytest.raises(SystemExit):
        loader.measure(panel, [trials.Spec(name) for name in ("dali", "replay")], keep)
    assert {row["name"]: row["n"] for row in kept} == {"dali": 3, "replay": 3}


def test_all_loaders_are_closed_whatever_becomes_of_the_file_and_of_the_first(
    load: Any, panel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python waits at its end for one that stays halted."""
    loader, trials = load("loader"), load("trials")
    closed: list[str] = []

    class Interrupted(Turns):
        def close(self) -> None:
            closed.append(self.spec.name)
            raise KeyboardInterrupt

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loader, "Trial", Interrupted)
    monkeypatch.setattr(dali_decoder, "installed", lambda: True)
    monkeypatch.setattr(panel, "limits", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        loader.measure(panel, [trials.Spec(name) for name in ("dali", "replay")], full)
    assert sorted(closed) == ["dali", "replay"]


def test_what_is_named_twice_is_measured_once(load: Any, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A second one of the same label would take the first one's place, which nobody would end."""
    loader, train, measured = load("loader"), load("train"), []

    class Enough(Exception):
        pass

    def stop(specs: Any) -> None:
        measured.append([spec.label for spec in specs])
        raise Enough

    monkeypatch.setattr(loader, "measure", lambda panel, specs, keep: stop(specs))
    monkeypatch.setattr(train, "race", lambda specs, *_: stop(specs))
    monkeypatch.setattr(load("harness"), "begin", lambda *_: None)
    out = tmp_path / "r.json"
    with pytest.raises(Enough):
        loader.main(loader.Options(data=tiny, out=out, loaders=("dali", "torch-pil", "dali", "torch-pil:")))
    with pytest.raises(Enough):
        train.main(train.Options(data=tiny, out=out, recipes=("fastddr", "report", "fastddr")))
    assert measured == [["dali", "torch-pil"], ["fastddr", "report"]]
    seen: list[Any] = []
    monkeypatch.setattr(train.kappas, "race", lambda *given: seen.append(given[4]) or stop([]))
    with pytest.raises(Enough):
        train.main(train.Options(data=tiny, out=out, target_qwk=(0.5,), seeds=(0, 1, 2, 3, 4, 4)))
    assert seen == [(0, 1, 2, 3, 4)], "one that counts twice draws the median to itself"
    panels: list[Any] = []
    monkeypatch.setattr(load("sources"), "warm", lambda found: False)
    monkeypatch.setattr(loader, "measure", lambda panel, specs, keep: panels.append(panel))
    monkeypatch.setattr(loader, "waits", lambda panel, specs: stop(specs))
    with pytest.raises(Enough):
        loader.main(loader.Options(data=tiny, out=out, step=("dali", "dali:")))
    assert measured[-1] == ["dali"]
    assert panels[0].about["in_page_cache"] is False


def test_a_race_to_a_kappa_refuses_what_it_would_pass_over(load: Any, tmp_path: Path) -> None:
    train = load("train")
    for wrong in ({"seconds": 60.0}, {"seeds": (0, 0, 0, 0, 0)}):
        with pytest.raises(UserError, match=f"^--{next(iter(wrong))} "):
            train.main(train.Options(target_qwk=(0.5,), out=tmp_path / "r.json", **wrong))


def test_it_is_said_where_fastddr_does_more_to_a_photograph_than_the_loops_of_others(load: Any) -> None:
    from fastddr.config.sections import POLICIES

    train, parse = load("train"), load("recipes").Spec.parse
    both = [parse("fastddr"), parse("report")]
    assert "less work than policy fundus" in train.unequal(both, POLICIES["fundus"])
    assert train.unequal(both, POLICIES["report"]) is None
    assert train.unequal(both[:1], POLICIES["fundus"]) is None


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


def test_of_damaged_photographs_libjpeg_has_a_limit_and_of_others_none(
    load: Any, panel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What all loaders pass over must not end a measurement, nor what only some can read."""
    monkeypatch.setattr(load("limits"), "copied", lambda *_: [1e9] * 5)
    whole, file = Path(panel.task.files[0]).read_bytes(), tmp_path / "p.jpg"
    panel.task, panel.options = replace(panel.task, files=[str(file)]), replace(panel.options, seconds=0.01)
    for content, limits in ((whole[:-2] + bytes(9) + whole[-2:], 2), (b"\x89PNG", 1)):
        file.write_bytes(content)
        panel.rows.clear()
        panel.limits()
        assert len(panel.rows) == limits
        said = f"The limit of libjpeg-turbo is left out: {file} cannot be decoded by libjpeg-turbo ("
        assert (said in capsys.readouterr().out) == (limits == 1)
