"""One, two and four ranks train on the same global batches, and share gradients once a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests_support import SMALL, forked, lines

#: Trains as `fastddr/train.py` does, but BatchNorm keeps the statistics that it began with, so that nothing but the sum
#: over the batch can depend on its cut into ranks. Training so is of no use to anyone, hence no option of fastddr's.
FROZEN = """
import json, sys
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.modules.batchnorm import _BatchNorm
from fastddr import cli
from fastddr.trainer import Trainer

with Trainer(cli.parse(sys.argv[1:], "frozen")) as trainer:
    for module in trainer.bare_model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
    model, found, shared = trainer.model, {}, []

    def counted(state, bucket):
        if bucket.is_last():
            shared.append(trainer.progress.step)
        return allreduce_hook(state, bucket)

    if trainer.runtime.world > 1:
        model.register_comm_hook(None, counted)
        names = ("static_graph", "gradient_as_bucket_view", "find_unused_parameters", "broadcast_buffers")
        found = {name: getattr(model, name) for name in names}
    # As `fit`, but for the report.
    while trainer.progress.epoch < trainer.config.epochs:
        trainer.train_epoch()
        trainer.validate()
    trainer.stopping.settle()
    found |= {"shared": shared, "accumulation": trainer.runtime.accumulation}
    if trainer.runtime.is_main:
        (trainer.run.path / "ddp.json").write_text(json.dumps(found))
"""
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run of each number of ranks; a global batch of 8, in micro batches of 2, so on four ranks nothing is
    accumulated."""
    folder = tmp_path_factory.mktemp("worlds")
    script = folder / "frozen.py"
    script.write_text(FROZEN)
    small = [*SMALL, "--micro-batch-size", "2", "--model", "resnet", "--memory.checkpointing", "--epochs", "1"]
    worlds = ",".join(map(str, WORLDS))
    done = forked(worlds, script, "--data", str(tiny), "--run-dir", "on{ranks}", *small, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "strides" not in done.stderr, "gradients lie as their weights do"
    return {world: folder / f"on{world}" for world in WORLDS}


def losses(run: Path, name: str) -> list[float]:
    return [line[name] for line in lines(run) if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train/loss", "valid/loss"])
def test_the_loss_is_the_same_on_any_number_of_ranks(runs: dict[int, Path], name: str) -> None:
    one = losses(runs[1], name)
    assert len(one) == (3 if name == "train/loss" else 1)
    assert name == "valid/loss" or max(one) - min(one) > 1e-3, "it moves, so that another course would be seen"
    for world in WORLDS[1:]:
        assert losses(runs[world], name) == pytest.approx(one, rel=2e-5)


@pytest.mark.slow
def test_gradients_are_shared_once_a_step(runs: dict[int, Path]) -> None:
    for world in WORLDS[1:]:
        found: dict[str, Any] = json.loads((runs[world] / "ddp.json").read_text())
        assert found["accumulation"] == 4 // world
        assert found["shared"] == list(range(3)), "and not on the inner steps of an accumulation"
        assert found["gradient_as_bucket_view"]
        assert not found["find_unused_parameters"]
        assert not found["broadcast_buffers"]
        # PyTorch cannot have it within an accumulation.
        assert found["static_graph"] == (world == 4)
