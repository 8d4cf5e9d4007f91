"""The networks whose training step is measured, by name: fastddr's, timm's and torchvision's.

convmixer-512-12-k9-p8        fastddr's ConvMixer: width, depth, kernel, patch
resnet, resnet,depth=40, cnn  fastddr's others, with settings where the default is not meant
timm:convmixer-512-12-k9-p8   timm's ConvMixer class with the settings of ours: like with like
timm:convmixer_768_32         a model of timm's
torchvision:resnet50          a model of torchvision's
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from flops import Mixer
from torch import nn

from fastddr import models
from fastddr.config import Config
from fastddr.errors import UserError
from fastddr.models import levers

#: Grades of DDR without the ungradable.
CLASSES = 5
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
_MIXER = re.compile(r"convmixer-(\d+)-(\d+)-k(\d+)-p(\d+)")
_PEERS = ("timm", "torchvision")


def mixer(name: str) -> Mixer | None:
    """The settings that the name of a ConvMixer spells out; None of any other name."""
    match = _MIXER.fullmatch(name.removeprefix("timm:"))
    return Mixer(*map(int, match.groups())) if match else None


def check(name: str) -> None:
    """Raise UserError for a name that cannot be one of a network."""
    source, colon, _ = name.partition(":")
    ours = name.partition(",")[0] in models.names()
    if mixer(name) is None and not ours and not (colon and source in _PEERS):
        raise UserError(
            f"--models {name}: known are {', '.join(models.names())} (settings as in resnet,depth=40), "
            "convmixer-WIDTH-DEPTH-kKERNEL-pPATCH, the same after timm:, timm:NAME and torchvision:NAME."
        )


def build(name: str, image_size: int) -> nn.Module:
    """A new network, images (b, 3, h, w) to logits (b, 5), with random weights, on the CPU.

    Raises:
        UserError: its package is not installed, or fastddr cannot build it.
        RuntimeError, ValueError: the package does not know it.
    """
    settings = mixer(name)
    source, rest = _parts(name)
    if source in _PEERS and find_spec(source) is None:
        raise UserError(f"{source} is not installed; pip install {source}.")
    if source == "timm":
        import timm
        from timm.models.convmixer import ConvMixer

        if settings is not None:
            return ConvMixer(settings.dim, settings.depth, settings.kernel, settings.patch, num_classes=CLASSES)
        return timm.create_model(rest, num_classes=CLASSES)
    if source == "torchvision":
        from torchvision.models import get_model

        return get_model(rest, num_classes=CLASSES)
    source, chosen = _ours(name)
    return models.build(source, num_classes=CLASSES, image_size=image_size, **chosen)


def _parts(name: str) -> tuple[str, str]:
    source, _, rest = name.partition(":" if ":" in name else ",")
    return source, rest


def _ours(name: str) -> tuple[str, dict[str, Any]]:
    """A model of fastddr's and its settings, as far as the name says them."""
    settings = mixer(name)
    if settings is not None:
        return "convmixer", {
            "dim": settings.dim, "depth": settings.depth, "kernel_size": settings.kernel, "patch_size": settings.patch,
        }  # fmt: skip
    source, rest = _parts(name)
    pairs = (pair.partition("=") for pair in rest.split(",") if pair)
    return source, {key: int(value) if value.isdigit() else value for key, _, value in pairs}


def as_trained(name: str, image_size: int, device: torch.device) -> nn.Module:
    """As `build`, on a device, its maps in the order in which fastddr trains such a model there."""
    # Laid out before it is moved, as training does: copies on the card would leave holes between its weights.
    network = build(name, image_size).to(memory_format=torch.channels_last).to(device)
    config = Config()
    if _parts(name)[0] not in _PEERS:
        source, chosen = _ours(name)
        config = replace(config, model=source, **{source: replace(getattr(config, source), **chosen)})
        if levers.layout(config, device) == "NCHW":
            levers.keep_contiguous(network)
    return network


def settings_of(name: str, network: nn.Module) -> Mixer | None:
    """The settings of a ConvMixer, by its name or, of timm's named ones, from the network; None of other networks."""
    if mixer(name) is not None or type(network).__name__ != "ConvMixer":
        return mixer(name)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    patches, depthwise = convolutions[:2]
    # One convolution for the patches, two a layer.
    return Mixer(patches.out_channels, len(convolutions) // 2, depthwise.kernel_size[0], patches.kernel_size[0])


def lay_out(network: nn.Module, layout: str, device: torch.device) -> nn.Module:
    """The network on its device, its weights and all its maps in a layout.

    fastddr's ConvMixer gives channels_last maps whatever it is given, because its patches are cut by a matrix product;
    for NCHW they are copied into that order once, behind the patches.
    """
    network.to(device).to(memory_format=LAYOUTS[layout])
    patches = getattr(network, "patches", None)
    if layout == "NCHW" and patches is not None:
        patches.register_forward_hook(lambda module, inputs, output: output.contiguous())
    return network
