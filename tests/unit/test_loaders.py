"""Loaders: one contract, the same pixels."""

from __future__ import annotations

import itertools
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import ODD, draw, picture
from PIL import Image, ImageOps, PngImagePlugin
from reference import REAL, compared, needs_dali
from tests_support import batches, same, task

from fastddr import loaders, sampling
from fastddr.config import AugmentConfig
from fastddr.data import manifest, photograph
from fastddr.errors import UserError
from fastddr.loaders import dali, dali_decoder
from fastddr.meters import is_out_of_memory

ALL = [*REAL, "replay"]
#: No augmentation, the report's, and one that turns, scales and colours.
POLICIES = {
    "none": AugmentConfig(hflip=False, vflip=False),
    "report": AugmentConfig(),
    "fundus": AugmentConfig(rotate=180, scale=(0.87, 1.15), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
}
STD = 255 * torch.tensor(AugmentConfig().std).view(1, 3, 1, 1)
#: Grey levels by which a warp of a loader may be off where nothing is scaled. PIL's cuts fractions off.
WARPED = {"torchvision": 1.01}
EXACT = 0.02
#: What scaling to the canvas adds: each of PIL's two passes rounds to whole levels, others round once.
SCALED = 1.01


@pytest.fixture(scope="module")
def found(tiny: Path) -> manifest.Manifest:
    return manifest.read(tiny)


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


# ------------------------------------------------------------------------------------------ the pixels


def off_by(name: str, wanted: loaders.Task, epoch: int = 0) -> dict[str, float]:
    """Largest differences from the reference in grey levels: within the canvas, at its edge, and outside.

    `bias` is the mean of them, with their signs, within: what rounds down everywhere is darker.

    A pixel that lies up to 1.5 within is made of the outermost pixels of the canvas, among others.
    """
    worst = {"within": 0.0, "edge": 0.0, "outside": 0.0, "bias": 0.0}
    biases = []
    requests = wanted.requests(epoch)
    for k, batch in enumerate(batches(name, wanted, epoch)):
        for image in compared(batch, wanted, requests, k):
            levels = np.abs(image.levels).max(axis=-1)
            for where, there in (
                ("within", image.inside > 1.5),
                ("edge", np.abs(image.inside) <= 1.5),
                ("outside", image.inside < -1.5),
            ):
                worst[where] = max(worst[where], float(levels[there].max(initial=0)))
            biases.append(image.levels[image.inside > 1.5])
    worst["bias"] = abs(float(np.concatenate(biases).mean()))
    return worst


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_where_nothing_is_scaled_the_pixels_are_those_of_the_reference(
    name: str, policy: str, odd: manifest.Manifest
) -> None:
    """Turned photographs, grey ones, palettes and so on among them."""
    wanted = task(odd, batch_size=len(ODD), augment=POLICIES[policy])
    assert wanted.canvas_is_source
    most = EXACT if policy != "fundus" else WARPED.get(name, EXACT)
    for epoch in (0, 3):
        off = off_by(name, wanted, epoch)
        assert off["within"] <= most
        assert off["edge"] <= most
        assert off["outside"] <= EXACT
        assert off["bias"] <= 0.15


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_scaled_photographs_are_those_of_the_reference(name: str, policy: str, mixed: manifest.Manifest) -> None:
    wanted = task(mixed, batch_size=7, augment=POLICIES[policy])
    assert not wanted.canvas_is_source
    most = SCALED + (WARPED.get(name, EXACT) if policy == "fundus" else 0)
    for epoch in (0, 3):
        off = off_by(name, wanted, epoch)
        assert off["within"] <= most
        assert off["edge"] <= most
        assert off["outside"] <= EXACT
        assert off["bias"] <= 0.15


@needs_dali
@pytest.mark.parametrize("policy", POLICIES)
def test_regions_are_cut_from_whole_photographs_with_the_same_bits(
    policy: str, mixed: manifest.Manifest, odd: manifest.Manifest
) -> None:
    """As on a GPU whose decoder does not bear regions."""
    for found in (mixed, odd):
        wanted = task(found, batch_size=7, augment=POLICIES[policy])
        regions = batches("dali", wanted)
        assert dali_decoder.by_region(wanted)
        assert not dali_decoder.by_region(replace(wanted, regions="never"))
        whole = batches("dali", replace(wanted, regions="never"))
        assert len(whole) == len(regions)
        assert all(torch.equal(one.image, other.image) for one, other in zip(whole, regions, strict=True))


def test_a_gpu_decodes_regions_only_where_its_codec_bears_them(
    odd: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = task(odd, batch_size=7)
    on_card = replace(wanted, device=torch.device("cuda", 0))
    known = {"0.7.0": True, "0.8.0.22": True, "0.9.0.20": False, "0.10.0": False, "1.0.0": False}
    for versions, regions in [((version,), bears) for version, bears in known.items()] + [((), True)]:
        monkeypatch.setattr(dali_decoder, "codecs", lambda versions=versions: versions)
        assert dali_decoder.by_region(on_card) == regions
        assert dali_decoder.by_region(replace(on_card, regions="always"))
        assert dali_decoder.by_region(wanted)
    assert dali_decoder.decoding(on_card)["hw_decoder_load"] == 0, "the engines only where they are asked for"
    assert dali_decoder.decoding(replace(on_card, jpeg_engines=True))["hw_decoder_load"] == 1


def test_scratch_of_the_decoder_does_not_grow_with_the_threads(odd: manifest.Manifest) -> None:
    """As far as DALI takes it beforehand: each thread's, and one more."""
    for threads in (1, 7, 16, 64, 200):
        given = dali_decoder.decoding(replace(task(odd, threads=threads), device=torch.device("cuda", 0)))
        assert 0 < given["device_memory_padding"] <= 16 * 2**20
        assert (threads + 1) * given["device_memory_padding"] <= dali_decoder.SCRATCH
        assert 2 * (threads + 1) * given["host_memory_padding"] <= dali_decoder.SCRATCH
    assert "device_memory_padding" not in dali_decoder.decoding(task(odd))


def test_photographs_that_are_decoded_whole_and_may_not_fit_are_told(
    odd: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dali_decoder, "codecs", lambda: ("0.9.0",))
    side = np.full(len(odd.files()), 3456)
    wanted = replace(task(odd, batch_size=16), widths=side, heights=side, device=torch.device("cuda", 0))
    said = dali_decoder.too_large(wanted, 2**30)
    assert said is not None
    assert "about 1.1 GiB" in said
    assert "1.0 GiB may be left" in said
    assert "fastddr prepare" in said
    assert "0.0 GiB may be left" in (dali_decoder.too_large(wanted, -(2**30)) or "")
    assert dali_decoder.too_large(wanted, 2 * 2**30) is None
    assert dali_decoder.too_large(replace(wanted, regions="always"), 2**30) is None
    assert dali_decoder.too_large(replace(wanted, device=torch.device("cpu")), 2**30) is None


def test_a_decoder_without_memory_is_told_from_a_bad_photograph(
    odd: manifest.Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It says of both only that it failed."""
    failed, free = RuntimeError("Failed to decode sample #3"), [2**34]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2**35))
    wanted = task(odd)
    on_card = replace(wanted, device=torch.device("cuda", 0))
    monkeypatch.setattr(dali_decoder, "name_refused", lambda ids, task: None)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photograph")
    assert dali_decoder.explained(failed, [0, 1], on_card) is failed
    free[0] = 2**20
    assert is_out_of_memory(dali_decoder.explained(failed, [0, 1], on_card))
    assert dali_decoder.explained(failed, [0, 1], wanted) is failed, "a CPU has its own words for it"
    files = [*list(odd.files())[:2], str(broken), *list(odd.files())[3:]]
    found = dali_decoder.explained(failed, [0, 1, 2], replace(on_card, files=files))
    assert isinstance(found, UserError)
    assert "broken.jpg" in str(found)


@needs_dali
def test_what_dali_alone_does_not_decode_is_named(found: manifest.Manifest, tmp_path: Path) -> None:
    bits = tmp_path / "bits.tif"
    Image.new("1", (80, 80)).save(bits)
    files = list(found.files())
    files[5] = str(bits)
    wanted = task(found, files=files, ids=np.arange(8), batch_size=8)
    loader = loaders.build("dali", wanted)
    with pytest.raises(UserError, match=r"bits\.tif: DALI cannot decode .* --loader torchvision"):
        list(loader.epoch(0))
    loader.close()
    wide = np.array(wanted.widths)
    wide[2] += 1
    said = dali_decoder.name_refused(range(5), replace(wanted, widths=wide))
    assert said is not None
    assert said.startswith(f"{files[2]}: DALI decodes it to 80 × 80 pixels, and 81 × 80 were expected")
    assert dali_decoder.name_refused(range(5), wanted) is None


@needs_dali
def test_the_version_of_the_codec_is_found() -> None:
    assert len(dali_decoder.codecs()) == 1
    assert dali_decoder.codecs()[0].count(".") >= 2


@pytest.mark.parametrize("image_size", [64, 80])
@pytest.mark.parametrize("name", REAL)
def test_evaluation_windows_are_those_of_the_reference(name: str, image_size: int, mixed: manifest.Manifest) -> None:
    off = off_by(name, task(mixed, "test", batch_size=7, image_size=image_size))
    assert max(off.values()) <= SCALED


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    """White noise, oblong and 6 to 9 times as large as its canvas: what a wrong filter would show in."""
    root = tmp_path_factory.mktemp("reduced")
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate([(480, 480), (700, 560), (300, 720), (1100, 500)]):
        for split in ("train", "valid", "test"):
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            picture(root / split / str(number) / f"{number}.jpg", noise)
    return manifest.read(root)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_strongly_reduced_photographs_are_those_of_the_reference(
    name: str, policy: str, reduced: manifest.Manifest
) -> None:
    """At the very edge of a canvas DALI repeats the last pixel for its filter, and PIL cuts the filter off."""
    most = SCALED + (WARPED.get(name, EXACT) if policy == "fundus" else 0)
    off = off_by(name, task(reduced, batch_size=4, augment=POLICIES[policy]))
    assert off["within"] <= most
    assert off["edge"] <= 12


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_the_step_to_the_canvas_is_antialiased(name: str, policy: str, tmp_path: Path) -> None:
    """A checkerboard of single pixels, reduced 5 times, is grey.

    Without antialiasing each pixel of the canvas would be one of the photograph's, as black or white as that.
    """
    rows, columns = np.indices((400, 400))
    board = np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    for split, grade in itertools.product(("train", "valid", "test"), range(2)):
        picture(tmp_path / split / str(grade) / f"{grade}.jpg", board)
    wanted = task(manifest.read(tmp_path), batch_size=2, augment=POLICIES[policy])
    requests = wanted.requests(0)
    (batch,) = batches(name, wanted)
    for image, seen in zip(batch.image, compared(batch, wanted, requests, 0), strict=True):
        colour = requests.colour[0, 0] if policy != "fundus" else requests.colour[0, batch.id.tolist().index(seen.id)]
        values = image.permute(1, 2, 0).double().numpy() - colour[:, 3]
        grey = values @ np.linalg.inv(colour[:, :3].astype(np.float64)).T
        assert np.abs(grey - 127.5)[seen.inside > 1.5].max() < 2.5


@needs_dali
@pytest.mark.parametrize("policy", ["report", "fundus"])
@pytest.mark.parametrize("of", ["odd", "mixed", "reduced"])
def test_dali_decodes_only_a_box_and_the_pixels_stay(
    of: str, policy: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against decoding whole photographs. What is scaled may round to the next level."""
    found_ = request.getfixturevalue(of)
    wanted = task(found_, batch_size=4, image_size=32, augment=POLICIES[policy])
    plain = dali._inputs
    requests = wanted.requests(0)
    whole = requests.source_width * requests.source_height
    shares = [plain(wanted, requests, k)["shape"].prod(axis=1) / whole[k] for k in range(len(requests))]
    assert np.mean(shares) < 0.6, "most of a photograph is not decoded"

    def all_of_it(wanted: loaders.Task, requests: Any, k: int) -> dict[str, np.ndarray]:
        inputs = plain(wanted, requests, k)
        cut = inputs["start"].astype(np.float32)
        if wanted.canvas_is_source:
            # Windows of one's own canvas are bit-equal to PIL's in any case; warps are asked of the whole canvas.
            if "back" in inputs:
                inputs["back"][:, :2, 2] += cut
                inputs["start"][:] = 0
                inputs["shape"] = np.stack([requests.canvas_width[k], requests.canvas_height[k]], axis=1)
        else:
            inputs["roi_start"] += cut[:, ::-1]
            inputs["roi_end"] += cut[:, ::-1]
            inputs["start"][:] = 0
            inputs["shape"] = np.stack([requests.source_width[k], requests.source_height[k]], axis=1)
        return inputs | {"shape": inputs["shape"].astype(np.int32)}

    boxed = batches("dali", wanted)
    monkeypatch.setattr(dali, "_inputs", all_of_it)
    for k, (one, other) in enumerate(zip(boxed, batches("dali", wanted), strict=True)):
        back = np.linalg.inv(requests.colour[k][:, :, :3].astype(np.float64))
        levels = np.einsum("bij,bjhw->bihw", back, (one.image - other.image).double().numpy())
        assert np.abs(levels).max() <= (EXACT if wanted.canvas_is_source else SCALED)
        assert np.abs(levels).mean() <= 0.02


def test_a_box_is_no_larger_than_the_image_needs(found: manifest.Manifest) -> None:
    """Which the test above could not see: a box of the whole canvas gives the same pixels."""
    requests = task(found, image_size=32, augment=POLICIES["fundus"]).requests(0)
    for k in range(len(requests)):
        box = sampling.boxes(requests.affine[k], requests.canvas_width[k], requests.canvas_height[k], 32)
        assert (box[:, 2:] - box[:, :2]).max() <= 32 * 1.15 * 2**0.5 + 6


@needs_dali
def test_half_precision_comes_straight_from_dali(found: manifest.Manifest) -> None:
    for augment, dtype in itertools.product((POLICIES["report"], POLICIES["fundus"]), (torch.float16, torch.bfloat16)):
        full = batches("dali", task(found, augment=augment))
        half = batches("dali", task(found, augment=augment, dtype=dtype))
        for one, other in zip(full, half, strict=True):
            assert other.image.dtype == dtype
            assert torch.equal(one.image.to(dtype), other.image)


@needs_dali
def test_a_batch_of_dali_is_not_copied(found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, torch.Tensor]] = []
    plain = torch.from_dlpack

    def watched(buffer: Any) -> torch.Tensor:
        made.append((buffer.data_ptr(), plain(buffer)))
        return made[-1][1]

    monkeypatch.setattr(dali.torch, "from_dlpack", watched)
    for batch in batches("dali", task(found, augment=POLICIES["fundus"])):
        pointer, tensor = made.pop(0)
        assert pointer == tensor.data_ptr() == batch.image.data_ptr()
        assert batch.image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", REAL)
def test_names_of_any_kind_and_relative_paths(
    name: str, tmp_path: Path, found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(name, task(found, "test", batch_size=13))
    files = found.files()
    for number, id_ in enumerate(found.ids("test").tolist()):
        new = tmp_path / "folder with spaces" / ("ä" * number) / os.fsdecode(b"\xff%d.jpg" % id_)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(Path(files[id_]).read_bytes())
        files[id_] = os.path.relpath(new, tmp_path)
    monkeypatch.chdir(tmp_path)
    got = batches(name, task(found, "test", batch_size=13, files=files))
    assert all(same(one, other) for one, other in zip(got, expected, strict=True))


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


def test_a_batch_larger_than_the_split_is_refused(found: manifest.Manifest) -> None:
    with pytest.raises(UserError, match="batch_size 64 is larger than the 27"):
        task(found, batch_size=64)


def test_unknown_loader(found: manifest.Manifest) -> None:
    with pytest.raises(UserError, match="no such loader"):
        loaders.build("ffcv", task(found))


def test_two_builds_of_dali_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    both = [Distribution("nvidia-dali-cuda130"), Distribution("nvidia_dali_cuda120"), Distribution("numpy")]
    monkeypatch.setattr(dali_decoder.importlib.metadata, "distributions", lambda: both)
    monkeypatch.setattr(dali_decoder, "_builds", dali_decoder._builds.__wrapped__)
    with pytest.raises(UserError, match="pip uninstall"):
        dali_decoder.installed()


# ------------------------------------------------------------------------------------------ odd photographs


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


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'


def _exif(order: str, *entries: tuple[int, int, int, bytes]) -> bytes:
    """A block of EXIF with these entries: tag, type, count and value."""
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    for tag, kind, count, value in entries:
        block += struct.pack(f"{order}HHI", tag, kind, count) + value
    return b"Exif\0\0" + block + bytes(4)


def _text(name: str, text: bytes) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(name, text.decode()) if name.startswith("XML") else info.add_text(name, text.decode())
    return info


def _profile(raw: bytes) -> bytes:
    return b"\nexif\n%8d\n%s\n" % (len(raw), raw.hex().encode())


SIX = _exif("<", (0x0112, 3, 1, b"\6\0\0\0"))
#: What says how a photograph lies, and whether DALI believes it.
LIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "exif": ("JPEG", True, {"exif": SIX}),
    "exif of a png": ("PNG", True, {"exif": SIX}),
    "a long, little end first": ("JPEG", True, {"exif": _exif("<", (0x0112, 4, 1, b"\6\0\0\0"))}),
    "a long, big end first": ("JPEG", False, {"exif": _exif(">", (0x0112, 4, 1, b"\0\0\0\6"))}),
    "a text that lies beyond": (
        "JPEG", False, {"exif": _exif("<", (0x010F, 2, 9, b"\xff\0\0\0"), (0x0112, 3, 1, b"\6\0\0\0"))}
    ),
    "xmp": ("JPEG", False, {"xmp": XMP % 6}),
    "xmp, upside down": ("JPEG", False, {"xmp": XMP % 3}),
    "xmp of a png": ("PNG", False, {"pnginfo": _text("XML:com.adobe.xmp", XMP % 6)}),
    "text of a png": ("PNG", False, {"pnginfo": _text("Raw profile type exif", _profile(SIX[6:]))}),
    "tiff": ("TIFF", True, {"tiffinfo": {0x0112: 6}}),
    "xmp of a tiff": ("TIFF", False, {"tiffinfo": {700: XMP % 6}}),
}  # fmt: skip


def test_a_photograph_lies_as_dali_reads_it(tmp_path: Path, found: manifest.Manifest) -> None:
    """Where only Pillow believes what is said, loaders would give other pixels, or squeezed ones."""
    files, sizes, uprights = [], [], []
    for number, (name, (format, believed, settings)) in enumerate(LIES.items()):
        path = draw(tmp_path / f"{name}.jpg", number)
        with Image.open(path) as image:
            pixels = Image.fromarray(np.asarray(image))
        pixels.save(path, format, **settings)
        with photograph.strict_sizes():
            header = photograph.header(str(path))
            upright = photograph.upright(str(path))
        assert (header.width, header.height) == upright.size == ((32, 40) if believed else (40, 32)), name
        assert ("turned" in header.traits) == believed, name
        files.append(str(path))
        sizes.append(upright.size)
        uprights.append(np.asarray(upright))
    if dali_decoder.installed():
        width, height = np.array(sizes).T
        ids = np.arange(len(files))
        theirs = {"files": files, "grades": ids, "ids": ids, "widths": width, "heights": height}
        wanted = task(found, **theirs, canvas=32, batch_size=1, image_size=32)
        for part in dali_decoder.Canvases(wanted, 4).walk(ids):
            for id_, canvas in part:
                assert np.array_equal(canvas.numpy(), uprights[id_]), files[id_]


@needs_dali
def test_a_card_without_memory_is_no_bad_photograph(found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's error goes on as it is, and the trainer has the sentence; no photograph is opened to find the culprit."""

    class Full:
        def outputs(self, **_: Any) -> None:
            raise RuntimeError("Error in MIXED operator: CUDA allocation failed")

    loader = loaders.build("dali", task(found))
    loader._pipeline = Full()  # type: ignore[attr-defined]
    monkeypatch.setattr(dali_decoder, "name_unreadable", lambda files: pytest.fail("looked for a bad photograph"))
    with pytest.raises(RuntimeError, match="CUDA allocation failed"):
        loader._receive(loader.task.requests(0), 0)  # type: ignore[attr-defined]
    loader.close()
