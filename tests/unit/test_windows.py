"""Nine evaluation windows of a canvas: where they lie, that all are scored once, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tests_support import batches, task
from torch import Tensor, nn

from fastddr import loaders, sampling
from fastddr.config import AugmentConfig
from fastddr.data.manifest import Manifest
from fastddr.evaluation.evaluate import score
from fastddr.loaders import dali_decoder
from fastddr.loaders.base import Requests


def affines(requests: Requests) -> np.ndarray:
    """Of all photographs, in their order."""
    return np.concatenate([requests.at(k).affine for k in range(len(requests))])


@given(width=st.integers(64, 300), height=st.integers(64, 300))
def test_the_windows_reach_from_edge_to_edge(width: int, height: int) -> None:
    place = sampling.NINE
    maps = sampling.evaluation_maps(np.full(9, width), np.full(9, height), 64, AugmentConfig(), place)
    crops = sampling.as_crops(maps.affine, 64)
    assert crops.x.reshape(3, 3).tolist() == [[0, (width - 64) // 2, width - 64]] * 3
    assert crops.y.reshape(3, 3).T.tolist() == [[0, (height - 64) // 2, height - 64]] * 3
    middle = sampling.evaluation_maps(np.array([width]), np.array([height]), 64, AugmentConfig())
    assert (maps.affine[4] == middle.affine[0]).all(), "the fifth is the one that is scored without"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("each", [2, 5, 12])
def test_each_window_is_asked_for_once_on_any_number_of_ranks(mixed: Manifest, world: int, each: int) -> None:
    seen = []
    for rank in range(world):
        asked = task(mixed, "test", multi=True, batch_size=each * world, rank=rank, world=world)
        requests = asked.requests(0)
        assert len(requests) == asked.steps
        flat = zip(requests.id.ravel(), requests.valid.ravel(), affines(requests), strict=True)
        seen += [(int(id_), tuple(affine.ravel())) for id_, valid, affine in flat if valid]
    alone = task(mixed, "test", multi=True, batch_size=9).requests(0)
    flat = zip(alone.id.ravel(), affines(alone), strict=True)
    wanted = [(int(id_), tuple(affine.ravel())) for id_, affine in flat]
    assert sorted(seen) == sorted(wanted)
    assert len(wanted) == 9 * len(mixed.ids("test"))


def test_all_loaders_give_the_same_windows(mixed: Manifest) -> None:
    asked = task(mixed, "test", multi=True, batch_size=5)
    reference = batches("torchvision", asked)
    streamed = [("dali", "none")] if dali_decoder.installed() else []
    for name, store in (*streamed, ("resident", "none"), ("resident", "ram")):
        for one, other in zip(batches(name, replace(asked, store=store)), reference, strict=True):
            assert torch.equal(one.id, other.id)
            assert (one.image - other.image).abs().mean() < 0.02


class _Bright(nn.Module):
    """Two logits: the mean of the window, and none."""

    def forward(self, image: Tensor) -> Tensor:
        mean = image.mean((1, 2, 3))
        return torch.stack([mean, torch.zeros_like(mean)], 1)


class _Keeping(_Bright):
    """Keeps a weight while it is scored, as timm's LeViT does, until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.ones(())), {}

    def train(self, mode: bool = True) -> _Keeping:
        if mode:
            self.kept.clear()
        return super().train(mode)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * self.kept.setdefault("weight", self.weight.detach().clone())


def test_averaged_weights_are_scored_as_they_are_now(mixed: Manifest) -> None:
    model, loader = _Keeping().eval(), loaders.build("resident", task(mixed, "valid"))
    before, after = [
        score(Accelerator(cpu=True), model, loader, paths=mixed.path, weights="some").logits
        for weight in (1, 2)
        if model.weight.data.fill_(weight) is not None
    ]
    loader.close()
    assert not model.training
    torch.testing.assert_close(after, 2 * before)


def test_the_answer_is_the_mean_of_the_windows_probabilities(mixed: Manifest) -> None:
    found = {}
    for size in (9, 4):
        loader = loaders.build("resident", task(mixed, "test", multi=True, batch_size=size))
        found[size] = score(Accelerator(cpu=True), _Bright(), loader, paths=mixed.path, weights="some")
        loader.close()
    single = batches("resident", task(mixed, "test", multi=True, batch_size=9))
    wanted = torch.stack([_Bright()(batch.image).softmax(1).mean(0) for batch in single])
    for result in found.values():
        assert result.ids.tolist() == mixed.ids("test").tolist()
        torch.testing.assert_close(result.logits.softmax(1), wanted)
    assert torch.equal(found[9].grades, torch.as_tensor(mixed.grade[mixed.ids("test")]))
