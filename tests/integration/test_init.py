"""Runs that begin at earlier weights, recompute their blocks, train a model of timm's, or are compiled."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import SMALL, environment, settings, train, weights

from fastddr import checkpoints
from fastddr.config import Config
from fastddr.errors import EXIT_USER_ERROR, UserError
from fastddr.trainer import Trainer


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with averaged weights, done."""
    return train(tiny, tmp_path_factory.mktemp("runs") / "first")


def test_a_run_begins_at_the_best_weights_of_another_and_goes_on_without_it(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = Path(shutil.copytree(run, tmp_path / "source", symlinks=True)), tmp_path / "second"
    begin = settings(tiny, folder, "--init", f"run:{source}")
    with Trainer(begin) as trainer:
        best = checkpoints.load(source / "checkpoints" / "best").ema
        assert best is not None
        for model in (trainer.bare_model, trainer._weights):
            found = model.state_dict()
            assert found.keys() == best.keys()
            assert all(torch.equal(found[name], best[name]) for name in best)
        trainer.train_epoch()
        trainer.validate()
    taken = f"run:{source}: {len(best)} of {len(best)} tensors taken"
    assert f"init {taken}" in capsys.readouterr().out
    saved = checkpoints.load(folder / "checkpoints" / "last").model
    assert not torch.equal(saved["head.weight"], best["head.weight"])
    # A resume goes on from its own weights; what it began at may be gone.
    shutil.rmtree(source)
    with Trainer(begin) as trainer:
        found = trainer.bare_model.state_dict()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert "tensors taken" not in capsys.readouterr().out
    # What it began at is told for good.
    assert (folder / "init.txt").read_text() == f"init {taken}\n"
    train(tiny, folder, "--init", f"run:{source}")
    assert f"| Begins at | {taken} |" in (folder / "report" / "report.md").read_text()
    with pytest.raises(UserError, match=r"init was 'run:.*' and is now None"):
        train(tiny, folder)


def test_a_run_that_ended_before_its_first_checkpoint_begins_at_them_again(
    run: Path, tiny: Path, tmp_path: Path
) -> None:
    begin = settings(tiny, tmp_path / "second", "--init", f"run:{run}")
    with Trainer(begin):
        pass
    with Trainer(begin) as trainer:
        best = checkpoints.load(run / "checkpoints" / "best").ema
        assert best is not None
        for model in (trainer.bare_model, trainer._weights):
            assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--init", "none.pth"), "there is no such file"),
        (("--model", "timm:no_such_model"), "no_such_model"),
        (("--compile",), "needs a C.. compiler"),
    ],
)
def test_what_cannot_be_had_is_told_before_the_photographs_are_read_and_leaves_no_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], said: str
) -> None:
    def early(*_: object) -> None:
        raise AssertionError("thousands of photographs are decoded here")

    monkeypatch.setattr("fastddr.trainer.source.open_data", early)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=said):
        train(tiny, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_configuration_made_in_python_is_checked() -> None:
    with pytest.raises(UserError, match="the Trainer's configuration: epochs is 0, but must be at least 1"):
        Trainer(Config(epochs=0))
    assert type(Trainer(Config(lr=np.float64(0.1))).config.lr) is float, "config.yaml knows no number of NumPy's"


def test_recomputed_blocks_give_the_run_bit_for_bit(run: Path, tiny: Path, tmp_path: Path) -> None:
    again = weights(train(tiny, tmp_path / "sparing", "--memory.checkpointing"))
    assert [name for name, tensor in weights(run).items() if not torch.equal(tensor, again[name])] == []


def test_a_model_of_timms_trains_and_is_reported(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    run = train(tiny, tmp_path / "run", "--model", "timm:test_resnet", "--epochs", "1", "--memory.layout", "NCHW")
    assert "timm:test_resnet" in (run / "report" / "report.md").read_text()
    assert "conv1.0.weight" in weights(run) or "conv1.weight" in weights(run)


#: In a process of its own: the checks of shapes that tests run under are not what is compiled.
BROKEN = """
import sys
import torch
from fastddr import train
from fastddr.models import levers

def backend(*_):
    raise {error}

levers.check_compiler = lambda *_: None
levers.compiled = lambda model, *_: torch.compile(model, backend=backend)
sys.exit(train.main())
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "ValueError('no such instruction')",
            "torch.compile cannot compile convmixer here: .*no such instruction; leave",
        ),
        ("torch.OutOfMemoryError('full')", "fastddr: the memory of cpu is too small"),
    ],
)
def test_a_compiler_that_fails_ends_the_run_in_one_sentence(tiny: Path, tmp_path: Path, error: str, words: str) -> None:
    command = [sys.executable, "-c", BROKEN.format(error=error), "--data", str(tiny), "--run-dir", "run"]
    done = subprocess.run(
        [*command, *SMALL, "--compile"], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert re.search(words, done.stderr)
    assert "Traceback" not in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "UserError" in status["reason"]
