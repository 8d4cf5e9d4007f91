"""Whole training against peers: recipes and their targets, peers that train, the time to a kappa, loops in turns."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import BENCHMARKS, elsewhere

from fastddr.errors import UserError


def test_names_and_options_of_recipes(load: Any) -> None:
    spec = load("recipes").Spec
    assert (spec.parse("fastddr").label, spec.parse("fastddr").kind) == ("fastddr", "fastddr")
    assert (spec.parse("fastddr:loader=replay").label, spec.parse("fastddr:loader=replay").kind) == (
        "fastddr, replay", "ceiling",
    )  # fmt: skip
    assert (spec.parse("timm:channels_last,compile").label, spec.parse("timm").kind) == (
        "timm, channels_last, compile", "peer",
    )  # fmt: skip
    assert spec.parse("report:workers=0").label == "report, workers=0"
    for wrong in ("tim", "report:compile", "report:workers=many"):
        with pytest.raises(UserError, match=f"--recipes {wrong}: "):
            spec.parse(wrong)


def test_class_folders_repeat_the_training_split(load: Any, tiny: Path, tmp_path: Path) -> None:
    from fastddr.data import manifest

    found = manifest.read(tiny)
    wanted = len(found.ids("train"))
    assert load("recipe").class_folders(tiny, tmp_path / "once", 0) == wanted
    assert load("recipe").class_folders(tiny, tmp_path / "more", wanted + 1) == 2 * wanted
    linked = manifest.read(tmp_path / "more")
    for split, times in (("train", 2), ("valid", 1), ("test", 1)):
        grades = sorted(linked.grade[linked.ids(split)].tolist())
        assert grades == sorted(times * found.grade[found.ids(split)].tolist()), split
    shutil.rmtree(tmp_path / "more" / "test")
    assert load("recipe").class_folders(tmp_path / "more", tmp_path / "again", 0) == 2 * wanted
    assert not manifest.read(tmp_path / "again").has("test"), "training needs none"


def test_targets_of_training(load: Any) -> None:
    targets = load("targets")
    kinds = {"fastddr": "fastddr", "fastddr, replay": "ceiling", "report": "peer", "report, workers=0": "peer"}
    speeds = {
        "fastddr": [95.0] * 5,
        "fastddr, replay": [100.0] * 5,
        "report": [10.0] * 5,
        "report, workers=0": [70.0] * 5,
    }
    about = {"model": "ConvMixer 64/4 k5 p8", "device": "cpu"}
    rows = {row["name"]: row for row in targets.training(speeds, kinds, about)}
    assert (rows["fastddr / fastddr, replay"]["target"], rows["fastddr / fastddr, replay"]["met"]) == (0.9, True)
    assert "target" not in rows["fastddr / report"], "a peer counts in its fastest form"
    assert (rows["fastddr / report, workers=0"]["target"], rows["fastddr / report, workers=0"]["met"]) == (1.4, False)
    gpu = {"model": "ConvMixer 512/12 k9 p8", "device": "cuda"}
    rows = {row["name"]: row for row in targets.training(speeds, kinds, gpu)}
    assert (rows["fastddr / fastddr, replay"]["target"], rows["fastddr / fastddr, replay"]["met"]) == (0.98, False)
    assert rows["fastddr / report, workers=0"]["target"] == 20.0


SMALL = """
{model: convmixer, convmixer: {dim: 8, depth: 1, kernel_size: 3, patch_size: 8}, epochs: 2, batch_size: 8,
 image_size: 32, canvas: 40, lr: 0.01, precision: fp32}
"""


def case(load: Any, tiny: Path, tmp_path: Path) -> Any:
    from fastddr.config import load_preset

    preset = tmp_path / "small.yaml"
    preset.write_text(SMALL)
    load("recipe").class_folders(tiny, tmp_path / "photographs", 0)
    return load("recipe").Case(str(tmp_path / "photographs"), load_preset(str(preset)), resized=True)


def test_photographs_of_another_file_system_are_trained_on_by_fastddr_too(
    load: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are only symbolic links, and they lead out of the folder that it is given."""
    from rich.console import Console

    from fastddr.data import source

    def link(*_: Any) -> None:
        raise OSError("Invalid cross-device link")

    class Trainer:
        def __init__(self, config: Any) -> None:
            self.found = source.open_data(config, Console(quiet=True))

        def __enter__(self) -> Any:
            return self

    monkeypatch.setattr(load("recipe"), "os", SimpleNamespace(link=link))
    monkeypatch.setattr("fastddr.trainer.Trainer", Trainer)
    wanted = case(load, tiny, tmp_path)
    recipe = load("recipes").Fastddr(wanted, {})
    recipe.silence.close()
    shutil.rmtree(recipe.folder)
    assert len(recipe.trainer.found.ids("train")) == sum(1 for _ in Path(wanted.root, "train").rglob("*.jpg"))


def test_a_split_that_lacks_a_grade_is_no_matter_to_the_loops_of_others(load: Any, tiny: Path, tmp_path: Path) -> None:
    wanted = case(load, tiny, tmp_path)
    for file in Path(wanted.root, "valid", "4").iterdir():
        file.unlink()
    recipe = load("recipes").make(load("recipes").Spec.parse("report:workers=0"), wanted)
    assert len(recipe.valid.dataset.classes) == 5
    recipe.close()


def test_a_loop_at_rest_leaves_the_card_to_others(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its next epoch wants is taken again before the clock begins."""
    recipe, told = load("recipe"), []

    class Loop(recipe.Recipe):  # type: ignore[misc,name-defined]  # loaded by a fixture
        def __init__(self) -> None:
            self.device, self.tuned, self.room = torch.device("cuda", 0), True, 0

        def _train(self) -> tuple[int, float]:
            told.append("train")
            return 8, 0.0

        score = close = None

    for name, answer in {"max_memory_allocated": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("given back"))
    monkeypatch.setattr(torch, "empty", lambda size, **_: told.append(f"took {size}"))
    monkeypatch.setattr(recipe, "time", SimpleNamespace(perf_counter=lambda: told.append("clock") or 0.0))
    loop = Loop()
    for _ in range(2):
        loop.epoch()
        loop.rest()
    turn = ["clock", "train", "clock", "given back"]
    assert told == [*turn, "took 30", *turn]


def test_the_ceiling_trains_in_the_micro_batches_of_fastddr(
    load: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, recipes, given = load("train"), load("recipes"), {}

    def contender(spec: Any, wanted: Any) -> Any:
        given[spec.label] = wanted.config.micro_batch_size
        return SimpleNamespace(
            spec=spec, about={"micro_batch_size": 4}, close=lambda: None, row=dict,
            warm=lambda: SimpleNamespace(images=8, seconds=1.0),
        )  # fmt: skip

    monkeypatch.setattr(train, "Contender", contender)
    monkeypatch.setattr(train.harness, "interleaved", lambda *_: {})
    specs = [recipes.Spec.parse(text) for text in ("report", "fastddr", "fastddr:loader=replay", "fastddr:loader=dali")]
    train.race(specs, case(load, tiny, tmp_path), {"device": "cuda", "model": "m"}, 5, None, lambda line: None)
    assert given == {"report": "auto", "fastddr": "auto", "fastddr, replay": 4, "fastddr, dali": "auto"}


@pytest.mark.parametrize(("capability", "runs_in"), [((7, 5), "fp16"), ((9, 0), "bf16")])
def test_peers_train_in_the_precision_of_fastddr(
    load: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs_in: str
) -> None:
    loops, wanted = load("loops"), case(load, tiny, tmp_path)
    wanted = replace(wanted, config=replace(wanted.config, precision="auto"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(loops.runtime, "card_of", lambda device: (capability, "a card"))
    for kind, expected in ((loops.Torchvision, runs_in), (loops.Timm, runs_in), (loops.Report, "fp32")):
        loop = kind.__new__(kind)
        loops.Loop.__init__(loop, wanted, {})
        assert loop.about() == {"runs_in": expected}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_peers_compute_in_the_precision_that_their_rows_say(load: Any, tiny: Path, tmp_path: Path, name: str) -> None:
    recipes, wanted = load("recipes"), case(load, tiny, tmp_path)
    spec, seen = recipes.Spec.parse(f"{name}:workers=0"), []
    if recipes.RECIPES[name].missing() is not None:
        pytest.skip("timm is not installed")
    recipe = recipes.make(spec, replace(wanted, config=replace(wanted.config, precision="bf16")))
    try:
        convolution = next(module for module in recipe.model.modules() if isinstance(module, torch.nn.Conv2d))
        convolution.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
        recipe.step(*next(iter(recipe.loader)))
    finally:
        recipe.close()
    assert (seen, recipe.about(), recipe.scaler) == ([torch.bfloat16], {"runs_in": "bf16"}, None)


# timm leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["report", "torchvision", "timm"])
def test_peers_train_on_every_photograph_and_learn(
    load: Any, tiny: Path, tmp_path: Path, name: str, layout: str
) -> None:
    recipes = load("recipes")
    spec = recipes.Spec.parse(f"{name}:workers=0{',channels_last' * (layout == 'NHWC')}")
    if recipes.RECIPES[spec.name].missing() is not None:
        pytest.skip("timm is not installed")
    wanted = case(load, tiny, tmp_path)
    recipe = recipes.make(spec, wanted)
    try:
        before = [parameter.detach().clone() for parameter in recipe.model.parameters()]
        found = elsewhere(recipe.model, load("networks").LAYOUTS[layout])
        epoch = recipe.epoch()
        assert set(found) <= {"patches"}, "fastddr's patches are cut by a matrix product, in any layout"
        photographs = sum(1 for _ in Path(wanted.root, "train").rglob("*.jpg"))
        # timm leaves out the last, partial batch.
        assert epoch.images == (photographs // 8 * 8 if spec.name == "timm" else photographs)
        assert 0 <= epoch.waited <= epoch.seconds
        after = list(recipe.model.parameters())
        assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert -1 <= recipe.score() <= 1
        assert set(found) <= {"patches"}
        image, _ = next(iter(recipe.loader))
        assert tuple(image.shape[1:]) == (3, 32, 32)
    finally:
        recipe.close()


def test_the_time_to_a_kappa(load: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kappas, recipes = load("kappas"), load("recipes")
    started, clock = [], iter(range(10_000))

    class Runner:
        def __init__(self, label: str, make: Any, spec: Any, wanted: Any) -> None:
            if label == "timm":
                raise UserError("timm is not\ninstalled.")
            assert not wanted.endless
            started.append((wanted.config.seed, label))
            # Seed 2 of the report's way never gets far.
            slow = (wanted.config.seed, label) == (2, "report")
            self.kappas = iter([0.1, 0.2] if slow else [0.4, 0.6] if label == "fastddr" else [0.3, 0.4])

        def ask(self, question: str) -> Any:
            return next(self.kappas) if question == "score" else None

        def close(self) -> None:
            started.append("closed")

    monkeypatch.setattr(kappas, "Halted", Runner)
    monkeypatch.setattr(kappas, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    specs, said = [recipes.Spec.parse(name) for name in ("fastddr", "report", "timm")], []
    about, wanted = {"model": "M"}, case(load, tiny, tmp_path)
    asked = kappas.race(specs, wanted, about, (0.5, 0.25), (1, 2), said.append)
    after_one = next(asked)
    [after_two] = asked
    assert started[::2] == [(1, "fastddr"), (1, "report"), (2, "fastddr"), (2, "report")], "seed by seed"
    assert started[1::2] == ["closed"] * 4
    rows = {row["name"]: row for row in after_two}
    assert rows["timm"]["failed"] == "timm is not installed", "the others go on"
    early, late = rows["fastddr: to kappa 0.25"], rows["fastddr: to kappa 0.5"]
    assert (early["seconds"], early["epochs"], early["median"], early["unit"]) == ([1, 1], [1, 1], 1, "s")
    assert (late["seconds"], late["epochs"], late["seeds"], late["epochs_at_most"]) == ([2, 2], [2, 2], [1, 2], 2)
    assert late["curves"] == [{"seconds": [1, 2], "qwk": [0.4, 0.6]}] * 2
    assert "curves" not in early
    missed = rows["report: to kappa 0.25"]
    assert missed["failed"] == "1 of 2 seeds came to a kappa of 0.25 within 2 epochs", "no median of those that came"
    assert (missed["seconds"], missed["epochs"]) == ([1, None], [1, None])
    assert not [row for row in after_two if row["kind"] == "ratio"]
    [ratio] = [row for row in after_one if row["kind"] == "ratio"]
    assert (ratio["name"], ratio["median"], ratio["unit"]) == ("report / fastddr: to kappa 0.25", 1, "×")


def test_a_training_ends_at_the_highest_kappa(
    load: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kappas, recipes, asked = load("kappas"), load("recipes"), []

    class Runner:
        def __init__(self, *_: Any) -> None:
            pass

        def ask(self, question: str) -> Any:
            asked.append(question)
            return 0.9

        def close(self) -> None:
            pass

    monkeypatch.setattr(kappas, "Halted", Runner)
    curve = kappas.train(recipes.Spec.parse("report"), case(load, tiny, tmp_path), 0, 0.5)
    assert (asked, curve.qwk) == (["epoch", "score"], [0.9])


def test_what_starts_workers_is_waited_for(load: Any) -> None:
    loops = load("loops")

    class Starting:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            time.sleep(0.05)
            return iter([(torch.zeros(2, 3), torch.zeros(2))])

    class Loop(loops.Loop):  # type: ignore[misc,name-defined]  # loaded by a fixture
        def __init__(self) -> None:
            self.model, self.loader = torch.nn.Identity(), Starting()

        def step(self, image: torch.Tensor, grade: torch.Tensor) -> int:
            return len(image)

    images, waited = Loop()._train()
    assert (images, waited > 0.04) == (2, True)


@pytest.mark.slow
def test_training_loops_take_turns(load: Any, tiny: Path, tmp_path: Path) -> None:
    preset = tmp_path / "small.yaml"
    preset.write_text(SMALL)
    # Where it is installed, its way trains in `test_peers_train_on_every_photograph_and_learn`.
    missing = ["timm:workers=0"] if find_spec("timm") is None else []
    done = subprocess.run(
        [
            *(sys.executable, "-B", str(BENCHMARKS / "train.py"), "--data", str(tiny), "--preset", str(preset)),
            *("--rounds", "5", "--out", str(tmp_path / "r.json")),
            *("--recipes", "fastddr", "fastddr:loader=replay", "report:workers=0", *missing),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    if missing:
        assert "timm is not installed" in rows["timm, workers=0"]["failed"]
        assert "timm, workers=0 is left out: timm is not installed" in done.stdout
    for name in ("fastddr", "fastddr, replay", "report, workers=0"):
        assert (rows[name]["unit"], rows[name]["n"], rows[name]["model"]) == ("images/s", 5, "ConvMixer 8/1 k3 p8")
        assert rows[name]["median"] > 0
        assert 0 <= rows[name]["data_wait"] < 1
    # fastddr leaves out the last, partial batch, and so says its count.
    assert rows["fastddr"]["images"] == rows["fastddr"]["epoch"] // 8 * 8
    assert rows["report, workers=0"]["images"] == rows["fastddr"]["epoch"]
    assert "target" in rows["fastddr / fastddr, replay"]
