"""Models of one's own, registered with timm: built and traced without values where that can be, and told where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddr import __main__ as command
from fastddr import models
from fastddr.config import Config, from_mapping
from fastddr.memory import fitting, predicting
from fastddr.memory.predicting import Case, tape_of
from fastddr.models import weights

timm = pytest.importorskip("timm")

Registers = Callable[[Callable[[], nn.Module]], str]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registers:
    """Gives a model to timm as `timm:own`, and the caches of a process that knows it alone."""
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "cache"))

    def registered(make: Callable[[], nn.Module]) -> str:
        def own(pretrained: bool = False, num_classes: int = 5, **_: Any) -> nn.Module:
            return make()

        entries = timm.models._registry
        monkeypatch.setitem(entries._model_entrypoints, "own", own)
        for cached in (predicting._traced, predicting._built):
            cached.cache_clear()
        predicting._apart.clear()
        return "timm:own"

    return registered


def config(model: str, **changes: Any) -> Config:
    tree = {"model": model, "batch_size": 8, "image_size": 32, "canvas": 32, "precision": "fp32"}
    return from_mapping(tree | changes, "test")


class Net(nn.Module):
    """Small; `width` channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.classify = nn.Conv2d(3, width, 4, stride=4), nn.Linear(width, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.stem(image).relu().mean((2, 3)))


class Rates(Net):
    """Asks for values while it is built, as Swin and MAE do for their rates of stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]


class Dropping(Net):
    """Asks for a value in each step in training."""

    def forward(self, image: Tensor) -> Tensor:
        if self.training and torch.rand(1) < 0.5:
            return super().forward(image)
        return super().forward(image.flip(3))


class Constant(Net):
    """Has a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image * self.scale)


def test_a_model_that_asks_for_values_while_it_is_built_is_traced(register: Registers) -> None:
    before = torch.get_rng_state()
    rates = tape_of(Case(config(register(Rates)), 8))
    assert torch.equal(torch.get_rng_state(), before), "the run's own weights come from it"
    assert rates == tape_of(Case(config(register(Net)), 8))


@pytest.mark.parametrize("model", [Dropping, Constant])
def test_a_step_that_needs_values_is_told_and_no_traceback(
    model: type[Net], register: Registers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = register(model)
    assert command.main(["plan", "--vram", "8", "--model", name, "--image-size", "32"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("fastddr: --model timm:own: its memory cannot be predicted (its step cannot be traced")
    # A training goes on without a prediction.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X 9")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**34))
    monkeypatch.setattr(fitting, "numerics", lambda deterministic, cpu: None)
    for micro in ("auto", 8):
        found = fitting.settle(config(name, micro_batch_size=micro), torch.device("cuda", 0), 1)
        assert found.config.micro_batch_size == micro
        assert found.own is None
        [line] = found.said
        assert line.startswith("memory is not predicted: its step cannot be traced without values")


def test_an_edited_model_has_another_tape(register: Registers, tmp_path: Path) -> None:
    narrow, wide = (tape_of(Case(config(register(lambda width=width: Net(width))), 8)) for width in (8, 16))
    assert narrow.peak(8).held < wide.peak(8).held
    assert not list((tmp_path / "cache").rglob("*.json")), "its code may be another tomorrow"
    tape_of(Case(config("timm:test_resnet", image_size=64, canvas=64), 8))
    assert json.loads(next((tmp_path / "cache").rglob("*.json")).read_text()), "timm's own are of its version"


class Scaled(nn.Linear):
    def forward(self, values: Tensor, by: float) -> Tensor:
        return by * super().forward(values)


class Called(Net):
    """What is called `head` and `fc` here is no layer that needs one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Scaled(8, 5)

    def head(self, values: Tensor) -> Tensor:
        return self.fc(values, 0.5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stem(image).mean((2, 3)))


class Headed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stem(image).mean((2, 3)))


class Pooled(Net):
    """A head of timm's: `pre_logits`, a second argument, has a default."""

    def __init__(self, pre_logits: bool | None = None) -> None:
        super().__init__()
        self.head = timm.layers.ClassifierHead(8, 5)
        self.more = {} if pre_logits is None else {"pre_logits": pre_logits}

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stem(image), **self.more)


class Joined(Net):
    """A head that takes several tensors as one list."""

    class Head(nn.Linear):
        def forward(self, values: list[Tensor]) -> Tensor:
            return super().forward(torch.cat(values, 1))

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        values = self.stem(image).mean((2, 3))
        return self.head([values, values])


class Skipping(Net):
    """A head that may be given a second tensor, and is."""

    class Head(nn.Linear):
        def forward(self, values: Tensor, more: Tensor | None = None) -> Tensor:
            return super().forward(values if more is None else torch.cat((values, more), 1))

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        values = self.stem(image).mean((2, 3))
        return self.head(values, values)


class Named(Net):
    """A head whose argument is given by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(input=self.stem(image).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (Called, torch.bfloat16),
        (Headed, torch.float32),
        (Pooled, torch.float32),
        (partial(Pooled, pre_logits=False), torch.float32),
        (Joined, torch.bfloat16),
        (Skipping, torch.bfloat16),
        (Named, torch.float32),
    ],
)
def test_a_head_is_a_layer_that_needs_one_argument(
    model: Callable[[], Net], kind: torch.dtype, register: Registers
) -> None:
    built = models.build(register(model), num_classes=5, image_size=32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = built(torch.randn(2, 3, 32, 32))
    assert logits.dtype == kind
    assert bool(weights.heads(built)) == (model is not Called), "as before it was built"
