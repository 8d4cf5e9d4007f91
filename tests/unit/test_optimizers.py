"""Optimizers, learning rate and averaged weights against their recurrences by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastddr import optimizers
from fastddr.config import Config, OptimizerConfig
from fastddr.errors import UserError


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizers.build(model, name, lr=0.1, weight_decay=0.5)
    step(model, optimizer, 0.0)  # without a gradient decay is all that moves a weight
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == {"0.weight", "3.weight"}


def test_what_a_model_names_is_not_decayed() -> None:
    """As timm's transformers name their positions, which have more than one dimension, some by a pattern."""

    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed, self.weight = nn.Parameter(torch.ones(1, 4, 2)), nn.Parameter(torch.ones(2, 2))
            self.pos = nn.Linear(2, 2, bias=False)

        def no_weight_decay(self) -> set[str]:
            return {"pos_embed", "pos.*"}

    model = Positioned()
    before = model.pos.weight.clone()
    step(model, optimizers.build(model, "adamw", lr=0.1, weight_decay=0.5), 0.0)
    assert torch.equal(model.pos_embed, torch.ones(1, 4, 2))
    assert torch.equal(model.pos.weight, before)
    assert not torch.equal(model.weight, torch.ones(2, 2))


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    model = tiny()
    model[0].requires_grad_(False)
    optimizer = optimizers.build(model, "adam", lr=0.1)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == 4
    assert {id(parameter) for parameter in held} == {id(p) for p in model[1:].parameters()}


def test_adamw_step_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    weight = model.weight.item()
    optimizer = optimizers.build(model, "adamw", lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    first = second = 0.0
    for t, gradient in enumerate([2.0, -1.0, 0.5], start=1):
        step(model, optimizer, gradient)
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        weight -= 0.1 * 0.5 * weight
        weight -= 0.1 * (first / (1 - 0.8**t)) / (math.sqrt(second / (1 - 0.9**t)) + 1e-8)
    assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_adam_decay_is_part_of_the_gradient() -> None:
    model = nn.Linear(1, 1, bias=False)
    weight = model.weight.item()
    step(model, optimizers.build(model, "adam", lr=0.1, weight_decay=3.0), 0.0)
    assert model.weight.item() == pytest.approx(weight - math.copysign(0.1, weight), rel=1e-5)


def test_sgd_is_nesterovs() -> None:
    model = nn.Linear(1, 1, bias=False)
    weight, velocity = model.weight.item(), 0.0
    optimizer = optimizers.build(model, "sgd", lr=0.1, weight_decay=0.5, momentum=0.7)
    for gradient in [2.0, -1.0, 0.5]:
        step(model, optimizer, gradient)
        slope = gradient + 0.5 * weight
        velocity = 0.7 * velocity + slope
        weight -= 0.1 * (slope + 0.7 * velocity)
    assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_sgd_without_momentum() -> None:
    model = nn.Linear(1, 1, bias=False)
    weight = model.weight.item()
    optimizer = optimizers.build(model, "sgd", lr=0.1, momentum=0.0)
    step(model, optimizer, 2.0)
    assert model.weight.item() == pytest.approx(weight - 0.2, rel=1e-5)


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="no weight"):
        optimizers.build(tiny().requires_grad_(False), lr=0.1)


# --- learning rate


@given(total=st.integers(1, 200), share=st.floats(0, 0.99), schedule=st.sampled_from(["constant", "cosine"]))
def test_lr_rises_in_a_line_then_never_rises(total: int, share: float, schedule: str) -> None:
    warmup = int(share * total)
    factors = [optimizers.lr_factor(s, total, warmup, schedule) for s in range(total)]
    line = [*factors[: warmup + 1]]
    assert line == pytest.approx([(s + 1) / (warmup + 1) for s in range(warmup + 1)])
    assert line[-1] == 1
    assert all(later <= earlier for earlier, later in pairwise(factors[warmup:]))
    assert all(0 < factor <= 1 for factor in factors)


def test_cosine_ends_at_zero_and_constant_does_not() -> None:
    assert optimizers.lr_factor(999, 1000, 10, "cosine") < 1e-5
    assert optimizers.lr_factor(1000, 1000, 10, "cosine") == optimizers.lr_factor(5000, 1000, 10, "cosine") == 0
    assert optimizers.lr_factor(505, 1000, 10, "cosine") == pytest.approx(0.5)
    assert optimizers.lr_factor(257, 1000, 10, "cosine") > 0.8  # a straight line would be at 0.75
    assert optimizers.lr_factor(999, 1000, 10, "constant") == 1


def test_set_lr_reaches_every_group() -> None:
    optimizer = optimizers.build(tiny(), "sgd", lr=0.1)
    optimizers.set_lr(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


# --- averaged weights


def tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(model.parameters(), model.buffers())]


def test_ema_is_the_recurrence_by_hand() -> None:
    model = tiny()
    ema = optimizers.make_ema(model)
    by_hand = [tensor.double() for tensor in tensors(model)]
    for t in range(6):
        with torch.no_grad():
            for tensor in tensors(model):
                tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)
        optimizers.update_ema(ema, model, t, 0.3)
        d = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3][t]  # (1 + t) / (10 + t) passes 0.3 at t = 3
        by_hand = [d * mean + (1 - d) * now for mean, now in zip(by_hand, tensors(model), strict=True)]
    for mean, expected, now in zip(tensors(ema), by_hand, tensors(model), strict=True):
        if mean.is_floating_point():
            torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert mean.item() == now.item() == 6


def test_ema_is_a_separate_model_that_takes_no_gradient() -> None:
    model = tiny().to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    ema = optimizers.make_ema(model)
    assert not ema.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert ema[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ema[0].weight.zero_()
    assert torch.equal(model[0].weight, before["0.weight"])


def test_ema_follows_a_wrapped_model() -> None:
    model = tiny()
    ema = optimizers.make_ema(model)
    wrapped = nn.ModuleDict({"module": model})  # as DDP and torch.compile wrap it: one name further down
    with torch.no_grad():
        model[3].bias.fill_(7.0)
    start = ema[3].bias.clone()
    optimizers.update_ema(ema, wrapped, 0, 0.9)
    torch.testing.assert_close(ema[3].bias, 0.1 * start + 0.9 * model[3].bias)


def test_ema_update_reads_nothing_back_to_the_host() -> None:
    model = tiny().to("meta")  # a meta tensor has no value: any read of one raises
    ema = optimizers.make_ema(model)
    optimizers.update_ema(ema, model, 0, 0.9)


def test_averages_stay_where_a_step_was_left_out() -> None:
    model = tiny()
    ema = optimizers.make_ema(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = copy.deepcopy(ema.state_dict())
    optimizers.update_ema(ema, model, 5, 0.9, skip=torch.tensor(True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.state_dict().items())
    other = copy.deepcopy(ema)
    optimizers.update_ema(ema, model, 5, 0.9, skip=torch.tensor(False))
    optimizers.update_ema(other, model, 5, 0.9)
    assert not torch.equal(ema[0].weight, before["0.weight"])
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), other.parameters(), strict=True))
    # As on a GPU, where the host does not look.
    optimizers.update_ema(other, model, 5, 0.9, skip=torch.tensor(True), asks=False)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), other.parameters(), strict=True))
    optimizers.update_ema(ema, model, 6, 0.9)
    optimizers.update_ema(other, model, 6, 0.9, skip=torch.tensor(False), asks=False)
    for a, b in zip(ema.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_optimizer_and_the_factor_of_a_configuration() -> None:
    chosen = OptimizerConfig(name="sgd", weight_decay=0.1, momentum=0.5, schedule="cosine", warmup_ratio=0.5)
    [group, _] = optimizers.from_config(tiny(), Config(lr=0.2, optimizer=chosen)).param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.2, 0.1, 0.5, True)
    factors = [optimizers.planned_factor(chosen, step, 10) for step in range(10)]
    assert factors == [optimizers.lr_factor(step, 10, 5, "cosine") for step in range(10)]
    assert optimizers.planned_factor(replace(chosen, warmup_ratio=0.99), 0, 1) == 1, "one step is left"
