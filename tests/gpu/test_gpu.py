"""Loaders on a card: the GPU decoder against PIL, half precision, buffers and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import pytest
import torch
from photographs import ODD
from reference import DECODED, DECODED_MEAN, POLICIES, REAL, furthest, needs_dali
from tests_support import environment, task

from fastddr import loaders
from fastddr.config import AugmentConfig
from fastddr.data import manifest
from fastddr.loaders import dali_decoder

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)
#: What half precision adds to a normalised value of up to 2.7, in grey levels (of 255, a standard deviation of 0.3).
ROUNDED = {torch.float16: 0.1, torch.bfloat16: 0.8}

#: In a process of its own: a decoder that crashes must fail the test and not end the session.
COMPARE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from reference import furthest
print(*furthest(**json.loads(sys.argv[2])))
"""


def pairs(*policies: str) -> list[Any]:
    """Loaders with policies. Of PyTorch's, which decodes on the host, one is enough: `fundus`, with every map."""
    both = [
        pytest.param(name, policy, marks=needs_dali if name == "dali" else ())
        for name in ("dali", "resident")
        for policy in policies
    ]
    return [*both, ("torchvision", "fundus")]


class Crashed(Exception):
    """A process was ended by a signal."""


def off(
    name: str, data: Path, canvas: int, policy: str, dtype: torch.dtype, batch_size: int = 9, **changes: Any
) -> tuple[float, float]:
    """Largest and mean difference from the reference in grey levels, of all photographs of train.

    Where DALI is all of the loader, or does what it seldom does, in a process of its own. `changes` are settings of the
    task.
    """
    augment = {field.name: getattr(POLICIES[policy], field.name) for field in fields(AugmentConfig)}
    asked = {"name": name, "data": str(data), "canvas": canvas, "augment": augment, "batch_size": batch_size,
             "dtype": str(dtype).removeprefix("torch."), **changes}  # fmt: skip
    if name == "dali" or changes:
        arguments = [sys.executable, "-c", COMPARE, str(Path(__file__).parents[1]), json.dumps(asked)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=90, env=environment())
        if done.returncode < 0:
            raise Crashed(f"signal {-done.returncode}: {done.stderr[-2000:]}")
        assert done.returncode == 0, done.stderr[-2000:]
        most, mean = map(float, done.stdout.split()[-2:])
    else:
        most, mean = furthest(**asked)
    print(f"{name}, {policy}, {data.name} at {canvas} px, {dtype}: off by {most:.2f} levels, {mean:.3f} on average")
    return most, mean


@pytest.mark.parametrize("canvas", [80, 72], ids=["own canvas", "scaled"])
@pytest.mark.parametrize(("name", "policy"), pairs(*POLICIES))
def test_the_pixels_on_the_card_are_those_of_the_reference(name: str, canvas: int, policy: str, tiny: Path) -> None:
    """Regions and whole photographs, decoded on the card; JPEGs of 4:2:0, with fancy upsampling on."""
    most, mean = off(name, tiny, canvas, policy, torch.float32)
    # A warp by PIL cuts fractions off, and scaling rounds to whole levels.
    more = (1.01 if canvas != 80 else 0) + (1.01 if name == "torchvision" and policy == "fundus" else 0)
    assert most <= DECODED + more
    assert mean <= DECODED_MEAN + more / 2


@pytest.mark.parametrize("name", REAL)
def test_photographs_that_are_no_plain_jpegs(name: str, odd: manifest.Manifest) -> None:
    """Turned ones, grey ones, four inks, palettes and so on; what the card cannot decode is decoded on the host."""
    most, mean = off(name, Path(odd.root), 80, "report", torch.float32, batch_size=len(ODD))
    assert most <= DECODED
    assert mean <= DECODED_MEAN


@pytest.fixture(scope="session")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    """As `mixed`, and two of more than a megapixel: of such nvJPEG decodes also the Huffman codes on the card."""
    shapes = [*photographs.SHAPES, (1300, 1000), (1000, 1270)]
    return manifest.read(photographs.mixed(tmp_path_factory.mktemp("data") / "unequal", shapes))


@pytest.mark.parametrize(("name", "policy"), pairs("none", "fundus"))
def test_small_and_large_photographs_in_one_batch(name: str, policy: str, unequal: manifest.Manifest) -> None:
    most, mean = off(name, Path(unequal.root), 80, policy, torch.float32)
    more = 1.01 + (1.01 if name == "torchvision" else 0)
    assert most <= DECODED + more
    assert mean <= DECODED_MEAN + more / 2


@needs_dali
@pytest.mark.parametrize("of", ["tiny", "unequal"])
def test_regions_of_photographs(of: str, tiny: Path, unequal: manifest.Manifest) -> None:
    """nvImageCodec 0.9 may crash at them, which is why `auto` does without: no other version may."""
    data, more = (tiny, 0.0) if of == "tiny" else (Path(unequal.root), 1.01)
    try:
        most, mean = off("dali", data, 80, "report", torch.float32, regions="always")
    except Crashed as error:
        if all(version.startswith("0.9") for version in dali_decoder.codecs()):
            pytest.xfail(f"nvImageCodec {dali_decoder.codecs()}: {error}")
        raise
    assert most <= DECODED + more
    assert mean <= DECODED_MEAN + more / 2


@pytest.mark.parametrize("of", ["tiny", "odd"])
@pytest.mark.parametrize("name", [pytest.param("dali", marks=needs_dali), "resident"])
def test_jpeg_engines(name: str, of: str, tiny: Path, odd: manifest.Manifest) -> None:
    """A card that has none decodes on CUDA."""
    data, batch_size = (tiny, 9) if of == "tiny" else (Path(odd.root), len(ODD))
    most, mean = off(name, data, 80, "report", torch.float32, batch_size, jpeg_engines=True)
    assert most <= DECODED
    assert mean <= DECODED_MEAN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "policy"), pairs("report", "fundus"))
def test_half_precision(name: str, policy: str, dtype: torch.dtype, tiny: Path) -> None:
    most, mean = off(name, tiny, 80, policy, dtype)
    # The colour map of `fundus` may have darkened an image, and its inverse then stretches the rounding.
    stretched = ROUNDED[dtype] * (3 if policy == "fundus" else 1)
    assert most <= DECODED + stretched + (1.01 if name == "torchvision" and policy == "fundus" else 0)
    assert mean <= DECODED_MEAN + stretched


@pytest.mark.parametrize("policy", ["report", "fundus"])
@pytest.mark.parametrize("canvas", [80, 72], ids=["own canvas", "scaled"])
@pytest.mark.parametrize("name", REAL)
def test_a_photograph_does_not_depend_on_its_place_in_a_batch(name: str, canvas: int, policy: str, tiny: Path) -> None:
    """DALI's default gives one part of a batch to the JPEG engines and the rest to CUDA."""
    found = manifest.read(tiny)
    ids = found.ids("train")[:24]

    def images(**changes: Any) -> dict[int, torch.Tensor]:
        wanted = task(found, **{"ids": ids, "canvas": canvas, "augment": POLICIES[policy], "threads": 2} | changes)
        loader = loaders.build(name, replace(wanted, device=CARD))
        made = {
            int(id_): image
            for batch in loader.epoch()
            for id_, image, valid in zip(batch.id.tolist(), batch.image, batch.valid.tolist(), strict=True)
            if valid
        }
        loader.close()
        assert len(made) == 24
        return made

    # Training's maps belong to the photograph and not to its place.
    expected = images(batch_size=24)
    for batch_size in (12, 3, 1):
        for id_, image in images(batch_size=batch_size).items():
            assert torch.equal(image, expected[id_]), (id_, batch_size)
    # An evaluation is in the order of the ids.
    expected = images(batch_size=24, train=False)
    for order in (ids[::-1].copy(), np.roll(ids, 7)):
        for id_, image in images(batch_size=24, train=False, ids=order).items():
            assert torch.equal(image, expected[id_]), id_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*REAL, "replay"])
def test_batches_stay_as_they_were_and_come_again(name: str, dtype: torch.dtype, tiny: Path) -> None:
    """In float32 and float16 a batch of `dali` is DALI's own buffer; in bfloat16 it is a copy."""
    wanted = replace(task(manifest.read(tiny)), device=CARD, dtype=dtype)
    loader = loaders.build(name, wanted)
    kept = [(batch.image, batch.image.clone()) for batch in loader.epoch()]
    again = [batch.image for batch in loader.epoch()]
    loader.close()
    for (image, copy), repeated in zip(kept, again, strict=True):
        assert image.device.type == "cuda"
        assert torch.equal(image, copy), "a batch that is kept is not written over"
        assert torch.equal(image, repeated)


@pytest.mark.parametrize("name", REAL)
def test_the_host_never_waits_for_the_card(name: str, tiny: Path) -> None:
    """PyTorch refuses every call that makes the host wait. What DALI does inside is not seen by it."""
    loader = loaders.build(name, replace(task(manifest.read(tiny)), device=CARD, dtype=torch.float16))
    list(loader.epoch(0))
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype
            torch.cuda.set_sync_debug_mode("error")
        for batch in loader.epoch(1):
            batch.image.sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()


#: Memory of the card over so many epochs, the odd ones left early, and after `close`: of PyTorch, and of all together.
MEMORY = """
import gc, json, sys
from dataclasses import fields, replace
sys.path.insert(0, sys.argv[1])
import torch
from fastddr import loaders
from fastddr.data import manifest
from tests_support import task
device = torch.device("cuda", 0)
torch.zeros(1, device=device)

def used():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info(device)
    return {"torch": torch.cuda.memory_allocated(device) / 2**20, "card": (whole - free) / 2**20}

def walk(loader, epochs):
    for number in range(epochs):
        for k, batch in enumerate(loader.epoch(number)):
            if number % 2 and k == 1:
                break

def build():
    return loaders.build(sys.argv[2], replace(task(manifest.read(sys.argv[3]), threads=2), device=device))

loader = build()
walk(loader, 4)
found = {"before": used()}
walk(loader, int(sys.argv[4]))
found["after the walk"] = used()
loader.close()
del loader
found["closed"] = used()
for _ in range(5):
    loader = build()
    walk(loader, 2)
    loader.close()
    del loader
found["after 5 loaders"] = used()
print(json.dumps(found))
"""


@pytest.mark.alone
@pytest.mark.parametrize("name", REAL)
def test_memory_of_the_card_is_flat_and_given_back(name: str, tiny: Path) -> None:
    """Of the card as a whole."""
    # Were every batch of `dali` (192 KiB) left behind, 200 epochs of four on average would be 150 MiB. PyTorch counts
    # the others' batches itself, and to the byte.
    epochs = 200 if name == "dali" else 20
    arguments = [sys.executable, "-c", MEMORY, str(Path(__file__).parents[1]), name, str(tiny), str(epochs)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=90, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["after the walk"]["torch"] <= seen["before"]["torch"] + 1, seen
    assert seen["after the walk"]["card"] <= seen["before"]["card"] + 32, seen
    assert seen["closed"]["torch"] <= 1, seen
    # DALI keeps its pool for the next pipeline.
    assert seen["after 5 loaders"]["card"] <= seen["closed"]["card"] + 32, seen
