"""The benchmarks of ceilings and of single operations: what they measure, say and leave out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import BENCHMARKS
from torch import nn

from fastddr.kernels import warp as kernels
from fastddr.loaders import resident

CPU = torch.device("cpu")


def test_ceilings_say_what_they_leave_out(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = load("ceilings")
    product = ceilings._product

    def failing(clock: Any, kind: str, side: int) -> Any:
        if kind == "fp16":
            raise RuntimeError("no such product.\nIn some file.")
        return None if kind == "bf16" else product(clock, kind, 16)

    monkeypatch.setattr(ceilings, "_product", failing)
    said: list[str] = []
    monkeypatch.setattr(ceilings.harness, "say", said.append)
    found = ceilings.measure(CPU, ("fp32", "bf16", "fp16"), 5, 1, tiny=True)
    assert said == [
        "Matrix products in bf16 are left out: its products take too long here.",
        "Matrix products in fp16 are left out: no such product.",
    ]
    assert [(row["name"], row["unit"], row["n"]) for row in found.rows()] == [
        ("copy", "GB/s", 5), ("matmul, fp32", "GFLOP/s", 5),
    ]  # fmt: skip
    assert found.peak("fp32") == pytest.approx(1e9 * found.rows()[1]["median"])
    assert found.peak("bf16") is None


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a card that there is not is told: cycles to sleep, and events; each lasts a tenth of a second."""
    told: list[Any] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def synchronize(self) -> None:
            pass

        def query(self) -> bool:
            return False

        def elapsed_time(self, end: Event) -> float:
            return 100.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", told.append)
    return told


def test_short_calls_wait_for_the_card_together(load: Any, on_card: list[Any]) -> None:
    """Before the first event, so that neither the sleep nor Python's time to send them is measured."""
    timing, card = load("timing"), torch.device("cuda", 0)
    clock = timing.Clock(card, queued=True)
    assert clock.seconds(lambda: on_card.append("call"), 3) == pytest.approx(0.1 / 3)
    assert on_card == [3 * timing._SENT, "event", *["call"] * 3, "event"]
    assert clock.repeats(int, 100.0)[0] == timing._QUEUED
    on_card.clear()
    # Where the card was done with its sleep before the host had sent the calls, it waited for Python between them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.Event, "query", lambda event: True)
        clock.seconds(int, 3)
    assert on_card == [3 * timing._SENT, "event", "event", 3 * timing._SLOW * timing._SENT, "event", "event"]
    on_card.clear()
    plain = timing.Clock(card)
    plain.seconds(int)
    assert on_card == ["event", "event"], "of a step Python's time is a part"
    assert plain.repeats(int, 100.0)[0] > timing._QUEUED


def test_the_kernel_alone_is_timed_behind_a_queue(
    load: Any, on_card: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = load("stages")
    warped: list[int] = []
    places: list[int] = []

    def warp(batch: int) -> torch.Tensor:
        made = torch.empty(1024)
        warped.append(batch)
        places.append(made.data_ptr())
        return made

    monkeypatch.setattr(kernels, "warp", warp)
    # Of which two batches are as large as twice the cache.
    monkeypatch.setattr(stages, "cache_bytes", lambda device: 4096)

    def epoch(number: int) -> Iterator[None]:
        for batch in range(5):
            yield resident.kernels.warp(batch)

    loader = SimpleNamespace(epoch=epoch, task=SimpleNamespace(device=torch.device("cuda", 0), micro_batch_size=50))
    # 24 batches of 50 in a tenth of a second.
    assert stages.kernel(loader, 0.0) == pytest.approx([12_000.0] * stages.ROUNDS)
    assert warped == [batch % 5 for batch in range(5 + 24 * (stages.ROUNDS + 1))]
    assert on_card[::3] == [24 * load("timing")._SENT] * (stages.ROUNDS + 1)
    assert all(len(set(places[k : k + 3])) == 3 for k in range(5, len(places) - 2)), "none is written over a cached one"


def test_shares_of_an_operation(load: Any) -> None:
    operations, ceilings = load("operations"), load("ceilings")
    limits = ceilings.Ceilings([100e9], {"fp32": [1e12]}, "cpu")
    about = {"dtype": "fp32"}
    bound_by_bytes = operations.Operation("depthwise forward", 3, "NCHW", int, flop=10**9, moved=10**9)
    row = operations.row(bound_by_bytes, about, [0.02] * 5, limits, in_cache=False)
    assert (row["median"], row["unit"], row["kernel"], row["layout"]) == (pytest.approx(2e4), "µs", 3, "NCHW")
    assert (row["gigabytes_per_second"], row["share_of_copy"]) == (50, 0.5)
    assert (row["teraflop_per_second"], row["share_of_matmul"], row["roofline_share"]) == (0.05, 0.05, 0.5)
    bound_by_flop = operations.Operation("pointwise forward", None, "NCHW", int, flop=10**10, moved=10**9)
    assert operations.row(bound_by_flop, about, [0.02] * 5, limits, in_cache=False)["roofline_share"] == 0.5
    unknown = operations.row(bound_by_flop, {"dtype": "bf16"}, [0.02] * 5, limits, in_cache=False)
    assert "roofline_share" not in unknown
    assert "share_of_matmul" not in unknown


def test_sentences_on_layouts_and_on_the_furthest(load: Any) -> None:
    operations = load("operations")
    about = {"dtype": "bf16", "batch_size": 64, "channels": 512, "side": 32}
    parts = ("forward", "data gradient", "weight gradient")
    rows, seconds = [], {}
    # k 5 is faster in NHWC, k 9 in NCHW; of k 7 a part is missing, k 3 is no difference.
    for kernel, (first, last) in {3: (1.0, 1.0), 5: (3.0, 2.0), 7: (1.0, 1.0), 9: (1.0, 2.5)}.items():
        for layout, scale in (("NCHW", first), ("NHWC", last)):
            for part in parts[: 2 if (kernel, layout) == (7, "NHWC") else 3]:
                name = f"depthwise {part} k{kernel}, {layout}"
                took = scale * (2 if part == "weight gradient" else 1)
                seconds[name] = [took * share for share in (0.9, 1, 1, 1, 1.1)]
                rows.append({"name": name, "kind": "operation", "operation": f"depthwise {part}", "kernel": kernel,
                             "layout": layout, **about, "median": took, "roofline_share": 0.1 / took})  # fmt: skip
    ratios = operations.slower(rows, seconds, about)
    assert [(row["kernel"], row["median"]) for row in ratios] == [(3, 1.0), (5, pytest.approx(2 / 3)), (9, 2.5)]
    layouts, furthest = operations.sentences(rows + ratios)
    assert layouts == (
        "Depthwise convolution, forward and gradients, bf16, 64×512×32×32: "
        "k 3: NCHW and NHWC cannot be told apart (1.00, 1.00-1.00); "
        "k 5: NCHW takes 1.50 (1.50-1.50) times as long as NHWC; "
        "k 9: NHWC takes 2.50 (2.50-2.50) times as long as NCHW."
    )
    # In its slower layout k 9's weight gradient is further, but nobody has to take that.
    assert "depthwise weight gradient k5, NHWC, bf16, 512 channels, is furthest" in furthest
    assert "40.0 times the least" in furthest


def test_inputs_are_larger_than_the_cache(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = load("operations")
    monkeypatch.setattr(operations, "cache_bytes", lambda device: 3 * 4 * 64)
    shape = operations.Shape(1, 4, 4)
    inputs = operations.Inputs(shape, torch.float32, "NHWC", CPU)
    assert len(inputs.maps) == 6
    assert not inputs.in_cache
    seen: list[int] = []
    call = inputs.each(lambda x, dy: seen.append(x.data_ptr()))
    for _ in range(12):
        call()
    assert seen[:6] == seen[6:]
    assert len(set(seen)) == 6
    for operation in (*operations.gelu(inputs), *operations.batch_norm(inputs)):
        for _ in range(6):
            operation.call()
        held = [result if isinstance(result, torch.Tensor) else result[0] for result in inputs.results]
        assert len({result.data_ptr() for result in held}) == 6, f"{operation.name} writes over what the cache holds"
    monkeypatch.setattr(operations, "_MOST", 2 * 4 * 64)
    inputs = operations.Inputs(shape, torch.float32, "NHWC", CPU)
    assert (len(inputs.maps), inputs.in_cache) == (2, True)


def test_gradients_of_operations_are_right(load: Any) -> None:
    operations = load("operations")
    inputs = operations.Inputs(operations.Shape(2, 4, 6), torch.float32, "NHWC", CPU)
    inputs.maps, inputs.gradients = inputs.maps[:1], inputs.gradients[:1]
    x, dy = inputs.maps[0].clone().requires_grad_(), inputs.gradients[0]
    torch.manual_seed(0)
    forward, data, weight = operations.convolutions(inputs, 5, depthwise=True)
    torch.manual_seed(0)
    kernel = inputs.tensor(4, 1, 5, 5).requires_grad_()
    y = nn.functional.conv2d(x, kernel, padding=2, groups=4)
    of_data, of_weight = torch.autograd.grad(y, (x, kernel), dy)
    torch.testing.assert_close(forward.call(), y)
    assert data.call()[1] is None
    torch.testing.assert_close(data.call()[0], of_data)
    assert weight.call()[0] is None
    torch.testing.assert_close(weight.call()[1], of_weight)
    # Two maps of 2·4·6² numbers, 4·25 weights; two FLOP for each number and tap.
    assert (data.flop, data.moved) == (2 * 288 * 25, 4 * (2 * 288 + 100))


def test_a_run_of_operations(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    done = subprocess.run(
        [sys.executable, "-B", str(BENCHMARKS / "operations.py"), "--tiny", "--rounds", "5", "--threads", "1",
         "--kernels", "3", "5", "--out", str(out)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows, said = json.loads(out.read_text())["rows"], done.stdout
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
        assert row["low"] <= row["median"] <= row["high"], row
        assert row["n"] == 5
    assert set(by_kind) == {"ceiling", "operation", "ratio"}
    three = ("forward", "data gradient", "weight gradient")
    expected = {f"depthwise {part} k{k}" for part in three for k in (3, 5)} | {f"pointwise {part}" for part in three}
    expected |= {f"{what} {way}" for what in ("BatchNorm", "GELU") for way in ("forward", "backward")}
    names = {row["name"] for row in by_kind["operation"]}
    assert names == {f"{name}, {layout}" for name in expected for layout in ("NCHW", "NHWC")}
    for row in by_kind["operation"]:
        assert {"operation", "dtype", "batch_size", "channels", "side", "share_of_copy", "roofline_share"} <= set(row)
        assert ("share_of_matmul" in row) == row["operation"].startswith(("depthwise", "pointwise"))
    assert [row["kernel"] for row in by_kind["ratio"]] == [3, 5]
    assert "Depthwise convolution, forward and gradients, fp32, 4×32×16×16: k 3: " in said
    assert "is furthest from its roofline" in said
