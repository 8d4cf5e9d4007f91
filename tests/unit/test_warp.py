"""The kernel of the resident loader: its plain reference against NumPy, and Triton's against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import ROOT

from fastddr import sampling
from fastddr.config import AugmentConfig
from fastddr.kernels import warp as kernels

TURNING = AugmentConfig(
    rotate=180, scale=(0.87, 1.15), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05
)  # fmt: skip


def bilinear(photograph: np.ndarray, back: np.ndarray, size: int) -> np.ndarray:
    """Pixel by pixel: the mean of the four neighbours by distance, black outside."""
    height, width, _ = photograph.shape
    framed = np.zeros((height + 2, width + 2, 3))
    framed[1:-1, 1:-1] = photograph
    image = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            x, y = back @ [column + 0.5, row + 0.5, 1] - 0.5
            left, top = int(np.floor(x)), int(np.floor(y))
            for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
                weight = (1 - abs(x - left - dx)) * (1 - abs(y - top - dy))
                place = (min(max(top + dy, -1), height) + 1, min(max(left + dx, -1), width) + 1)
                image[row, column] += weight * framed[place]
    return image


def a_batch(seed: int, count: int = 3, size: int = 12, augment: AugmentConfig = TURNING) -> tuple[torch.Tensor, ...]:
    """Photographs of several shapes behind one another, and maps: the arguments of `warp` but for the last two."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(size, 3 * size, (count, 2))
    ends = np.cumsum(sizes.prod(axis=1) * 3)
    pixels = rng.integers(0, 256, ends[-1], dtype=np.uint8)
    maps = sampling.training_maps(sampling.numbers(count, seed, 0), sizes[:, 0], sizes[:, 1], size, augment)
    return (
        torch.from_numpy(pixels),
        torch.from_numpy(ends - sizes.prod(axis=1) * 3),
        torch.from_numpy(sizes.astype(np.int32)),
        torch.from_numpy(sampling.inverse(maps.affine).astype(np.float32)),
        torch.from_numpy(maps.colour.astype(np.float32)),
    )


@given(st.integers(0, 2**31))
@settings(max_examples=5)
def test_the_reference_is_bilinear_with_black_outside(seed: int) -> None:
    pixels, offset, size, inverse, colour = a_batch(seed)
    images = kernels.warp(pixels, offset, size, inverse, colour, 12)
    for k in range(3):
        width, height = size[k].tolist()
        begin = int(offset[k])
        photograph = pixels[begin : begin + width * height * 3].view(height, width, 3).numpy()
        seen = bilinear(photograph, inverse[k].double().numpy(), 12)
        expected = seen @ colour[k, :, :3].double().numpy().T + colour[k, :, 3].double().numpy()
        # In grey levels 0.02: float32 places a pixel to within 1e-5 of itself, between neighbours 255 apart.
        assert np.abs(images[k].numpy() - expected).max() < 0.02 * np.abs(colour[k].numpy()).max()


def test_a_window_on_whole_pixels_is_the_window_itself() -> None:
    augment = AugmentConfig()
    pixels, offset, size, inverse, colour = a_batch(1, augment=augment)
    images = kernels.warp(pixels, offset, size, inverse, colour, 12)
    levels = (images - colour[0, :, 3]) / colour[0, :, :3].diagonal()
    assert (levels - levels.round()).abs().max() < 0.01
    assert levels.round().unique().numel() > 100


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 5, 7), (3, 4, 3), (1, 1, 1)])
@pytest.mark.parametrize("alike", [True, False])
def test_colour_maps_are_products(shape: tuple[int, int, int], alike: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (*shape, 3)).astype(np.float32)
    colour = rng.normal(size=(shape[0], 3, 4)).astype(np.float32)
    if alike:
        colour[:] = np.concatenate([np.diag([0.1, 0.2, 0.3]), [[1], [2], [3]]], axis=1)
    expected = np.einsum("nij,nhwj->nhwi", colour[:, :, :3], images) + colour[:, None, None, :, 3]
    seen = kernels.coloured(torch.from_numpy(images.copy()), torch.from_numpy(colour))
    assert np.abs(seen.numpy() - expected).max() < 1e-3


def test_one_shared_map_that_mixes_channels_mixes_them() -> None:
    colour = torch.zeros(2, 3, 4)
    colour[:, 0, 2] = 1  # red becomes blue
    images = torch.tensor([1.0, 2, 3]).expand(2, 4, 4, 3).contiguous()
    assert kernels.coloured(images, colour)[..., 0].unique().tolist() == [3]


COMPARE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch
from fastddr.config import AugmentConfig
from fastddr.kernels import warp as kernels
from test_warp import TURNING, a_batch
worst = 0.0
for seed, augment in ((0, TURNING), (1, AugmentConfig()), (2, TURNING)):
    arguments = a_batch(seed, count=4, size=20, augment=augment)
    expected = kernels.warp_reference(*arguments, 20)
    seen = kernels._warp_triton(*arguments, 20, torch.float32)
    assert seen.shape == (4, 20, 20, 3) and seen.is_contiguous()
    worst = max(worst, (seen - expected).abs().max().item())
    half = kernels._warp_triton(*arguments, 20, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 bits of precision, and the interpreter cuts off what a GPU rounds.
    assert ((half.float() - seen).abs() <= seen.abs() / 128 + 1e-6).all()
print(worst)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with PyTorch for CUDA)")
def test_tritons_kernel_computes_what_the_reference_does() -> None:
    """By Triton's interpreter, which needs no GPU, in a process of its own: it is chosen when Triton is imported."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'unit'}"}
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1e-3


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with PyTorch for CUDA)")
def test_headers_are_looked_for_where_triton_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's own scheme names a folder that need not be there."""
    (tmp_path / "Python.h").touch()
    known = {"include": str(tmp_path)}
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(kernels.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(
        kernels.sysconfig, "get_paths", lambda scheme="": known if scheme == "posix_prefix" else {"include": "/nowhere"}
    )
    assert kernels.triton_lacks() is None


def test_a_kernel_is_tried_on_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    try_ = kernels.fails.__wrapped__
    monkeypatch.setattr(kernels, "triton_lacks", lambda: None)
    assert try_(torch.device("cpu")) is None, "there it is the reference"

    def no_driver(*_: object) -> None:
        raise AssertionError("libcuda.so\n cannot found!")

    monkeypatch.setattr(kernels, "warp_reference", no_driver)
    assert try_(torch.device("cpu")) == "Triton cannot run here (libcuda.so cannot found!)"

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "warp_reference", full)
    with pytest.raises(torch.OutOfMemoryError):
        try_(torch.device("cpu"))
    monkeypatch.setattr(kernels, "triton_lacks", lambda: "a C compiler for Triton (gcc or clang)")
    assert try_(torch.device("cpu")) == "this machine lacks a C compiler for Triton (gcc or clang)", (
        "and nothing is tried"
    )


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/clang" if name == "clang" else None)
    monkeypatch.setattr("os.path.isfile", lambda path: True)
    assert kernels.triton_lacks() is None
    monkeypatch.setattr("os.path.isfile", lambda path: not path.endswith("Python.h"))
    assert kernels.triton_lacks() == "the header files of Python for Triton (python3-dev)"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert kernels.triton_lacks() == "a C compiler for Triton (gcc or clang)"
    monkeypatch.setenv("CC", "tcc")
    assert "header files" in (kernels.triton_lacks() or "")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels.triton_lacks() == "Triton, which comes with PyTorch for CUDA on Linux"


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastddr.kernels.warp_triton import warp_kernel
given = {"pixels": "*u8", "offset": "*i64", "size": "*i32", "inverse": "*fp32", "colour": "*fp32"}
for capability in sys.argv[1].split():
    for dtype in sys.argv[2].split():
        signature = given | {"images": f"*{dtype}", "image_size": "i32", "BLOCK": "constexpr"}
        source = ASTSource(warp_kernel, signature, constexprs={"BLOCK": 256})
        made = triton.compile(source, target=GPUTarget("cuda", int(capability), 32))
        print(capability, dtype, len(made.asm["cubin"]))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with PyTorch for CUDA)")
@pytest.mark.parametrize(
    ("hook", "capabilities", "dtypes"),
    [
        # Turing, Ampere, Hopper, and Blackwell in a data centre and in a desktop.
        ("", "75 80 90 100 120", "fp32 bf16 fp16"),
        ("import jaxtyping; jaxtyping.install_import_hook('fastddr', 'beartype.beartype')\n", "80", "bf16"),
    ],
    ids=["as users have it", "under the shape checks of tests"],
)
def test_tritons_kernel_compiles_for_every_card(tmp_path: Path, hook: str, capabilities: str, dtypes: str) -> None:
    """To machine code, which needs no GPU; the interpreter lets pass what the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-c", hook + COMPILE, capabilities, dtypes]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(capabilities.split()) * len(dtypes.split())
