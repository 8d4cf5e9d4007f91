"""The normalisation of a batch on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import needs_dali

from fastddr.config import AugmentConfig
from fastddr.loaders.normaliser import Normaliser

POLICY = AugmentConfig(mean=(0.41, 0.25, 0.13), std=(0.29, 0.21, 0.17))


def levels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 300))
def test_each_value_is_its_own_with_any_threads(b: int, h: int, w: int) -> None:
    """In pieces of one thread or all at once, from uint8 or float32: the same bits."""
    images = levels(b, h, w)
    few, many = (Normaliser(POLICY, threads)(images) for threads in (1, 64))
    assert torch.equal(few, many)
    assert torch.equal(few, Normaliser(POLICY, 2)(images.float()))
    wanted = (images.double() / 255 - torch.tensor(POLICY.mean).double()) / torch.tensor(POLICY.std).double()
    torch.testing.assert_close(few.double(), wanted, atol=2e-6, rtol=0)


@needs_dali
def test_its_bits_are_those_of_dali() -> None:
    """A resident loader, whose windows DALI normalises, gives the same batches."""
    from nvidia.dali import Pipeline, fn, types

    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 7, 3).contiguous()
    pipeline = Pipeline(len(images), 1, None, exec_dynamic=True)
    with pipeline:
        pixels = fn.external_source(name="pixels", dtype=types.UINT8, ndim=3, layout="HWC")
        mean, std = ([255 * value for value in values] for values in (POLICY.mean, POLICY.std))
        pipeline.set_outputs(
            fn.crop_mirror_normalize(pixels, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC")
        )
    pipeline.build()
    pipeline.feed_input("pixels", images.numpy())
    (normalised,) = pipeline.run()
    assert torch.equal(Normaliser(POLICY, 2)(images), torch.from_dlpack(normalised.as_tensor()))


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda images: images,
    "a slice": lambda images: images[1, 2:],
    "an array": lambda images: images.numpy()[:, :3],
}


@pytest.mark.parametrize("view", VIEWS)
def test_memory_comes_back_when_nobody_sees_it(view: str) -> None:
    normaliser = Normaliser(POLICY, 2)
    held = VIEWS[view](first := normaliser(levels(2, 8, 8)))
    place, before, wanted = first.data_ptr(), first.clone(), held + 0
    del first
    others = [normaliser(levels(2, 8, 8, seed=seed)) for seed in range(1, 6)]
    assert place not in {other.data_ptr() for other in others}
    assert (held == wanted).all()
    del held, others
    assert torch.equal(normaliser(levels(2, 8, 8)), before)
    assert 0 < len(normaliser._free) <= 3, "what many held at once is not kept for ever"
    assert normaliser(levels(1, 8, 8)).shape == (1, 8, 8, 3), "of another shape"
