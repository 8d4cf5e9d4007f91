"""What of `augment` makes sense together: no map may shrink by more than 1.25, because a warp does not antialias."""

from __future__ import annotations

import math

from fastddr.config.sections import AugmentConfig
from fastddr.errors import need

#: Most canvas pixels that may fall on one image pixel, along any direction. Bilinear interpolation reads four
#: neighbours; much beyond this it leaves out pixels, and what is left flickers from epoch to epoch.
MAX_SHRINK = 1.25


def largest_window(augment: AugmentConfig, image_size: int, canvas: int) -> float:
    """Longest side of a window of the canvas, in canvas pixels, before it is scaled."""
    if augment.resized_crop is None:
        return float(image_size)
    return canvas * math.sqrt(augment.resized_crop[1] * _elongation(augment))


def _elongation(augment: AugmentConfig) -> float:
    return max(augment.ratio[1], 1 / augment.ratio[0])


def check_augment(augment: AugmentConfig, image_size: int, canvas: int) -> None:
    """Raise `UserError` unless the values make sense together on windows of this size and canvases of this short side.

    Whatever passes draws maps (`fastddr.sampling.training_maps`) that shrink by at most `MAX_SHRINK`.
    """
    # Comparisons are written so that NaN fails them.
    low, high = augment.scale
    need(
        1 / MAX_SHRINK <= low <= high < math.inf,
        f"augment.scale is {low} to {high}, but must rise from at least {1 / MAX_SHRINK}: a map that shrinks by more "
        f"than {MAX_SHRINK} would alias; for a wider view take a smaller canvas.",
    )
    for key in ("brightness", "contrast", "saturation", "translate"):
        value = getattr(augment, key)
        need(0 <= value <= 1, f"augment.{key} is {value}, but must be from 0 to 1.")
    need(0 <= augment.hue <= 0.5, f"augment.hue is {augment.hue}, but must be from 0 to 0.5.")
    need(0 <= augment.rotate <= 180, f"augment.rotate is {augment.rotate}, but must be 0 to 180.")
    need(all(0 < value < math.inf for value in augment.std), f"augment.std is {augment.std}, but must be above 0.")
    need(all(map(math.isfinite, augment.mean)), f"augment.mean is {augment.mean}, but must be three numbers.")
    for key in ("mixup", "cutmix"):
        value = getattr(augment, key)
        need(0 <= value < math.inf, f"augment.{key} is {value}, but must be 0 (off) or an alpha above 0.")
    narrow, wide = augment.ratio
    need(0 < narrow <= wide < math.inf, f"augment.ratio is {narrow} to {wide}, but must rise from above 0.")
    if augment.resized_crop is None:
        need(
            augment.ratio == (1, 1),
            f"augment.ratio is {narrow} to {wide}, but only a resized window has one; set augment.resized_crop too.",
        )
        return
    small, large = augment.resized_crop
    need(
        0 < small <= large <= 1,
        f"augment.resized_crop is {small} to {large}, but must rise from above 0 to at most 1: it is a share of an "
        "area.",
    )
    shortest = canvas * math.sqrt(small * min(narrow, 1 / wide))
    need(
        shortest >= 1,
        f"augment.resized_crop from {small} makes a window of {shortest:.2g} pixels a side, but the least is 1; "
        "raise it.",
    )
    # A ratio such as 4/3 cannot be written exactly.
    need(
        large * _elongation(augment) <= 1 + 1e-9,
        f"augment.resized_crop up to {large} and augment.ratio {narrow} to {wide} make a window of up to "
        f"{math.sqrt(large * _elongation(augment)):.3f} times canvas, which does not fit; lower the area to at most "
        f"{_down(1 / _elongation(augment))}.",
    )
    longest = largest_window(augment, image_size, canvas)
    shrink = longest / image_size / low
    most = MAX_SHRINK * low * image_size / longest
    # Not below the canvas that is just small enough, whatever rounding does.
    smaller = math.floor(canvas * most * (1 + 1e-10))
    need(
        shrink <= MAX_SHRINK + 1e-9,
        f"augment.resized_crop up to {large} takes windows of up to {longest:.0f} pixels of canvas {canvas} into "
        f"image_size {image_size}, which with augment.scale from {low} shrinks by {shrink:.3g}; the limit is "
        f"{MAX_SHRINK}: lower canvas to {smaller}, or the area to {_down(large * most**2)}.",
    )


def _down(value: float) -> str:
    """With three digits, never rounded up: what is advised must pass."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.floor(value / unit * (1 + 1e-10)) * unit:.3g}"
