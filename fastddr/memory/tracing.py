"""Records what a training step does to the memory, from `step.training_step` itself, on tensors without values.

`FakeTensorMode` gives tensors that have shapes and storages but no memory, so a step of any size takes milliseconds. A
dispatch mode sees each operation and notes each storage that is new; a weak reference tells when it goes. That is what
the allocator of a GPU would be asked for, in its order, but for what a kernel takes for itself (`allowances`).

The tensors are on the CPU, under the CPU's autocast with the rules of a GPU's (`autocast`): a build of PyTorch without
CUDA can neither move a module to a CUDA device that is not there nor run the autograd engine on it. The optimizer is
the fused one of a GPU, so the flag of a bad step stays a tensor and nothing asks for a value.

Why not `torch.distributed._tools.mem_tracker.MemTracker`: it gives snapshots and no order of events, so neither the
allocator can be replayed nor another batch size answered. Tests hold this recorder against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddr import losses, optimizers
from fastddr.loaders.base import Batch
from fastddr.memory.autocast import AsOnGPU
from fastddr.memory.recording import Cost, Recorder
from fastddr.memory.tape import Tape
from fastddr.models import levers
from fastddr.runtime import DTYPES
from fastddr.step import Tally, training_step

#: Batches that are traced where nothing is known of a model: two give each block's line, a third has to lie on it.
#: BatchNorm wants more than one value a channel, so none is 1.
BATCHES = (2, 3, 7)
#: One of these is traced where each block is known to be either the model's or each photograph's: what it divides is of
#: each photograph, as long as it divides nothing else. Large primes do not.
PRIMES = (1009, 1013, 1019)


@dataclass(frozen=True)
class Steps:
    """How a step is made, as far as its memory depends on it."""

    image_size: int
    """Side of the images in pixels."""
    classes: int = 5
    """What the model gives for an image; 1 is the value of a regression."""
    precision: str = "fp32"
    """`fp32`, `bf16` or `fp16`."""
    optimizer: str = "adam"
    momentum: float = 0.9
    """Of SGD."""
    clip_norm: float | None = None
    average: bool = False
    """Whether averaged weights (EMA) are kept."""
    accumulated: bool = False
    """Whether a step has several micro batches: the memory is the same for any number of them above one."""
    mixed: bool = False
    """Whether images are mixed with each other, which makes a second copy of them."""
    ranks: int = 1
    """With several, DDP keeps all gradients in buckets, from the first step on."""
    recomputed: bool = False
    """Whether the activations within each block are computed again in the backward pass (checkpointing)."""


class Inexact(RuntimeError):
    """A model whose memory is not affine in the batch."""


class StandIn(Accelerator):
    """What `training_step` asks of an Accelerator, without its state, which is a process's for good."""

    num_processes = 1
    sync_gradients = True

    def __init__(self, accumulation: int, *, scaler: bool) -> None:
        # Not Accelerator's: it would choose device and precision for the whole process.
        self._every, self._micro = accumulation, 0
        # In float16 the scaler looks after bad gradients; what it keeps is a few numbers.
        tracker = torch.zeros((), dtype=torch.int32)
        stand_in = SimpleNamespace(scale=lambda loss: loss, update=lambda scale: None, _growth_tracker=tracker)
        self.scaler = stand_in if scaler else None

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """The gradients meet in the last micro batch of a step."""
        self._micro += 1
        self.sync_gradients = self._micro % self._every == 0
        yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """The gradients of a micro batch."""
        (loss / self._every).backward(**kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: Any, norm_type: Any = 2) -> Tensor:
        """As Accelerate's."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def _into(place: Tensor, parameter: Tensor) -> None:
    """Move a gradient into its place in a bucket."""
    if parameter.grad is not None and parameter.grad is not place:
        place.copy_(parameter.grad)
        parameter.grad = place


class Training:
    """A model and all that its steps need, on any device."""

    def __init__(
        self,
        network: nn.Module,
        steps: Steps,
        batch: int,
        recorder: Recorder | None = None,
        ema: nn.Module | None = None,
    ) -> None:
        """`batch` photographs at once; the network and its averaged weights, if there are any, are on their device."""
        self.steps, self.batch, self.recorder, self.network = steps, batch, recorder, network
        self.device = next(network.parameters()).device
        self.accumulation = 2 if steps.accumulated else 1
        self.accelerator = StandIn(self.accumulation, scaler=steps.precision == "fp16")
        network.train()
        self._keep([*network.parameters(), *network.buffers()], "parameters")
        if steps.recomputed:
            levers.recompute_blocks(network, "this model")
        self.ema = ema
        if self.ema is not None:
            self._keep([*self.ema.parameters(), *self.ema.buffers()], "averaged weights")
        self.optimizer = optimizers.build(network, steps.optimizer, lr=1e-6, momentum=steps.momentum, fused=True)
        self.model = self._mixed_precision(network)
        self.buckets = self._bucketed() if steps.ranks > 1 else []
        self._gradients()
        self.criterion = losses.MeanSquare() if steps.classes == 1 else losses.CrossEntropy()
        self.tally = Tally.zeros(self.device)
        self._moments()

    def _keep(self, tensors: list[Tensor], kind: str) -> None:
        if self.recorder is not None:
            for tensor in tensors:
                self.recorder.rename(tensor, kind)

    def _mixed_precision(self, network: nn.Module) -> nn.Module:
        """As `Accelerator.prepare` wraps it: forward under autocast, logits in float32."""
        if self.steps.precision == "fp32":
            return network
        inner, dtype, kind = network.forward, DTYPES[self.steps.precision], self.device.type

        def forward(image: Tensor) -> Tensor:
            with torch.autocast(kind, dtype):
                logits: Tensor = inner(image)
            return logits.float()

        network.forward = forward
        return network

    def _bucketed(self) -> list[Tensor]:
        """DDP's buckets with `gradient_as_bucket_view`: a gradient is copied into its place and lives there."""
        places = []
        for parameter in self.network.parameters():
            place = torch.zeros_like(parameter)
            places.append(place)
            self._keep([place], "gradients")
            parameter.register_post_accumulate_grad_hook(partial(_into, place))
        return places

    def _gradients(self) -> None:
        if self.recorder is None or self.buckets:
            return
        for parameter in self.network.parameters():
            parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def _is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._keep([parameter.grad], "gradients")

    def _moments(self) -> None:
        moments = [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        self._keep(moments, "optimizer")

    def _batches(self) -> Iterator[Batch]:
        size, dtype = self.steps.image_size, DTYPES[self.steps.precision]
        for _ in range(self.accumulation):
            image = torch.zeros(self.batch, 3, size, size, device=self.device, dtype=dtype)
            image = image.contiguous(memory_format=torch.channels_last)
            numbers = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            valid = torch.ones(self.batch, dtype=torch.bool, device=self.device)
            self._keep([image, numbers, valid], "images")
            yield Batch(image=image, grade=numbers, id=numbers, valid=valid)

    def _mix(self, _microstep: int, image: Tensor, grade: Tensor) -> tuple[Tensor, Tensor]:
        """What mixup takes: a rolled copy, scaled, and shares of the grades."""
        mixed = image.roll(1, 0).mul_(0.5).add_(image.mul(0.5)).contiguous(memory_format=torch.channels_last)
        self._keep([mixed], "images")
        return mixed, torch.zeros(self.batch, self.steps.classes, device=self.device)

    def begin(self) -> None:
        """Let the optimizer make its moments, by an update with gradients of zero, as the first step would."""
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._moments()

    def step(self, number: int) -> None:
        """One optimizer step, and the averaged weights'."""
        told = training_step(
            self.accelerator,
            self.model,
            self._batches(),
            self.criterion,
            self.optimizer,
            self.tally,
            self.steps.clip_norm,
            self._mix if self.steps.mixed else None,
        )
        self._moments()
        if self.ema is not None:
            # As on a GPU, whatever stands in for one: the differences of all weights are there for a moment.
            optimizers.update_ema(self.ema, self.network, number, 0.999, told[:2].any(), asks=False)


@dataclass(frozen=True)
class Run:
    """What one step with one batch did to the memory, and what it cost."""

    kinds: list[str]
    sizes: list[int]
    events: list[int]
    begins: int
    flop: Cost
    moved: Cost


def run(make: Callable[[], nn.Module], steps: Steps, batch: int, *, fake: bool = True) -> Run:
    """A step with `batch` photographs at once, recorded with all that is there before it.

    It is one in which the optimizer has its moments already: at the peak of the first one they are not there yet. With
    `fake=False` on real tensors of the CPU.
    """
    recorder = Recorder(batch)
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta") if fake else nullcontext())
        network = make()
        ema = optimizers.make_ema(network) if steps.average else None
        if fake:
            # Back to the CPU: what stands in for values is a shape, a layout and a storage without memory.
            stack.close()
            stack.enter_context(FakeTensorMode())
            _hollow(network)
            if ema is not None:
                _hollow(ema)
        stack.enter_context(recorder)
        # Around the whole step, since checkpointing computes a block again in the backward pass.
        stack.enter_context(AsOnGPU())
        training = Training(network, steps, batch, recorder, ema)
        training.begin()
        begins = len(recorder.events)
        recorder.flop, recorder.moved = Cost(), Cost()
        training.step(0)
        events = _ordered(recorder.events)
    return Run(list(recorder.kinds), list(recorder.sizes), events, begins, recorder.flop, recorder.moved)


def _ordered(events: list[int]) -> list[int]:
    """The same, but blocks that are freed together, between two that are taken, by number."""
    # The cache of autocast frees its copies in the order of their addresses, which is another one in each run.
    found: list[int] = []
    for freed, group in groupby(events, lambda event: event < 0):
        together = list(group)
        found += sorted(together, reverse=True) if freed else together
    return found


def _hollow(network: nn.Module) -> None:
    """Give a network on `meta` fake parameters and buffers on the CPU, in the same layout."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        known = made.get(id(tensor))
        if known is None:
            known = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                known = nn.Parameter(known, tensor.requires_grad)
            made[id(tensor)] = known
        return known

    for module in network.modules():
        for named in (module._parameters, module._buffers):
            for name, tensor in named.items():
                if tensor is not None:
                    # Of parameters `fake` makes parameters, which its signature does not say.
                    named[name] = fake(tensor)  # type: ignore[assignment]


def trace(make: Callable[[], nn.Module], steps: Steps, batches: Sequence[int] = BATCHES) -> Tape:
    """The tape of a model's step, for any batch.

    Several batches are traced: the first two give each block's bytes as a line over the batch, and all others have to
    lie on it. One alone is enough, and faster, where each block is either of the model or of each photograph, and the
    batch divides those of photographs and no other (`prime`). The tests prove that of fastddr's models.

    `make` builds a new network where it is called: images (b, 3, h, w) to logits (b, classes).

    Raises:
        Inexact: a block's size is not affine in the batch, or another batch takes other blocks.
        UserError: the model cannot be made.
    """
    return tape_of([run(make, steps, batch) for batch in batches], batches, steps)


def tape_of(runs: Sequence[Run], batches: Sequence[int], steps: Steps) -> Tape:
    """The same from what `run` found with each of the batches.

    Raises:
        Inexact: as `trace`.
    """
    low, *others = runs
    first, micro = batches[0], 2 if steps.accumulated else 1
    for batch, other in zip(batches[1:], others, strict=True):
        if low.events != other.events:
            raise Inexact(f"the model takes other blocks for {batch} photographs than for {first}")
    if not others:
        each = [0 if size % first else size // first for size in low.sizes]
    else:
        step = batches[1] - first
        each = [(b - a) // step for a, b in zip(low.sizes, others[0].sizes, strict=True)]
    fixed = [size - first * slope for size, slope in zip(low.sizes, each, strict=True)]
    for batch, other in zip(batches[1:], others, strict=True):
        if [f + batch * e for f, e in zip(fixed, each, strict=True)] != other.sizes:
            raise Inexact("the memory of the model is not affine in the batch")

    def line(found: Sequence[Cost]) -> dict[str, int]:
        total = found[0].total
        slope = found[0].divided // first if len(found) == 1 else (found[1].total - total) // (batches[1] - first)
        return {"fixed": (total - first * slope) // micro, "each": slope // micro}

    return Tape(
        low.kinds, fixed, each, low.events, low.begins, line([one.flop for one in runs]),
        line([one.moved for one in runs]),
    )  # fmt: skip


def prime(make: Callable[[], nn.Module], image_size: int) -> int | None:
    """Of `PRIMES` the first that divides no tensor of a network and not the side of its images; None if all do."""
    with torch.device("meta"):
        network = make()
    counts = {image_size, *(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))}
    return next((batch for batch in PRIMES if all(count % batch or not count for count in counts)), None)
