"""What a step, mixing, scoring and the ring ask of a card, on one that is not there (`fake_card`)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_card import CUDA, Card
from fake_card import card as card  # a fixture of all these tests
from torch import nn

from fastddr import mixing, models, optimizers
from fastddr.config import AugmentConfig, Config
from fastddr.evaluation import grading, views
from fastddr.loaders import ring
from fastddr.memory.tracing import Steps, Training
from fastddr.watch import Watch


def network(outputs: int) -> nn.Module:
    shape = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 8}
    return models.build("convmixer", num_classes=outputs, image_size=16, **shape).to(CUDA)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("outputs", [5, 1])
def test_a_step_never_waits_and_mixes_no_devices(card: Card, precision: Any, optimizer: str, outputs: int) -> None:
    """Promise 5: the host queues a step and learns later what became of it."""
    model = network(outputs)
    steps = Steps(16, outputs, precision, optimizer, average=True, accumulated=True, mixed=True, recomputed=True)
    training = Training(model, steps, 4, ema=optimizers.make_ema(model))
    watch = Watch(CUDA)
    card.waits.clear()
    for number in range(2):
        training.step(number)
        watch.look(torch.zeros(4, dtype=torch.bool, device=CUDA), number, [])
    # PyTorch's fused SGD moves its flag to where the weights really are, which on a card is where it is.
    assert [wait for wait in card.waits if optimizer != "sgd" or wait != "to"] == []
    assert card.faults == []


def test_mixing_never_waits(card: Card) -> None:
    mix = mixing.Draws(replace(Config(), augment=AugmentConfig(mixup=0.2, cutmix=1.0)), 0, 4)
    image, grade = torch.zeros(4, 3, 16, 16, device=CUDA), torch.zeros(4, dtype=torch.int64, device=CUDA)
    for step in range(4):
        mixed, shares = mix(step, 0, image, grade)
        assert mixed.is_cuda
        assert shares.is_cuda
    assert card.waits == card.faults == []


def test_scoring_a_regression_never_waits(card: Card) -> None:
    """Its thresholds are numbers of the host, which a card needs for each batch."""
    model = views.averaged(grading.Graded(network(1), grading.Grading()), "dihedral").eval()
    card.waits.clear()
    with torch.no_grad():
        model(torch.zeros(2, 3, 16, 16, device=CUDA))
    assert card.waits == card.faults == []


RING = Path(ring.__file__).read_text()
#: Its lines that order a copy with what is before or behind it.
ORDERS = re.findall(r"^ +(.*\.(?:synchronize|wait_stream|wait_event|record)\(.*\))$", RING, re.MULTILINE)


@pytest.mark.parametrize("without", [None, *ORDERS])
def test_the_ring_needs_each_of_its_orders_and_no_more(card: Card, without: str | None) -> None:
    assert ORDERS
    broken: dict[str, Any] = {"__name__": "ring"}
    exec(RING.replace(without or "no such line", "pass"), broken)
    slots = broken["Ring"](CUDA)
    for number, size in enumerate((64, 80, 64, 200, 100, 64, 300, 64, 64, 500, 64, 64, 64)):
        with slots.slot(size) as slot:
            slot.host[:size].fill_(number)
            assert (slots.send(slot, size).float() * 2).is_cuda
    assert bool(card.faults) == (without is not None)
