"""The resident loader on a card: the kernel, every store, and the memory that it takes and gives back."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import DECODED, DECODED_MEAN, POLICIES
from tests_support import runs_ahead, task, warm_for_running_ahead

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data import manifest
from fastddr.kernels import warp as kernels
from fastddr.loaders import dali_decoder
from fastddr.loaders.base import Batch, Task

pytestmark = pytest.mark.gpu
STD = 255 * torch.tensor(AugmentConfig().std).view(1, 3, 1, 1)
CARD = torch.device("cuda", 0)


def batches(wanted: Task, epochs: int = 2) -> list[Batch]:
    loader = loaders.build("resident", wanted)
    try:
        return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]
    finally:
        loader.close()


@pytest.fixture
def wanted(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "cache"))
    return task(manifest.read(tiny), device=CARD)


@pytest.mark.parametrize("size", [64, 255, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_computes_what_the_reference_does(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(CARD).manual_seed(0)
    sides = torch.tensor([[600, 520], [512, 512], [700, 530]], dtype=torch.int32)
    lengths = sides.prod(1) * 3
    pixels = torch.randint(0, 256, (int(lengths.sum()),), dtype=torch.uint8, device=CARD, generator=generator)
    turned = torch.tensor([[0.8, -0.6, 100], [0.6, 0.8, -50]]).expand(3, 2, 3).contiguous()
    colour = torch.randn(3, 3, 4, device=CARD, generator=generator) / 255
    arguments = (pixels, (lengths.cumsum(0) - lengths).to(CARD), sides.to(CARD), turned.to(CARD), colour, size)
    precision = torch.get_float32_matmul_precision()
    # The reference's maps are matrix products; in TF32, which a training before may have left on, they miss pixels.
    torch.set_float32_matmul_precision("highest")
    try:
        expected = kernels.warp_reference(*arguments, torch.float32)
    finally:
        torch.set_float32_matmul_precision(precision)
    seen = kernels.warp(*arguments, dtype)
    assert seen.dtype == dtype
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3
    # Where float32 places a pixel otherwise by 1e-5 of itself, white noise differs by some hundredths of a level.
    assert ((seen.float() - expected).abs() <= expected.abs() * rounding + 1e-3).float().mean() > 0.999


def test_a_photograph_beyond_two_gibibytes_of_the_store() -> None:
    """Where it begins is no 32-bit number."""
    side, begin = 64, 2**31 + 4097
    photograph = torch.randint(0, 256, (side * side * 3,), dtype=torch.uint8, device=CARD)
    store = torch.zeros(begin + len(photograph), dtype=torch.uint8, device=CARD)
    store[begin:] = photograph
    size = torch.tensor([[side, side]], dtype=torch.int32, device=CARD)
    back, colour = torch.eye(2, 3, device=CARD)[None] * 0.9, torch.eye(3, 4, device=CARD)[None]
    far = kernels.warp(store, torch.tensor([begin], device=CARD), size, back, colour, 48)
    near = kernels.warp(photograph, torch.tensor([0], device=CARD), size, back, colour, 48)
    assert near.float().std() > 10
    assert torch.equal(far, near)


@pytest.mark.parametrize("store", ["vram", "ram", "mmap", "none"])
@pytest.mark.parametrize("augment", [AugmentConfig(), POLICIES["fundus"]], ids=["windows", "warps"])
def test_every_store_gives_the_batches_of_a_cpu(store: Any, augment: AugmentConfig, wanted: Task) -> None:
    on_card = batches(replace(wanted, store=store, augment=augment))
    on_cpu = batches(replace(wanted, store="none", augment=augment, device=torch.device("cpu")))
    for one, other in zip(on_card, on_cpu, strict=True):
        assert one.image.device.type == "cuda"
        assert one.image.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.id.cpu(), other.id)
        levels = ((one.image.cpu() - other.image) * STD).abs()
        print(f"{store}: off by {levels.max():.2f} levels, {levels.mean():.3f} on average")
        # The GPU's decoder rounds otherwise: as in the test of `dali`, times what the colour map stretches.
        assert levels.max() <= DECODED * 1.2**4
        assert levels.mean() <= DECODED_MEAN * 1.2**4


def test_all_stores_give_the_same_bits(wanted: Task) -> None:
    warped = replace(wanted, augment=POLICIES["fundus"])
    found = [batches(replace(warped, store=store)) for store in ("vram", "ram", "mmap", "none")]
    for other in found[1:]:
        # The maps of boxes have their corner taken out in float32, so a last bit may differ.
        assert all(((a.image - b.image).cpu() * STD).abs().max() < 0.05 for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("store", ["ram", "mmap"])
def test_slots_are_not_written_over_while_they_are_read(store: Any, wanted: Task) -> None:
    """The computation is kept busy, so that copies run far ahead of it."""
    calm = batches(replace(wanted, store=store), epochs=3)
    loader = loaders.build("resident", replace(wanted, store=store))
    busy = torch.randn(4096, 4096, device=CARD)
    kept = []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
            kept.append(batch.image)
    assert all(torch.equal(image, batch.image) for image, batch in zip(kept, calm, strict=True))
    loader.close()


@pytest.mark.alone
@pytest.mark.parametrize("store", ["ram", "mmap", "none"])
def test_a_host_that_has_photographs_decoded_does_not_wait_for_training(
    store: Any, wanted: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch, where each photograph that the card has decoded is copied to the host; or, without DALI and
    a store, each that the host has decoded to the card."""
    if store == "none":
        monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    wanted = replace(wanted, store=store, ids=wanted.ids[:24], batch_size=8)
    other = loaders.build("resident", replace(wanted, canvas=wanted.canvas - 2))
    warm_for_running_ahead(other)
    other.close()
    loader = loaders.build("resident", wanted)
    runs_ahead(loader)
    loader.close()


def test_memory_stays_flat_and_is_given_back(wanted: Task) -> None:
    gc.collect()  # what tests before this one have left would be freed within it
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loader = loaders.build("resident", replace(wanted, store="vram", dtype=torch.bfloat16))
    seen = []
    for epoch in range(20):
        for _ in loader.epoch(epoch):
            pass
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_allocated())
    del _
    assert max(seen[1:]) == min(seen[1:])
    assert seen[0] - before >= 27 * 80 * 80 * 3
    loader.close()
    del loader
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
