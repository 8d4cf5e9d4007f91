"""What needs a card of the benchmark of loaders: peers that send or decode there, and how long a step waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import needs_dali
from tests_support import first_batch, task

from fastddr.data import manifest
from fastddr.loaders import dali_decoder

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
@pytest.mark.parametrize("name", ["torch-pil", "torch-decode-jpeg", "spdl-decode-jpeg", "torchvision-gpu"])
def test_peers_give_normalised_batches_on_the_card(name: str, load: Callable[[str], Any], tiny: Path) -> None:
    wanted = task(manifest.read(tiny), device=CARD, threads=1, batch_size=4, image_size=32)
    images = first_batch(load("peers").PEERS[name], wanted)
    assert (images.shape, images.dtype, images.device) == ((4, 3, 32, 32), torch.float32, CARD)
    # From black to white, in ImageNet's normalisation.
    assert -2.2 < images.min() < 0 < images.max() < 2.7


@needs_dali
def test_a_plain_dali_pipeline_gives_batches_on_the_card(load: Callable[[str], Any], tiny: Path) -> None:
    """In a process of its own, as the benchmark has it: some builds of nvImageCodec crash at a part of a photograph."""
    trials = load("trials")
    wanted = task(manifest.read(tiny), device=CARD, threads=1, batch_size=4, image_size=32)
    try:
        trial = trials.Trial(trials.Spec("dali-plain"), wanted)
        try:
            trial.warm()
        finally:
            trial.close()
    except RuntimeError as problem:  # as `Halted` says it
        if "has died" in str(problem):
            pytest.skip(f"nvImageCodec {', '.join(dali_decoder.codecs())} crashes at it")
        raise
    assert trial.warmth.vram


@pytest.mark.alone
@needs_dali
def test_a_model_that_takes_its_time_is_no_waiting_for_data(
    load: Callable[[str], Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parts of many steps, in which a loader holds the host back."""
    waiting, trials = load("waiting"), load("trials")
    step = waiting.training_step

    def slow(*arguments: Any) -> torch.Tensor:
        torch.cuda._sleep(10**8)  # some twentieth of a second
        found: torch.Tensor = step(*arguments)
        return found

    monkeypatch.setattr(waiting, "training_step", slow)
    found = manifest.read(tiny)
    wanted = task(found, device=CARD, batch_size=2, image_size=32, ids=found.ids("train")[:24])
    row = waiting.share(trials.Spec("dali"), wanted, (8, 1, 3, 8), 100)
    assert row["median"] < 20
