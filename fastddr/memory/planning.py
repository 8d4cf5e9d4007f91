"""What fits on a card: the largest micro batch, the cheapest change that makes a training fit, a table of models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastddr.config import MODELS, Config, check
from fastddr.errors import UserError
from fastddr.loaders.capacity import SHARES
from fastddr.memory.allowances import Allowance
from fastddr.memory.cards import images_per_second
from fastddr.memory.predicting import (
    PHOTOGRAPHS,
    Case,
    batch_normed,
    fits,
    gib,
    loader_bytes,
    needed,
    predict,
    tape_of,
)
from fastddr.runtime import divide_batch

#: Below so many photographs at once BatchNorm's statistics are so noisy that another change is cheaper.
FEW = 8
#: What the blocks of a step in half precision take at least of those in float32: no number has less than two bytes.
HALF = 0.5
#: Largest micro batch that is looked for.
MOST = 4096


@dataclass(frozen=True)
class Way:
    """A change that makes a training fit."""

    flags: str
    costs: str
    """What it changes besides."""
    case: Case
    total: int
    """Bytes, as predicted for it."""


def divisors(number: int) -> list[int]:
    """All, the largest first."""
    return [part for part in range(number, 0, -1) if number % part == 0]


def largest(case: Case, limit: int, allowance: Allowance) -> int:
    """The largest micro batch of at most `limit` bytes, whatever the global batch; 0 if there is none."""
    low, high = 0, 1
    while high <= MOST and fits(replace(case, micro=high), limit, allowance):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(case, micro=middle), limit, allowance) else (low, middle)
    return low


def _smaller(case: Case, limit: int, allowance: Allowance, like: Case | None = None, share: float = 1) -> int | None:
    """The largest micro batch below the case's that divides a rank's part of the global batch and fits."""
    least = 2 if case.steps.mixed else 1
    parts = [micro for micro in divisors(case.config.batch_size // case.ranks) if least <= micro < case.micro]
    if like is not None:  # traced already; of its blocks the case's take `share` at least, which saves traces
        parts = [micro for micro in parts if share * tape_of(like).peak(micro).held <= limit]
    if parts and not case.steps.accumulated:
        # With accumulation a step never takes less: the gradients are there as well. So this may save a trace.
        parts = [micro for micro in parts if tape_of(case).peak(micro).held <= limit]
    return next((micro for micro in parts if fits(replace(case, micro=micro), limit, allowance)), None)


@dataclass(frozen=True)
class _Change:
    flags: str
    costs: str
    """What it changes besides."""
    case: Case
    share: float = 0
    """What its blocks take at least of those of the case before it."""
    micro: range | None = None
    """Smaller micro batches that come with it; None where the micro batch stays."""


def _changes(case: Case) -> Iterator[_Change]:
    """All that `ways` tries, in its order."""
    config, smaller = case.config, range(1, case.micro)
    few = FEW if batch_normed(config) else 1
    yield _Change("", "", case, micro=range(few, case.micro))
    if _has_blocks(config):
        again = replace(case, config=replace(config, memory=replace(config.memory, checkpointing=True)))
        yield _Change("--memory.checkpointing", "nothing in the result; a step takes about a third longer", again)
    if config.precision == "fp32":
        half = replace(case, config=replace(config, precision="bf16"))
        for micro in (None, smaller):
            yield _Change("--precision bf16", "numbers of less precision (fp16 on older cards)", half, HALF, micro)
    yield _Change("", "", case, micro=range(1, few))
    if config.model == "resnet" and config.resnet.stem != "standard":
        stem = replace(case, config=replace(config, resnet=replace(config.resnet, stem="standard")))
        yield _Change("--resnet.stem standard", "another model: its maps are a sixteenth as large", stem)
        yield _Change("--resnet.stem standard", "another model", stem, micro=smaller)
    for part in (3, 2, 1):
        size = config.image_size * part // 4 // 32 * 32
        if size:
            sized = replace(case, config=replace(config, image_size=size))
            costs = "less of the photograph is seen at once"
            if size < config.canvas and _allowed(replace(config, image_size=size, canvas=size)):
                costs += f"; with --canvas {size} too the whole of it, in fewer pixels"
            yield _Change(f"--image-size {size}", costs, sized, _share(config, size))


def _allowed(config: Config) -> bool:
    """Whether image, canvas and augmentation go together."""
    try:
        check(config, "fastddr plan")
    except UserError:
        return False
    return True


def ways(case: Case, limit: int, allowance: Allowance) -> Iterator[Way]:
    """Changes that make a training fit into `limit` bytes, each by its own prediction, the cheapest first.

    Cheap is what changes the result little and costs little time: where photographs are kept, the micro batch
    (BatchNorm's statistics), activations that are computed again, the precision, a very small micro batch, the model's
    stem, and last the image.
    """
    config = case.config
    if config.loading.store == "vram":
        case = replace(case, config=replace(config, loading=replace(config.loading, store="ram")))
        if fits(case, limit, allowance):
            total = predict(case, allowance).total
            yield Way("--loading.store ram", "nothing in the result", case, total)
    for change in _changes(case):
        try:
            way = _way(change, case, limit, allowance)
        except UserError:
            # Not every image suits a model of timm's, or the augmentation.
            if change.case.config.image_size == config.image_size:
                raise
            continue
        if way is not None:
            yield way


def _way(change: _Change, case: Case, limit: int, allowance: Allowance) -> Way | None:
    """The change of a case as one that makes it fit; None where it does not."""
    check(change.case.config, "fastddr plan")
    flags, costs, micro = change.flags, change.costs, change.case.micro
    if change.micro is None:
        if _least(change, case, micro) > limit or not fits(change.case, limit, allowance):
            return None
    else:
        found = _smaller(change.case, limit, allowance, case, change.share)
        if found is None or found not in change.micro:
            return None
        micro, flags = found, f"{change.flags} --micro-batch-size {found}".strip()
        normed = "the global batch stays"
        if batch_normed(change.case.config):
            normed = f"BatchNorm sees {micro} photographs at a time; {normed}"
        costs = "; ".join(filter(None, (costs, normed)))
    changed = replace(change.case, micro=micro)
    return Way(flags, costs, changed, predict(changed, allowance).total)


def _least(change: _Change, case: Case, micro: int) -> float:
    """What a change of a case takes at least with a micro batch: no trace of it is needed to say."""
    return change.share * tape_of(case).peak(micro).held


def _share(config: Config, size: int) -> float:
    """What the blocks of a step take at least of their bytes, with images of another size."""
    # Maps go by the area, a ConvMixer's by that of its whole patches; attention, which timm may have, by its square.
    # What is rounded down further on takes a little from it.
    whole = config.convmixer.patch_size if config.model == "convmixer" else 1
    area = (size // whole / max(1, config.image_size // whole)) ** 2
    return 0.8 * area if config.model in MODELS else 0.8 * area**2


def _has_blocks(config: Config) -> bool:
    """Whether activation checkpointing can be asked for: not twice, not with torch.compile, and only of our models."""
    return not (config.memory.checkpointing or config.compile) and config.model in MODELS


@dataclass(frozen=True)
class Line:
    """A model and size of the table."""

    model: str
    image_size: int
    canvas: int
    largest: int
    """Largest micro batch; 0 if not even one photograph fits."""
    micro: int = 0
    """What is chosen for the wanted global batch; 0 as well then."""
    accumulation: int = 0
    store: str = ""
    """Where DDR's decoded photographs would be kept."""
    total: int = 0
    """Bytes with this micro batch, or with one photograph where that does not fit."""
    rate: float | None = None
    """Images a second at most; None where the card's limits are not known."""


def line(case: Case, limit: int, allowance: Allowance, bandwidth: float | None, peak: float | None) -> Line:
    """What is chosen for one configuration, at its global batch.

    Raises:
        UserError: the global batch cannot be cut among the ranks.
    """
    config = case.config
    part, _ = divide_batch(config.batch_size, "auto", case.ranks)
    whole = replace(case, micro=part)
    micro = part if fits(whole, limit, allowance) else _smaller(whole, limit, allowance)
    most = largest(case, limit, allowance)
    found = Line(config.model, config.image_size, config.canvas, most)
    if micro is None:
        return replace(found, total=predict(replace(case, micro=1), allowance).total)
    chosen = replace(case, micro=micro)
    total = predict(chosen, allowance).total
    photographs = PHOTOGRAPHS * 3 * config.canvas**2
    vram = photographs <= SHARES["vram"] * (limit - allowance.context) and total + photographs <= limit
    rate = None
    if bandwidth is not None and peak is not None:
        rate = images_per_second(tape_of(chosen), micro, part // micro, bandwidth, peak)
    store = "vram" if vram else "ram or a file"
    return replace(found, micro=micro, accumulation=part // micro, store=store, total=total, rate=rate)


def choose_micro_batch(
    config: Config, world: int, free_bytes: int, allowance: Allowance, below: int | None = None
) -> tuple[int, str]:
    """The largest micro batch that fits, and the reason; the global batch, and so the recipe, stays.

    Args:
        config: `precision` may be `auto`, which is half precision on a GPU.
        free_bytes: of the card, now that CUDA's context is there. Where the loader may keep photographs in VRAM, it
            may take its quarter of them.
        below: take a smaller one than this, which was too large in reality.

    Raises:
        UserError: the global batch cannot be divided by the ranks, or not even the smallest micro batch fits.
    """
    part, _ = divide_batch(config.batch_size, "auto", world)
    config = replace(config, precision="bf16") if config.precision == "auto" else config
    keeps = config.loader in ("auto", "resident") and config.loading.store in ("auto", "vram")
    room = int(free_bytes * (1 - allowance.share) * (1 - SHARES["vram"] if keeps else 1))
    # The loader's store has its share already, and the context is there.
    config = replace(config, loading=replace(config.loading, store="ram"))

    def need(micro: int) -> int:
        case = Case(config, micro, world)
        own = needed(tape_of(case), micro) + loader_bytes(config, micro, allowance)
        return own + allowance.workspaces

    refused = ""
    least = 2 if Case(config, part, world).steps.mixed else 1
    if part < least:
        raise UserError(
            f"augment.mixup and augment.cutmix mix the photographs that a rank holds, and batch_size "
            f"{config.batch_size} on {world} ranks is one a rank; raise --batch-size, or set both to 0."
        )
    for micro in divisors(part):
        if micro < least or (below is not None and micro >= below):
            continue
        wanted = need(micro)
        if wanted <= room:
            quarter = ", a quarter left to decoded photographs" if keeps else ""
            return micro, f"{gib(wanted)} predicted of {gib(room)} that may be taken{quarter}{refused}"
        refused = refused or f"; {micro} would take {gib(wanted)}"
    raise UserError(
        f"batch_size {config.batch_size}: even {least} photograph(s) of {config.image_size} px at once would take "
        f"{gib(need(least))} of the card's memory, of which {gib(room)} may be taken; lower --image-size, or see "
        "`fastddr plan`."
    )
