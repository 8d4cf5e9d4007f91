"""The micro batch of a run on a GPU: chosen by prediction, then checked by one real step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastddr import models, optimizers, ranks
from fastddr.config import Config
from fastddr.errors import UserError
from fastddr.memory import allowances
from fastddr.memory.planning import choose_micro_batch
from fastddr.memory.predicting import GIB, Case, gib, predict
from fastddr.memory.tracing import Inexact, Training
from fastddr.meters import is_out_of_memory
from fastddr.runtime import agree_on_precision, card_of, numerics


def one_step(config: Config, micro: int, world: int, device: torch.device) -> None:
    """Two real steps with a throw-away model and random images; the second one is the first with all moments.

    Compiled where training will be: what is kept for the backward pass is then another. Of that the compiler remembers
    its kernels, so training need not wait for them again.

    Raises:
        torch.OutOfMemoryError: they are too large for the device.
        UserError: the model cannot be compiled.
    """
    case = Case(config, micro, world)
    with torch.random.fork_rng(devices=[]):
        network = models.build(
            config.model, num_classes=config.outputs, image_size=config.image_size, **config.model_settings
        ).to(device)
    if models.levers.layout(config, device) == "NCHW":
        models.levers.keep_contiguous(network)
    ema = optimizers.make_ema(network) if case.steps.average else None
    training = Training(network, case.steps, micro, ema=ema)
    try:
        with models.levers.compiling(config, lambda: None):
            training.model = models.levers.compiled(training.model, config)
            for number in range(2):
                training.step(number)
    finally:
        if config.compile:
            torch.compiler.reset()  # else what was compiled for this model is kept beside what will be for the run's


def checked(
    config: Config, world: int, free_bytes: int, try_: Callable[[int], None], allowance: allowances.Allowance
) -> tuple[int, list[str]]:
    """The largest micro batch that is predicted to fit and whose real step does, and what to say.

    `free_bytes`: of this rank's card. `try_`: one real step with so many photographs at once; it raises what
    `is_out_of_memory` if that is too much.

    Raises:
        UserError: none fits.
    """
    said: list[str] = []
    below = None
    while True:
        try:
            micro, reason = choose_micro_batch(config, world, free_bytes, allowance, below)
        except UserError as error:
            if not said:
                raise
            # None is left to try, and why the last one failed is not what was predicted.
            raise UserError(
                f"{said[-1]}; no smaller one is left, so lower --image-size, or see with nvidia-smi what else is on "
                "the card."
            ) from error
        try:
            try_(micro)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).strip().partition("\n")[0]
            said.append(f"micro batch {micro}: a real step ran out of memory ({why}), although {reason}")
            below = micro
        else:
            return micro, [*said, f"micro batch {micro}: {reason}; a real step went through"]
        if torch.cuda.is_available():
            _free()


def _free() -> None:
    # In half precision a model's forward holds the model: only the collector lets go of it.
    gc.collect()
    torch.cuda.empty_cache()


class Settled(NamedTuple):
    """A run's configuration with its micro batch, and what is predicted of it."""

    config: Config
    own: float | None = None
    """GiB at the peak of PyTorch's own memory; None where nothing is predicted."""
    taken: int = 0
    """Bytes of the card that the run will take, without a store of photographs."""
    said: Sequence[str] = ()


def settle(config: Config, device: torch.device, world: int) -> Settled:
    """Choose the micro batch of a run on a GPU, where it is `auto`. A CPU's configuration stays as it is.

    Raises:
        UserError: not even the smallest micro batch fits, or the global batch cannot be divided.
    """
    if device.type != "cuda":
        return Settled(config)
    given = config
    # The real step computes as training will.
    numerics(config.deterministic, cpu=False)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    capability, card = card_of(device)
    # What an earlier run of this process has left behind is free, and is not of this run's peaks.
    _free()
    torch.cuda.reset_peak_memory_stats(device)
    precision, _ = agree_on_precision(given.precision, launched, capability, card)
    chosen: Any = precision
    config = replace(config, precision=chosen)
    allowance = allowances.load(card)
    said: list[str] = []
    # All ranks hold as many, so the one with least room decides.
    free = min(ranks.gather([torch.cuda.mem_get_info(device)[0]]))
    try:
        if config.micro_batch_size == "auto":
            micro, said = checked(config, world, free, lambda size: one_step(config, size, world, device), allowance)
            least = min(ranks.gather([micro]))
            if least < micro:
                said.append(f"micro batch {least}: more does not fit on the card of another rank")
            config = replace(config, micro_batch_size=least)
            _free()
            torch.cuda.reset_peak_memory_stats(device)
        if config.batch_size % world or int(config.micro_batch_size) * world > config.batch_size:
            return Settled(replace(config, precision=given.precision), said=said)
        without = replace(config, loading=replace(config.loading, store="none"))
        found = predict(Case(without, int(config.micro_batch_size), world), allowance)
    except Inexact as problem:
        said.append(f"memory is not predicted: {problem}")
        return Settled(replace(config, precision=given.precision), said=said)
    taken = found.total - found.kinds["context"]
    own = (taken - found.kinds["loader"]) / GIB
    kinds = {kind: count for kind, count in found.kinds.items() if kind not in ("context", "loader")}
    most = max(kinds, key=lambda kind: kinds[kind])
    said.append(f"memory: {own:.2f} GiB predicted for PyTorch, most of it {most}; {allowance.source}")
    if taken > free:  # the micro batch was given, or chosen on a larger card
        said.append(f"memory: {gib(taken)} predicted with the loader's, and {gib(free)} are free: it may run out")
    return Settled(replace(config, precision=given.precision), own, taken, said)
