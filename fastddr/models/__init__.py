"""The models, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastddr import ranks
from fastddr.config import Config
from fastddr.errors import UserError, nearest
from fastddr.models import cnn, convmixer, levers, resnet, weights, zoo
from fastddr.models.heads import single

#: Each takes `num_classes` and `image_size` and, as further keywords with defaults, the model's own settings.
_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn.cnn,
    "convmixer": convmixer.convmixer,
    "resnet": resnet.resnet,
}


def names() -> list[str]:
    """The names that `build` knows, sorted."""
    return sorted(_BUILDERS)


def build(name: str, *, num_classes: int, image_size: int, **settings: object) -> nn.Module:
    """A new model: images (b, 3, h, w) to logits (b, num_classes), in float32 and channels_last, on the CPU. The head
    stays in float32 under autocast.

    `image_size` is the side in pixels of the square images that it will be trained on. The weights depend on
    nothing but torch's global CPU generator, which the caller seeds. `timm:NAME` is a model of timm's. Raises UserError
    for an unknown model or setting and for settings of which no model can be made.
    """
    builder: Callable[..., nn.Module]
    if name.startswith(zoo.PREFIX):
        if settings:
            raise UserError(f"model {name!r} has no settings here, but {', '.join(settings)} was given.")
        builder = partial(zoo.build, name)
    elif name in _BUILDERS:
        builder = _BUILDERS[name]
        known = [key for key in inspect.signature(builder).parameters if key not in ("num_classes", "image_size")]
        for key in settings:
            if key not in known:
                raise UserError(f"model {name!r} has no setting {key!r}: {nearest(key, known)}")
    else:
        raise UserError(f"there is no model {name!r}: {nearest(name, names())}")
    model = builder(num_classes=num_classes, image_size=image_size, **settings)
    return single(model, weights.heads(model)).to(memory_format=torch.channels_last)


def from_config(config: Config, say: Callable[[str], None], device: torch.device | None = None) -> nn.Module:
    """The model of a configuration, on the CPU, with what `config.memory` says of it; `say` hears what to know of it.

    `device`: the one that it will run on, where that is not the CPU.

    Raises:
        UserError: no such model can be made.
    """
    model = build(config.model, num_classes=config.outputs, image_size=config.image_size, **config.model_settings)
    if config.model == "resnet" and config.resnet.stem == "stride1":
        say(
            "  resnet.stem stride1: behind the stem, maps have the image's full resolution, 16 times the pixels of the "
            "standard stem's, and take as much more memory"
        )
    if config.sync_batchnorm and ranks.world() > 1:
        # Before anything hooks itself to the norms: they are replaced.
        theirs = config.model.startswith(zoo.PREFIX)
        model = zoo.synchronised(model) if theirs else nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.memory.checkpointing:
        levers.recompute_blocks(model, config.model)
        say("  memory.checkpointing: each block is computed again in the backward pass, and keeps only its input")
    if levers.layout(config, device or torch.device("cpu")) == "NCHW":
        levers.keep_contiguous(model)
        say("  memory.layout NCHW: maps lie in PyTorch's default order, not in channels_last")
    return model
