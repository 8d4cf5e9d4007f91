"""What this machine can do at most, measured: copying, matrix products, decoding.

    python benchmarks/ceilings.py
    python benchmarks/ceilings.py --data DDR-masters   # decoding of your photographs
    python benchmarks/ceilings.py --tiny               # small and quick: a rehearsal, no figures

Copying: bytes a second that pass through memory when a large buffer is copied, read and written ones counted; on a GPU
within its own memory. Matrix products: FLOP a second of the best of a few sizes, square matrices of random numbers, for
each kind of numbers (tf32 is what training makes of float32 products on a GPU; fp32 is without it). Decoding:
photographs a second that libjpeg-turbo decodes in one thread, times the cores.

Nothing of a training step can be faster than the first two, and no loader that decodes whole photographs on the cores
than the third. `operations.py` and `step.py` measure the first two anew and give their figures as shares of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import harness
import limits
import numpy as np
import script
import torch
from timing import Clock

from fastddr.errors import UserError
from fastddr.ranks import available_cores

#: Sides of the matrices.
_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}
_TINY = (256,)
#: Seconds of a round, and what one product may take in its warm-up before the size is given up.
_ROUND, _LONGEST = 0.03, 0.25
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Copies of less than this could live in a cache. On a rehearsal that is no matter.
_MEGABYTES, _TINY_MEGABYTES = 256, 16


@dataclass
class Options(script.Output):
    """Measure copying, matrix products and decoding."""

    data: Path | None = None
    """Folder of photographs to decode; by default synthetic ones, in the user's cache."""
    encodings: tuple[Literal["95-420", "100-444"], ...] = ("95-420", "100-444")
    """Of the synthetic photographs: JPEG quality and chroma."""
    photographs: int | None = None
    """Size of the synthetic set; by default that of the quickstart."""
    decode: bool = True
    """Also measure decoding."""
    rounds: int = 7
    """Counted rounds."""
    threads: int | None = None
    """CPU threads; by default all cores."""
    tiny: bool = False
    """Small sizes and 60 synthetic photographs: a rehearsal."""


@dataclass(frozen=True)
class Ceilings:
    """Copying and matrix products, a value a round."""

    copy: list[float]
    """Bytes a second, read and written ones counted."""
    matmul: dict[str, list[float]]
    """FLOP a second by kind of numbers."""
    device: str
    """`cuda` or `cpu`."""

    @property
    def bandwidth(self) -> float:
        """Bytes a second, the median."""
        return float(np.median(self.copy))

    def peak(self, precision: str) -> float | None:
        """FLOP a second when training in a precision, the median; None where its kind of numbers was left out."""
        numbers = numbers_of(precision, self.device)
        return float(np.median(self.matmul[numbers])) if numbers in self.matmul else None

    def rows(self) -> list[dict[str, Any]]:
        """For the JSON and the table."""
        found: list[dict[str, Any]] = [
            {"name": "copy", "kind": "ceiling", **harness.spread([rate / 1e9 for rate in self.copy]), "unit": "GB/s"}
        ]
        unit, scale = ("TFLOP/s", 1e12) if self.device == "cuda" else ("GFLOP/s", 1e9)
        for numbers, rates in self.matmul.items():
            about = {"name": f"matmul, {numbers}", "kind": "ceiling", "numbers": numbers}
            found.append(about | harness.spread([rate / scale for rate in rates]) | {"unit": unit})
        return found


def numbers_of(precision: str, device: str) -> str:
    """The kind of numbers in which products are computed when training in a precision, as `fastddr.runtime` sets it."""
    return "tf32" if (precision, device) == ("fp32", "cuda") else precision


def measure(device: torch.device, numbers: Sequence[str], rounds: int, threads: int, *, tiny: bool) -> Ceilings:
    """Copying, and matrix products in these kinds of numbers; what cannot be measured is said and left out."""
    copy = limits.copied(device, threads, rounds, _TINY_MEGABYTES if tiny else _MEGABYTES)
    clock = Clock(device)
    sizes = _TINY if tiny else _SIZES[device.type]
    trials: dict[str, Callable[[], float]] = {}
    for kind in numbers:
        reason = "its products take too long here"
        for side in sizes:
            try:
                trial = _product(clock, kind, side)
            except (RuntimeError, ValueError) as problem:  # no such product on this device, or no memory for it
                reason = str(problem).splitlines()[0]
                break
            if trial is None:
                break
            trials[f"{kind} {side}"] = trial
        if f"{kind} {sizes[0]}" not in trials:
            harness.say(f"Matrix products in {kind} are left out: {reason.rstrip('.')}.")
    found = harness.interleaved(trials, rounds)
    matmul = {}
    for kind in numbers:
        mine = {name: rates for name, rates in found.items() if name.startswith(f"{kind} ")}
        if mine:
            matmul[kind] = max(mine.values(), key=lambda rates: float(np.median(rates)))
    if device.type == "cuda":
        trials.clear()  # they hold the matrices
        trial = None
        torch.cuda.empty_cache()
    return Ceilings(copy, matmul, device.type)


@contextmanager
def _precision(kind: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product(clock: Clock, kind: str, side: int) -> Callable[[], float] | None:
    """FLOP a second of a round; None where one product takes longer than it may."""

    def matrix() -> torch.Tensor:
        # Random, for a GPU that multiplies zeros draws less power and clocks higher.
        return torch.randn(side, side, device=clock.device).to(_DTYPES[kind])

    left, right, out = matrix(), matrix(), matrix()

    def product() -> torch.Tensor:
        return torch.mm(left, right, out=out)

    with _precision(kind):
        times, took = clock.repeats(product, _ROUND)
    if clock.device.type == "cpu" and took > _LONGEST:
        return None

    def turn() -> float:
        with _precision(kind):
            return 2 * side**3 / clock.seconds(product, times)

    return turn


def _decoding_rows(options: Options, cores: int) -> Iterator[dict[str, Any]]:
    # Not at the top: `step` and `operations` import this file and need no photographs.
    import sources

    photographs = 60 if options.tiny else options.photographs
    for name, root in sources.roots(options.data, options.encodings, photographs):
        files = sources.read(root).files()
        if not all(file.lower().endswith((".jpg", ".jpeg")) for file in files):
            harness.say(f"Decoding of {name} is left out: not all of its photographs are JPEGs.")
            continue
        try:
            rates = limits.decoded(limits.spaced(files, 64), 0.05 if options.tiny else 0.5, options.rounds)
        except UserError as problem:
            harness.say(f"Decoding of {name} is left out: {harness.sentence(problem)}.")
            continue
        about = {"name": f"decode, {name}, one core × {cores}", "kind": "ceiling", "photographs": name}
        yield about | harness.spread([cores * rate for rate in rates]) | {"unit": "images/s"}


def main(options: Options) -> None:
    """Measure, print and write."""
    harness.begin(options.rounds)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    threads = options.threads or available_cores()
    torch.set_num_threads(threads)
    numbers = ("fp32", *["tf32"] * (device.type == "cuda"), "bf16", "fp16")
    rows: list[dict[str, Any]] = []
    with harness.writing("ceilings", rows, options.out, wandb=options.wandb, tiny=options.tiny):
        rows += measure(device, numbers, options.rounds, threads, tiny=options.tiny).rows()
        if options.decode:
            rows.extend(_decoding_rows(options, threads))
        harness.show(f"Ceilings of {harness.hardware_name(harness.machine())}", rows)


if __name__ == "__main__":
    script.run(main, Options)
