"""How much memory of a card a training takes, by kind: a tape for any configuration, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastddr import models
from fastddr.config import MODELS, Config
from fastddr.data.cache import folder, keep
from fastddr.errors import UserError
from fastddr.memory.allocator import replay
from fastddr.memory.allowances import GIB, Allowance
from fastddr.memory.tape import KINDS, Tape, rounded
from fastddr.memory.tracing import Inexact, Steps, prime, trace
from fastddr.runtime import DTYPES

#: Gradable photographs of DDR in train and valid, which a store of decoded ones would keep.
PHOTOGRAPHS = 6260 + 2503
#: Of what an eager step keeps for its backward pass, what a compiled one keeps: four maps of a ConvMixer's six.
COMPILED = 4 / 6
#: To how many bytes the room that the allocator needs is found.
_STEP = 2 * 2**20
#: Batches that the loader has on their way to a GPU, if nothing else is asked for, and the one that it makes.
_AHEAD = 4
#: What a model is built with.
Chosen = tuple[tuple[str, Any], ...]
#: Whether each block of a model was either of the model or of each photograph when it was first traced.
_apart: dict[tuple[str, Chosen], bool] = {}


@dataclass(frozen=True)
class Case:
    """A training whose memory is asked for."""

    config: Config
    """Its `precision` is not `auto`; `loading.store` is where photographs will be kept."""
    micro: int
    """Photographs that a rank holds at once."""
    ranks: int = 1

    @property
    def steps(self) -> Steps:
        """What the memory of its step depends on."""
        config = self.config
        return Steps(
            image_size=config.image_size,
            classes=config.outputs,
            precision=config.precision,
            optimizer=config.optimizer.name,
            momentum=config.optimizer.momentum,
            clip_norm=None if config.optimizer.clip_norm is None else 1.0,
            average=config.optimizer.ema_decay is not None,
            accumulated=self.micro * self.ranks < config.batch_size,
            mixed=bool(config.augment.mixup or config.augment.cutmix),
            ranks=min(self.ranks, 2),
            recomputed=self.config.memory.checkpointing,
        )


@dataclass(frozen=True)
class Prediction:
    """Bytes by kind at the peak."""

    kinds: dict[str, int]
    estimated: bool
    """Whether part of it is no trace but an estimate (compiled steps)."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.kinds.values())

    @property
    def binding(self) -> str:
        """What takes most."""
        return max(self.kinds, key=lambda kind: self.kinds[kind])


@cache
def _code() -> str:
    """A digest of the code that tapes depend on."""
    package = Path(__file__).parents[1]
    files = [package / "step.py", package / "losses.py", package / "optimizers.py", package / "loaders" / "base.py"]
    files += sorted((package / "models").glob("*.py")) + [
        package / "memory" / f"{n}.py" for n in ("tape", "recording", "autocast", "tracing")
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def tape_of(case: Case) -> Tape:
    """The tape of a case, from the cache where it was traced before.

    Raises:
        UserError: there is no such model.
        Inexact: its memory is not affine in the batch.
    """
    tape = _traced(case.config.model, tuple(case.config.model_settings.items()), case.steps)
    if not case.config.compile:
        return tape
    saved = [kind == "activations" for kind in tape.kinds]
    each = [int(e * COMPILED) if s else e for e, s in zip(tape.each, saved, strict=True)]
    return replace(tape, each=each)


@lru_cache(maxsize=32)
def _traced(model: str, chosen: Chosen, steps: Steps) -> Tape:
    def made() -> Tape:
        make = _maker(model, chosen, steps.classes, steps.image_size)
        try:
            alone = prime(make, steps.image_size) if _known(model, chosen) else None
            return trace(make, steps, (2, 3) if alone is None else (alone,))
        except models.zoo.FAILURES as error:
            if model in MODELS or isinstance(error, Inexact):
                raise
            # Its code may ask for what a tensor without values cannot say, such as which of them are above 0.
            raise Inexact(f"its step cannot be traced without values, {models.zoo.brief(error)}") from error

    tape = made() if _own(model) else kept(_key(model, chosen, steps), made)
    _apart.setdefault((model, chosen), not any(f and e for f, e in zip(tape.fixed, tape.each, strict=True)))
    return tape


def _known(model: str, chosen: Chosen) -> bool:
    # Of timm's models nothing is proved. The first tape shows whether each block of this one is the model's or each
    # photograph's; the other ways to train it are then traced like our own.
    return model in MODELS or _apart.get((model, chosen), False)


def _key(model: str, chosen: Chosen, steps: Steps) -> str:
    key = json.dumps([model, chosen, asdict(steps), _code(), torch.__version__, _timm(model)])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _timm(model: str) -> str | None:
    """The version of timm, where the model is of it. Who lacks it is told so where the model is built."""
    try:
        return version("timm") if model.startswith(models.zoo.PREFIX) else None
    except PackageNotFoundError:
        return None


def _own(model: str) -> bool:
    """Whether a model is not timm's own but was registered with timm: its code may be another tomorrow."""
    timm = sys.modules.get("timm")  # who has not imported it has registered nothing
    name = model.removeprefix(models.zoo.PREFIX)
    if timm is None or model in MODELS or not timm.is_model(name):
        return False
    return not timm.models.model_entrypoint(name).__module__.startswith("timm.")


def _maker(model: str, chosen: Chosen, classes: int, size: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        # Built when it is first asked for: of a tape that is kept nobody asks.
        built = _built(model, chosen, classes, size)
        try:
            return deepcopy(built)
        except RuntimeError:  # a model of timm's may hold a tensor that PyTorch does not copy
            return _hollow(model, chosen, classes, size)

    return make


class _Valueless(TorchFunctionMode):
    """Leaves out what fills tensors of `meta`: there is nothing to fill, and to see that takes as long as a step."""

    _FILLS = frozenset({
        Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.fill_,
        Tensor.zero_,
    })  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


def _hollow(model: str, chosen: Chosen, classes: int, size: int) -> nn.Module:
    """A new model without values: its tensors are on `meta`.

    Raises:
        UserError: it cannot be made, on the CPU either.
    """
    build = partial(models.build, model, num_classes=classes, image_size=size, **dict(chosen))
    try:
        with torch.device("meta"), _Valueless():
            return build()
    except UserError:
        # Its code may ask for values while it is built, as for the rates of stochastic depth.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return build().to("meta")


@lru_cache(maxsize=4)
def _built(model: str, chosen: Chosen, classes: int, size: int) -> nn.Module:
    """A model without values, to copy."""
    return _hollow(model, chosen, classes, size)


def batch_normed(config: Config) -> bool:
    """Whether the model of a configuration has BatchNorm, to which it matters how many photographs are held at once."""
    built = _built(config.model, tuple(config.model_settings.items()), config.outputs, config.image_size)
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in built.modules())


def _path(key: str) -> Path:
    return folder() / "memory" / f"{key}.json"


def kept(key: str, make: Callable[[], Tape]) -> Tape:
    """The tape of a key from the user's cache, else made and kept there."""
    path = _path(key)
    try:
        return Tape(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass  # none yet, or a broken one: it is made anew
    tape = make()
    with suppress(OSError):  # without a cache the next question takes as long again
        keep(path, json.dumps(asdict(tape)))
    return tape


def needed(tape: Tape, batch: int) -> int:
    """The least that the allocator has to be allowed, so that it gets through the steps: its peak and fragmentation."""
    low = tape.peak(batch).held
    if replay(tape, batch, low) is not None:
        return low
    allocator = replay(tape, batch)
    assert allocator is not None
    high = allocator.most
    while high - low > _STEP:
        middle = (low + high) // 2
        low, high = (low, middle) if replay(tape, batch, middle) is not None else (middle, high)
    return high


def loader_bytes(config: Config, micro: int, allowance: Allowance, photographs: int = PHOTOGRAPHS) -> int:
    """What the loader keeps on the card: batches on their way, the decoder, and its store if that is in VRAM.

    Photographs are of the canvas: larger ones, which are not prepared, take more while they are decoded.
    """
    ahead = (config.loading.prefetch or _AHEAD - 1) + 1
    # DALI gives float32, and decodes a batch while it warps the one before it.
    dali = config.loader in ("auto", "dali")
    image = 3 * config.image_size**2 * (4 if dali else DTYPES[config.precision].itemsize)
    canvas = 3 * config.canvas**2
    decoder = 0 if config.loader in ("torchvision", "replay") else allowance.decoder
    decoded = 2 * micro * canvas if dali else 0
    store = photographs * canvas if config.loading.store == "vram" else 0
    return ahead * rounded(micro * image) + decoder + decoded + store


def fits(case: Case, limit: int, allowance: Allowance) -> bool:
    """Whether `predict` comes to at most `limit` bytes; where that is clear it is found sooner."""
    room = limit - loader_bytes(case.config, case.micro, allowance) - allowance.workspaces - allowance.context
    return goes_through(tape_of(case), case.micro, room)


def goes_through(tape: Tape, batch: int, room: int) -> bool:
    """Whether the allocator gets through the steps with `room` bytes."""
    if tape.peak(batch).held > room:
        return False
    free = replay(tape, batch)
    return (free is not None and free.most <= room) or needed(tape, batch) <= room


def predict(case: Case, allowance: Allowance, photographs: int = PHOTOGRAPHS) -> Prediction:
    """The peak of a training on a GPU, by kind; no GPU is needed to say it."""
    tape = tape_of(case)
    peak = tape.peak(case.micro)
    found = {kind: peak.kinds[kind] for kind in KINDS}
    found["fragmentation"] = needed(tape, case.micro) - peak.held
    found["loader"] = loader_bytes(case.config, case.micro, allowance, photographs)
    found["workspaces"] = allowance.workspaces
    found["context"] = allowance.context
    return Prediction(found, case.config.compile)


def usable(vram: float, allowance: Allowance) -> int:
    """Bytes of a card of `vram` GiB that may be used."""
    return int(vram * GIB * (1 - allowance.share))


def gib(count: float) -> str:
    """`7.8 GiB`."""
    return f"{count / GIB:.1f} GiB" if count >= 0.095 * GIB else f"{count / 2**20:.0f} MiB"
