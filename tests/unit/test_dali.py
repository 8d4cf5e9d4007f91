"""What the DALI loader decodes, what it refuses, and what it says when it cannot."""

from __future__ import annotations

import importlib.metadata
import itertools
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from photographs import draw
from PIL import Image, PngImagePlugin
from reference import EXACT, POLICIES, SCALED, needs_dali
from tests_support import batches, task

from fastddr import loaders, meters, sampling
from fastddr.data import manifest, photograph
from fastddr.errors import UserError
from fastddr.loaders import base, canvases, dali, dali_decoder
from fastddr.loaders.base import Seen
from fastddr.meters import is_out_of_memory


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
    # What could not be read once, and can be now; in DALI's own words.
    away = RuntimeError(
        "Error in CPU operator `nvidia.dali.fn.io.file.read`,\nwhich was used\n\nencountered:\n\n"
        'Assert on "fp_ != nullptr" failed: Could not open file /data/a.jpg\nC++ context: [/opt/dali/std_file.cc:29] '
    )
    found = dali_decoder.explained(away, [0, 1], wanted)
    assert isinstance(found, UserError)
    assert "for a moment (Could not open file /data/a.jpg); give the same command again" in str(found)


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
    seen, _ = requests.block(0)
    shares = plain(wanted, seen)["shape"].prod(axis=1) / (seen.source_width * seen.source_height)
    assert np.mean(shares) < 0.6, "most of a photograph is not decoded"

    def all_of_it(wanted: loaders.Task, seen: Seen) -> dict[str, np.ndarray]:
        inputs = plain(wanted, seen)
        cut = inputs["start"].astype(np.float32)
        if wanted.canvas_is_source:
            # Windows of one's own canvas are bit-equal to PIL's in any case; warps are asked of the whole canvas.
            if "back" in inputs:
                inputs["back"][:, :2, 2] += cut
                inputs["start"][:] = 0
                inputs["shape"] = np.stack([seen.canvas_width, seen.canvas_height], axis=1)
        else:
            inputs["roi_start"] += cut[:, ::-1]
            inputs["roi_end"] += cut[:, ::-1]
            inputs["start"][:] = 0
            inputs["shape"] = np.stack([seen.source_width, seen.source_height], axis=1)
        return inputs | {"shape": inputs["shape"].astype(np.int32)}

    boxed = batches("dali", wanted)
    monkeypatch.setattr(dali, "_inputs", all_of_it)
    for k, (one, other) in enumerate(zip(boxed, batches("dali", wanted), strict=True)):
        back = np.linalg.inv(requests.at(k).colour[:, :, :3].astype(np.float64))
        levels = np.einsum("bij,bjhw->bihw", back, (one.image - other.image).double().numpy())
        assert np.abs(levels).max() <= (EXACT if wanted.canvas_is_source else SCALED)
        assert np.abs(levels).mean() <= 0.02


@needs_dali
@pytest.mark.parametrize("canvas", [80, 64])
def test_what_dali_is_told_is_worked_out_in_blocks(
    canvas: int, found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = task(found, batch_size=4, image_size=32, canvas=canvas, augment=POLICIES["fundus"])
    plain, made = dali._inputs, []
    whole = plain(wanted, wanted.requests(0).block(0)[0])
    monkeypatch.setattr(base, "_TOGETHER", 8)
    monkeypatch.setattr(dali, "_inputs", lambda task, seen: made.append(len(seen.affine)) or plain(task, seen))
    requests = wanted.requests(0)
    loader = dali.DaliLoader(wanted)
    told = [loader._inputs(requests, k) for k in range(len(requests))]
    loader.close()
    assert made == [8] * (len(requests) // 2) + [4] * (len(requests) % 2), "once a block"
    for name, values in whole.items():
        assert (np.concatenate([inputs[name] for inputs in told]) == values).all(), name


def test_a_box_is_no_larger_than_the_image_needs(found: manifest.Manifest) -> None:
    """Which the test above could not see: a box of the whole canvas gives the same pixels."""
    requests = task(found, image_size=32, augment=POLICIES["fundus"]).requests(0)
    for k in range(len(requests)):
        box = sampling.boxes(requests.at(k).affine, requests.at(k).canvas_width, requests.at(k).canvas_height, 32)
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


@pytest.mark.parametrize(
    ("driver", "build", "said"),
    [
        (12080, "cuda130", "cuda130 needs CUDA 13, and this GPU's driver can do 12.8; .* nvidia-dali-cuda120`, or"),
        (13000, "cuda130", None),
        (12080, "cuda120", None),
        (13020, "cuda120", None),
        (None, "cuda130", None),
    ],
)
def test_a_build_that_is_too_new_for_the_driver_is_told_when_a_loader_opens(
    driver: int | None, build: str, said: str | None, found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an image of CUDA 12: PyTorch of CUDA 12 trains there."""
    monkeypatch.setattr(dali_decoder, "dali_builds", lambda: (f"nvidia-dali-{build}",))
    monkeypatch.setattr(dali_decoder, "_driver", lambda: driver)
    gpu, cpu = task(found, device=torch.device("cuda")), task(found)
    for opens in (dali.DaliLoader, lambda wanted: canvases.build(wanted, 4)):
        opens(cpu)
        if said is None:
            opens(gpu)
        else:
            with pytest.raises(UserError, match=said):
                opens(gpu)


def test_two_builds_of_dali_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is installed is read once, whatever is asked about it."""
    names = ["nvidia-dali-cuda130", "nvidia_dali_cuda120", "nvidia-nvimgcodec-cu13", "numpy"]
    both = [SimpleNamespace(metadata={"Name": name, "Version": "0.9.1"}) for name in names]
    scans: list[int] = []

    class Broken:
        @property
        def metadata(self) -> str:
            """As of a package whose description is not UTF-8."""
            return b"\xe9".decode()

    monkeypatch.setattr(importlib.metadata, "distributions", lambda: scans.append(1) or [Broken(), *both])
    once = cache(meters.packages.__wrapped__)
    for module in (meters, dali_decoder):
        monkeypatch.setattr(module, "packages", once)
    with pytest.raises(UserError, match="pip uninstall"):
        dali_decoder.installed()
    assert dali_decoder.codecs() == ("0.9.1",)
    assert len(scans) == 1


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
    loader._pipeline = Full()  # type: ignore[attr-defined]  # of the DALI loader alone
    monkeypatch.setattr(dali_decoder, "first_unusable", lambda files: pytest.fail("looked for a bad photograph"))
    with pytest.raises(RuntimeError, match="CUDA allocation failed"):
        loader._receive(loader.task.requests(0), 0)  # type: ignore[attr-defined]  # likewise
    loader.close()
