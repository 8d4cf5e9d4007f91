"""Levers of memory: they change what is kept and when it is computed, and no number; and `torch.compile`."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests_support import elsewhere
from torch import Tensor, nn

from fastddr import models
from fastddr.config import Config, MemoryConfig
from fastddr.errors import UserError
from fastddr.models import levers
from fastddr.stopping import Stopping, StopRequested

CPU = torch.device("cpu")
OURS = {
    "convmixer": {"dim": 8, "depth": 3, "kernel_size": 5, "patch_size": 4},
    "cnn": {"blocks": 2, "width": 4},
    "resnet": {"depth": 10, "width": 16},
}
#: With BatchNorm in their blocks, with other norms, and with dropout's draws.
TIMMS = ["timm:test_resnet", "timm:test_efficientnet", "timm:test_convnext", "timm:test_vit"]
SIZE = 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> nn.Module:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return models.build(name, num_classes=5, image_size=SIZE, **OURS.get(name, {}))


def after_three_backwards(model: nn.Module) -> dict[str, Tensor]:
    """Logits, gradients and buffers after forward and backward of three micro batches."""
    torch.manual_seed(1)
    found = {}
    for number in range(3):
        logits = model.train()(torch.randn(4, 3, SIZE, SIZE))
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 4])).backward()
        found[f"logits {number}"] = logits.detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"gradient {name}"] = parameter.grad
    return found | dict(model.named_buffers())


@pytest.mark.parametrize("name", [*OURS, *TIMMS])
def test_recomputed_blocks_change_no_number(name: str) -> None:
    """Not a bit of any gradient, and BatchNorm's statistics have each batch once."""
    plain, sparing = build(name), build(name)
    levers.recompute_blocks(sparing, name)
    expected, found = after_three_backwards(plain), after_three_backwards(sparing)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    counters = [value for key, value in found.items() if key.endswith("num_batches_tracked")]
    assert all(counter == 3 for counter in counters)
    assert bool(counters) == any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())


@pytest.mark.parametrize("name", [*OURS, *TIMMS])
def test_blocks_run_again_in_the_backward_pass_and_only_in_training(name: str) -> None:
    model = build(name)
    levers.recompute_blocks(model, name)
    inner = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)][1:-1]
    ran: list[int] = [0]

    def count(*_: object) -> None:
        ran[0] += 1

    for module in inner:
        module.register_forward_pre_hook(count)
    logits = model(torch.randn(2, 3, SIZE, SIZE))
    once = ran[0]
    logits.sum().backward()
    assert ran[0] > once
    ran[0] = 0
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, SIZE, SIZE))
    assert ran[0] == once


def test_a_copy_recomputes_by_itself() -> None:
    """As the averaged weights are copied: the copy's blocks must not run the original's."""
    model = build("convmixer")
    levers.recompute_blocks(model, "convmixer")
    copy = deepcopy(model)
    found = after_three_backwards(copy)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found["layers.0.depthwise_norm.num_batches_tracked"] == 3
    assert model.get_buffer("layers.0.depthwise_norm.num_batches_tracked") == 0


def test_names_of_weights_are_those_without_levers() -> None:
    plain, sparing = build("resnet"), build("resnet")
    levers.recompute_blocks(sparing, "resnet")
    assert list(plain.state_dict()) == list(sparing.state_dict())


def test_a_model_without_blocks_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"timm:other does not say .*--micro-batch-size"):
        levers.recompute_blocks(nn.Linear(2, 2), "timm:other")

    class Refuses(nn.Module):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            assert not enable, "gradient checkpointing not supported"

    with pytest.raises(UserError, match="timm:other does not say"):
        levers.recompute_blocks(Refuses(), "timm:other")


@pytest.mark.parametrize("name", OURS)
def test_maps_are_contiguous_where_nchw_is_asked_for(name: str) -> None:
    last, first = build(name).double(), build(name).double()
    levers.keep_contiguous(first)
    other = elsewhere(first, torch.contiguous_format)
    image = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.testing.assert_close(first(image), last(image), rtol=1e-10, atol=1e-10)
    assert set(other) <= {"patches"}, "which are cut by a matrix product, in any layout"
    assert all(weight.is_contiguous() for weight in first.parameters())


def test_a_configuration_sets_the_levers_and_says_so() -> None:
    said: list[str] = []
    base = replace(Config(), image_size=SIZE, convmixer=replace(Config().convmixer, **OURS["convmixer"]))
    plain = models.from_config(base, said.append)
    assert said == []
    assert not plain.layers.recompute
    config = replace(base, memory=MemoryConfig(checkpointing=True, layout="NCHW"))
    sparing = models.from_config(config, said.append)
    assert sparing.layers.recompute
    assert sparing.get_parameter("layers.0.pointwise.weight").is_contiguous()
    assert [line.split(":")[0].split()[0] for line in said] == ["memory.checkpointing", "memory.layout"]


def test_the_stem_that_takes_memory_is_warned_of() -> None:
    said: list[str] = []
    base = replace(Config(), model="resnet", image_size=SIZE)
    models.from_config(base, said.append)
    assert said == []
    models.from_config(replace(base, resnet=replace(base.resnet, stem="stride1", width=16)), said.append)
    assert len(said) == 1
    assert "16 times" in said[0]


# ------------------------------------------------------------------------------------------------------ torch.compile


def test_without_compile_the_model_is_itself() -> None:
    model = build("cnn")
    assert levers.compiled(model, Config()) is model


def test_a_machine_without_a_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(Config(), compile=True)
    monkeypatch.setattr(levers.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        levers.check_compiler(config, CPU)
    monkeypatch.setattr(levers, "triton_lacks", lambda: "a C compiler for Triton")
    with pytest.raises(UserError, match="--compile lacks a C compiler for Triton; install that"):
        levers.check_compiler(config, torch.device("cuda"))
    levers.check_compiler(Config(), CPU)


#: In a process where einops has met no tensor.
GRAPHS = """
import functools
from dataclasses import replace
import torch
from fastddr import models
from fastddr.config import Config
from fastddr.models import levers
torch.compile = functools.partial(torch.compile, backend="eager")
model = models.build("convmixer", num_classes=5, image_size=32, dim=8, depth=2, kernel_size=3, patch_size=4)
compiled = levers.compiled(model, replace(Config(), compile=True))
for _ in range(3):
    compiled(torch.randn(2, 3, 32, 32)).sum().backward()
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_a_convmixer_is_compiled_once() -> None:
    done = subprocess.run([sys.executable, "-c", GRAPHS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == 1


def failing(error: BaseException) -> Any:
    def backend(*_: Any) -> Any:
        raise error

    return torch.compile(torch.nn.Linear(2, 2), backend=backend)


def test_a_compiler_keeps_the_layout_and_the_budget_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor, "layout_optimization", True)
    monkeypatch.setattr(functorch, "activation_memory_budget", 0.5)
    asked: tuple[tuple[Any, float], ...] = ("NCHW", 0.3), ("NHWC", 1.0), ("auto", 0.3)
    for order, budget in asked:
        memory = MemoryConfig(layout=order, activation_budget=budget)
        levers.compiled(build("cnn"), replace(Config(), compile=True, memory=memory))
        assert (inductor.layout_optimization, functorch.activation_memory_budget) == (order != "NCHW", budget)


@pytest.mark.parametrize(
    ("kernel", "asked", "on_gpu"),
    [(9, "auto", "NCHW"), (7, "auto", "NHWC"), (9, "NHWC", "NHWC"), (7, "NCHW", "NCHW")],
)  # fmt: skip
def test_maps_lie_as_a_gpu_is_fast_with_the_kernel(kernel: int, asked: Any, on_gpu: str) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    mixer = replace(Config().convmixer, kernel_size=kernel, dim=8, depth=1)
    config = replace(Config(), convmixer=mixer, memory=MemoryConfig(layout=asked))
    as_asked = "NHWC" if asked == "auto" else asked
    assert (levers.layout(config, cpu), levers.layout(config, gpu)) == (as_asked, on_gpu)
    assert levers.layout(replace(config, model="resnet"), gpu) == as_asked
    built = models.from_config(config, lambda line: None, gpu)
    assert built.get_parameter("patches.weight").is_contiguous() is (on_gpu == "NCHW")


def unasked() -> None:
    """Nobody wants the run to stop."""


def test_a_compiler_that_a_stop_has_ended_has_not_failed(tmp_path: Path) -> None:
    stopping = Stopping(tmp_path / "STOP", None, rank=0, world=1)
    config = replace(Config(), compile=True)
    with stopping.listening():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequested, match="SIGTERM"), levers.compiling(config, stopping.heard):
        failing(RuntimeError("g++: terminated"))(torch.zeros(1, 2))
    stopping._world = 2  # which could agree on no step
    with pytest.raises(KeyboardInterrupt), levers.compiling(config, stopping.heard):
        failing(RuntimeError("g++: terminated"))(torch.zeros(1, 2))


def test_what_has_no_deterministic_form_is_one_sentence() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for ours, kind, said in (True, UserError, "no deterministic put_.*convmixer"), (False, RuntimeError, "put_ "):
            with pytest.raises(kind, match=said), levers.compiling(replace(Config(), deterministic=ours), unasked):
                torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    asked = replace(Config(), deterministic=True)
    with pytest.raises(RuntimeError, match="another"), levers.compiling(asked, unasked):
        raise RuntimeError("another")
    # As it comes out of a trace.
    words = "backend='x' raised:\nRuntimeError: median CUDA with output does not have a deterministic implementation"
    compiled = levers.compiling(replace(asked, compile=True), unasked)
    with pytest.raises(UserError, match="no deterministic median CUDA with output,"), compiled:
        raise RuntimeError(words)


def test_a_compiler_that_fails_is_one_sentence_and_full_memory_stays_that() -> None:
    config = replace(Config(), compile=True)
    words = r"cannot compile convmixer here: .*ValueError: no such instruction; leave"
    with pytest.raises(UserError, match=words), levers.compiling(config, unasked):
        failing(ValueError("no such instruction"))(torch.zeros(1, 2))
    pages = "C++ compile error\n\nCommand:\ng++ x\n\nOutput:\nx.cpp:1: no such register" + "\ny" * 999
    words = r"C\+\+ compile error Command: g\+\+ x Output: x.cpp:1: no such register y.* …; leave"
    with pytest.raises(UserError, match=words), levers.compiling(config, unasked):
        failing(RuntimeError(pages))(torch.zeros(1, 2))
    from torch._dynamo import config as dynamo

    all_of_it = dynamo.patch(verbose=True)
    with pytest.raises(RuntimeError, match="no such instruction"), all_of_it, levers.compiling(config, unasked):
        failing(ValueError("no such instruction"))(torch.zeros(1, 2))
    with pytest.raises(torch.OutOfMemoryError), levers.compiling(config, unasked):
        failing(torch.OutOfMemoryError("out of memory"))(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="another"), levers.compiling(config, unasked):
        raise RuntimeError("another")


def test_statistics_are_shared_among_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(
        Config(), model="resnet", image_size=64, sync_batchnorm=True, memory=MemoryConfig(checkpointing=True)
    )

    def norms(config: Config) -> tuple[nn.Module, list[nn.Module]]:
        torch.manual_seed(0)
        model = models.from_config(config, lambda line: None)
        return model, [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    one, alone = norms(asked)
    monkeypatch.setenv("WORLD_SIZE", "2")
    plain, _ = norms(replace(asked, sync_batchnorm=False))
    model, together = norms(asked)
    assert not any(isinstance(norm, nn.SyncBatchNorm) for norm in (*alone, *plain.modules()))
    assert len(together) == len(alone) > 0
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in together)
    # A norm that is computed again must not count a batch twice, so the hooks go to the new ones.
    assert all(norm._forward_pre_hooks for norm in together)
    found, wanted = model.state_dict(), one.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5), "scoring needs no GPU"
