"""The suite of benchmarks: parts that fail, comparison with stored results, diagnosis, the guard of ratios."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro
from tests_support import BENCHMARKS, task

from fastddr.errors import UserError

MACHINE = {"cpu": "some", "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64", "gpu": None}


def row(name: str, median: float, unit: str = "images/s", spread: float = 0.05, **settings: Any) -> dict[str, Any]:
    low, high = median * (1 - spread), median * (1 + spread)
    return {"name": name, "median": median, "low": low, "high": high, "unit": unit, "n": 5, **settings}


def result(load: Any, name: str, rows: list[dict[str, Any]], gpu: str | None = None, **more: Any) -> Any:
    record = {
        "benchmark": name,
        "machine": MACHINE | {"gpu": gpu},
        "versions": {"torch": "2.12"},
        "date": "2026-01-01T00:00:00+00:00",
        "command": f"python benchmarks/{name}.py",
        "rows": rows,
    }
    return load("stored").Result(name, Path(f"{name}_hardware_2026-01-01.json"), record | more)


# ------------------------------------------------------------------------------------------------------------- compare


def test_what_has_become_slower(load: Any) -> None:
    compare = load("compare")
    then = result(load, "loader", [
        row("dali", 1000, policy="report"), row("dali", 500, policy="fundus"), row("wait", 1.0, "% of the step"),
        row("noisy", 100, spread=0.5), row("first", 10, "s"), row("error", 1.0, "%"), row("shared", 0.1, "of a step"),
    ])  # fmt: skip
    now = result(load, "loader", [
        row("dali", 600, policy="report"), row("dali", 500, policy="fundus"), row("wait", 2.0, "% of the step"),
        row("noisy", 60, spread=0.5), row("first", 5, "s"), row("new", 1), row("error", 0.5, "%"),
        row("shared", 0.2, "of a step"),
    ])  # fmt: skip
    found = {change.name: change for change in compare.changes(now, then)}
    assert set(found) == {"dali, report", "dali, fundus", "wait", "noisy", "first", "error", "shared"}, (
        "what only one has is no change"
    )
    assert found["dali, report"].factor == pytest.approx(0.6)
    assert found["wait"].factor == pytest.approx(0.5), "of waiting, less is better"
    assert found["first"].factor == pytest.approx(2.0), "and of seconds"
    assert found["error"].factor == pytest.approx(2.0), "and of errors"
    worse = {name for name, change in found.items() if change.worse}
    assert worse == {"dali, report", "wait", "shared"}, "where intervals overlap nothing is said"


def test_outcomes_do_not_part_what_belongs_together(load: Any) -> None:
    compare = load("compare")
    a = row("fastddr", 100, model="CNN", loader="dali", n=5, images=640)
    b = row("fastddr", 90, model="CNN", loader="resident", n=7, images=64)
    assert compare.identity(a) == compare.identity(b)
    assert compare.identity(a) != compare.identity(a | {"model": "ResNet"})
    assert compare.identity(a) != compare.identity(a | {"batch_size": 64})
    assert compare.identity(a) == compare.identity(a | {"micro_batch_size": 8}), "what `auto` found room for"
    assert compare.identity(a) != compare.identity(a | {"epoch": 3130}), "what begins each epoch anew has another speed"


@pytest.mark.parametrize(
    ("gpu", "pretended", "flags", "said"),
    [
        (None, False, "", "a training step of small models on a CPU,"),
        (None, False, " --models cnn", "a training step on a CPU,"),
        (None, True, "", "a training step on a pretended card, under"),
        ("H200", False, "", "a training step, measured by"),
        ("H200", False, " --tiny", "a training step of small models, measured by"),
    ],
)
def test_a_table_of_peaks_says_where_and_of_what(load: Any, gpu: Any, pretended: bool, flags: str, said: str) -> None:
    machine = MACHINE | {"gpu": gpu, "pretended_card": pretended}
    found = result(load, "memory", [], machine=machine, command=f"python benchmarks/memory.py{flags}")
    assert said in load("outcomes").memory([found], str)[0]


# ----------------------------------------------------------------------------------------------------------- diagnosis


def told(load: Any, *results: Any, stored: tuple[Any, ...] = ()) -> str:
    return "\n".join(load("diagnosis").tell({one.name: one for one in results}, stored))


def test_a_machine_that_is_all_right(load: Any) -> None:
    assert told(load, result(load, "loader", [row("dali", 100)])) == "Nothing wrong was found."


def test_others_at_work_come_first(load: Any) -> None:
    busy = {"conditions": {"before": {"disturbed": True}, "after": None}}
    said = told(load, result(load, "loader", [], **busy), result(load, "train", []))
    assert said.splitlines()[0] == "Others were at work on this machine during loader: stop them and measure again."
    quiet = {"conditions": {"before": {"disturbed": False}, "after": {"disturbed": False}}}
    assert result(load, "loader", [row("dali", 100, others_cpu_share=0.8), row("other", 100)], **quiet).disturbed
    assert not result(load, "loader", [row("dali", 100, others_cpu_share=0.05)], **quiet).disturbed


def test_a_hot_card(load: Any) -> None:
    hot = {"conditions": {"before": {"disturbed": False, "gpus": [{"index": 1, "temperature_c": 88.0}]}}}
    assert "GPU 1 is at 88 °C (step)" in told(load, result(load, "step", [], gpu="H", **hot))
    cool = {"conditions": {"before": {"disturbed": False, "gpus": "unknown: there is no nvidia-smi"}}}
    assert told(load, result(load, "step", [], gpu="H", **cool)) == "Nothing wrong was found."


def test_a_decoder_that_fails_or_lies(load: Any) -> None:
    rows = [
        {"name": "window", "failed": "exit code -11: no message"},
        row("whole", 100, largest_levels=200.0),
        row("fine", 100, largest_levels=3.0),
    ]
    said = told(load, result(load, "decode", rows))
    assert "failed at window (exit code -11: no message)" in said
    assert "wrong pixels at whole (off by 200 levels of 255)" in said
    assert "fine" not in said
    assert said.count("--loader torchvision") == 2


def test_a_slower_machine_explains_everything_else(load: Any) -> None:
    then = [result(load, name, [row("copying", 100), row("other", 10)]) for name in ("ceilings", "loader")]
    now = [result(load, name, [row("copying", 50), row("other", 5)]) for name in ("ceilings", "loader")]
    said = told(load, *now, stored=tuple(then))
    assert "The machine itself is slower" in said
    assert "loader, beside" not in said
    said = told(load, result(load, "loader", [row("copying", 50)], versions={"torch": "2.13"}), stored=tuple(then))
    assert "loader, beside 2026-01-01: copying: 50 images/s, 0.50 times as good as 100" in said
    assert "torch 2.12 then, 2.13 now" in said
    other = told(load, result(load, "loader", [row("copying", 50)], gpu="another"), stored=tuple(then))
    assert other == "Nothing wrong was found.", "another machine's figures say nothing"


def test_a_loader_that_holds_training_up(load: Any) -> None:
    trained = result(load, "train", [
        row("fastddr", 50, kind="fastddr", loader="dali", model="CNN", data_wait=0.4),
        row("fastddr / fastddr, replay", 0.5, "×", kind="target", model="CNN", target=0.9),
    ])  # fmt: skip
    loaded = result(load, "loader", [
        row("dali: decode", 70, "% of the time", kind="profile"),
        row("dali: read", 10, "% of the time", kind="profile"),
        row("resident, ram: warp", 90, "% of the time", kind="profile"),
    ])  # fmt: skip
    said = told(load, trained, loaded)
    assert "trains at 0.50 of its ceiling, so it waits for photographs" in said
    assert "70 % of its time go into decoding: `--loader resident`" in said
    assert "python benchmarks/loader.py" in told(load, trained), "without the loaders' profile it says where to get it"
    trained.rows[0]["data_wait"] = 0.03
    said = told(load, trained, loaded)
    assert "waits for photographs for 3 % of the time: loading takes cores or GPU from the model. The loader is" in said
    near = result(load, "train", [
        trained.rows[0], row("fastddr / fastddr, replay", 0.92, "×", kind="target", model="CNN", target=0.9)
    ])  # fmt: skip
    assert "does not hold it up" in told(load, near)
    near.rows[1]["target"] = 0.98
    assert "does not hold it up" not in told(load, near), "a GPU should come to that"


@pytest.mark.parametrize(("store", "stage", "remedy"), [
    ("vram", "kernel", "no store is faster"), ("ram", "copy, kernel, waiting", "`--loading.store vram`"),
    ("ram", "gather, Python", "`--loading.store vram` keeps them there"),
])  # fmt: skip
def test_what_stops_the_resident_loader_depends_on_its_store(
    store: str, stage: str, remedy: str, load: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastddr.data import manifest

    stages = load("stages")
    wanted = task(manifest.read(tiny), store=store)
    monkeypatch.setattr(stages, "_repeated", lambda work, seconds: lambda: 1e-6)
    monkeypatch.setattr(stages, "kernel", lambda loader, seconds: [10_000.0] * 5)
    found = stages.of(SimpleNamespace(name="resident", task=wanted, _finisher=None, _ring=object()), 1000.0, 0.0)
    assert set(found.shares) == {"vram": {"Python", stage}, "ram": {"gather, Python", "copy, kernel, waiting"}}[store]
    if store == "vram":
        assert found.shares["kernel"] == pytest.approx([10.0] * 5), "what Python takes to send a batch is no kernel's"
    trained = result(load, "train", [
        row("fastddr", 50, kind="fastddr", loader="resident", store=store, model="CNN", data_wait=0.4),
        row("fastddr / fastddr, replay", 0.5, "×", kind="target", model="CNN", target=0.98),
    ])  # fmt: skip
    other = {"ram": "vram", "vram": "ram"}[store]
    loaded = result(load, "loader", [
        row(f"resident, {other}: read", 99, "% of the time", kind="profile"),
        row(f"resident, {store}: {stage}", 90, "% of the time", kind="profile"),
    ])  # fmt: skip
    said = told(load, trained, loaded)
    assert "90 % of its time go into" in said, "of the store that training took"
    assert remedy in said
    assert ("--loading.store vram" in said) == (store != "vram")


# --------------------------------------------------------------------------------------------------------------- suite


SCRIPT = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
{body}
"""
RECORD = {"benchmark": "x", "machine": MACHINE, "versions": {}, "date": "2026", "command": "x", "rows": []}


def test_parts_that_fail_do_not_end_the_suite(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = load("suite")
    bodies = {
        "decode": "print('begun'); sys.exit('the decoder broke')",
        "ceilings": "time.sleep(60)",
        "operations": f"out.write_text({json.dumps(json.dumps(RECORD))})",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(body=body))
    monkeypatch.setattr(suite, "HERE", tmp_path)
    out = tmp_path / "out"
    options = suite.Options(minutes=0.1, parts=("decode", "ceilings", "operations"), tiny=True, out=out)
    assert suite.main(options) == 1
    record = json.loads((out / "suite.json").read_text())
    states = {part["name"]: (part["state"], part["why"]) for part in record["parts"]}
    assert states["decode"] == ("failed", "exit code 1: the decoder broke")
    assert states["ceilings"][0] == "stopped"
    assert states["operations"] == ("done", "")
    assert record["diagnosis"] == ["Nothing wrong was found."]
    assert record["environment"]["machine"]["cores"] >= 1
    assert "decode: failed: exit code 1: the decoder broke" in capsys.readouterr().out
    # Again into that folder: an earlier result is none of this run.
    cut = f"out.with_name(out.name.replace('_', '-incomplete_', 1)).write_text({json.dumps(json.dumps(RECORD))})"
    for body, result in (("pass", ""), (cut, "operations-incomplete")):
        (tmp_path / "operations.py").write_text(SCRIPT.format(body=body))
        [part] = suite.chosen(["operations"])
        assert suite.run(part, [], out, 60).file.partition("_")[0] == result


@pytest.mark.parametrize(
    ("cards", "tiny", "begun"),
    [(0, True, True), (1, True, False), (2, True, True), (0, False, False), (1, False, False), (2, False, True)],
)
def test_scaling_is_measured_on_several_gpus_and_rehearsed_on_a_cpu(
    cards: int, tiny: bool, begun: bool, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, ran = load("suite"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(suite, "environment", lambda: {"machine": MACHINE})
    monkeypatch.setattr(suite, "run", lambda part, *_: ran.append(part.name) or suite.Outcome(part.name, "done"))
    options = suite.Options(out=tmp_path / "out", parts=("decode", "scaling"), tiny=tiny, results=tmp_path)
    assert suite.main(options) == 0
    assert ran == ["decode", *["scaling"] * begun]


def test_every_part_is_a_script_of_that_name(load: Any) -> None:
    suite = load("suite")
    names = [part.name for part in suite.PARTS]
    assert names[:4] == ["decode", "ceilings", "operations", "step"], "most important first"
    assert all((BENCHMARKS / f"{name}.py").exists() for name in names)
    with pytest.raises(UserError, match="--parts lodaer: known are decode, "):
        suite.chosen(["lodaer"])


def test_what_parts_are_given_on_a_gpu(load: Any) -> None:
    suite, given = load("suite"), {}
    for part in suite.PARTS:
        for arguments in (part.gpu, part.cpu, part.tiny):
            chosen = tyro.cli(load(part.name).Options, args=arguments)  # a flag that is not there ends it
            given.setdefault(part.name, chosen)
    train, step = given["train"], given["step"].filled(gpu=True)
    recipes = [load("recipes").Spec.parse(text) for text in train.recipes]
    assert [recipe.label for recipe in recipes[:2]] == ["fastddr", "fastddr, replay"]
    assert "peer" in {recipe.kind for recipe in recipes}
    # As many as end in a part's time; see the notes there.
    assert len(recipes) <= 4
    [heat] = load("step").heats(step)
    assert sum(variant.mode == "compile" for variant in heat) <= 4
    assert len(load("memory").trials(given["memory"], gpu=True)) == 5
    assert given["decode"].ways == ("training",)
    assert given["ceilings"].encodings == ("95-420",)


def test_default_recipes_on_a_gpu(load: Any) -> None:
    train, spec = load("train"), load("recipes").Spec
    labels = [spec.parse(text).label for text in train._GPU]
    assert {"timm, compile", "report", "report, channels_last"} <= set(labels), "the fastest form is found out"
    assert [spec.parse(text).label for text in train._GPU_KAPPA] == ["fastddr", "report"]


@pytest.mark.parametrize("gpu", [True, False])
def test_ways_to_decode(load: Any, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastddr.loaders import dali_decoder

    decode = load("decode")
    asked: list[tuple[str, ...]] = []

    def roots(data: Any, encodings: tuple[str, ...], *_: Any) -> list[tuple[str, Path]]:
        asked.append(encodings)
        return [(name, tmp_path) for name in encodings]

    trials: list[str] = []
    monkeypatch.setattr(load("sources"), "roots", roots)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(load("harness"), "begin", lambda: None)
    monkeypatch.setattr(load("harness"), "machine", lambda: MACHINE)
    monkeypatch.setattr(load("conditions"), "take", lambda before: {})
    monkeypatch.setattr(load("conditions"), "sentence", lambda *_: None)
    monkeypatch.setattr(dali_decoder, "installed", lambda: True)
    monkeypatch.setattr(decode, "in_process", lambda given, limit: trials.append(given[2]) or {"failed": "x"})
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(decode, "report", rows.append)
    for ways in (("training",), ("training", "regions", "engines")):
        trials.clear()
        decode.main(decode.Options(out=tmp_path / "r.json", encodings=("95-420",), ways=ways))
        wanted = ["", decode.REGIONS, decode.ENGINES][: len(ways) if gpu else 1]
        assert trials == [way for way in wanted for _ in range(2)]
    assert asked == [("95-420",)] * 2
    assert {row["batches"] for row in rows} == {32 if gpu else 16}, "or it is compared with other numbers of them"


# --------------------------------------------------------------------------------------------------------------- guard


def test_the_guard_judges_ratios_and_asks_twice(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = load("guard")
    older = result(load, "loader", [
        row("dali / torch-pil, the best peer", 3.0, "×", policy="report", photographs="quality 95"),
        row("dali / torch-pil", 9.0, "×", policy="report", photographs="quality 100"),
        row("resident, mmap / torch-pil", 7.0, "×", policy="report", photographs="quality 95"),
        row("dali", 1000, policy="report"),
    ])  # fmt: skip

    def rows(dali: float, resident: float) -> list[dict[str, Any]]:
        return [
            row("dali / torch-pil", dali, "×", policy="report"),
            row("resident, ram / torch-pil", resident, "×", policy="report"),
            row("dali", 1.0, policy="report"),
        ]

    found = guard.judge(rows(2.0, 2.0), older, 0.6)
    assert [(one.name, one.stored, one.good) for one in found] == [
        ("dali / torch-pil", 3.0, True), ("resident, ram / torch-pil", 7.0, False)
    ]  # fmt: skip
    said: list[str] = []
    turns = iter([rows(1.0, 7.0), rows(2.9, 6.9), rows(1.0, 7.0), rows(1.0, 7.0), []])
    monkeypatch.setattr(guard, "measured", lambda name: next(turns))
    monkeypatch.setattr(guard.harness, "say", said.append)
    assert guard.check("loader", older, 0.6), "a disturbed minute is forgiven"
    assert [line.rpartition(": ")[2] for line in said if "again" in line] == ["again"]
    assert not guard.check("loader", older, 0.6)
    assert said[-2].endswith("FAILED")
    with pytest.raises(UserError, match="store a new result"):
        guard.check("loader", older, 0.6)
