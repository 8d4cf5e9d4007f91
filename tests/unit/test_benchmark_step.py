"""The benchmark of the training step: what it counts, compares, says and leaves out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import BENCHMARKS, elsewhere
from torch import nn

import fastddr
from fastddr import runtime
from fastddr.errors import UserError
from fastddr.models import levers

CPU = torch.device("cpu")
#: Settings, side of the images; GFLOP of an image and its GB eager and compiled in bf16, as published for them.
PUBLISHED = [
    ("convmixer-768-32-k7-p8", 256, 124, 2.52, 1.66),
    ("convmixer-1024-20-k9-p14", 224, 35.4, 0.524, 0.346),
    ("convmixer-512-12-k9-p8", 256, 22.8, 0.629, 0.415),
]


# ------------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize(("name", "size", "gigaflop", "eager", "compiled"), PUBLISHED)
def test_flop_and_bytes_are_the_published_ones(
    load: Any, name: str, size: int, gigaflop: float, eager: float, compiled: float
) -> None:
    mixer = load("networks").mixer(name)
    assert float(f"{mixer.training(size) / 1e9:.3g}") == gigaflop
    assert float(f"{mixer.moved(size, 2, compiled=False) / 1e9:.3g}") == eager
    assert float(f"{mixer.moved(size, 2, compiled=True) / 1e9:.3g}") == compiled


@pytest.mark.parametrize("source", ["", "timm:"])
@pytest.mark.parametrize("name", ["convmixer-512-12-k9-p8", "convmixer-24-3-k5-p7"])
def test_formula_and_counter_agree_up_to_the_head(load: Any, source: str, name: str) -> None:
    if source:
        pytest.importorskip("timm")
    flops, networks = load("flops"), load("networks")
    network = networks.build(source + name, 64)
    mixer = networks.settings_of(source + name, network)
    head = 2 * mixer.dim * networks.CLASSES
    assert flops.training(network, 64) == mixer.training(64) + 3 * head
    assert not next(network.parameters()).is_meta


def test_the_first_convolution_has_no_gradient_of_the_images(load: Any) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4))
    first, depthwise = 2 * 64 * 4 * 27, 2 * 64 * 4 * 9
    assert load("flops").training(network, 8) == 2 * first + 3 * depthwise
    with pytest.raises(ValueError, match="without a convolution"):
        load("flops").training(nn.Flatten(), 8)


def test_settings_of_a_named_model_of_timm(load: Any) -> None:
    pytest.importorskip("timm")
    networks = load("networks")
    network = networks.build("timm:convmixer_768_32", 32)
    assert vars(networks.settings_of("timm:convmixer_768_32", network)) == {
        "dim": 768, "depth": 32, "kernel": 7, "patch": 7,
    }  # fmt: skip


def test_the_roofline_is_the_longer_time(load: Any) -> None:
    least = load("flops").least_seconds
    assert least(10.0, 3.0, 5.0, 2.0) == 2.0
    assert least(10.0, 6.0, 5.0, 2.0) == 3.0


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", ["convmixer-16-2-k3-p8", "timm:convmixer-16-2-k3-p8", "resnet,depth=10,width=16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_maps_are_in_the_layout_that_is_named(load: Any, name: str, layout: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    networks = load("networks")
    network = networks.lay_out(networks.build(name, 64), layout, CPU)
    images = torch.randn(2, 3, 64, 64)
    found = elsewhere(network, networks.LAYOUTS[layout])
    for given in networks.LAYOUTS:
        found.clear()
        network(images.contiguous(memory_format=networks.LAYOUTS[given]))
        assert bool(found) == (given != layout) or name.startswith("convmixer"), (given, found)
    found.clear()
    network(images.contiguous(memory_format=networks.LAYOUTS[layout]))
    assert found == []


@pytest.mark.parametrize(
    ("name", "layout"),
    [("convmixer-16-2-k9-p8", "NCHW"), ("convmixer,dim=16,depth=2,patch_size=8", "NCHW"),
     ("convmixer-16-2-k3-p8", "NHWC"), ("resnet,depth=10,width=16", "NHWC")],
)  # fmt: skip
def test_maps_are_where_the_trainer_of_a_gpu_has_them(
    name: str, layout: str, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, chosen = load("networks"), levers.layout
    monkeypatch.setattr(levers, "layout", lambda config, device: chosen(config, torch.device("cuda")))
    network = networks.as_trained(name, 64, CPU)
    found = elsewhere(network, networks.LAYOUTS[layout])
    # As loaders give them.
    network(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert set(found) <= {"patches"}, "which is cut by a matrix product, in any layout"


def test_unknown_networks_and_packages(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = load("networks")
    for name in ("convmixer-16-2-k3-p8", "timm:convmixer-16-2-k3-p8", "cnn", "resnet,depth=40", "torchvision:resnet50"):
        networks.check(name)
    for name in ("convmixer_768_32", "keras:resnet50", "convmixer-16-2", "timm", "cnn:blocks=2"):
        with pytest.raises(UserError, match=name):
            networks.check(name)
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="timm is not installed"):
        networks.build("timm:convmixer_768_32", 32)


# ------------------------------------------------------------------------------------------------------ training steps


def a_job(variants: ModuleType, heats: list[list[Any]], records: str = "") -> Any:
    return variants.Job("fp32", 4, 32, heats, heats[0][0], "adam", 5, 1, 1, None, records)


def test_variants_and_their_heats(load: Any) -> None:
    step = load("step")
    options = step.Options(
        models=("cnn", "convmixer-16-1-k3-p8", "timm:convmixer_768_32", "timm:convmixer-16-1-k3-p8"),
        modes=("eager", "compile"),
    ).filled(gpu=False)
    heats = step.heats(options)
    assert [list(dict.fromkeys(variant.model for variant in heat)) for heat in heats] == [
        ["cnn"], ["convmixer-16-1-k3-p8", "timm:convmixer-16-1-k3-p8"], ["timm:convmixer_768_32"],
    ]  # fmt: skip
    assert [variant.name for variant in heats[0]] == [
        "cnn, eager, NCHW", "cnn, eager, NHWC", "cnn, compile, NCHW", "cnn, compile, NCHW, layout kept",
        "cnn, compile, NHWC", "cnn, compile, NHWC, layout kept",
    ]  # fmt: skip
    assert [variant.name for variant in heats[1]][:3] == [
        "convmixer-16-1-k3-p8, eager, NCHW", "convmixer-16-1-k3-p8, eager, NHWC",
        "timm:convmixer-16-1-k3-p8, eager, NCHW",
    ]  # fmt: skip
    assert heats[1][-1].name == "timm:convmixer-16-1-k3-p8, compile, NHWC, layout kept"
    assert step.Options().filled(gpu=True).modes == ("eager", "deterministic", "compile", "max-autotune")
    for model in (*step.MODELS, *step.CPU_MODELS, *step.TINY_MODELS):
        load("networks").check(model)


def test_variants_are_not_one_to_the_compiler(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = load("variants")
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda network, options: asked.append(options) or network)
    network = nn.Flatten()
    for mode in variants.MODES:
        for choice in (True, False) if variants.MODES[mode] is not None else (None,):
            assert variants.compiled(network, variants.Variant("cnn", mode, "NCHW", choice)) is network
    assert [options.pop("layout_optimization") for options in asked] == [True, False] * 3
    cudagraphs, autotuned = (
        [bool(options.get(key)) for options in asked[::2]] for key in ("triton.cudagraphs", "max_autotune")
    )
    assert (cudagraphs, autotuned) == ([False, True, False], [False, True, True])


@pytest.mark.skipif(torch.cuda.is_available(), reason="Accelerate's precision and device are a process's for good")
def test_a_compiled_variant_must_have_been_compiled(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = load("variants")
    threads = torch.get_num_threads()
    run = runtime.start(replace(fastddr.load_preset("quickstart"), precision="fp32", batch_size=4, threads=threads))
    eager, compiled = (
        variants.Variant("convmixer-16-1-k3-p8", *how) for how in (("eager", "NHWC"), ("compile", "NCHW", True))
    )
    job = a_job(variants, [[eager, compiled]])
    running = variants.Running(eager, job, run)
    assert running() > 0
    assert set(running.about) == {"parameters", "flop", "mixer"}
    monkeypatch.setattr(torch, "compile", lambda network, options: network)
    with pytest.raises(RuntimeError, match="nothing was compiled"):
        variants.Running(compiled, job, run)


def test_a_deterministic_variant_computes_as_training_does_and_the_others_do_not(load: Any) -> None:
    variants = load("variants")
    modes = ("eager", variants.DETERMINISTIC)
    for mode in (*modes, *modes):
        with variants.numerics(variants.Variant("cnn", mode, "NCHW"), CPU):
            assert torch.are_deterministic_algorithms_enabled() == (mode == variants.DETERMINISTIC)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_variant_that_fails_is_said_and_the_others_go_on(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = load("variants")

    asked: list[str] = []

    class Running:
        def __init__(self, variant: Any, job: Any, run: Any) -> None:
            if variant.model == "unbuilt":
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate.")
            self.variant, self.about, self.turns = variant, {"flop": 1}, 0

        def __call__(self) -> float:
            self.turns += 1
            asked.append(self.variant.model)
            if self.variant.model == "breaks" and self.turns == 3:
                raise RuntimeError("Detected recompile")
            return 10.0

    monkeypatch.setattr(variants, "Running", Running)
    heat = [variants.Variant(model, "eager", "NCHW") for model in ("cnn", "unbuilt", "breaks", "resnet")]
    job, run = a_job(variants, [heat]), SimpleNamespace(device=CPU)
    said: list[str] = []
    kept: list[list[int]] = []
    measured = variants.Heat(0, job, run, said.append)
    measured.warm()
    records = measured.race(lambda found: kept.append([len(r["rates"]) for r in found if "rates" in r]))
    measured.close()
    assert asked.count("cnn") == 5
    assert asked.count("breaks") == 3
    by_model = {record["variant"]["model"]: record for record in records}
    assert by_model["cnn"]["rates"] == by_model["resnet"]["rates"] == [10.0] * 5
    out_of_memory = "OutOfMemoryError: CUDA out of memory (beside 1 other variants of this heat)"
    assert by_model["unbuilt"]["failed"] == out_of_memory
    assert by_model["breaks"]["failed"] == "RuntimeError: Detected recompile"
    assert f"unbuilt, eager, NCHW is left out: {out_of_memory}." in said
    assert "breaks, eager, NCHW is left out: RuntimeError: Detected recompile." in said
    assert kept == [[3, 3], [4, 4]], "rounds are kept as they come, once there are a few"
    # When the time is up no variant begins.
    object.__setattr__(job, "until", 0.0)
    late = variants.Heat(0, job, run, said.append)
    late.warm()
    assert [record["failed"] for record in late.race()] == [load("harness").TIME_UP] * 4
    assert said[-1] == "resnet, eager, NCHW is left out: the time was up before its turn came."


#: Of four heats: one is whole, one dies in its warm-up of one variant and then without a word, one after four of five
#: rounds, and the last is whole again.
DYING = """
import json, os, signal, sys
job = json.load(open(sys.argv[1]))
def record(heat, rounds):
    rate = {"heat": heat, "variant": job["heats"][heat][0], "rates": [1.0] * rounds, "flop": 1}
    open(job["records"], "a").write(json.dumps([rate]) + "\\n")
for heat in range(job["first"], 4):
    if heat == 1 and len(job["heats"][1]) == 3:
        why = "CUDA error: an illegal memory access was encountered"
        lost = {"heat": 1, "variant": job["heats"][1][0], "failed": why, "lost": True}
        open(job["records"], "a").write(json.dumps([lost]) + "\\n")
        sys.exit("resnet: " + why)
    if heat == 1:
        sys.exit("the driver is gone")
    record(heat, 3)
    record(heat, 4)
    if heat == 2:
        open(job["records"], "a").write('[{"heat": 2, "ra')
        os.kill(os.getpid(), signal.SIGSEGV)
    record(heat, 5)
"""


def test_another_process_measures_the_heats_behind_one_that_died(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, variants = load("step"), load("variants")
    models = ("cnn", "resnet", "convmixer-16-1-k3-p8", "torchvision:resnet50")
    job = a_job(variants, [[variants.Variant(model, "eager", "NCHW")] for model in models])
    job.heats[1] += [variants.Variant("resnet", "eager", "NHWC"), variants.Variant("resnet", "compile", "NCHW", True)]
    monkeypatch.setattr(step, "WORKER", (sys.executable, "-c", DYING))
    records = step.Measuring()(job)
    last = {record["heat"]: record for record in records}
    assert [last[heat].get("rates") for heat in range(4)] == [[1.0] * 5, None, [1.0] * 4, [1.0] * 5]
    assert [(r["variant"]["layout"], r["variant"]["mode"], r["failed"]) for r in records if r["heat"] == 1] == [
        ("NCHW", "eager", "CUDA error: an illegal memory access was encountered"),
        ("NHWC", "eager", "the driver is gone"), ("NCHW", "compile", "the driver is gone"),
    ], "the others have been tried without it"  # fmt: skip
    without = step._without(job, job.reference, 0)
    assert (without.reference, without.first) == (job.heats[1][0], 1), "it is measured in no heat any more"
    said = "convmixer-16-1-k3-p8 has had 4 of 5 rounds: its process was killed by SIGSEGV."
    assert said in capsys.readouterr().out
    # When the time is up no other process begins.
    object.__setattr__(job, "until", 0.0)
    late = {record["heat"]: record.get("failed") for record in step.Measuring()(job)}
    assert late[0] is None
    assert late[1] == late[2] == late[3] == load("harness").TIME_UP
    # Refused, of which it begins no second one.
    object.__setattr__(job, "until", None)
    refuses = "import sys, pathlib; pathlib.Path(sys.argv[1] + '.json').touch(exist_ok=False); sys.exit(2)"
    monkeypatch.setattr(step, "WORKER", (sys.executable, "-c", refuses, str(tmp_path / "once")))
    assert {record["failed"] for record in step.Measuring()(job)} == {"it said nothing"}
    monkeypatch.setattr(step, "WORKER", (sys.executable, "-c", "raise SystemExit('fp16 needs a GPU.')"))
    assert {record["failed"] for record in step.Measuring()(job)} == {"fp16 needs a GPU"}


@pytest.mark.parametrize("when", ["warm", "race"])
def test_an_error_of_cuda_ends_the_process_but_not_one_of_memory(
    when: str, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants, problem = load("variants"), ""

    class Running:
        def __init__(self, variant: Any, job: Any, run: Any) -> None:
            self.about = {"flop": 1}
            if when == "warm":
                raise RuntimeError(problem)

        def __call__(self) -> float:
            raise RuntimeError(problem)

    def measure() -> list[dict[str, Any]]:
        heat = variants.Variant("cnn", "eager", "NCHW")
        measured = variants.Heat(0, a_job(variants, [[heat]]), SimpleNamespace(device=CPU), lambda line: None)
        measured.warm()
        records: list[dict[str, Any]] = measured.race()
        return records

    monkeypatch.setattr(variants, "Running", Running)
    monkeypatch.setattr(variants, "_answers", lambda: "CUBLAS" in problem)
    for problem in ("CUDA error: out of memory", "Detected recompile", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"):
        [record] = measure()
        assert record["failed"] == f"RuntimeError: {problem}"
    problem = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
    with pytest.raises(variants.Lost, match=r"^cnn, eager, NCHW: RuntimeError: CUDA error: an illegal"):
        measure()


#: Ends the benchmark after the first heat.
STOPS = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
record = {"heat": 0, "variant": job["heats"][0][0], "rates": [1.0] * 5, "flop": 1, "parameters": 1, "mixer": None}
open(job["records"], "a").write(json.dumps([record]) + "\\n")
os.kill(os.getppid(), %d)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_measured_before_a_stop_is_kept(
    number: signal.Signals, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, variants = load("step"), load("variants")
    heats = [[variants.Variant(model, "eager", "NCHW")] for model in ("cnn", "resnet")]
    measuring = step.Measuring()
    monkeypatch.setattr(step, "WORKER", (sys.executable, "-c", STOPS % number))
    before = signal.getsignal(number)
    with measuring:
        records = measuring(a_job(variants, heats))
    assert signal.getsignal(number) == before
    assert measuring.stopped == number
    assert [record.get("failed") for record in records] == [None, "the benchmark was stopped"]


def test_a_stop_is_the_exit_code_and_the_result_is_not_complete(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = load("step")
    monkeypatch.setattr(load("harness"), "begin", lambda *_: None)
    ceilings = SimpleNamespace(rows=list, peak=lambda precision: None, bandwidth=1.0)
    monkeypatch.setattr(step, "measure", lambda *_, **__: ceilings)
    monkeypatch.setattr(step, "WORKER", (sys.executable, "-c", STOPS % signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        step.main(step.Options(models=("cnn", "resnet"), modes=("eager",), layouts=("NCHW",), out=tmp_path / "r.json"))
    assert ended.value.code == 128 + signal.SIGTERM
    record = json.loads((tmp_path / "r-incomplete.json").read_text())
    assert (record["complete"], record["rows"][0]["name"]) == (False, "cnn, eager, NCHW")


def test_rows_and_ratios_of_records(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, variants, ceilings = load("step"), load("variants"), load("ceilings")
    name = "convmixer-16-1-k3-p8"
    ours, theirs = (variants.Variant(model, "eager", "NCHW") for model in (name, f"timm:{name}"))
    compiled = variants.Variant(name, "compile", "NCHW", True)
    other = variants.Variant("cnn", "eager", "NHWC")
    job = a_job(variants, [[ours, compiled, theirs], [other]])
    mixer = vars(load("networks").mixer(name))
    mine = {"flop": 10**6, "parameters": 7, "mixer": mixer}

    def record(heat: int, variant: Any, rates: list[float], **more: Any) -> dict[str, Any]:
        return {"heat": heat, "variant": vars(variant), "rates": rates, **mine, **more}

    records = [
        record(0, ours, [100.0, 200.0, 100.0, 100.0, 100.0], peak_bytes=2**30),
        record(0, compiled, [300.0, 600.0, 300.0, 300.0, 300.0]),
        record(0, theirs, [50.0, 100.0, 50.0, 50.0, 50.0]),
        # A slow minute: the ratio is to the reference of this heat.
        record(1, ours, [10.0] * 5),
        record(1, other, [20.0] * 5, mixer=None),
        {"heat": 2, "variant": vars(ours), "failed": "the time was up"},
        {"heat": 1, "variant": vars(variants.Variant("cnn", "compile", "NHWC", True)), "failed": "out of memory"},
    ]
    # 10⁶ FLOP take 1/1000 s, and 50 · 4 B · 16 places · 16 = 51,200 B take 1/500 s.
    limits = ceilings.Ceilings([25.6e6], {"fp32": [1e9]}, "cpu")
    rows = step.rows_of(job, records, limits)
    steps = {row["name"]: row for row in rows if row["kind"] == "step"}
    assert list(steps) == [variant.name for variant in (ours, compiled, theirs, other)]
    row = steps[ours.name]
    assert (row["median"], row["n"], row["unit"], row["ms_a_step"]) == (100.0, 5, "images/s", 40.0)
    assert (row["share_of_matmul"], row["share_of_copy"], row["roofline_share"]) == (0.1, 0.2, 0.2)
    assert (row["gigaflop_an_image"], row["teraflop_per_second"], row["bytes_an_image"]) == (1e-3, 1e-4, 51_200)
    assert (row["peak_gib"], row["parameters"], row["layout"], row["precision"]) == (1.0, 7, "NCHW", "fp32")
    assert "layout_optimization" not in row
    assert steps[compiled.name]["layout_optimization"] is True
    assert steps[compiled.name]["bytes_an_image"] == 51_200 * 33 / 50
    assert "share_of_copy" not in steps[other.name]
    ratios = {
        (row["to"], row["of"]): (row["median"], row["low"], row["high"]) for row in rows if row["kind"] == "ratio"
    }
    assert ratios == {
        ("eager", compiled.name): (3, 3, 3),
        ("timm", ours.name): (2, 2, 2),
        ("reference", theirs.name): (0.5, 0.5, 0.5),
        ("reference", other.name): (2, 2, 2),
    }
    assert len(ratios) == len([row for row in rows if row["kind"] == "ratio"])
    assert [row.get("to_reference") for row in steps.values()] == [None, 3, 0.5, 2]
    [failed] = [row for row in rows if row["kind"] == "failed"]
    assert (failed["name"], failed["failed"]) == ("cnn, compile, NHWC", "out of memory")
    said: list[str] = []
    monkeypatch.setattr(step.harness, "say", said.append)
    step.report(job, rows)
    assert said == [
        "Left out, fp32, batch 4, 32 px: cnn, compile, NHWC: out of memory.",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_precision_that_the_machine_lacks(load: Any, tmp_path: Path) -> None:
    variants = load("variants")
    job = variants.Job("fp16", 4, 32, [], variants.Variant("cnn", "eager", "NCHW"), "adam", 5, 1, 1, None, "")
    job.write(tmp_path / "job.json")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        variants.main(tmp_path / "job.json")


@pytest.mark.slow
def test_a_run_of_steps(tmp_path: Path) -> None:
    ours = "convmixer-16-1-k3-p8"
    twin = [f"timm:{ours}"] if importlib.util.find_spec("timm") else []
    out = tmp_path / "r.json"
    done = subprocess.run(
        [sys.executable, "-B", str(BENCHMARKS / "step.py"), "--tiny", "--rounds", "5", "--threads", "1",
         "--models", ours, *twin, "cnn,blocks=1,width=4", "torchvision:no_such_model",
         "--modes", "eager", "--layouts", "NCHW", "NHWC", "--steps", "1", "--out", str(out)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    steps = [row for row in rows if row["kind"] == "step"]
    measured = [ours, *twin, "cnn,blocks=1,width=4"]
    assert {row["name"] for row in steps} == {
        f"{model}, eager, {layout}" for model in measured for layout in ("NCHW", "NHWC")
    }
    for row in steps:
        assert {"ms_a_step", "gigaflop_an_image", "teraflop_per_second", "share_of_matmul", "parameters"} <= set(row)
        assert (row["unit"], row["n"], row["precision"], row["batch_size"], row["image_size"]) == (
            "images/s", 5, "fp32", 4, 32,
        )  # fmt: skip
        assert row["low"] <= row["median"] <= row["high"]
        assert ("roofline_share" in row) == ("convmixer" in row["name"])
        assert ("to_reference" in row) == (row["name"] != f"{ours}, eager, NCHW")
    failed = {row["name"]: row["failed"] for row in rows if row["kind"] == "failed"}
    assert list(failed) == [f"torchvision:no_such_model, eager, {layout}" for layout in ("NCHW", "NHWC")]
    assert all("no_such_model" in why for why in failed.values())
    assert "Left out, fp32, batch 4, 32 px: torchvision:no_such_model, eager, NCHW; " in done.stdout
    assert [row["to"] for row in rows if row["kind"] == "ratio"].count("timm") == 2 * len(twin)
