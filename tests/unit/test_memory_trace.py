"""The tracer: against hand counts, MemTracker, real tensors and the CPU's own allocator."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastddr import models
from fastddr.memory import autocast, tracing
from fastddr.memory.allocator import Allocator, replay
from fastddr.memory.tape import Tape, rounded
from fastddr.memory.tracing import Steps, Training, trace

Make = Callable[[], nn.Module]
SIZE = 8


def linear() -> nn.Module:
    """192 pixels to 5 logits: weights of 3,840 bytes, a bias of 20."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5))


def convolution() -> nn.Module:
    """A convolution of 864 bytes, BatchNorm, ReLU in place, and a head."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
                        nn.Flatten(), nn.Linear(8 * SIZE * SIZE, 5))  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def ours(name: str, size: int = 64, **settings: Any) -> Make:
    return lambda: models.build(name, num_classes=5, image_size=size, **settings)


SETTINGS: dict[str, dict[str, Any]] = {
    "convmixer": {"dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 8},
    "cnn": {"blocks": 2, "width": 8},
    "resnet": {"depth": 10, "width": 16},
}


def small(name: str, size: int = 64) -> Make:
    return ours(name, size, **SETTINGS[name])


SMALL = {name: small(name) for name in SETTINGS}

# --------------------------------------------------------------------------------------------------------- hand counts

WEIGHTS = rounded(3840) + rounded(20)


def test_a_linear_layer_by_hand() -> None:
    """At the peak, after the backward pass, weights, both moments and the gradients are there."""
    peak = trace(linear, Steps(SIZE)).peak(4)
    assert peak.kinds["parameters"] == WEIGHTS == 4096 + 512
    assert peak.kinds["optimizer"] == 2 * WEIGHTS + 2 * 512  # two moments, and a step counter for each tensor
    assert peak.kinds["gradients"] == WEIGHTS
    assert peak.kinds["images"] == 4 * 192 * 4 + 512 + 512  # the images, their grades, which are valid
    assert peak.kinds["averaged weights"] == peak.kinds["weight copies"] == 0
    assert peak.held == sum(peak.kinds.values())


def test_sgd_keeps_one_moment_or_none() -> None:
    assert trace(linear, Steps(SIZE, optimizer="sgd")).peak(4).kinds["optimizer"] == WEIGHTS
    assert trace(linear, Steps(SIZE, optimizer="sgd", momentum=0.0)).peak(4).kinds["optimizer"] == 0


def test_averaged_weights_are_a_copy() -> None:
    tape = trace(linear, Steps(SIZE, average=True))
    assert tape.peak(4).kinds["averaged weights"] == WEIGHTS
    # On a GPU the host does not look whether the step counts: the differences of all weights are there for a moment.
    last = [size for size, kind in zip(tape.sizes(4), tape.kinds, strict=True) if kind == "temporaries"][-8:]
    assert {3840, 20} <= set(last)


def test_autocast_keeps_a_half_copy_of_each_weight() -> None:
    """`linear` casts weight and bias once, and both wait for the backward pass; the images come in bfloat16."""
    tape = trace(linear, Steps(SIZE, precision="bf16"))
    copies = [size for size, kind in zip(tape.sizes(4), tape.kinds, strict=True) if kind == "weight copies"]
    assert sorted(copies) == sorted([3840 // 2, 20 // 2])
    images = [size for size, kind in zip(tape.sizes(4), tape.kinds, strict=True) if kind == "images"]
    assert max(images) == 4 * 192 * 2


class Normed(nn.Module):
    """Attention without a fused kernel between two norms; where it is explicit, it says what a GPU's autocast does."""

    def __init__(self, explicit: bool, recomputed: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 5)
        self.group, self.layer, self.values = nn.GroupNorm(4, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.explicit, self.recomputed = explicit, recomputed

    def single(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self.explicit else tensor

    def attend(self, tokens: Tensor) -> Tensor:
        tokens = self.values(self.layer(self.single(self.values(tokens))))
        scores = tokens @ tokens.mT
        return (scores.softmax(-1, dtype=torch.float32) if self.explicit else scores.softmax(-1)) @ tokens

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.group(self.single(self.embed(image))).flatten(2).transpose(1, 2)
        attended = checkpoint(self.attend, tokens, use_reentrant=False) if self.recomputed else self.attend(tokens)
        logits: Tensor = self.head(attended.mean(1))
        return logits


@pytest.mark.parametrize("recomputed", [False, True])
def test_half_precision_is_that_of_a_gpu(recomputed: bool) -> None:
    """On a GPU autocast computes norms and softmax in float32, as if the model said so; a CPU's does not."""
    by_rule, by_hand = (
        trace(lambda explicit=explicit: Normed(explicit, recomputed), Steps(SIZE, precision="bf16"))  # type: ignore[misc]
        for explicit in (False, True)
    )
    assert by_rule.peak(64) == by_hand.peak(64)


def test_the_list_of_a_gpus_autocast_is_pytorchs() -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    found = {}
    for macro in ("AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE"):
        lines = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*\n)", header.read_text())
        assert lines is not None
        names = re.findall(r"_\((\w+)", lines[1])
        found[macro] = {name.lstrip("_").removeprefix("linalg_") for name in names if "upsample" not in name}
    assert found["AT_FORALL_FP32"] - autocast.FLOAT32 - {"nll_loss2d"} == set()
    assert found["AT_FORALL_FP32_SET_OPT_DTYPE"] == autocast.INTO_FLOAT32 - {"norm"}


def test_accumulation_keeps_gradients_while_the_next_micro_batch_is_there() -> None:
    once, twice = (trace(convolution, Steps(SIZE, accumulated=more)) for more in (False, True))
    # The activations of a second micro batch beside the gradients of the first.
    gradients = rounded(864) + 2 * rounded(32) + rounded(8 * 64 * 5 * 4) + rounded(20)
    assert once.peak(512).kinds["gradients"] < gradients == twice.peak(512).kinds["gradients"]
    assert twice.cost(16) == pytest.approx(once.cost(16), rel=0.05)


def test_convolution_batchnorm_relu_by_hand() -> None:
    """What waits for the backward pass: the map before BatchNorm, and after it, where ReLU works in its place."""
    batch, maps = 512, 512 * 8 * SIZE * SIZE * 4
    tape = trace(convolution, Steps(SIZE))
    peak = tape.peak(batch)
    few = 64 * 1024
    # `Flatten` copies a map that is channels_last. In the backward pass the gradient of the map comes on top.
    assert 3 * maps <= peak.kinds["activations"] < 3 * maps + few
    assert maps <= peak.kinds["temporaries"] < 2 * maps + few
    assert peak.kinds["images"] == rounded(batch * 192 * 4) + 2 * rounded(batch * 8) - rounded(batch * 8) + 512


def test_ddp_keeps_all_gradients_from_the_start() -> None:
    tape = trace(linear, Steps(SIZE, ranks=2))
    assert tape.peak(4).kinds["gradients"] == WEIGHTS
    assert all(kinds["gradients"] == WEIGHTS for kinds in tape.course(4))


def test_mixing_takes_a_second_copy_of_the_images() -> None:
    plain, mixed = (trace(convolution, Steps(SIZE, mixed=more)).peak(512).kinds["images"] for more in (False, True))
    assert mixed - plain == 512 * 192 * 4


def test_flop_are_those_of_the_formula() -> None:
    tape = trace(ours("convmixer", dim=24, depth=3, kernel_size=5, patch_size=8), Steps(64))
    elements = 8 * 8 * 24
    layers = 3 * 3 * elements * (2 * 25 + 2 * 24)  # forward and twice as much backward
    # The patches are a matrix product whose input needs no gradient; the head's needs one.
    assert tape.flop["each"] == layers + 2 * 6 * 64 * elements + 3 * 2 * 24 * 5


# ----------------------------------------------------------------------------------------------------- other witnesses


def held(run: Any) -> int:
    """Most bytes, not rounded, in the step."""
    now = most = 0
    for place, event in enumerate(run.events):
        now += run.sizes[event - 1] if event > 0 else -run.sizes[-event - 1]
        most = max(most, now) if place >= run.begins else most
    return most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_it_agrees_with_memtracker_to_the_byte(name: str, precision: str) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    steps = Steps(64, precision=precision)
    with torch.device("meta"):
        network = SMALL[name]()
    with FakeTensorMode():
        tracing._hollow(network)
        training = Training(network, steps, 4)
        tracker = MemTracker()
        tracker.track_external(network, training.optimizer)
        with tracker:
            training.step(0)
            tracker.reset_mod_stats()
            training.step(1)
        (found,) = tracker.get_tracker_snapshot("peak").values()
    total = next(value for key, value in found.items() if str(key).endswith("Total"))
    assert held(tracing.run(SMALL[name], steps, 4)) == total


@pytest.mark.parametrize("name", SMALL)
def test_real_tensors_take_the_same_blocks_in_the_same_order(name: str) -> None:
    fake, real = (tracing.run(SMALL[name], Steps(64), 4, fake=fake) for fake in (True, False))
    assert fake.events == real.events
    assert fake.sizes == real.sizes


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says it once a process
@pytest.mark.parametrize("name", SMALL)
def test_the_cpu_allocator_has_given_out_as_much(name: str, load: Callable[[str], Any]) -> None:
    """An independent witness: what PyTorch's allocator was asked for in the same step, the scratch of kernels included,
    which no trace sees."""
    on_cpu = load("memory").on_cpu
    # Large enough that the maps outweigh the scratch.
    steps = Steps(128)
    training = Training(small(name, 128)(), steps, 16)
    training.step(0)
    most = on_cpu(training)
    predicted = held(tracing.run(small(name, 128), steps, 16))
    assert predicted <= most <= 1.25 * predicted


# --------------------------------------------------------------------------------------------------- any batch and size


@pytest.fixture(scope="module")
def tapes() -> dict[str, Tape]:
    return {name: trace(make, Steps(64, precision="bf16")) for name, make in SMALL.items()}


@given(name=st.sampled_from(sorted(SMALL)), batch=st.integers(1, 500), more=st.integers(1, 500))
@settings(deadline=None, max_examples=60)
def test_a_larger_batch_never_takes_less(tapes: dict[str, Tape], name: str, batch: int, more: int) -> None:
    assert tapes[name].peak(batch).held <= tapes[name].peak(batch + more).held


@pytest.mark.parametrize("name", SMALL)
def test_accumulation_never_takes_less(name: str) -> None:
    once, twice = (trace(SMALL[name], Steps(64, accumulated=more), (2, 3)) for more in (False, True))
    for batch in (1, 2, 7, 64, 1000):
        assert once.peak(batch).held <= twice.peak(batch).held


@pytest.mark.parametrize("name", SMALL)
def test_a_larger_image_never_takes_less(name: str) -> None:
    steps = [Steps(size, precision="bf16") for size in (48, 76, 96)]
    found = [held(tracing.run(small(name, each.image_size), each, 4)) for each in steps]
    assert found == sorted(found)


@pytest.mark.parametrize("name", SMALL)
def test_a_tape_answers_a_batch_that_was_not_traced(tapes: dict[str, Tape], name: str) -> None:
    steps = Steps(64, precision="bf16")
    direct = tracing.run(SMALL[name], steps, 37)
    assert tapes[name].sizes(37) == direct.sizes
    assert tapes[name].events == direct.events


VARIANTS = (
    Steps(64), Steps(96, precision="bf16", accumulated=True, average=True), Steps(64, precision="fp16", mixed=True),
    Steps(64, recomputed=True, clip_norm=1.0), Steps(64, optimizer="sgd", ranks=2, precision="bf16"),
)  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("steps", VARIANTS, ids=str)
def test_one_large_prime_tells_what_several_batches_tell(name: str, steps: Steps) -> None:
    make = small(name, steps.image_size)
    batch = tracing.prime(make, steps.image_size)
    assert batch is not None
    assert trace(make, steps, (batch,)) == trace(make, steps)


def test_a_prime_that_divides_something_else_is_passed_over() -> None:
    first, second, third = tracing.PRIMES
    assert tracing.prime(linear, 64) == first
    assert tracing.prime(linear, 2 * first) == second
    assert tracing.prime(lambda: nn.Linear(first, second), 64) == third
    assert tracing.prime(lambda: nn.Linear(first, second), third) is None


def test_a_model_whose_memory_is_no_line_is_refused() -> None:
    class Gram(nn.Module):
        """Products of all images with each other: quadratic in the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, image: Tensor) -> Tensor:
            flat = image.flatten(1)
            return self.fc((flat @ flat.T).softmax(1) @ flat)

    with pytest.raises(tracing.Inexact, match="not affine"):
        trace(Gram, Steps(SIZE))


# ----------------------------------------------------------------------------------------------------------- allocator

MIB = 2**20


def test_segments_are_those_of_cuda() -> None:
    for size, segment in ((1, 2), (MIB, 2), (MIB + 1, 20), (9 * MIB, 20), (10 * MIB, 10), (11 * MIB + 1, 12)):
        allocator = Allocator()
        allocator.take(size)
        assert allocator.reserved == segment * MIB, size


def test_freed_blocks_join_and_are_used_again() -> None:
    allocator = Allocator()
    taken = [allocator.take(6 * MIB) for _ in range(3)]
    assert allocator.reserved == 20 * MIB
    for piece in (taken[0], taken[2], taken[1]):
        allocator.free(piece)
    assert allocator.allocated == 0
    allocator.take(9 * MIB)
    allocator.take(9 * MIB)
    assert allocator.reserved == 20 * MIB


def test_a_free_place_that_is_too_small_is_fragmentation() -> None:
    allocator = Allocator()
    first, _ = allocator.take(40 * MIB), allocator.take(40 * MIB)
    allocator.free(first)
    allocator.take(41 * MIB)
    assert allocator.reserved == (40 + 40 + 42) * MIB
    # What is left of a segment stays with its block where it is 1 MiB or less.
    assert (allocator.allocated, allocator.peak) == (82 * MIB, 82 * MIB)


def test_at_the_limit_whole_free_segments_go_back() -> None:
    allocator = Allocator(limit=100 * MIB)
    first, _ = allocator.take(40 * MIB), allocator.take(40 * MIB)
    allocator.free(first)
    assert allocator.take(50 * MIB) is not None
    assert allocator.reserved == 90 * MIB
    assert allocator.take(20 * MIB) is None


def test_the_peak_of_a_step_counts_what_was_not_cut_off_and_nothing_before_it() -> None:
    tape = Tape(
        kinds=["parameters", "optimizer", "activations"],
        fixed=[60 * MIB - 5000, 100 * MIB, 0],
        each=[0, 0, 20 * MIB],
        events=[1, 2, -2, 3, -3],
        begins=3,
        flop={"fixed": 0, "each": 0},
        moved={"fixed": 0, "each": 0},
    )
    for batch, peak, reserved in ((1, 60 + 20, 60 + 100), (6, 60 + 120, 60 + 100 + 120)):
        allocator = replay(tape, batch)
        assert allocator is not None
        assert (allocator.peak, allocator.most) == (peak * MIB, reserved * MIB), batch


@given(batch=st.integers(1, 200), name=st.sampled_from(sorted(SMALL)))
@settings(deadline=None, max_examples=20)
def test_the_replayed_allocator_holds_what_the_tape_says(tapes: dict[str, Tape], batch: int, name: str) -> None:
    tape = tapes[name]
    allocator = replay(tape, batch)
    assert allocator is not None
    assert allocator.most >= tape.peak(batch).held
    assert replay(tape, batch, tape.peak(batch).held - 1) is None


def test_of_equal_places_the_older_is_taken() -> None:
    """Whatever address Python gave them: one question has one answer."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        allocator = Allocator()
        taken = [allocator.take(12 * MIB) for _ in range(3)]
        for place in order:
            allocator.free(taken[place])
        assert [allocator.take(12 * MIB) for _ in range(3)] == taken
