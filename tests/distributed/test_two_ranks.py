"""Two ranks on a CPU, over gloo, launched as a user would."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import ROOT, forked, launch, task, weights

from fastddr.data import manifest
from fastddr.loaders import canvases, stores

SMALL = [
    "--epochs", "2", "--batch-size", "8", "--micro-batch-size", "2", "--image-size", "64", "--canvas", "80",
    "--evaluation.field", "center",
    "--convmixer.dim", "8", "--convmixer.depth", "1", "--convmixer.kernel-size", "3", "--convmixer.patch-size", "8",
    "--tracking.no-wandb", "--tracking.no-tensorboard", "--tracking.log-every-steps", "1", "--threads", "1",
    "--loading.threads", "1", "--optimizer.ema-decay", "0.9",
]  # fmt: skip


EVALUATE = """
import json, sys
import numpy as np
from fastddr import checkpoints, cli, models, runtime
from fastddr.config import load_preset
from fastddr.evaluation.evaluate import score
from fastddr.loaders import Task, build
from fastddr.data import manifest

run, out = sys.argv[1:]
config = load_preset(run + "/config.yaml")
found = manifest.read(config.data)
state = runtime.start(config)
model = models.build(config.model, num_classes=5, image_size=config.image_size, **config.model_settings)
saved = checkpoints.load(__import__("pathlib").Path(run) / "checkpoints" / "last")
checkpoints.load_weights(model, saved.ema, saved.path)
task = Task(files=found.files(), grades=found.grade, widths=found.width, heights=found.height, ids=found.ids("test"),
            train=False, image_size=config.image_size, canvas=config.canvas, augment=config.augment, seed=0,
            batch_size=3 * state.world, rank=state.rank, world=state.world)
loader = build("auto", task)
result = score(state.accelerator, model, loader, paths=found.path, weights="last")
loader.close()
from dataclasses import replace
valid = build("auto", replace(task, ids=found.ids("valid")))
last = score(state.accelerator, model, valid, paths=found.path, weights="last")
loss = float(__import__("torch").nn.functional.cross_entropy(last.logits, last.grades))
np.savez(f"{out}-{state.rank}.npz", loss=loss, logits=result.logits.numpy(), ids=result.ids.numpy(), world=state.world)
state.accelerator.end_training()
"""


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained by two ranks, which share one file of decoded photographs."""
    folder = tmp_path_factory.mktemp("two")
    kept = ["--loader", "resident", "--loading.store", "mmap"]
    done = launch(2, ROOT / "fastddr" / "train.py", "--data", str(tiny), "--run-dir", "run", *SMALL, *kept, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loader resident in mmap" in done.stdout
    return folder / "run"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_two_ranks_that_compile_end_near_those_that_do_not(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two ranks fill the cores; processes that compile for them would first have to start.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    done = forked(
        2, ROOT / "fastddr" / "train.py", "--data", str(tiny), "--run-dir", "run", *SMALL, "--compile", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    eager, compiled = weights(run), weights(tmp_path / "run")
    assert eager.keys() == compiled.keys(), "plain names"
    assert not all(torch.equal(eager[name], compiled[name]) for name in eager), "nothing was compiled"
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_train_and_report_like_one(run: Path, tiny: Path) -> None:
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert [line["step"] for line in lines(run) if "train/loss" in line] == [1, 2, 3, 4, 5, 6], "no line twice"
    found = manifest.read(tiny)
    with (run / "report" / "predictions.csv").open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert paths == [found.path[i] for split in manifest.SPLITS for i in found.ids(split)]
    store = stores.Mapped(task(found, store="mmap"), canvases.decoder(task(found)))
    wanted = np.concatenate([found.ids(split) for split in manifest.SPLITS])
    assert not store.missing(wanted).any(), "each rank filled its part of the same file"
    assert len(store.damaged(wanted)) == 0
    store.close()


@pytest.fixture(scope="module")
def scored(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of one and of two made of the test split under the same weights."""
    folder = tmp_path_factory.mktemp("scored")
    script = folder / "evaluate_it.py"
    script.write_text(EVALUATE)
    done = forked("1,2", script, str(run), str(folder / "on{ranks}"), cwd=run.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return {ranks: [dict(np.load(folder / f"on{ranks}-{rank}.npz")) for rank in range(ranks)] for ranks in (1, 2)}


@pytest.mark.slow
def test_evaluation_has_every_photograph_once_on_every_rank(
    scored: dict[int, list[dict[str, Any]]], tiny: Path
) -> None:
    """13 photographs at 3 a rank: padding across the border of the ranks, and a rank with padding alone."""
    ids = manifest.read(tiny).ids("test").tolist()
    for ranks, results in scored.items():
        for result in results:
            assert result["world"] == ranks
            assert result["ids"].tolist() == ids


@pytest.mark.slow
def test_evaluation_on_two_ranks_equals_that_on_one(scored: dict[int, list[dict[str, Any]]]) -> None:
    for result in scored[2]:
        assert np.abs(result["logits"] - scored[1][0]["logits"]).max() < 1e-6


@pytest.mark.slow
def test_validation_while_training_is_that_of_the_saved_weights(
    run: Path, scored: dict[int, list[dict[str, Any]]]
) -> None:
    """Not of each rank's own BatchNorm statistics, which differ until DDP's next forward."""
    logged = [line["valid/loss"] for line in lines(run) if "valid/loss" in line]
    assert logged[-1] == pytest.approx(float(scored[1][0]["loss"]), abs=1e-5)


@pytest.mark.slow
def test_a_mistake_is_told_and_no_rank_hangs(tiny: Path, tmp_path: Path) -> None:
    script = ROOT / "fastddr" / "train.py"
    done = launch(2, script, "--data", "nowhere", cwd=tmp_path)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("fastddr:")]
    assert len(ours) == 2, "both ranks end in the same sentence"
    assert all("nowhere: there is no such folder" in line for line in ours)
    assert "Connection closed" not in done.stderr
    (tmp_path / "thesis.txt").write_text("mine")
    done = forked(2, script, "--data", str(tiny), "--run-dir", ".", *SMALL, cwd=tmp_path)
    assert done.returncode != 0
    assert "not a run" in done.stderr
