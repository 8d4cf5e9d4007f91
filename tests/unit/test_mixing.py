"""Mixing: what torchvision does to a micro batch, drawn from (seed, step, microstep, rank) and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tests_support import settings

from fastddr import losses, mixing, runtime
from fastddr.config import AugmentConfig, Config
from fastddr.errors import UserError
from fastddr.loaders import Batch
from fastddr.step import Tally, training_step
from fastddr.trainer import Trainer


class Dropping(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(image, 0.5, self.training)


@pytest.mark.parametrize("kind", [{}, {"mixup": 0.4}])
def test_layers_that_draw_draw_by_step_micro_batch_and_rank(kind: dict[str, float]) -> None:
    """Whatever was drawn before: a run that goes on must draw as one that was never stopped."""
    config = replace(Config(), model="timm:swin_tiny", augment=replace(AugmentConfig(), **kind))
    assert not mixing.Draws(replace(config, model="convmixer"), 0, 4).layers
    image, grade = torch.ones(4, 3, 8, 8), torch.arange(4)

    def dropped(step: int, microstep: int, rank: int) -> torch.Tensor:
        mixed, target = mixing.Draws(config, rank, 4)(step, microstep, image, grade)
        assert torch.equal(mixed, image)
        assert target.shape == ((4, config.num_classes) if kind else (4,))
        return Dropping()(mixed)

    first = dropped(3, 1, 0)
    torch.manual_seed(99)
    assert torch.equal(dropped(3, 1, 0), first)
    for other in ((4, 1, 0), (3, 0, 0), (3, 1, 1)):
        assert not torch.equal(dropped(*other), first)


KINDS = [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]


def mixer(kind: dict[str, float], classes: int = 5, seed: int = 3, rank: int = 0) -> mixing.Draws:
    ungradable: Any = "class" if classes == 6 else "exclude"
    config = replace(Config(), augment=replace(AugmentConfig(), **kind), ungradable=ungradable, seed=seed)
    return mixing.Draws(config, rank, 6)


def photographs(n: int = 6, side: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Photograph i is i + 1 everywhere, but for channels: channel c is 100 × c more."""
    values = torch.arange(1.0, n + 1)[:, None, None, None] + 100 * torch.arange(3)[None, :, None, None]
    return values.expand(n, 3, side, side).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 6])
def test_shapes_and_shares(kind: dict[str, float], dtype: torch.dtype, classes: int) -> None:
    grade = torch.tensor([0, 1, 2, 3, 4, classes - 1])
    for step in range(10):
        image = photographs(dtype=dtype)
        mixed, target = mixer(kind, classes=classes)(step, 0, image, grade)
        assert mixed.shape == image.shape
        assert mixed.dtype == dtype
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert target.shape == (6, classes)
        assert target.dtype == torch.float32
        assert torch.allclose(target.sum(1), torch.ones(6))
        assert (target >= 0).all()
        # Each is mixed with one other, in one share for all.
        own = target[torch.arange(6), grade]
        partner = target[torch.arange(6), grade.roll(1)]
        different = grade != grade.roll(1)
        assert torch.allclose((own + partner)[different], torch.ones(int(different.sum())))
        assert torch.allclose(own[different], own[different][0].expand(int(different.sum())))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_images_stay_channels_last_where_roll_does_not_keep_the_layout(
    kind: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    grade = torch.tensor([0, 1, 2, 3, 4, 4])
    wanted = mixer(kind)(0, 0, photographs(), grade)[0]
    roll = torch.Tensor.roll
    monkeypatch.setattr(torch.Tensor, "roll", lambda self, *args: roll(self, *args).contiguous())
    mixed = mixer(kind)(0, 0, photographs(), grade)[0]
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed, wanted)


def test_mixup_blends_photographs_in_the_shares_of_their_grades() -> None:
    image, grade = photographs(5), torch.arange(5)
    for step in range(20):
        mixed, target = mixer({"mixup": 1.0})(step, 0, image, grade)
        expected = torch.einsum("ij,jchw->ichw", target, image)
        assert torch.allclose(mixed, expected, atol=1e-4)


def test_cutmix_pastes_one_box_in_the_share_of_its_area() -> None:
    image, grade = photographs(5), torch.arange(5)
    areas = []
    for step in range(20):
        mixed, target = mixer({"cutmix": 1.0})(step, 0, image, grade)
        pasted = mixed == image.roll(1, 0)
        assert (pasted | (mixed == image)).all()
        assert (pasted == pasted[:1, :1]).all(), "the same box in all photographs and channels"
        box = pasted[0, 0]
        areas.append(box.float().mean().item())
        assert box.sum() == box.any(0).sum() * box.any(1).sum(), "a box"
        assert target[grade, grade].tolist() == pytest.approx([1 - areas[-1]] * 5)
    assert max(areas) > 0.3
    assert min(areas) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_a_function_of_seed_step_microstep_and_rank(kind: dict[str, float]) -> None:
    image, grade = photographs(), torch.tensor([0, 1, 2, 3, 4, 4])

    def shares(seed: int, step: int, microstep: int, rank: int) -> bytes:
        mixed, target = mixer(kind, seed=seed, rank=rank)(step, microstep, image, grade)
        return mixed.numpy().tobytes() + target.numpy().tobytes()

    base = (3, 7, 1, 2)
    assert shares(*base) == shares(*base)
    others = {shares(3, 8, 1, 2), shares(3, 7, 2, 2), shares(3, 7, 1, 3), shares(4, 7, 1, 2), shares(2**62, 7, 1, 2)}
    # The same numbers in other places.
    others |= {shares(7, 3, 1, 2), shares(3, 7, 2, 1), shares(3, 1, 7, 2), shares(2, 7, 1, 3)}
    assert len(others | {shares(*base)}) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generators_and_the_batch_are_left_alone(
    kind: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even asked to seed: `torch.manual_seed` would seed the GPUs' generators too."""
    image, grade = photographs(), torch.tensor([0, 1, 2, 3, 4, 4])
    image_before, grade_before = image.clone(), grade.clone()
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every GPU"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    one = mixer(kind)(5, 0, image, grade)
    assert (torch.random.get_rng_state() == state).all()
    torch.random.default_generator.manual_seed(12)
    other = mixer(kind)(5, 0, image, grade)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert torch.equal(image, image_before)
    assert torch.equal(grade, grade_before)


def test_shares_follow_their_distribution_and_the_coin_is_fair() -> None:
    image, grade = photographs(2, side=32), torch.tensor([0, 1])

    def shares(kind: dict[str, float], n: int = 600) -> torch.Tensor:
        one = mixer(kind)
        return torch.stack([one(step, 0, image, grade)[1][0, 0] for step in range(n)])

    uniform = shares({"mixup": 1.0})
    assert torch.histc(uniform, 4, 0, 1).tolist() == pytest.approx([150] * 4, abs=45)
    narrow = shares({"mixup": 50.0})
    assert narrow.mean().item() == pytest.approx(0.5, abs=0.01)
    # The variance of Beta(a, a) is 1 / (4 (2a + 1)).
    assert narrow.var().item() == pytest.approx(1 / 404, rel=0.2)
    both, blended = mixer({"mixup": 50.0, "cutmix": 50.0}), 0
    for step in range(600):
        mixed, _ = both(step, 0, image, grade)
        blended += bool(((mixed != image) & (mixed != image.roll(1, 0))).any())
    assert blended / 600 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_on_the_device_is_asked_for(kind: dict[str, float]) -> None:
    """On the meta device there are no values, so whatever waits for one fails."""
    image, grade = photographs(8).to("meta"), torch.zeros(8, dtype=torch.int64, device="meta")
    for step in range(4):
        mixed, target = mixer(kind)(step, 0, image, grade)
        assert (mixed.device.type, target.device.type) == ("meta", "meta")


def test_a_mixer_is_built_where_it_is_asked_for() -> None:
    plain = Config()
    batch = photographs(), torch.tensor([0, 1, 2, 3, 4, 5])
    state = torch.random.get_rng_state()
    found = mixing.Draws(plain, 0, 1)(0, 0, *batch)
    assert found[0] is batch[0]
    assert found[1] is batch[1]
    assert (torch.random.get_rng_state() == state).all()
    for kind in KINDS:
        config = replace(plain, augment=replace(plain.augment, **kind), ungradable="class", seed=9)
        with pytest.raises(UserError, match=r"one at a time; give a --batch-size .* of at least 2 for each rank"):
            mixing.Draws(config, 0, 1)
        found = mixing.Draws(config, 2, 4)(1, 0, *batch)
        wanted = mixer(kind, classes=6, seed=9, rank=2)(1, 0, *batch)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


# ---------------------------------------------------------------------------------------------- in the training step


def _batches(n: int = 2) -> list[Batch]:
    pick = torch.Generator().manual_seed(0)
    return [
        Batch(
            image=torch.randn(4, 3, 8, 8, generator=pick).contiguous(memory_format=torch.channels_last),
            grade=torch.tensor([0, 1, 2, 4]),
            id=torch.arange(4),
            valid=torch.ones(4, dtype=torch.bool),
        )
        for _ in range(n)
    ]


def _model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))


def _trained(*mixes: Any) -> tuple[torch.Tensor, Tally]:
    """The weights after a step with each of these mixers, and the tally of all."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    bare = _model()
    model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    criterion, tally = losses.CrossEntropy(label_smoothing=0.1), Tally.zeros(torch.device("cpu"))
    for mix in mixes:
        training_step(accelerator, model, _batches(), criterion, optimizer, tally, 1.0, mix)
    return bare[1].weight.detach(), tally


def test_a_step_mixes_every_micro_batch_and_off_is_off() -> None:
    seen = []

    def watched(microstep: int, image: torch.Tensor, grade: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(microstep)
        return image, torch.eye(5)[grade]

    plain, tally = _trained(None)
    same, same_tally = _trained(watched)
    assert seen == [0, 1]
    assert torch.allclose(plain, same, atol=1e-6), "whole shares are grades"
    assert same_tally.stack().tolist() == pytest.approx(tally.stack().tolist())
    assert tally.count == 8
    mixed, _ = _trained(partial(mixer({"mixup": 1.0}), 0))
    assert not torch.allclose(plain, mixed, atol=1e-3)


def test_the_model_sees_mixed_photographs_and_the_loss_their_shares() -> None:
    mix, model = partial(mixer({"mixup": 1.0, "cutmix": 1.0}), 5), _model()
    total = torch.zeros(())
    for microstep, batch in enumerate(_batches()):
        image, target = mix(microstep, batch.image, batch.grade)
        total = total + losses.CrossEntropy(label_smoothing=0.1)(model(image), target) / 2
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    found, tally = _trained(mix)
    assert torch.allclose(found, model[1].weight.detach(), atol=1e-6)
    assert (tally.loss / tally.count).item() == pytest.approx(total.item(), rel=1e-5)


def test_a_step_mixes_the_same_when_it_comes_again() -> None:
    one = mixer({"mixup": 0.5, "cutmix": 0.5})
    through, _ = _trained(*(partial(one, step) for step in range(4)))
    torch.rand(7)
    again, _ = _trained(*(partial(mixer({"mixup": 0.5, "cutmix": 0.5}), step) for step in range(4)))
    assert torch.equal(through, again)
    shifted, _ = _trained(*(partial(one, step) for step in range(1, 5)))
    assert not torch.equal(through, shifted)


@given(st.floats(0.51, 1.0))
def test_of_a_mixed_photograph_the_larger_share_is_right(share: float) -> None:
    tally = Tally.zeros(torch.device("cpu"))
    target = torch.eye(5)[[0, 1, 2]] * share + torch.eye(5)[[3, 3, 3]] * (1 - share)
    tally.add(torch.tensor(2.0), 10 * torch.eye(5)[[0, 3, 2]], target, torch.tensor(True))
    assert tally.stack().tolist() == [6.0, 2.0, 3.0, 3.0]
    tally.add(torch.tensor(1.0), 10 * torch.eye(5)[[0, 3, 2]], torch.tensor([0, 1, 2]), torch.tensor(True))
    assert tally.stack().tolist() == [9.0, 4.0, 6.0, 6.0]


# ---------------------------------------------------------------------------------------------- in a run


def test_one_photograph_at_a_time_is_a_mistake_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "divide_batch", lambda *_: (1, 1))  # as on eight ranks
    with (
        pytest.raises(UserError, match="one at a time"),
        Trainer(settings(tiny, tmp_path / "run", "--augment.mixup", "1")),
    ):
        pass
    assert not (tmp_path / "run").exists()
