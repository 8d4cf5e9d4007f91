"""Heat maps: the layer that is looked at, what a map is, and that it points at lesions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastddr import models
from fastddr.config import AugmentConfig
from fastddr.data import synthetic
from fastddr.errors import UserError
from fastddr.evaluation import explain

pytest.importorskip("captum")

SMALL = {
    "convmixer": {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 8},
    "cnn": {"blocks": 2, "width": 4},
    "resnet": {"depth": 10, "width": 16},
}
#: What stands before pooling and the head.
LAST = {"convmixer": "layers", "cnn": "packages", "resnet": "layer4"}


@pytest.mark.parametrize("name", [*SMALL, "timm:resnet18", "timm:convnext_atto"])
def test_the_last_map_is_found_and_explained(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = models.build(name, num_classes=5, image_size=64, **SMALL.get(name, {})).eval()
    image = torch.randn(2, 3, 64, 64)
    layer = explain.last_map(model, image)
    if name in LAST:
        assert layer is dict(model.named_modules())[LAST[name]]
    maps = explain.heat(model, layer, image, torch.tensor([1, 3]))
    assert maps.shape == (2, 64, 64)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing is left of the gradients"


def test_a_model_without_maps_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    with pytest.raises(UserError, match="no layer of this model gives maps"):
        explain.last_map(model, torch.randn(1, 3, 8, 8))


class _Tokens(nn.Module):
    """Rows of a map (b, d, h, w) as tokens (b, n, d), with channels last (b, h, w, d), or as attention between tokens,
    with its heads folded into the batch or not."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        tokens = maps.flatten(2).transpose(1, 2)
        heads = tokens.unflatten(2, (2, -1)).transpose(1, 2)
        found: dict[str, Callable[[], torch.Tensor]] = {
            "tokens": lambda: tokens,
            "channels last": lambda: maps.permute(0, 2, 3, 1),
            "attention": lambda: heads @ heads.transpose(2, 3),
            "heads in the batch": lambda: (heads @ heads.transpose(2, 3)).flatten(0, 1)[:, None],
        }
        return found[self.what]()


class _Mixed(nn.Module):
    """A patch embedding, something that is no map of the image, perhaps a map again, and a head."""

    def __init__(self, *whats: str, again: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)
        self.mixed = nn.ModuleList(_Tokens(what) for what in whats)
        self.again = nn.Conv2d(6, 6, 1) if again else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.embedding(image)
        for part in self.mixed:
            maps = maps + 1e-3 * part(maps).mean()
        return self.head((maps if self.again is None else self.again(maps)).mean((2, 3)))


@pytest.mark.parametrize(
    "whats", [("tokens",), ("channels last",), ("attention", "tokens"), ("tokens", "heads in the batch")]
)
def test_maps_that_became_tokens_are_no_maps(whats: tuple[str, ...]) -> None:
    """As in ViT, Swin, CaiT and MViT; a hybrid makes a map of its tokens again."""
    image = torch.randn(2, 3, 16, 16)
    with pytest.raises(UserError, match="no layer of this model gives maps"):
        explain.last_map(_Mixed(*whats, again=False), image[:1])
    hybrid = _Mixed(*whats, again=True)
    assert explain.last_map(hybrid, image[:1]) is hybrid.again


def test_a_layer_that_gives_other_maps_than_one_an_image_is_refused() -> None:
    model = _Mixed("heads in the batch", again=False)
    with pytest.raises(UserError, match="no layer of this model gives maps"):
        explain.heat(model, model.mixed[0], torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))


class _Corner(nn.Module):
    """Grade 1 where the upper right corner is bright; what is everywhere speaks for all grades."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[:, :, None, None])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        red, green = self.map(image).mean((2, 3)).unbind(1)
        return torch.stack([10 * green, 10 * green + red], 1)


def test_a_map_lies_on_what_speaks_for_the_grade() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[0, 1] = 1
    image[0, 0, 1, 6] = 1
    model = _Corner()
    found = explain.heat(model, model.map, image, torch.tensor([1]))[0]
    assert (found.argmax() // 8, found.argmax() % 8) == (1, 6)
    assert found.sum() == pytest.approx(float(found[1, 6])), "green speaks for both grades, and so for none"


def test_an_overlay_shows_the_photograph_and_the_map() -> None:
    photograph = np.full((32, 32, 3), 100, np.uint8)
    heat = np.zeros((32, 32), np.float32)
    heat[4:8, 20:24] = 1
    sheet = np.asarray(explain.overlay(photograph, heat, "2 Moderate NPDR"))
    side = (sheet.shape[1] - 4) // 2
    assert side >= 224
    left, right = sheet[:side, :side], sheet[:side, side + 4 :]
    assert (left == 100).all()
    factor = side // 32
    changed = (right != 100).any(2)
    assert changed[4 * factor : 8 * factor, 20 * factor : 24 * factor].all()
    assert changed.sum() == (4 * factor) ** 2
    image = (torch.full((1, 3, 2, 2), 100 / 255) - torch.tensor(AugmentConfig().mean).view(3, 1, 1)) / torch.tensor(
        AugmentConfig().std
    ).view(3, 1, 1)
    assert (explain.pixels(image, AugmentConfig()) == 100).all()


@pytest.mark.slow
def test_maps_point_at_the_lesions() -> None:
    """The pointing game (Zhang et al., "Top-down neural attention by excitation backprop", 2016): how often the
    strongest place of a map lies on a lesion. Trained on pairs of one eye, once with the signs of grade 3 and once
    without, so that nothing but the signs tells the grades apart."""
    before, size = torch.get_num_threads(), 128
    torch.set_num_threads(1)  # several wait for each other where anything else uses the cores
    try:
        torch.manual_seed(0)
        eyes = [synthetic.render(0, "train", k, grade, size)[0] for k, grade in itertools.product(range(48), (0, 3))]
        images = _normalised(eyes)
        truth = torch.tensor([0, 3]).repeat(48)
        model = models.build("convmixer", num_classes=5, image_size=size, dim=32, depth=2, kernel_size=5, patch_size=4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        steps = 25 * 6
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
        for step in range(steps):
            if step % 6 == 0:
                order = torch.randperm(96)
            batch = order[16 * (step % 6) :][:16]
            seen = images[batch].flip(-1) if step % 2 else images[batch]
            loss = F.cross_entropy(model(seen.contiguous(memory_format=torch.channels_last)), truth[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        tests = [synthetic.render(0, "test", k, 3, size) for k in range(50)]
        held_out = _normalised([pixels for pixels, _ in tests])
        grade = torch.full((50,), 3)
        maps = explain.heat(model, explain.last_map(model, held_out[:1]), held_out, grade).numpy()
    finally:
        torch.set_num_threads(before)
    hits, chance = [], []
    rows, columns = np.mgrid[:size, :size] + 0.5
    for (pixels, lesions), found in zip(tests, maps, strict=True):
        on = np.zeros((size, size), bool)
        for lesion in lesions:
            # Half a patch more, since a map knows no smaller place.
            on |= (columns - lesion.x) ** 2 + (rows - lesion.y) ** 2 <= (lesion.radius + 2) ** 2
        hits.append(on[np.unravel_index(found.argmax(), found.shape)])
        chance.append(on.sum() / (pixels.sum(2) > 60).sum())
    assert np.mean(chance) < 0.35
    # By chance 50 photographs would reach this once in 10,000 times (binomial, p = 0.3).
    assert np.mean(hits) >= 0.5, (np.mean(hits), np.mean(chance))


def _normalised(pixels: list[np.ndarray]) -> torch.Tensor:
    mean, std = (torch.tensor(values) for values in (AugmentConfig().mean, AugmentConfig().std))
    images = (torch.from_numpy(np.stack(pixels)) / 255 - mean) / std
    return images.permute(0, 3, 1, 2)
