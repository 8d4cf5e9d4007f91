"""Training on a card: the step, whole runs, the verbs that follow them, and a card that is too small."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reference import needs_dali
from tests_support import SMALL, environment, lines, status, weights

from fastddr.errors import EXIT_STOPPED, EXIT_USER_ERROR

pytestmark = pytest.mark.gpu

#: In a process of its own: Accelerate's precision is a process's for good.
STEPS = """
import json, sys, warnings
from dataclasses import replace
import torch
from fastddr import load_preset, losses, models, optimizers, runtime
from fastddr.loaders.base import Batch
from fastddr.step import Tally, training_step
from fastddr.watch import Watch

precision, name, clip = sys.argv[1], sys.argv[2], None if sys.argv[3] == "none" else float(sys.argv[3])
config = replace(load_preset("quickstart"), precision=precision, batch_size=8, image_size=32, threads=1)
run = runtime.start(config)
model = models.build("convmixer", num_classes=5, image_size=32, dim=16, depth=1, kernel_size=3, patch_size=8)
model = model.to(run.device)
ema = optimizers.make_ema(model)
prepared, optimizer = run.accelerator.prepare(model, optimizers.build(model, name, lr=0.01))
criterion, tally, watch = losses.CrossEntropy(), Tally.zeros(run.device), Watch(run.device)
done = 0

def batch(value=None):
    image = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(done))
    if value is not None:
        image[2, 1, 3, 3] = value
    ids = torch.arange(8, device=run.device)
    image = image.to(run.device, run.image_dtype).contiguous(memory_format=torch.channels_last)
    return Batch(image=image, grade=ids % 5, id=ids, valid=torch.ones_like(ids, dtype=torch.bool))

def step(given):
    global done
    told = training_step(run.accelerator, prepared, [given], criterion, optimizer, tally, clip)
    optimizers.update_ema(ema, model, done, 0.9, told[:2].any())
    done += 1
    return told

def state():
    moments = optimizer.state_dict()["state"]
    kept = {f"{i}.{key}": value for i, values in moments.items() for key, value in values.items()}
    # BatchNorm counts batches in an integer, which nothing reads.
    kept |= {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    kept |= {f"ema.{key}": value for key, value in ema.state_dict().items() if value.is_floating_point()}
    return {key: torch.as_tensor(value).clone() for key, value in kept.items()}

good = 0
while good < 3:  # the scaler of float16 looks for its scale
    good += not step(batch())[:2].any().item()
    assert done < 40
found = {
    "device": run.device.type,
    "fused": all(group.get("fused") for group in optimizer.param_groups),
    "changed": [],
    "bad": [],
    "named": [],
}
for value in (float("nan"), float("inf")):
    before = state()
    told = step(batch(value))
    # A card is read one step late, the CPU at once.
    named = watch.look(told, done, [torch.arange(8)]) or watch.settle()
    after = state()
    found["changed"] += [key for key in before if not torch.equal(before[key], after[key])]
    found["bad"].append(bool(told[0]))
    found["named"].append(named.step == done)
before = state()
batches = [batch() for _ in range(5)]
torch.cuda.synchronize()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that this is a prototype
    torch.cuda.set_sync_debug_mode("error")
for given in batches:
    watch.look(step(given), done, [given.id])
torch.cuda.set_sync_debug_mode("default")
after = state()
found["kept"] = [key for key in before if torch.equal(before[key], after[key])]
found["finite"] = all(bool(value.isfinite().all()) for value in after.values())
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("precision", "optimizer", "clip"),
    [
        ("fp32", "adam", "none"),
        ("fp32", "sgd", "1"),
        ("bf16", "adam", "1"),
        ("bf16", "sgd", "none"),
        ("fp16", "adam", "none"),
        ("fp16", "sgd", "1"),
    ],
)
def test_a_bad_step_changes_nothing_and_no_step_is_waited_for(precision: str, optimizer: str, clip: str) -> None:
    """Weights, moments, BatchNorm's statistics and averaged weights stay to the bit."""
    command = [sys.executable, "-c", STEPS, precision, optimizer, clip]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "cuda"
    assert found["fused"]
    assert found["changed"] == []
    assert found["bad"] == found["named"] == [True, True]
    assert found["kept"] == [], "the steps after it train"
    assert found["finite"]


# ------------------------------------------------------------------------------------------ runs


def trained(data: Path, run: Path, *more: str, timeout: float = 90) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The configuration that a run on the card has stored, and its figures; its losses are finite."""
    command = [sys.executable, "-m", "fastddr", "train", "--data", str(data), "--run-dir", str(run), *SMALL, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert status(run)["state"] == "done"
    logged = lines(run)
    for name in ("train/loss", "valid/loss"):
        losses = [line[name] for line in logged if name in line]
        assert losses
        assert all(loss is not None and math.isfinite(loss) for loss in losses), (name, losses)
    return yaml.safe_load((run / "config.yaml").read_text()), logged


#: Some hundred MiB a step, beside which what is allowed for workspaces is not all.
LARGER = ["--convmixer.dim", "128", "--convmixer.depth", "4", "--convmixer.patch-size", "1"]


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_a_run_on_the_card(precision: str, tiny: Path, tmp_path: Path) -> None:
    stored, logged = trained(tiny, tmp_path / "run", *LARGER, "--micro-batch-size", "auto", "--precision", precision)
    assert stored["loader"] == "resident"
    assert stored["micro_batch_size"] == 8
    if precision != "auto":
        assert stored["precision"] == precision
    elif torch.cuda.get_device_capability() >= (8, 0):
        assert stored["precision"] == "bf16"
    peak, predicted = (
        max(line[name] for line in logged if name in line)
        for name in ("memory/peak_allocated_gib", "memory/predicted_gib")
    )
    print(f"{precision}: {predicted:.3f} GiB predicted, {peak:.3f} GiB at the peak")
    # Both ways: more is taken than is there, or a card is not made use of.
    assert 0.5 <= predicted / peak <= 4


@pytest.mark.parametrize(("model", "precision"), [("convmixer", "auto"), ("resnet", "fp16"), ("cnn", "fp32")])
def test_deterministic_runs_end_with_the_same_weights(model: str, precision: str, tiny: Path, tmp_path: Path) -> None:
    """Bit for bit, also after a stop."""

    def train(run: str, *more: str) -> int:
        command = [
            sys.executable, "-m", "fastddr", "train", "--data", str(tiny), "--run-dir", run, *SMALL,
            "--convmixer.dim", "128", "--convmixer.depth", "4", "--model", model, "--precision", precision,
            "--deterministic", *more,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90, env=environment())
        assert done.returncode in (0, EXIT_STOPPED), done.stderr[-2000:]
        return done.returncode

    assert train("whole") == 0
    assert train("stopped", "--max-hours", "1e-9") == EXIT_STOPPED
    assert train("stopped") == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


#: Flags that take another way on a card, together where they do not touch each other.
WAYS: dict[str, list[str]] = {
    "dali": ["--loader", "dali", "--memory.layout", "NCHW", "--augment.policy", "fundus", "--augment.mixup", "0.2"],
    "torchvision": ["--loader", "torchvision", "--memory.checkpointing", "--loss.name", "mse", "--precision", "fp16"],
    "resident": ["--loader", "resident", "--loading.store", "ram", "--optimizer.name", "sgd", "--model", "resnet"],
    "engines": ["--loader", "dali", "--loading.jpeg-engines", "--model", "cnn"],
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=needs_dali if "dali" in WAYS[way] else ()) for way in WAYS])
def test_flags_on_the_card(way: str, tiny: Path, tmp_path: Path) -> None:
    stored, _ = trained(tiny, tmp_path / "run", *WAYS[way], "--epochs", "1")
    assert stored["loader"] == WAYS[way][1]


@pytest.mark.slow
def test_a_compiled_run_on_the_card(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "run", "--compile", "--epochs", "1", timeout=300)


# ------------------------------------------------------------------------------------------ verbs


def said(*arguments: str | Path, timeout: float = 90) -> str:
    """What a verb prints."""
    command = [sys.executable, "-m", "fastddr", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def probabilities(file: Path) -> dict[str, list[float]]:
    """Of each grade, by photograph."""
    with file.open(newline="") as stream:
        return {
            Path(row["path"]).name: [float(row[f"p{grade}"]) for grade in range(5)] for row in csv.DictReader(stream)
        }


def test_verbs_on_the_card(tiny: Path, tmp_path: Path) -> None:
    """They score as the run itself did, and one as the other."""
    run = tmp_path / "run"
    trained(tiny, run, "--lr", "0.01")
    said("evaluate", run, "--split", "test")
    [folder] = (run / "evaluations").glob("*")
    evaluated, own = probabilities(folder / "predictions.csv"), probabilities(run / "report" / "predictions.csv")
    assert len(evaluated) == 13
    for name, found in evaluated.items():
        # The run kept decoded photographs and evaluate streams them, in half precision.
        assert found == pytest.approx(own[name], abs=0.03)
    said("predict", run, tiny / "DR_grading" / "test", "--out", tmp_path / "grades.csv")
    graded = probabilities(tmp_path / "grades.csv")
    assert graded.keys() >= evaluated.keys()
    for name, found in evaluated.items():
        assert graded[name] == pytest.approx(found, abs=0.03)
    said("report", run)
    said("export", run, "--format", "safetensors", "--out", tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.alone
def test_a_calibration_finds_what_a_card_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes whatever else is on the card for the context."""
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    print(said("plan", "--calibrate", timeout=240))
    [file] = (tmp_path / "memory" / "cards").glob("*.json")
    found = json.loads(file.read_text())
    assert 2**26 < found["context"] < 2**32
    assert 0 <= found["workspaces"] < 2**33


# ------------------------------------------------------------------------------------------ a small card

#: `fastddr train` on a card of so many MiB.
SMALL_CARD = """
import sys
import torch
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(int(sys.argv[1]) * 2**20 / whole)
from fastddr.train import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("micro", ["24", "auto"])
def test_a_card_that_is_too_small(micro: str, tiny: Path, tmp_path: Path) -> None:
    """One sentence where too many photographs at once are asked for, else fewer at once."""
    arguments = ["--data", str(tiny), "--run-dir", str(tmp_path / "run"), *SMALL, *LARGER, "--epochs", "1",
                 "--batch-size", "24", "--micro-batch-size", micro]  # fmt: skip
    # 24 at once are predicted to take 676 MiB, 12 take 340, and libraries some tens.
    command = [sys.executable, "-c", SMALL_CARD, "520", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment())
    if micro == "auto":
        assert done.returncode == 0, done.stderr[-2000:]
        assert "micro batch 24: a real step ran out of memory" in done.stdout
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["micro_batch_size"] < 24
    else:
        assert done.returncode == EXIT_USER_ERROR, done.stderr[-2000:]
        # Before it stand flags that are of other models.
        *_, sentence = [line for line in done.stderr.splitlines() if line.startswith("fastddr: ")]
        assert "is too small for 24 photographs of 64 px at once" in sentence
        assert "--micro-batch-size 12" in sentence
        assert "Traceback" not in done.stderr
