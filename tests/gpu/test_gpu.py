"""What needs a card: the GPU decoder against PIL, half precision, and training on it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests_support import task

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data import manifest

pytestmark = pytest.mark.gpu
STD = 255 * torch.tensor(AugmentConfig().std).view(1, 3, 1, 1)

#: In a process of its own: a decoder that crashes must fail the test and not end the session.
COMPARE = """
import sys, torch
from dataclasses import replace
sys.path.insert(0, sys.argv[2])
from fastddr import loaders
from fastddr.data import manifest
from tests_support import task
found = manifest.read(sys.argv[1])
wanted = task(found, "test", canvas=int(sys.argv[3]), image_size=64, batch_size=13)
gpu = loaders.build("dali", replace(wanted, device=torch.device("cuda", 0)))
cpu = loaders.build("torchvision", replace(wanted, threads=0))
one, other = next(gpu.epoch()), next(cpu.epoch())
assert one.image.device.type == "cuda" and one.image.is_contiguous(memory_format=torch.channels_last)
levels = ((one.image.cpu() - other.image) * 255 * torch.tensor(wanted.augment.std).view(1, 3, 1, 1)).abs()
print(levels.max().item(), levels.mean().item())
"""


@pytest.mark.parametrize("canvas", [80, 72], ids=["window", "whole"])
def test_the_gpu_decoder_gives_the_pixels_of_pil(tiny: Path, canvas: int) -> None:
    """Within 3 levels at worst and half a level on average: the GPU's IDCT and upsampling round otherwise."""
    arguments = [sys.executable, "-c", COMPARE, str(tiny), str(Path(__file__).parents[1]), str(canvas)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    most, mean = map(float, done.stdout.split())
    assert most <= 3.01
    assert mean <= 0.5


@pytest.mark.parametrize("name", ["dali", "torchvision", "replay"])
def test_batches_are_on_the_card_in_the_training_dtype(name: str, tiny: Path) -> None:
    wanted = replace(task(manifest.read(tiny)), device=torch.device("cuda", 0), dtype=torch.bfloat16)
    loader = loaders.build(name, wanted)
    kept = [(batch.image, batch.image.clone()) for batch in loader.epoch()]
    again = [batch.image for batch in loader.epoch()]
    loader.close()
    for (image, copy), repeated in zip(kept, again, strict=True):
        assert image.device.type == "cuda"
        assert image.dtype == torch.bfloat16
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(image, copy), "a batch that is kept is not written over"
        assert torch.equal(image, repeated)


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_a_run_on_the_card(precision: str, tiny: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fastddr", "train", "--data", str(tiny), "--run-dir", "run", "--epochs", "2",
        "--batch-size", "8", "--image-size", "64", "--canvas", "80", "--convmixer.dim", "32", "--convmixer.depth", "2",
        "--tracking.no-wandb", "--tracking.no-tensorboard", "--precision", precision,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("memory/peak_allocated_gib", 0) > 0 for line in logged)
