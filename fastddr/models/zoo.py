"""timm's models by name, `timm:NAME`: built for this image size, and tried once on an image.

timm (Wightman, "PyTorch Image Models") is an optional dependency: `pip install -e ".[timm]"`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastddr.collector import no_collector
from fastddr.errors import UserError

PREFIX = "timm:"
#: What timm's models raise where something does not suit them.
FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def timm(why: str) -> ModuleType:
    """The package; UserError where it is not installed, which begins with `why`."""
    if find_spec("timm") is None:
        raise UserError(f'{why}: timm is not installed; pip install -e ".[timm]" installs it.')
    with no_collector():
        import timm

    return timm


def build(model: str, num_classes: int, image_size: int) -> nn.Module:
    """A new model of timm's with random weights, images (b, 3, image_size, image_size) to logits (b, num_classes).

    Raises:
        UserError: timm is missing, does not know the name, or the model does not take images of this size.
    """
    package, name = timm(f"--model {model}"), model.removeprefix(PREFIX)
    try:
        size = _size(package, _known(package, model), image_size)
        network: nn.Module = package.create_model(name, num_classes=num_classes, **size)
        with torch.no_grad():
            logits = network.eval()(torch.zeros(1, 3, image_size, image_size))
    except FAILURES as error:
        raise _refused(model, image_size, brief(error)) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise _refused(model, image_size, f"it does not give {num_classes} logits an image")
    return network.train()


def pretrained(model: str, image_size: int) -> dict[str, Tensor]:
    """timm's own pretrained weights of a model, by timm's names, fitted by timm to the image size.

    From timm's cache, or downloaded into it.

    Raises:
        UserError: there are none, or they cannot be had now.
    """
    why = f"--init imagenet for {model}"
    package, name = timm(why), model.removeprefix(PREFIX)
    if not package.is_model_pretrained(_known(package, model)):
        tags = sorted(package.list_models(f"{_family(name)}*", pretrained=True))
        raise UserError(
            f"{why}: timm has no pretrained weights of this model; "
            + (f"it has some of {', '.join(tags[:5])}." if tags else "leave --init out, or give it a file.")
        )
    try:
        with no_pickled_code():
            network: nn.Module = package.create_model(name, pretrained=True, **_size(package, name, image_size))
    except OSError as error:
        raise offline(why, error) from error
    except Exception as error:  # what downloads, unpacks and reads them are four libraries with errors of their own
        raise UserError(
            f"{why}: timm cannot load these weights ({brief(error)}); remove them from the cache of Hugging Face if "
            "they are broken there, or give --init a file."
        ) from error
    return network.state_dict()


def synchronised(network: nn.Module) -> nn.Module:
    """The network with BatchNorm's statistics over all ranks. PyTorch's own converter would lose the activations that
    some of timm's norms have in them.
    """
    from timm.layers import convert_sync_batchnorm

    found: nn.Module = convert_sync_batchnorm(network)
    return found


def head(network: nn.Module) -> tuple[str, ...]:
    """Names of the classifiers of a model of timm's, as they stand before its tensors' names."""
    found: Any = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def normalisation(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the images that timm's weights were trained on; None where it does not say."""
    about: dict[str, Any] = getattr(network, "pretrained_cfg", {})
    return (tuple(about["mean"]), tuple(about["std"])) if {"mean", "std"} <= set(about) else None


def brief(error: Exception) -> str:
    """What another library said, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def offline(why: str, error: OSError) -> UserError:
    """The sentence about weights that are neither in the cache nor to be had."""
    said = " ".join(str(error).split())[:120]
    return UserError(
        f"{why}: the weights are not in the cache of this machine and cannot be downloaded ({said}); go online once, "
        "or give --init a file."
    )


@contextmanager
def no_pickled_code() -> Iterator[None]:
    """Within it `torch.load` reads tensors and plain values alone, whatever its caller says."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before


def _known(package: ModuleType, model: str) -> str:
    name = model.removeprefix(PREFIX)
    architecture, _, tag = name.partition(".")
    if package.is_model(architecture) and (not tag or package.is_model_pretrained(name)):
        return name
    known = package.list_models(f"{architecture}.*", pretrained=True) if tag else package.list_models()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ([architecture] if tag else [])
    said = f"the nearest are {', '.join(PREFIX + other for other in close)}" if close else "timm.list_models() has all"
    raise UserError(f"--model {model}: timm has no such model; {said}.")


def _family(name: str) -> str:
    return name.partition(".")[0].partition("_")[0]


def _size(package: ModuleType, name: str, image_size: int) -> dict[str, int]:
    # timm's mark of the models whose size is fixed when they are built, which is how they take another.
    about = package.models.get_pretrained_cfg(name)
    return {"img_size": image_size} if about is not None and about.fixed_input_size else {}


def _refused(model: str, image_size: int, said: str) -> UserError:
    return UserError(
        f"--model {model} cannot take images of {image_size}×{image_size} ({said}); take another --image-size or model."
    )
