"""The resident loader: decoded once, the same pixels, the first step not late, never more than its store."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tests_support
import torch
from PIL import Image
from reference import POLICIES, needs_dali
from tests_support import task

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders import canvases, capacity, dali_decoder
from fastddr.loaders.base import Batch, Task
from fastddr.loaders.resident import ResidentLoader

STD = 255 * torch.tensor(AugmentConfig().std).view(1, 3, 1, 1)
STORES = ["ram", "mmap", "none"]


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "cache"))


def resident(wanted: Task, store: Any = "ram") -> ResidentLoader:
    return ResidentLoader(replace(wanted, store=store))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(map(tests_support.same, one, other))


class Walks:
    """Counts what is decoded, in place of the decoder."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.decoded: list[int] = []

    def walk(self, ids: np.ndarray) -> Generator[list[tuple[int, torch.Tensor]], None, None]:
        for made in self.inner.walk(ids):
            self.decoded += [id_ for id_, _ in made]
            yield made


def counted(loader: ResidentLoader) -> list[int]:
    walks = Walks(loader._canvases)
    loader._canvases = walks  # type: ignore[assignment]
    return walks.decoded


@pytest.mark.parametrize("augment", [AugmentConfig(), POLICIES["fundus"]], ids=["windows", "warps"])
def test_all_stores_give_the_same_bits_in_every_epoch(augment: AugmentConfig, found: manifest.Manifest) -> None:
    wanted = task(found, augment=augment)
    expected = None
    for store in STORES:
        loader = resident(wanted, store)
        epochs = [list(loader.epoch(e)) for e in (0, 1, 0)]
        assert same(epochs[0], epochs[2]), "what is kept is what was decoded"
        assert not same(epochs[0], epochs[1])
        expected = expected or epochs
        assert all(same(a, b) for a, b in zip(epochs, expected, strict=True)), store
        loader.close()


@needs_dali
@pytest.mark.parametrize("augment", [AugmentConfig(), POLICIES["fundus"]], ids=["windows", "warps"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_are_those_of_streaming_to_the_bit(split: str, augment: AugmentConfig, found: manifest.Manifest) -> None:
    wanted = task(found, split, augment=augment)
    stream, loader = loaders.build("dali", wanted), resident(wanted)
    for one, other in zip(stream.epoch(2), loader.epoch(2), strict=True):
        assert torch.equal(one.id, other.id)
        assert torch.equal(one.image, other.image)
    stream.close()
    loader.close()


@pytest.mark.parametrize("store", STORES)
def test_each_photograph_is_decoded_once(store: str, found: manifest.Manifest) -> None:
    loader = resident(task(found), store)
    decoded = counted(loader)
    for epoch in range(4):
        list(loader.epoch(epoch))
    if store == "none":
        assert len(decoded) == 4 * 24
    else:
        assert sorted(decoded) == sorted(set(decoded)), "none twice"
        assert len(decoded) == 27
    loader.close()


def test_another_loader_and_a_later_run_decode_nothing(found: manifest.Manifest) -> None:
    first = resident(task(found), "mmap")
    whole = [list(first.epoch(e)) for e in (0, 1, 2)]
    first.close()
    later = resident(task(found, threads=2), "mmap")
    decoded = counted(later)
    assert all(same(list(later.epoch(e)), whole[e]) for e in (0, 1, 2))
    assert decoded == []
    valid = resident(task(found, "valid"), "mmap")
    list(valid.epoch(0))
    assert valid._store.path == later._store.path  # type: ignore[attr-defined]
    for loader in (later, valid):
        loader.close()


def test_what_a_bad_disk_changed_is_decoded_again_and_said(found: manifest.Manifest) -> None:
    said: list[str] = []
    first = resident(task(found), "mmap")
    whole = list(first.epoch(0))
    store: Any = first._store
    store._write(store._begin + int(store.place.offset[whole[2].id[1]]) + 5, b"\x00\xff\x00\xff")
    first.close()
    again = ResidentLoader(replace(task(found), store="mmap"), said.append)
    decoded = counted(again)
    assert same(list(again.epoch(0)), whole)
    assert decoded == [int(whole[2].id[1])]
    assert len(said) == 1
    assert "1 photographs were not as they had been written" in said[0]
    again.close()


@needs_dali
@pytest.mark.parametrize("side", [96, 64])
@pytest.mark.parametrize("store", STORES)
def test_a_photograph_of_another_size_than_it_had_is_named_and_written_over_no_other(
    store: str, side: int, tiny: Path, tmp_path: Path
) -> None:
    wanted = task(manifest.read(shutil.copytree(tiny, tmp_path / "set")))
    *others, changed = wanted.requests(0).id.ravel().tolist()
    loader = resident(wanted, store)
    epoch = loader.epoch(0)
    next(epoch)
    file = wanted.files[changed]
    with Image.open(file) as image:
        image.resize((side, side)).save(file)
    said = rf"{re.escape(file)}: DALI decodes it to {side} × {side} pixels, and 80 × 80 were expected; put back"
    with pytest.raises(UserError, match=said):
        list(epoch)
    kept = [id_ for id_ in others if not loader._store.missing(np.array([id_])).any()]
    assert len(kept) == (0 if store == "none" else 20), "all but those of the batch"
    for id_ in kept:
        with Image.open(wanted.files[id_]) as image:
            assert np.array_equal(loader._store.get(id_).numpy(), np.asarray(image))
    loader.close()


@pytest.mark.parametrize(("ranks", "store"), [(1, "ram"), (8, "mmap")])
def test_a_loader_of_ones_own_leaves_memory_to_the_other_processes(
    ranks: int, store: str, found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(capacity, "free_ram", lambda: 4 * 27 * 80 * 80 * 3)
    for loader in (loaders.build("auto", task(found)), resident(task(found), "auto")):
        assert (loader.name, loader.task.store) == ("resident", store)
        loader.close()


def test_the_first_step_waits_for_its_own_photographs_only(found: manifest.Manifest) -> None:
    loader = resident(task(found))
    decoded = counted(loader)
    first = next(iter(loader.epoch(0)))
    assert decoded[:4] == first.id.tolist(), "in the order of the epoch"
    assert len(decoded) == 8, "and those of the batch after it, which is made meanwhile"
    loader.close()


@pytest.mark.parametrize("store", STORES)
def test_leaving_while_it_fills_is_safe(store: str, found: manifest.Manifest) -> None:
    wanted = task(found)
    whole = resident(wanted, "none")
    expected = [list(whole.epoch(e)) for e in (0, 1)]
    loader = resident(wanted, store)
    for stop in (1, 3):
        for k, _ in enumerate(loader.epoch(0)):
            if k + 1 == stop:
                break
    assert same(list(loader.epoch(1)), expected[1])
    assert same(list(loader.epoch(0)), expected[0])
    assert same(list(loader.epoch(0, 4)), expected[0][4:])
    for one in (whole, loader):
        one.close()


@pytest.mark.parametrize("store", STORES)
def test_an_evaluation_with_padding_over_several_ranks(store: str, found: manifest.Manifest) -> None:
    """13 photographs on 8 ranks of 3: one rank has a single photograph and padding, others nothing but padding."""
    wanted = task(found, "test", batch_size=24, world=8)
    (whole,) = resident(task(found, "test", batch_size=24), store).epoch(0)
    parts = []
    for rank in range(8):
        (part,) = resident(replace(wanted, rank=rank), store).epoch(0)
        parts.append(part)
    assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    assert torch.cat([part.valid for part in parts]).tolist() == [True] * 13 + [False] * 11


def test_nothing_is_kept_where_nothing_shall_be(found: manifest.Manifest) -> None:
    loader = resident(task(found, "test", batch_size=4), "none")
    store: Any = loader._store
    most = 0
    for _ in loader.epoch(0):
        most = max(most, len(store._canvases))
    assert most <= 8, "a batch, and what was decoded together with it"
    assert store._canvases == {}
    assert loader.kept is None
    loader.close()


def test_kept_counts_up_to_all(found: manifest.Manifest) -> None:
    loader = resident(task(found))
    seen = []
    for _ in loader.epoch(0):
        seen.append(loader.kept)
    assert seen == sorted(seen)
    assert seen[0] == pytest.approx(8 / 27)
    list(loader.epoch(1))
    list(loader.epoch(2))
    assert loader.kept == 1
    loader.close()
    assert loader.kept is None


def test_memory_is_the_store_and_stays_so(found: manifest.Manifest) -> None:
    loader = resident(task(found))
    store: Any = loader._store
    assert store.pixels.nbytes == 27 * 80 * 80 * 3
    before = store.pixels.data_ptr()
    threads = threading.active_count()
    for epoch in range(20):
        list(loader.epoch(epoch))
    assert store.pixels.data_ptr() == before
    assert store.pixels.nbytes == 27 * 80 * 80 * 3
    assert threading.active_count() == threads
    loader.close()
    with pytest.raises(AssertionError, match="closed"):
        _ = store.pixels


def test_batches_do_not_share_memory_with_the_store_or_each_other(found: manifest.Manifest) -> None:
    loader = resident(task(found))
    kept = [(batch.image, batch.image.clone()) for batch in loader.epoch(0)]
    for image, _ in kept[:1]:
        image.zero_()
    again = list(loader.epoch(0))
    assert all(torch.equal(batch.image, copy) for batch, (_, copy) in zip(again, kept, strict=True))
    assert all(torch.equal(image, copy) for image, copy in kept[1:])
    loader.close()


@needs_dali
def test_scaling_leaves_alone_what_need_not_be_scaled(mixed: manifest.Manifest) -> None:
    """Decoded beside others that are scaled, a photograph that is its own canvas has its own pixels."""
    wanted = task(mixed, "test", batch_size=7, threads=1)
    ids = wanted.ids[np.minimum(wanted.widths[wanted.ids], wanted.heights[wanted.ids]) == 80]
    assert 0 < len(ids) < len(wanted.ids)
    scaled = dict(pair for made in dali_decoder.Canvases(wanted, 4).walk(wanted.ids) for pair in made)
    for id_ in ids.tolist():
        with Image.open(wanted.files[id_]) as image:
            assert np.array_equal(scaled[id_].numpy(), np.asarray(image))


def test_pillow_fills_a_store_where_dali_is_not_installed(
    mixed: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = task(mixed, batch_size=7, augment=AugmentConfig())
    with_dali = list(resident(wanted).epoch(0)) if dali_decoder.installed() else None
    monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    assert canvases.decoder(wanted).startswith("pillow")
    loader, threads = resident(wanted), threading.active_count()
    plain = loaders.build("torchvision", replace(wanted, threads=0))
    for one, other in zip(loader.epoch(0), plain.epoch(0), strict=True):
        assert ((one.image - other.image) * STD).abs().max() <= 1.01
    if with_dali is not None:
        assert ((with_dali[0].image - next(iter(loader.epoch(0))).image) * STD).abs().max() <= 1.01
    assert threading.active_count() == threads, "no thread is left"
    loader.close()


@needs_dali
@pytest.mark.parametrize("augment", [AugmentConfig(), POLICIES["fundus"]], ids=["windows", "warps"])
def test_pytorch_makes_the_batches_of_dali(
    augment: AugmentConfig, found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded bit-equal, since these photographs are their own canvas; then warped and coloured by another library."""
    wanted = task(found, augment=augment)
    expected = list(resident(wanted).epoch(0))
    monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    loader = resident(wanted)
    assert loader._finisher is None
    for one, other in zip(loader.epoch(0), expected, strict=True):
        assert one.image.is_contiguous(memory_format=torch.channels_last)
        # Half a level where an edge of 255 levels is placed otherwise by 0.002 of a pixel.
        assert ((one.image - other.image) * STD).abs().max() < 0.5
    loader.close()


def test_pillow_ends_its_threads_when_it_is_left_early(
    found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    threads = threading.active_count()
    loader = resident(task(found, threads=2))
    next(iter(loader.epoch(0)))
    loader.close()
    assert threading.active_count() == threads
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"junk")
    files = found.files()
    files[int(found.ids("train")[0])] = str(bad)
    loader = resident(task(found, files=files))
    with pytest.raises(UserError, match=r"bad\.jpg"):
        list(loader.epoch(0))
    assert threading.active_count() == threads


@needs_dali
def test_raw_windows_are_the_pixels_before_the_colour_map(found: manifest.Manifest) -> None:
    wanted = task(found, augment=POLICIES["none"])
    loader = resident(wanted)
    mean, std = (torch.tensor(v) for v in (AugmentConfig().mean, AugmentConfig().std))
    for raw, batch in zip(loader.raw_windows(1), resident(wanted).epoch(1), strict=True):
        assert raw.dtype == torch.uint8
        assert ((raw / 255 - mean) / std - batch.image.permute(0, 2, 3, 1)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="windows only"):
        next(resident(task(found, augment=POLICIES["fundus"])).raw_windows())
    loader.close()
