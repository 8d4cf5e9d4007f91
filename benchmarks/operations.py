"""The operations of a ConvMixer one by one: depthwise and pointwise convolution, BatchNorm, GELU, forward and backward.

    python benchmarks/operations.py                        # 32² maps; on a GPU batch 64, widths 512 and 768
    python benchmarks/operations.py --kernels 9 --dtypes bf16 --channels 512
    python benchmarks/operations.py --tiny                 # a rehearsal, under 20 s on a CPU

Each operation is called often enough that a round of it lasts some milliseconds (on a GPU at most 128 times, all of
them queued before the first begins, so that Python's time to send them is no part of it); all operations of one width
and kind of numbers take turns, round after round. A convolution's data gradient and weight gradient are measured apart
(`aten.convolution_backward`, one output at a time), without bias; BatchNorm keeps float32 weights, as autocast does.

How to read it: the median is microseconds a call. GB/s and FLOP/s count what the operation must move and compute at
least: each map that goes in or out once. Most kernels of BatchNorm read their inputs twice, for the sums and again.
`share_of_copy` and `share_of_matmul` are shares of the ceilings that were measured just before; `roofline_share` is the
least time that these two allow, by the time it took: 1 is as fast as this machine can do it. A depthwise convolution's
FLOP count against the rate of full matrix products, although most of its kernels do not use the tensor cores.

Inputs are several tensors in turn, twice as large together as the last cache, so that no call finds its input there,
and as many results are kept, so that none is written over one that still lies there; `in_cache` marks rows where that
was not possible, whose GB/s may exceed what memory can do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import columns
import harness
import numpy as np
import script
import torch
import torch.nn.functional as F
from ceilings import Ceilings, measure, numbers_of
from columns import figure
from flops import least_seconds
from networks import LAYOUTS
from timing import Clock, cache_bytes, in_turn
from torch import Tensor

from fastddr.errors import UserError
from fastddr.ranks import available_cores
from fastddr.runtime import DTYPES, keep_memory

Layout = Literal["NCHW", "NHWC"]
#: Seconds that a round of one operation lasts at least.
_ROUND, _TINY_ROUND = 0.005, 0.001
#: Bytes that the tensors which take turns as one input, or as the result, may take together.
_MOST = 2**30
#: The three parts of a convolution, and which of input, weight and bias `convolution_backward` is asked for.
_GRADIENTS = {"data gradient": [True, False, False], "weight gradient": [False, True, False]}


@dataclass
class Options(script.Output):
    """Time single operations."""

    channels: tuple[int, ...] = ()
    """Widths; by default 512 and 768 on a GPU, 128 on a CPU."""
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    """Sides of the depthwise kernels, odd."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] | None = None
    """Kinds of numbers; by default bf16 and fp16 on a GPU, fp32 on a CPU."""
    layouts: tuple[Layout, ...] = ("NCHW", "NHWC")
    """Orders of the maps in memory."""
    rounds: int = 7
    """Counted rounds."""
    threads: int | None = None
    """CPU threads; by default all cores."""
    tiny: bool = False
    """4 images of 32 channels and 16² places, whatever else is asked for: a rehearsal."""


@dataclass(frozen=True)
class Shape:
    """The maps that are worked on."""

    batch: int
    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.batch}×{self.channels}×{self.side}×{self.side}"

    @property
    def elements(self) -> int:
        """Of one map."""
        return self.batch * self.channels * self.side**2


@dataclass(frozen=True)
class Operation:
    """One operation, ready to be called, and what it costs at least."""

    what: str
    """`depthwise forward`, `GELU backward`, …"""
    kernel: int | None
    layout: str
    call: Callable[[], object]
    flop: int
    moved: int
    """Bytes."""

    @property
    def name(self) -> str:
        """Without shape and kind of numbers."""
        return f"{self.what}{f' k{self.kernel}' if self.kernel else ''}, {self.layout}"


class Inputs:
    """Maps and gradients in one layout, as many of each as the cache demands, and room for as many results."""

    def __init__(self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device) -> None:
        self.shape, self.dtype, self.layout, self.device = shape, dtype, layout, device
        size, cache = shape.elements * dtype.itemsize, cache_bytes(device)
        wanted = math.ceil(2 * cache / size)
        copies = max(1, min(wanted, _MOST // size))
        self.in_cache = copies < wanted
        self.maps = [self.tensor(shape.batch, shape.channels, shape.side, shape.side) for _ in range(copies)]
        self.gradients = [torch.randn_like(x) for x in self.maps]
        self.results: deque[object] = deque(maxlen=copies)

    def tensor(self, *sizes: int) -> Tensor:
        """Random numbers in the layout."""
        return torch.randn(sizes, device=self.device).to(self.dtype).contiguous(memory_format=LAYOUTS[self.layout])

    def each(self, call: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        """The call with a map and a gradient, of which each pair takes its turn."""
        return self.taking_turns([partial(call, x, dy) for x, dy in zip(self.maps, self.gradients, strict=True)])

    def taking_turns(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """Of calls that have their inputs, one after the other."""
        return in_turn(calls, self.results)


def convolutions(inputs: Inputs, kernel: int, *, depthwise: bool) -> Iterator[Operation]:
    """Forward, data gradient and weight gradient of a depthwise convolution, or of a pointwise one (kernel 1)."""
    shape, channels = inputs.shape, inputs.shape.channels
    groups = channels if depthwise else 1
    weight = inputs.tensor(channels, channels // groups, kernel, kernel)
    padding = kernel // 2
    flop = 2 * shape.elements * weight[0].numel()
    moved = (2 * shape.elements + weight.numel()) * inputs.dtype.itemsize
    what, k = ("depthwise", kernel) if depthwise else ("pointwise", None)

    def forward(x: Tensor, dy: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, padding=padding, groups=groups)

    yield Operation(f"{what} forward", k, inputs.layout, inputs.each(forward), flop, moved)
    for part, mask in _GRADIENTS.items():

        def backward(x: Tensor, dy: Tensor, mask: list[bool] = mask) -> object:
            return torch.ops.aten.convolution_backward(
                dy, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, mask
            )

        yield Operation(f"{what} {part}", k, inputs.layout, inputs.each(backward), flop, moved)


def batch_norm(inputs: Inputs) -> Iterator[Operation]:
    """In training mode."""
    channels, size = inputs.shape.channels, inputs.shape.elements * inputs.dtype.itemsize
    weight, bias = (torch.ones(channels, device=inputs.device, requires_grad=True) for _ in range(2))
    mean, variance = torch.zeros(channels, device=inputs.device), torch.ones(channels, device=inputs.device)

    def forward(x: Tensor, dy: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, training=True)

    def gradients(x: Tensor, dy: Tensor) -> Callable[[], object]:
        x = x.detach().requires_grad_()
        y = forward(x, dy)
        return lambda: torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)

    def untracked(x: Tensor, dy: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(x, dy)

    yield Operation("BatchNorm forward", None, inputs.layout, inputs.each(untracked), 0, 2 * size)
    calls = [gradients(x, dy) for x, dy in zip(inputs.maps, inputs.gradients, strict=True)]
    yield Operation("BatchNorm backward", None, inputs.layout, inputs.taking_turns(calls), 0, 3 * size)


def gelu(inputs: Inputs) -> Iterator[Operation]:
    """Exact, as the models have it."""
    size = inputs.shape.elements * inputs.dtype.itemsize
    yield Operation("GELU forward", None, inputs.layout, inputs.each(lambda x, dy: F.gelu(x)), 0, 2 * size)
    backward = inputs.each(lambda x, dy: torch.ops.aten.gelu_backward(dy, x))
    yield Operation("GELU backward", None, inputs.layout, backward, 0, 3 * size)


def families(inputs: Inputs, kernels: Sequence[int]) -> Mapping[str, Callable[[], Iterator[Operation]]]:
    """All of one layout."""
    depthwise = {f"depthwise k{k}": partial(convolutions, inputs, k, depthwise=True) for k in kernels}
    return depthwise | {
        "pointwise": partial(convolutions, inputs, 1, depthwise=False),
        "BatchNorm": partial(batch_norm, inputs),
        "GELU": partial(gelu, inputs),
    }


def race(shape: Shape, precision: str, options: Options, ceilings: Ceilings, clock: Clock) -> list[dict[str, Any]]:
    """Rows of all operations of one shape and kind of numbers, and of the ratios of the layouts."""
    dtype = DTYPES[precision]
    found: dict[str, Operation] = {}
    trials: dict[str, Callable[[], float]] = {}
    failed: list[dict[str, Any]] = []
    in_cache = False
    about = {"dtype": precision, "batch_size": shape.batch, "channels": shape.channels, "side": shape.side}

    def leave_out(name: str, problem: RuntimeError) -> None:
        reason = str(problem).splitlines()[0]
        harness.say(f"{name}, {precision}, {shape} is left out: {reason.rstrip('.')}.")
        failed.append({"name": name, "kind": "failed", **about, "failed": reason})

    for layout in options.layouts:
        # RuntimeError: no memory, or the device has no such kernel.
        try:
            inputs = Inputs(shape, dtype, layout, clock.device)
        except RuntimeError as problem:
            leave_out(f"all of {layout}", problem)
            continue
        in_cache = inputs.in_cache
        for name, family in families(inputs, options.kernels).items():
            try:
                ready = list(family())
            except RuntimeError as problem:
                leave_out(f"{name}, {layout}", problem)
                continue
            for operation in ready:
                try:
                    times, _ = clock.repeats(operation.call, _TINY_ROUND if options.tiny else _ROUND)
                except RuntimeError as problem:
                    leave_out(operation.name, problem)
                    continue
                found[operation.name] = operation
                trials[operation.name] = partial(clock.seconds, operation.call, times)
    seconds = harness.interleaved(trials, options.rounds)
    rows = [row(found[name], about, seconds[name], ceilings, in_cache=in_cache) for name in found]
    return rows + failed + slower(rows, seconds, about)


def row(
    operation: Operation, about: Mapping[str, Any], seconds: Sequence[float], ceilings: Ceilings, *, in_cache: bool
) -> dict[str, Any]:
    """What a row of the table says."""
    median = float(np.median(seconds))
    peak = ceilings.peak(about["dtype"])
    found: dict[str, Any] = {
        "name": operation.name,
        "kind": "operation",
        "operation": operation.what,
        **({"kernel": operation.kernel} if operation.kernel else {}),
        "layout": operation.layout,
        **about,
        **harness.spread([1e6 * value for value in seconds]),
        "unit": "µs",
        "gigabytes_per_second": figure(operation.moved / median / 1e9),
        "share_of_copy": figure(operation.moved / median / ceilings.bandwidth),
    }
    if operation.flop:
        found["teraflop_per_second"] = figure(operation.flop / median / 1e12)
    if operation.flop and peak is not None:
        found["share_of_matmul"] = figure(operation.flop / median / peak)
    if peak is not None or not operation.flop:
        least = least_seconds(operation.flop, operation.moved, peak or math.inf, ceilings.bandwidth)
        found["roofline_share"] = figure(least / median)
    return found | ({"in_cache": True} if in_cache else {})


def slower(
    rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, Sequence[float]], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """For each kernel by how many times NHWC takes longer than NCHW, forward and both gradients together, by round."""
    found = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows if "kernel" in row):
        parts = {
            layout: [seconds[r["name"]] for r in rows if r.get("kernel") == kernel and r["layout"] == layout]
            for layout in LAYOUTS
        }
        if any(len(values) != 1 + len(_GRADIENTS) for values in parts.values()):
            continue  # a part is missing in a layout, or a layout was not asked for
        first, last = (np.sum(parts[layout], axis=0).tolist() for layout in ("NCHW", "NHWC"))
        name = f"depthwise k{kernel}, NHWC / NCHW"
        ratio = harness.ratio(last, first)
        found.append({"name": name, "kind": "ratio", "kernel": kernel, **about, **ratio, "unit": "× the time"})
    return found


def _by_how_much(row: Mapping[str, Any]) -> str:
    if row["low"] <= 1 <= row["high"]:
        return f"NCHW and NHWC cannot be told apart ({row['median']:.2f}, {row['low']:.2f}-{row['high']:.2f})"
    slow, fast = ("NHWC", "NCHW") if row["low"] > 1 else ("NCHW", "NHWC")
    times, *ends = (row[key] if row["low"] > 1 else 1 / row[key] for key in ("median", "low", "high"))
    return f"{slow} takes {times:.2f} ({min(ends):.2f}-{max(ends):.2f}) times as long as {fast}"


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much the slower layout loses at each kernel, and which depthwise operation is furthest from its roofline."""
    said = []
    ratios: dict[str, list[str]] = {}
    for row in (row for row in rows if row["kind"] == "ratio"):
        text = f"k {row['kernel']}: {_by_how_much(row)}"
        shape = Shape(row["batch_size"], row["channels"], row["side"])
        ratios.setdefault(f"Depthwise convolution, forward and gradients, {row['dtype']}, {shape}", []).append(text)
    said += [f"{what}: {'; '.join(parts)}." for what, parts in ratios.items()]
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if row["kind"] == "operation" and "kernel" in row and "roofline_share" in row:
            key = tuple(row[k] for k in ("operation", "kernel", "dtype", "batch_size", "channels", "side"))
            best[key] = max(best.get(key, row), row, key=lambda r: r["roofline_share"])
    if best:
        worst = min(best.values(), key=lambda r: r["roofline_share"])
        said.append(
            f"Of the depthwise operations, each in its faster layout, {worst['name']}, {worst['dtype']}, "
            f"{worst['channels']} channels, is furthest from its roofline: it takes {worst['median']:,.0f} µs, "
            f"{1 / worst['roofline_share']:.1f} times the least that the measured ceilings allow."
        )
    if any(row.get("in_cache") for row in rows):
        said.append("Inputs are small beside the last cache of this device: GB/s may be the cache's, not the memory's.")
    return said


def main(options: Options) -> None:
    """Measure, print and write."""
    even = [kernel for kernel in options.kernels if kernel % 2 == 0]
    if even:
        raise UserError(f"--kernels {even[0]}: an even kernel changes the map's size; take odd ones.")
    harness.begin(options.rounds)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    threads = options.threads or available_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # As `fastddr.runtime` trains.
    if gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    else:
        keep_memory()
    dtypes = options.dtypes or (("bf16", "fp16") if gpu else ("fp32",))
    widths = options.channels or ((512, 768) if gpu else (128,))
    shapes = [Shape(64 if gpu else 8, channels, 32) for channels in widths]
    if options.tiny:
        shapes = [Shape(4, 32, 16)]
    numbers = [numbers_of(precision, device.type) for precision in dtypes]
    rows: list[dict[str, Any]] = []
    with harness.writing("operations", rows, options.out, wandb=options.wandb, tiny=options.tiny):
        harness.say("ceilings …")
        ceilings = measure(device, numbers, options.rounds, threads, tiny=options.tiny)
        rows += ceilings.rows()
        harness.show(f"Ceilings of {harness.hardware_name(harness.machine())}", rows)
        for precision, shape in product(dtypes, shapes):
            found = race(shape, precision, options, ceilings, Clock(device, queued=True))
            columns.show(f"{shape}, {precision}", [row for row in found if row["kind"] == "operation"])
            rows += found
            if gpu:
                torch.cuda.empty_cache()
        for line in sentences(rows):
            harness.say(line)


if __name__ == "__main__":
    script.run(main, Options)
