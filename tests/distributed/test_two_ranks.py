"""Two ranks on a CPU, over gloo, launched as a user would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import ROOT, SMALL, evaluated, forked, launch, lines, table, task, weights

from fastddr.data import manifest
from fastddr.loaders import canvases, stores

FLAGS = [*SMALL, "--evaluation.field", "center", "--micro-batch-size", "2"]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained by two ranks, which share one file of decoded photographs."""
    folder = tmp_path_factory.mktemp("two")
    kept = ["--loader", "resident", "--loading.store", "mmap"]
    done = launch(2, ROOT / "fastddr" / "train.py", "--data", str(tiny), "--run-dir", "run", *FLAGS, *kept, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loader resident in mmap" in done.stdout
    return folder / "run"


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_two_ranks_that_compile_end_near_those_that_do_not(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two ranks fill the cores; processes that compile for them would first have to start.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    script = ROOT / "fastddr" / "train.py"
    done = forked(2, script, "--data", str(tiny), "--run-dir", "run", *FLAGS, "--compile", cwd=tmp_path, timeout=900)
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
    paths = [row["path"] for row in table(run / "report" / "predictions.csv")]
    assert paths == [found.path[i] for split in manifest.SPLITS for i in found.ids(split)]
    store = stores.Mapped(task(found, store="mmap"), canvases.decoder(task(found)))
    wanted = np.concatenate([found.ids(split) for split in manifest.SPLITS])
    assert not store.missing(wanted).any(), "each rank filled its part of the same file"
    assert len(store.damaged(wanted)) == 0
    store.close()


@pytest.mark.slow
def test_validation_while_training_is_that_of_the_saved_weights(run: Path) -> None:
    """Not of each rank's own BatchNorm statistics, which differ until DDP's next forward."""
    logged = [line["valid/loss"] for line in lines(run) if "valid/loss" in line]
    figures, _, _ = evaluated(run, "--split", "valid", "--weights", "last")
    assert logged[-1] == pytest.approx(figures["valid"]["loss"], abs=1e-5)


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
    done = forked(2, script, "--data", str(tiny), "--run-dir", ".", *FLAGS, cwd=tmp_path)
    assert done.returncode != 0
    assert "not a run" in done.stderr


#: Rank 0's disk is full when it makes the run's folder.
FULL = """
import errno, os, sys
from fastddr import ranks, runs, train

def begin(run, *_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.config))

if ranks.rank() == 0:
    runs.RunFolder.begin = begin
sys.exit(train.main())
"""


@pytest.mark.slow
def test_a_folder_that_rank_0_cannot_begin_is_told_by_all(tiny: Path, tmp_path: Path) -> None:
    """And not after a while as one that the others do not see."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    done = forked(2, script, "--data", str(tiny), "--run-dir", "run", *FLAGS, cwd=tmp_path)
    told = done.stderr.splitlines()[-2:]
    assert told[0] == told[1], "both ranks end in the same sentence"
    assert told[0].startswith("fastddr: run/config.yaml: No space left on device")
