"""Heat maps: which places of a photograph speak for the grade that a model gives it.

Gradient times activation of the last map of the model, summed over its channels: HiResCAM (Draelos and Carin, "Use
HiResCAM instead of Grad-CAM", 2020). Where the map is averaged and one linear layer follows, as in a ConvMixer or a
ResNet, it is Grad-CAM (Selvaraju et al., 2017) to a factor; where a linear layer sees every place, as in the CNN, it is
each place's share of the answer, which Grad-CAM is not. What is explained is the logarithm of the grade's probability,
so that what speaks for all grades alike does not count.

captum (Kokhlikyan et al., 2020) does the work; it is an optional dependency: `pip install -e ".[explain]"`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fastddr.config import AugmentConfig
from fastddr.errors import UserError
from fastddr.loaders.base import Loader

#: Share of the colours in the overlay where the map is strongest; where it is 0 the photograph shows as it is.
_STRENGTH = 0.6
#: Perceptually uniform, and rising in lightness: legible to colour-blind readers and in print.
_COLOURS = "inferno"
#: Pixels that the side of a window has in an overlay, at least.
_LEAST = 224
#: Images whose maps are made at once; few, and not tuned.
_TOGETHER = 8
_NO_MAPS = (
    "--explain: no layer of this model gives maps of the image, as those of convolutional networks do; leave "
    "--explain out."
)


def check() -> None:
    """Raise `UserError` where captum is not installed."""
    if find_spec("captum") is None:
        raise UserError('--explain: captum is not installed; pip install -e ".[explain]" installs it.')


def last_map(model: nn.Module, image: Float[Tensor, "b 3 s s"]) -> nn.Module:
    """The module whose output is explained: the last that gives maps (b, d, h, w) with more than one place.

    Of modules that give the same map, the outermost, so that what follows it is pooling and the head. Maps that became
    tokens again do not count: those of a patch embedding, or of attention between two places.

    Raises:
        UserError: no module gives maps that the head sees, as in most transformers.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        # Square images have square maps. Windows and heads of attention are folded into the batch, and make it larger.
        if output.ndim == 4 and output.shape[2] == output.shape[3] > 1:
            if len(output) == len(image):
                found.append(module)
        # Tokens (b, n, d) or, with channels last, (b, h, w, d).
        elif (output.ndim == 4 and output.shape[2:] != (1, 1)) or (output.ndim == 3 and output.shape[1] > 1):
            found.clear()

    hooks = [module.register_forward_hook(look) for module in model.modules() if module is not model]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserError(_NO_MAPS)
    return found[-1]


def heat(
    model: nn.Module, layer: nn.Module, image: Float[Tensor, "b 3 s s"], grade: Int[Tensor, " b"]
) -> Float[Tensor, "b s s"]:
    """The maps of these grades at the images' size, 0 where nothing speaks for the grade and at most 1.

    Args:
        model: in evaluation mode, images to logits.
        layer: of it, by `last_map`.
        image: normalised, as a loader gives it.
        grade: of each image, the one to explain.

    Raises:
        UserError: the layer does not give one map an image.
    """
    from captum.attr import LayerGradientXActivation

    def log_probability(images: Tensor) -> Tensor:
        return model(images).float().log_softmax(1)

    with torch.enable_grad():
        found = LayerGradientXActivation(log_probability, layer).attribute(image.float(), target=grade)
    if len(found) != len(image):
        raise UserError(_NO_MAPS)
    maps = found.detach().float().sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, size=image.shape[2:], mode="bilinear")[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def pixels(image: Float[Tensor, "b 3 s s"], augment: AugmentConfig) -> UInt8[np.ndarray, "b s s 3"]:
    """Normalised images as what they look like."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    seen = (image.detach().float().cpu() * std + mean).clamp(0, 1) * 255
    return seen.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def overlay(photograph: UInt8[np.ndarray, "s s 3"], heat_map: Float[np.ndarray, "s s"], title: str) -> Image.Image:
    """The window that the model saw, beside the same under its heat map, and a line of text below."""
    import matplotlib  # a second, which only those wait for that ask for heat maps

    colours = matplotlib.colormaps[_COLOURS](heat_map)[:, :, :3] * 255
    share = (_STRENGTH * np.sqrt(heat_map))[:, :, None]
    mixed = np.rint(photograph * (1 - share) + colours * share).astype(np.uint8)
    # Small windows are shown larger, pixel by pixel, so that the text has room.
    side = len(photograph) * -(-_LEAST // len(photograph))
    sheet = Image.new("RGB", (2 * side + 4, side + 20), "white")
    for left, pixels_ in ((0, photograph), (side + 4, mixed)):
        sheet.paste(Image.fromarray(pixels_).resize((side, side), Image.Resampling.NEAREST), (left, 0))
    ImageDraw.Draw(sheet).text((4, side + 3), title, fill="black", font=ImageFont.load_default(12))
    return sheet


def write(
    model: nn.Module,
    loader: Loader,
    augment: AugmentConfig,
    grades: Int[Tensor, " n"],
    titles: Callable[[int], str],
    keep: Callable[[int, Image.Image], object],
    on_batch: Callable[[int], object],
) -> None:
    """Draw an overlay of each photograph that falls to this rank, of the grade that it has been given.

    Args:
        model: bare, in evaluation mode.
        loader: of the photographs, one window each.
        augment: the normalisation of its images.
        grades: of each id.
        titles: the line below each.
        keep: is given id and overlay.
        on_batch: hears how many photographs are done.

    Raises:
        UserError: the model has no maps.
    """
    layer: nn.Module | None = None
    for batch in loader.epoch():
        image = batch.image.float()
        layer = layer or last_map(model, image[:1])
        grade = grades[batch.id.cpu()].to(image.device)
        # Some at a time: gradients of a batch of scoring take more memory than training may have had.
        parts = zip(image.split(_TOGETHER), grade.split(_TOGETHER), strict=True)
        maps = torch.cat([heat(model, layer, some, its).cpu() for some, its in parts]).numpy()
        seen = pixels(image, augment)
        for k, (id_, valid) in enumerate(zip(batch.id.tolist(), batch.valid.tolist(), strict=True)):
            if valid:
                keep(id_, overlay(seen[k], maps[k], titles(id_)))
        on_batch(int(batch.valid.sum()))
