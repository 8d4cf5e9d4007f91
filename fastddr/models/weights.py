"""Pretrained weights, `--init`: where they come from, what they are called, and what of them fits.

imagenet      what timm or torchvision publishes for this model, from their caches or downloaded into them
PATH          a file: safetensors, or a state dict that PyTorch saved
run:NAME      the best weights of an earlier run in runs/NAME, or in the folder that is named

Nothing is loaded that could run code: a pickle is read with `weights_only=True`, and beside tensors and plain values it
may hold the flags of the script that wrote it, an `argparse.Namespace`, which is a bag of such values.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastddr import ranks
from fastddr.config import Config, from_mapping
from fastddr.config.sections import IMAGENET_MEAN, IMAGENET_STD
from fastddr.config.strict import read_yaml
from fastddr.errors import UserError
from fastddr.models import zoo
from fastddr.models.convmixer import ConvMixer, our_name
from fastddr.models.heads import Single
from fastddr.models.resnet import PUBLISHED
from fastddr.runs import expanded

#: The ConvMixers that the paper trained on ImageNet: dim, depth, kernel, patch and activation, to timm's name.
CONVMIXERS = {
    (768, 32, 7, 7, "relu"): "convmixer_768_32",
    (1024, 20, 9, 14, "gelu"): "convmixer_1024_20_ks9_p14",
    (1536, 20, 9, 7, "gelu"): "convmixer_1536_20",
}
#: Learning rates of Adam from here on are such as models are trained with from random weights.
FROM_SCRATCH = 1e-3
#: What wraps a state dict in a file, and what wraps its names. First what timm's and ConvNeXt's scripts call averages.
_AVERAGES = ("state_dict_ema", "model_ema")
_INSIDE = (*_AVERAGES, "state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Source:
    """Some weights as they are kept."""

    tensors: dict[str, Tensor]
    """By their own names, on the CPU."""
    lines: tuple[str, ...] = ()
    """What to know of where they were found."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation of the images that they were trained on, where that is known."""


@dataclass(frozen=True)
class Fit:
    """What of some weights fits a model."""

    taken: dict[str, Tensor]
    """By the model's names."""
    lines: tuple[str, ...]
    """First how many were taken, then one line for each tensor that was not, here or there."""


def begin(
    config: Config,
    model: nn.Module,
    average: nn.Module,
    best: Callable[[Path], dict[str, Tensor]],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Let a model, and the average of its weights, begin at the weights that `config.init` names, on every rank.

    Where it is None, nothing is done.

    Args:
        model: bare; it is changed in place, so an optimizer may hold its parameters.
        average: the model that holds the averaged weights; the same as `model` where there is none.
        best: reads the weights of a checkpoint's folder.

    Returns:
        The lines that `say` heard of what was taken and what was not, the same on every rank.

    Raises:
        UserError: the weights cannot be had, or are another model's.
    """
    if config.init is None:
        return ()

    def take() -> tuple[Source, Fit]:
        there = source(config, best)
        return there, fit(model, there.tensors, config)

    there, found = ranks.main_first(take)
    # A file may lie on each machine by itself, and a run may train on and name another checkpoint the best.
    ranks.agree(
        lambda: _digest(found.taken),
        f"--init {config.init}: the ranks have read different weights; give a file or a run that all see, and that "
        "nobody writes to meanwhile.",
    )
    for target in (model, average):
        put(target, found.taken)
    lines = (*found.lines, *there.lines)
    # A model of timm's says itself what timm publishes for it was trained on.
    trained = there.normalisation or (zoo.normalisation(model) if config.init == "imagenet" else None)
    if trained is not None and trained != (config.augment.mean, config.augment.std):
        mean, std = (" ".join(map(str, values)) for values in trained)
        lines += (
            f"init: these weights were trained on images of another normalisation; --augment.mean {mean} "
            f"--augment.std {std} is theirs",
        )
    for line in lines:
        say(f"  {line}")
    if not config.init.startswith("run:") and config.optimizer.name in ("adam", "adamw") and config.lr >= FROM_SCRATCH:
        say(
            f"  --lr {config.lr:g} is a rate for training from scratch: pretrained weights are usually fine-tuned at a "
            "fifth to a tenth of it, such as --lr 2e-4"
        )
    return lines


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        # As bytes it can be seen only without gaps, and a file keeps those of a slice.
        whole = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(whole.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source(config: Config, best: Callable[[Path], dict[str, Tensor]]) -> Source:
    """The weights that `config.init` names; `UserError` where they cannot be had."""
    init = config.init
    assert init is not None
    if init == "imagenet":
        ours = not config.model.startswith(zoo.PREFIX)
        return Source(_imagenet(config), normalisation=(IMAGENET_MEAN, IMAGENET_STD) if ours else None)
    if init.startswith("run:"):
        return _run(init, best)
    return _file(expanded(init))


def _imagenet(config: Config) -> dict[str, Tensor]:
    why = f"--init imagenet for {config.model}"
    if config.model.startswith(zoo.PREFIX):
        return zoo.pretrained(config.model, config.image_size)
    if config.model == "convmixer":
        mixer = config.convmixer
        shape = (mixer.dim, mixer.depth, mixer.kernel_size, mixer.patch_size, mixer.activation)
        if shape in CONVMIXERS:
            return zoo.pretrained(zoo.PREFIX + CONVMIXERS[shape], config.image_size)
        theirs = "; ".join(
            f"dim {dim}, depth {depth}, kernel_size {kernel}, patch_size {patch}, activation {activation}"
            for dim, depth, kernel, patch, activation in CONVMIXERS
        )
        raise UserError(f"{why}: there are weights of three shapes only ({theirs}); --convmixer.size l is the first.")
    if config.model == "resnet":
        depth, width = config.resnet.depth, config.resnet.width
        if depth in PUBLISHED and width == 64:
            return _torchvision(f"resnet{depth}", why)
        depths = ", ".join(map(str, PUBLISHED))
        raise UserError(f"{why}: there are ImageNet weights of the depths {depths} with width 64 only.")
    raise UserError(f"{why}: nobody has published any; take another model, or leave --init out.")


def _torchvision(name: str, why: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except OSError as error:
        raise zoo.offline(why, error) from error
    # A file that broke off, or the page of a proxy in its place: the hash is of downloads, and not of what is cached.
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
        raise UserError(
            f"{why}: what should be the weights is not ({zoo.brief(error)}); remove {cached} if it is there and go "
            "online once, or give --init a file."
        ) from error


def _run(init: str, best: Callable[[Path], dict[str, Tensor]]) -> Source:
    name = init.removeprefix("run:")
    folder = Path("runs") / name if "/" not in name else expanded(name)
    checkpoint = folder / "checkpoints" / "best"
    if not checkpoint.exists():
        what = "this run has no best checkpoint yet" if (folder / "config.yaml").is_file() else "there is no run"
        raise UserError(f"--init {init}: {what} in {folder}; name a run that has validated at least once.")
    return Source(best(checkpoint), normalisation=_normalised(folder / "config.yaml"))


def _normalised(stored: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of a run's images, by its configuration, whose other keys may be of an older form."""
    augment = read_yaml(stored).get("augment") if stored.is_file() else None
    if not isinstance(augment, dict) or not {"mean", "std"} <= augment.keys():
        return None
    known = from_mapping({"augment": {key: augment[key] for key in ("mean", "std")}}, str(stored)).augment
    return known.mean, known.std


def _file(path: Path) -> Source:
    where = f"--init {path}"
    if path.is_dir():
        raise UserError(f"{where}: this is a folder; give a file, or run:{path} for the best weights of a run.")
    if not path.is_file():
        raise UserError(f"{where}: there is no such file; give a file, `imagenet`, or run:NAME.")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _unpickled(path, where)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: this is neither safetensors nor what torch.save wrote ({said}).") from None
    lines: tuple[str, ...] = ()
    for key in _INSIDE:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            if key in _AVERAGES:  # which are what these scripts score, and what timm takes
                lines = (f"init: of this file the averaged weights are taken, {key!r}",)
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{where}: there are no named tensors in it; save a model's state_dict().")
    unnamed = [name for name in loaded if not isinstance(name, str)]
    if unnamed:
        raise UserError(f"{where}: {unnamed[0]!r} among the weights is no name; save a model's state_dict() alone.")
    named: dict[str, Any] = dict(loaded)
    for wrapper in (*_WRAPPERS, *_WRAPPERS):  # one may lie within the other
        if all(name.startswith(wrapper) for name in named):
            named = {name.removeprefix(wrapper): value for name, value in named.items()}
    strange = [name for name, value in named.items() if not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"{where}: {strange[0]!r} among the weights is no tensor; save a model's state_dict() alone.")
    for name, value in named.items():
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise UserError(
                f"{where}: {name!r} is sparse, quantised, nested or without its numbers; save the state_dict() of a "
                "model with plain tensors."
            )
    return Source(named, lines)


def _unpickled(path: Path, where: str) -> Any:
    try:
        # It is made without `__init__` and filled by `__dict__.update`, with values that are allowed themselves.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The reason stands in the middle of a text of many lines; what matters is what it asked for.
        said = str(error).partition("Unsupported global: GLOBAL ")[2].split(" ")[0]
        what = f"it holds {said}, not tensors alone" if said else "it is no file of torch.save, or damaged"
        raise UserError(
            f"{where}: {what}, and fastddr runs no code from a file; save the model's state_dict() alone."
        ) from None


def heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give a model's logits, without the point before its tensors' names."""
    theirs = zoo.head(model)
    return theirs or tuple(name for name in ("head", "fc") if _takes_one(getattr(model, name, None)))


def _takes_one(layer: object) -> bool:
    """Whether it is a layer that needs one argument: a model of one's own may call anything else `head`."""
    if isinstance(layer, Single) or not isinstance(layer, nn.Module):
        return isinstance(layer, Single)
    taken = inspect.signature(layer.forward).parameters.values()
    needed = [argument for argument in taken if argument.default is argument.empty]
    return sum(argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD) for argument in needed) == 1


def fit(model: nn.Module, tensors: Mapping[str, Tensor], config: Config) -> Fit:
    """What of `tensors` goes into the model. The names may be ours, the paper's, timm's or torchvision's.

    The model may be a part of another, as in Lightning's checkpoints: then what its names begin with is taken off.
    Where no name is ours, but kinds and shapes agree one by one, they are taken in their order.

    Raises:
        UserError: not even half of the model's weights, the head left out, are there; or one is not finite.
    """
    mine = model.state_dict()
    tensors, lines = _part(model, tensors)
    theirs = {_name(model, name): tensor for name, tensor in tensors.items()}
    prefixes = tuple(f"{name}." for name in heads(model))
    if not set(mine) & set(theirs) and _alike(mine, theirs, prefixes):
        theirs = dict(zip(mine, theirs.values(), strict=True))
        lines.append("init: its names are not this model's, but kinds and shapes are, one by one: taken in that order")
    taken: dict[str, Tensor] = {}
    for name, tensor in mine.items():
        if name not in theirs:
            lines.append(f"init: {name} begins at random: it is not there")
        elif theirs[name].shape != tensor.shape:
            lines.append(f"init: {name} begins at random: {_shape(tensor)} here, {_shape(theirs[name])} there")
        elif (tensor.is_floating_point() and not theirs[name].is_floating_point()) or theirs[name].is_complex():
            kinds = [str(found.dtype).removeprefix("torch.") for found in (tensor, theirs[name])]
            lines.append(f"init: {name} begins at random: {kinds[0]} here, {kinds[1]} there")
        else:
            taken[name] = theirs[name]
    lines += [f"init: {name} is left out: it is not in this model" for name in theirs if name not in mine]
    body = {name: weight.numel() for name, weight in model.named_parameters() if not name.startswith(prefixes)}
    share = sum(count for name, count in body.items() if name in taken) / max(1, sum(body.values()))
    if share < 0.5:
        shown = next((name for name in theirs if name not in taken), "none")
        raise UserError(
            f"--init {config.init}: of this {config.model}'s weights only {share:.0%} are there (its first that does "
            f"not fit is {shown!r}); give the weights of a model of the same shape, in floating-point numbers."
        )
    for name, tensor in taken.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():  # as float8 is not asked
            raise UserError(f"--init {config.init}: {name} is not finite; take other weights.")
    return Fit(taken, (f"init {config.init}: {len(taken)} of {len(mine)} tensors taken", *lines))


def _name(model: nn.Module, name: str) -> str:
    """What a tensor is called here."""
    return our_name(name) if isinstance(model, ConvMixer) else name


def _part(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors by their names within the part of them that is this model, and a line that says which."""
    mine, behind = set(model.state_dict()), Counter[str]()
    for name in tensors:
        places = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        behind.update(name[:place] for place in places if _name(model, name[place:]) in mine)
    most = max(behind.values(), default=0)
    # They stay where as many names are the model's as they stand, and where too few are for the part to be this model.
    if most in (0, behind[""]) or 2 * most < len(mine):
        return tensors, []
    first = next(start for start, count in behind.items() if count == most)
    inside = {name.removeprefix(first): tensor for name, tensor in tensors.items() if name.startswith(first)}
    # What bears a name of the model's outside of the part is of another set of weights.
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(first)}
    extra = {name: tensor for name, tensor in outside.items() if _name(model, name) not in mine}
    line = f"init: taken from what its names begin with, {first!r}"
    return inside | extra, [f"{line}; {len(outside)} begin otherwise and are left" if outside else line]


def _alike(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], heads: tuple[str, ...]) -> bool:
    """Whether both list as many tensors, each of the other's kind (`weight`, `running_mean`, …) and shape."""

    def leaf(name: str) -> str:
        return name.rpartition(".")[2]

    return len(mine) == len(theirs) and all(
        leaf(one) == leaf(other) and (mine[one].shape == theirs[other].shape or one.startswith(heads))
        for one, other in zip(mine, theirs, strict=True)
    )


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


@torch.no_grad()
def put(model: nn.Module, taken: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model's own, which keep their place, type and layout."""
    own = model.state_dict()
    for name, tensor in taken.items():
        own[name].copy_(tensor)
