"""Loaders: one contract, the same pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import draw
from PIL import Image, ImageOps
from tests_support import task

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders import dali

needs_dali = pytest.mark.skipif(not dali.installed(), reason="NVIDIA DALI is not installed (Linux only)")
REAL = [pytest.param("dali", marks=needs_dali), "torchvision"]
ALL = [*REAL, "replay"]
ROTATING = AugmentConfig(rotate=180, scale=(0.87, 1.15), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
STD = 255 * torch.tensor(AugmentConfig().std).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def found(tiny: Path) -> manifest.Manifest:
    return manifest.read(tiny)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    """Photographs of many shapes, smooth so that a resampling can be compared, one of them lying on its side."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(5)
    shapes = [(80, 80), (120, 80), (80, 131), (300, 211), (97, 401), (60, 50), (160, 160)]
    for split in ("train", "valid", "test"):
        for number, (width, height) in enumerate(shapes):
            noise = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
            exif = Image.Exif()
            if number == 3:
                exif[0x0112] = 6
            path = root / split / str(number % 5) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95, exif=exif)
    return manifest.read(root)


def batches(name: str, wanted: loaders.Task, epoch: int = 0, start: int = 0) -> list[loaders.Batch]:
    loader = loaders.build(name, wanted)
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


def same(one: loaders.Batch, other: loaders.Batch) -> bool:
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in ("image", "grade", "id", "valid"))


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_what_the_design_says(name: str, found: manifest.Manifest) -> None:
    wanted = task(found)
    got = batches(name, wanted)
    assert len(got) == wanted.steps == 27 // 4
    for batch in got:
        assert batch.image.shape == (4, 3, 64, 64)
        assert batch.image.dtype == torch.float32
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        assert batch.valid.all()
        assert (batch.grade.numpy() == found.grade[batch.id.numpy()]).all()
        assert batch.image.isfinite().all()
    ids = torch.cat([batch.id for batch in got]).tolist()
    assert len(set(ids)) == len(ids) == 24, "no photograph twice, and the partial batch is dropped"
    if name != "replay":
        assert not torch.equal(got[0].image, got[1].image)


@pytest.mark.parametrize("name", ALL)
def test_an_evaluation_has_each_photograph_once_and_pads_at_the_tail(name: str, found: manifest.Manifest) -> None:
    got = batches(name, task(found, "test", batch_size=4))
    valid = torch.cat([batch.valid for batch in got]).tolist()
    assert valid == [True] * 13 + [False] * 3
    ids = torch.cat([batch.id for batch in got])[:13].tolist()
    assert ids == found.ids("test").tolist()


@needs_dali
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_dali_gives_the_pixels_of_pil_bit_for_bit_where_nothing_is_scaled(
    found: manifest.Manifest, split: str, epoch: int
) -> None:
    wanted = task(found, split)
    assert wanted.canvas_is_source
    for one, other in zip(
        batches("dali", wanted, epoch), batches("torchvision", replace(wanted, threads=0), epoch), strict=True
    ):
        assert torch.equal(one.id, other.id)
        assert ((one.image - other.image) * STD).abs().max() < 1e-3


@needs_dali
@pytest.mark.parametrize("image_size", [64, 80])
@pytest.mark.parametrize("split", ["train", "test"])
def test_dali_and_torchvision_agree_within_one_level_on_photographs_of_any_shape(
    mixed: manifest.Manifest, split: str, image_size: int
) -> None:
    wanted = task(mixed, split, batch_size=7, image_size=image_size)
    assert not wanted.canvas_is_source
    (one,), (other,) = batches("dali", wanted), batches("torchvision", replace(wanted, threads=0))
    assert torch.equal(one.id, other.id)
    assert ((one.image - other.image) * STD).abs().max() <= 1.01


@needs_dali
def test_dali_and_torchvision_agree_on_turned_scaled_and_coloured_photographs(mixed: manifest.Manifest) -> None:
    wanted = task(mixed, batch_size=7, augment=replace(ROTATING, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0))
    (one,), (other,) = batches("dali", wanted), batches("torchvision", replace(wanted, threads=0))
    levels = ((one.image - other.image) * STD).abs()
    # Where the canvas ends, PIL repeats its last pixel half a pixel further and DALI blends into the black.
    assert (levels > 2.01).float().mean() < 0.03
    assert levels.median() <= 1.01
    coloured = task(mixed, batch_size=7, augment=replace(ROTATING, rotate=0.0, scale=(1.0, 1.0)))
    (one,), (other,) = batches("dali", coloured), batches("torchvision", replace(coloured, threads=0))
    assert ((one.image - other.image) * STD).abs().max() <= 1.01 * 1.2**4


def reference(file: str, wanted: loaders.Task, requests: Any, k: int, b: int) -> np.ndarray:
    """The window by PIL, in the plainest way: the whole canvas first, then a slice of it."""
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    size = (int(requests.canvas_width[k, b]), int(requests.canvas_height[k, b]))
    canvas = np.asarray(upright.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    x, y = (-requests.affine[k, b, :, 2]).astype(int)
    window = canvas[y : y + wanted.image_size, x : x + wanted.image_size]
    return (window / 255 - wanted.augment.mean) / wanted.augment.std


@pytest.mark.parametrize("name", REAL)
def test_loaders_agree_with_a_plain_reference(name: str, mixed: manifest.Manifest) -> None:
    wanted = task(mixed, batch_size=7, threads=1, augment=AugmentConfig(hflip=False, vflip=False))
    (batch,) = batches(name, wanted)
    requests = wanted.requests(0)
    for b, id_ in enumerate(batch.id.tolist()):
        expected = torch.from_numpy(reference(wanted.files[id_], wanted, requests, 0, b)).permute(2, 0, 1)
        assert ((batch.image[b] - expected) * STD[0]).abs().max() <= 1.01, found_shape(mixed, id_)


def found_shape(found: manifest.Manifest, id_: int) -> str:
    return f"{found.path[id_]}, {found.width[id_]} × {found.height[id_]}"


@pytest.mark.parametrize("name", REAL)
def test_flips_mirror_the_window(name: str, found: manifest.Manifest) -> None:
    """Among the windows of an epoch all four mirrors occur, and each is the mirror of the plain window."""
    wanted = task(found)
    plain = task(found, augment=AugmentConfig(hflip=False, vflip=False))
    seen = set()
    for one, other in zip(batches(name, wanted), batches(name, plain), strict=True):
        for image, straight in zip(one.image, other.image, strict=True):
            mirrors = {
                (h, v): straight.flip([d for d, on in ((2, h), (1, v)) if on])
                for h, v in itertools.product((False, True), repeat=2)
            }
            matching = [key for key, mirror in mirrors.items() if torch.allclose(mirror, image, atol=1e-5)]
            assert len(matching) == 1
            seen.update(matching)
    assert len(seen) == 4


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "changes", [{"threads": 2}, {"prefetch": 1}, {"prefetch": 3}, {"threads": 2, "prefetch": 3}], ids=str
)
def test_threads_and_prefetch_change_nothing(name: str, found: manifest.Manifest, changes: dict[str, int]) -> None:
    one, other = batches(name, task(found)), batches(name, task(found, **changes))
    assert all(same(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", REAL)
def test_an_epoch_can_start_at_any_step(name: str, found: manifest.Manifest) -> None:
    wanted = task(found, accumulation=2)
    loader = loaders.build(name, wanted)
    whole = list(loader.epoch(2))
    assert len(whole) == len(loader) == 12
    for start in (0, 1, 3, 5, 6):
        rest = list(loader.epoch(2, start))
        assert len(rest) == len(whole) - 2 * start
        assert all(same(a, b) for a, b in zip(rest, whole[2 * start :], strict=True))
    loader.close()


@pytest.mark.parametrize("name", ALL)
def test_leaving_early_and_beginning_again_is_safe(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found, prefetch=3))
    whole = list(loader.epoch(0))
    for stop in (1, 2, 5):
        for k, batch in enumerate(loader.epoch(0)):
            assert same(batch, whole[k])
            if k + 1 == stop:
                break
        assert all(same(a, b) for a, b in zip(loader.epoch(0), whole, strict=True))
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.epoch(0)


@pytest.mark.parametrize("name", ALL)
def test_a_second_iterator_ends_the_first_loudly(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found))
    whole = list(loader.epoch(0))
    first = loader.epoch(0)
    next(first)
    assert all(same(a, b) for a, b in zip(loader.epoch(0), whole, strict=True))
    with pytest.raises(RuntimeError, match="newer epoch"):
        next(first)
    loader.close()


@pytest.mark.parametrize("name", REAL)
def test_batches_stay_as_they_were(name: str, found: manifest.Manifest) -> None:
    """A batch that is kept is not written over by a later one."""
    loader = loaders.build(name, task(found))
    kept = []
    for batch in loader.epoch(0):
        kept.append((batch.image, batch.image.clone()))
    list(loader.epoch(1))
    loader.close()
    assert all(torch.equal(image, copy) for image, copy in kept)


@pytest.mark.parametrize("name", ALL)
def test_what_accelerate_reads(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found, "test", batch_size=4))
    active = []
    for _ in loader.epoch(0):
        active.append((loader.end_of_dataloader, loader.gradient_state.active_dataloader is loader))
    assert active == [(False, True)] * 3 + [(True, True)]
    assert loader.gradient_state.active_dataloader is None
    assert loader.remainder == 13 % 4
    for _ in loader.epoch(0):
        break
    loader.close()
    assert loader.gradient_state.active_dataloader is None


@pytest.mark.parametrize("name", REAL)
def test_ranks_cut_the_same_global_batches(name: str, found: manifest.Manifest) -> None:
    whole = batches(name, task(found, batch_size=6))
    parts = [batches(name, task(found, batch_size=6, rank=rank, world=2)) for rank in (0, 1)]
    for one, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(one.image, torch.cat([left.image, right.image]))
        assert torch.equal(one.id, torch.cat([left.id, right.id]))


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("damage", ["truncated", "junk"])
def test_a_photograph_that_cannot_be_decoded_is_named(
    name: str, threads: int, damage: str, tmp_path: Path, found: manifest.Manifest
) -> None:
    content = Path(found.files()[3]).read_bytes()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:2] + b"junk" * 100)
    files = found.files()
    files[3] = str(bad)
    wanted = task(found, files=files, ids=np.arange(8), batch_size=8, threads=threads)
    loader = loaders.build(name, wanted)
    with pytest.raises(UserError, match=r"bad\.jpg") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    loader.close()


@needs_dali
def test_workers_do_not_inherit_a_pipeline(found: manifest.Manifest) -> None:
    """A forked worker that collects a pipeline of its parent would wait for ever for threads that it has not got."""
    pipelines = loaders.build("dali", task(found))
    list(pipelines.epoch(0))
    loader = loaders.build("torchvision", task(found))
    assert loader._loader.multiprocessing_context.get_start_method() in ("forkserver", "spawn")  # type: ignore[attr-defined]
    assert len(list(loader.epoch(0))) == len(loader)
    loader.close()
    pipelines.close()


@pytest.mark.parametrize("name", REAL)
def test_closing_is_quiet_though_a_bad_photograph_is_on_its_way(
    name: str, tmp_path: Path, found: manifest.Manifest
) -> None:
    files = found.files()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"junk")
    files[5] = str(bad)
    loader = loaders.build(name, task(found, files=files, ids=np.arange(8), train=False, prefetch=3))
    next(loader.epoch(0))
    loader.close()


def test_a_batch_larger_than_the_split_is_refused(found: manifest.Manifest) -> None:
    with pytest.raises(UserError, match="batch_size 64 is larger than the 27"):
        task(found, batch_size=64)


def test_unknown_loader(found: manifest.Manifest) -> None:
    with pytest.raises(UserError, match="no such loader"):
        loaders.build("ffcv", task(found))


def test_auto_prefers_dali_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "installed", lambda: False)
    assert loaders.choose("auto")[0] == "torchvision"
    monkeypatch.setattr(dali, "installed", lambda: True)
    name, reason = loaders.choose("auto")
    assert name == "dali"
    assert "installed" in reason


def test_two_builds_of_dali_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    both = [Distribution("nvidia-dali-cuda130"), Distribution("nvidia_dali_cuda120"), Distribution("numpy")]
    monkeypatch.setattr(dali.importlib.metadata, "distributions", lambda: both)
    with pytest.raises(UserError, match="pip uninstall"):
        dali.installed()


# ------------------------------------------------------------------------------------------ odd photographs


ODD: dict[str, dict[str, Any]] = {
    "greyscale": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "progressive": {"progressive": True},
    **{f"turned {way}": {"orientation": way} for way in range(2, 9)},
    "png": {"format": "PNG"},
    "grey png": {"format": "PNG", "mode": "L"},
    "palette": {"format": "PNG", "mode": "P"},
    "transparent": {"format": "PNG", "mode": "RGBA"},
    "turned png": {"format": "PNG", "orientation": 6},
    "tiff": {"format": "TIFF"},
    "lzw tiff": {"format": "TIFF", "compression": "tiff_lzw"},
    "cmyk tiff": {"format": "TIFF", "mode": "CMYK"},
    "turned tiff": {"format": "TIFF", "orientation": 6},
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    """Photographs that are no plain RGB JPEG, all of them called .jpg, as large as their canvas."""
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "valid", "test"):
        for number, (name, settings) in enumerate(ODD.items()):
            path = root / split / str(number % 5) / f"{name}.jpg"
            draw(path, number, size=(100, 80), **{"format": "JPEG"} | settings)
    return manifest.read(root)


@pytest.mark.parametrize("name", REAL)
def test_odd_photographs_give_the_pixels_of_pillow_in_every_loader(name: str, odd: manifest.Manifest) -> None:
    wanted = task(odd, "test", batch_size=len(ODD))
    (batch,) = batches(name, wanted)
    for b, id_ in enumerate(batch.id.tolist()):
        with Image.open(wanted.files[id_]) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float64)
        height, width = upright.shape[:2]
        window = upright[(height - 64) // 2 :, (width - 64) // 2 :][:64, :64]
        expected = (window / 255 - wanted.augment.mean) / wanted.augment.std
        levels = (batch.image[b] - torch.from_numpy(expected).permute(2, 0, 1)) * STD[0]
        assert levels.abs().max() < 1e-3, odd.path[id_]
