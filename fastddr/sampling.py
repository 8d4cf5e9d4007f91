"""Who comes when, and seen how: order, windows and colours as pure functions of (seed, epoch, id).

Nothing here has state. A counter-based generator (Philox; Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011) gives each epoch an order and each photograph one row of random numbers, so a run can start at
any step, on any number of ranks, and see the same photographs in the same windows.

Geometry is in continuous pixel coordinates: pixel i covers [i, i + 1). An *affine* map (2×3) takes canvas
coordinates to image coordinates, a *colour* map (3×4) takes (R, G, B, 1) in 0-255 to normalised values. The
canvas is the photograph, upright, scaled so that its short side has a given length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from fastddr.config import AugmentConfig

#: Random numbers a photograph has in an epoch, from each of its streams. Fixed columns: a new use takes a spare one
#: (14 to 23 are free), and no other moves.
_COLUMNS = 12
_X, _Y, _HFLIP, _VFLIP, _ANGLE, _SCALE, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _SHIFT_X, _SHIFT_Y = range(12)
_AREA, _RATIO = 12, 13
#: Streams of the generator that must not share numbers. A photograph has two: a longer row from one would change
#: all of its numbers, and with them the figures that were published with a seed.
_ORDER, _PHOTOGRAPH, _PHOTOGRAPH_MORE = 0, 1, 2

#: Weights of R, G, B in luma (ITU-R BT.601), the grey that saturation and hue turn about.
_LUMA = np.array([0.299, 0.587, 0.114])
#: RGB to YIQ (NTSC), in which a hue is an angle.
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


#: Places (x, y) of the nine windows of an evaluation with several, row by row; the middle one is the fifth.
NINE = np.stack(np.meshgrid(range(3), range(3)), axis=-1).reshape(-1, 2)


@dataclass(frozen=True)
class Maps:
    """The two maps of each of n photographs."""

    affine: Float[np.ndarray, "n 2 3"]
    colour: Float[np.ndarray, "n 3 4"]


@dataclass(frozen=True)
class Crops:
    """Affine maps that are a window of the canvas, perhaps mirrored: `x`, `y` its upper left corner."""

    x: Int[np.ndarray, " n"]
    y: Int[np.ndarray, " n"]
    hflip: Bool[np.ndarray, " n"]
    vflip: Bool[np.ndarray, " n"]


def _generator(seed: int, stream: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, 0]))


def order(ids: Int[np.ndarray, " n"], seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The ids in the order of this epoch."""
    # By random keys and not by `permutation`, whose algorithm NumPy may change between versions.
    return ids[np.argsort(_generator(seed, _ORDER, epoch).random(len(ids)), kind="stable")]


def numbers(count: int, seed: int, epoch: int) -> Float[np.ndarray, "count 24"]:
    """Row i: the uniform numbers in [0, 1) of photograph i in this epoch, whatever `count` is."""
    streams = (_PHOTOGRAPH, _PHOTOGRAPH_MORE)
    rows = np.empty((count, len(streams), _COLUMNS))
    for place, stream in enumerate(streams):
        rows[:, place] = _generator(seed, stream, epoch).random((count, _COLUMNS))
    return rows.reshape(count, -1)


def canvas_size(
    width: Int[np.ndarray, " n"], height: Int[np.ndarray, " n"], canvas: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Width and height of the canvas of photographs of these sizes: the short side is `canvas` long."""
    short = np.minimum(width, height).astype(np.float64)
    # Half-way cases round up, not to even, so that a photograph and its transpose get transposed canvases.
    scaled_width = np.floor(width * canvas / short + 0.5).astype(np.int64)
    scaled_height = np.floor(height * canvas / short + 0.5).astype(np.int64)
    return scaled_width, scaled_height


def schedule(
    ids: Int[np.ndarray, " n"], batch_size: int, *, rank: int = 0, world: int = 1, accumulation: int = 1, pad: bool
) -> tuple[Int[np.ndarray, "m b"], Bool[np.ndarray, "m b"]]:
    """One rank's micro batches of ids, with a mask of the valid ones.

    Each global batch of `batch_size` ids is cut contiguously by rank, and a rank's part into `accumulation`
    micro batches; so the global batches are the same on any number of ranks. The last, partial global batch
    is dropped, or with `pad` filled up at its tail with the last id, marked not valid.
    """
    steps = -(-len(ids) // batch_size) if pad else len(ids) // batch_size
    size = steps * batch_size
    valid = np.arange(size) < len(ids)
    if size > len(ids):
        ids = np.concatenate([ids, np.full(size - len(ids), ids[-1] if len(ids) else 0)])

    def cut(values: np.ndarray) -> np.ndarray:
        micro = batch_size // (world * accumulation)
        return values[:size].reshape(steps, world, accumulation, micro)[:, rank].reshape(-1, micro)

    return cut(ids), cut(valid)


def training_maps(
    rows: Float[np.ndarray, "n 24"],
    canvas_width: Int[np.ndarray, " n"],
    canvas_height: Int[np.ndarray, " n"],
    image_size: int,
    augment: AugmentConfig,
) -> Maps:
    """The augmented maps of n photographs, from their random numbers and the sizes of their canvases.

    A random window becomes the image, which is then turned and scaled about its middle, mirrored and shifted. What
    falls outside the canvas is black. Without `augment.resized_crop` the window is as large as the image and lies on
    whole pixels. With it the window has a random area and ratio and lies anywhere inside the canvas, as torchvision's
    RandomResizedCrop ("inception cropping": Szegedy et al., "Going Deeper with Convolutions", 2015, section 6).

    A configuration that `fastddr.config.check` passed never shrinks by more than 1.25.
    """
    size = np.full((len(rows), 2), float(image_size))
    if augment.resized_crop is None:
        x = np.floor(rows[:, _X] * (canvas_width - image_size + 1))
        y = np.floor(rows[:, _Y] * (canvas_height - image_size + 1))
    else:
        size = _resized(rows, np.minimum(canvas_width, canvas_height), augment.resized_crop, augment.ratio)
        x = rows[:, _X] * (canvas_width - size[:, 0])
        y = rows[:, _Y] * (canvas_height - size[:, 1])
    mirror_x = np.where(augment.hflip & (rows[:, _HFLIP] < 0.5), -1.0, 1.0)
    mirror_y = np.where(augment.vflip & (rows[:, _VFLIP] < 0.5), -1.0, 1.0)
    angle = np.deg2rad(augment.rotate) * (2 * rows[:, _ANGLE] - 1)
    low, high = augment.scale
    scale = low + (high - low) * rows[:, _SCALE]
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.empty((len(rows), 2, 2))
    linear[:, 0, 0], linear[:, 0, 1] = mirror_x * cos, -mirror_x * sin
    linear[:, 1, 0], linear[:, 1, 1] = mirror_y * sin, mirror_y * cos
    if augment.resized_crop is not None:
        linear *= (image_size / size)[:, None, :]
    affine = _about_middle(linear, np.stack([x, y], axis=1) + size / 2, image_size)
    if augment.translate:
        affine[:, :, 2] += augment.translate * image_size * (2 * rows[:, [_SHIFT_X, _SHIFT_Y]] - 1)
    return Maps(affine, _colour(rows, augment))


def evaluation_maps(
    canvas_width: Int[np.ndarray, " n"],
    canvas_height: Int[np.ndarray, " n"],
    image_size: int,
    augment: AugmentConfig,
    place: Int[np.ndarray, "n 2"] | None = None,
) -> Maps:
    """A window of each canvas, normalised and nothing else.

    `place`: of the window along each side (x, y), 0 = at the beginning, 1 = in the middle, 2 = at the end; by default
    the middle one.
    """
    free = np.stack([canvas_width, canvas_height], axis=1) - image_size
    corner = (np.ones_like(free) if place is None else place) * free // 2
    linear = np.broadcast_to(np.eye(2), (len(canvas_width), 2, 2))
    colour = np.broadcast_to(_normalisation(augment), (len(canvas_width), 3, 4))
    return Maps(_about_middle(linear, corner + image_size / 2, image_size), colour.astype(np.float32))


def as_crops(affine: Float[np.ndarray, "n 2 3"], image_size: int) -> Crops:
    """The maps of a policy that `only_crops`, as windows: none of them turns, scales or lies between pixels."""
    diagonal = affine[:, [0, 1], [0, 1]]
    flipped = diagonal < 0
    corner = np.where(flipped, affine[:, :, 2] - image_size, -affine[:, :, 2])
    windows = (np.abs(diagonal) == 1).all() and not affine[:, [0, 1], [1, 0]].any() and (corner % 1 == 0).all()
    assert windows, "the policy said that every map is a window"
    whole = corner.astype(np.int64)
    return Crops(x=whole[:, 0], y=whole[:, 1], hflip=flipped[:, 0], vflip=flipped[:, 1])


def inverse(affine: Float[np.ndarray, "n 2 3"]) -> Float[np.ndarray, "n 2 3"]:
    """The maps backwards: from image to canvas coordinates."""
    linear = np.linalg.inv(affine[:, :, :2])
    return np.concatenate([linear, -linear @ affine[:, :, 2:]], axis=2)


def boxes(
    affine: Float[np.ndarray, "n 2 3"],
    canvas_width: Int[np.ndarray, " n"],
    canvas_height: Int[np.ndarray, " n"],
    image_size: int,
) -> Int[np.ndarray, "n 4"]:
    """The part of each canvas that its image is made of, as (left, top, right, bottom) in whole pixels.

    A bilinear warp reads nothing outside of it but what lies outside the canvas, which is black: the map of the box
    is the map of the canvas with (left, top) taken into its offset. One pixel is spared for rounding in float32. A
    box is never empty; where an image lies wholly off its canvas, the box is the canvas's nearest pixel.
    """
    ends = np.array([0.5, image_size - 0.5])
    # The middles of the image's four corner pixels, (4, 3).
    corners = np.stack([*(axis.ravel() for axis in np.meshgrid(ends, ends)), np.ones(4)], axis=1)
    seen = np.einsum("nij,kj->nik", inverse(affine), corners)
    size = np.stack([canvas_width, canvas_height], axis=1)
    low = np.clip(np.floor(seen.min(axis=2) - 0.5).astype(np.int64) - 1, 0, size - 1)
    high = np.clip(np.floor(seen.max(axis=2) - 0.5).astype(np.int64) + 3, low + 1, size)
    return np.concatenate([low, high], axis=1)


def only_crops(augment: AugmentConfig) -> bool:
    """Whether every map of this policy is a window, perhaps mirrored, as `as_crops` has them."""
    still = augment.rotate == 0 and augment.scale == (1.0, 1.0) and augment.translate == 0
    return still and augment.resized_crop is None


def only_normalises(augment: AugmentConfig) -> bool:
    """Whether the colour map of this policy is the same for all photographs: the normalisation."""
    return not (augment.brightness or augment.contrast or augment.saturation or augment.hue)


def _resized(
    rows: Float[np.ndarray, "n 24"],
    short: Int[np.ndarray, " n"],
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Float[np.ndarray, "n 2"]:
    """Width and height of random windows: an area, as a share of the square of this side, and a ratio of the two."""
    share = area[0] + (area[1] - area[0]) * rows[:, _AREA]
    # Uniform in its logarithm, so that 2:1 is as frequent as 1:2.
    wide = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * rows[:, _RATIO])
    # A side as long as the canvas's may come out longer by a rounding.
    return np.minimum(np.sqrt(np.stack([share * wide, share / wide], axis=1)), 1) * short[:, None]


def _about_middle(
    linear: Float[np.ndarray, "n 2 2"], middle: Float[np.ndarray, "n 2"], image_size: int
) -> Float[np.ndarray, "n 2 3"]:
    """The map with this linear part that takes this point of the canvas to the image's middle."""
    half = image_size / 2
    offset = half - np.einsum("nij,nj->ni", linear, middle)
    return np.concatenate([linear, offset[:, :, None]], axis=2)


def _normalisation(augment: AugmentConfig) -> Float[np.ndarray, "3 4"]:
    mean, std = np.array(augment.mean), np.array(augment.std)
    return np.concatenate([np.diag(1 / (255 * std)), (-mean / std)[:, None]], axis=1)


def _colour(rows: Float[np.ndarray, "n 24"], augment: AugmentConfig) -> Float[np.ndarray, "n 3 4"]:
    """Hue, saturation, contrast, brightness and normalisation, in this order, folded into one map."""
    if only_normalises(augment):
        return np.broadcast_to(_normalisation(augment).astype(np.float32), (len(rows), 3, 4))

    def factor(column: int, width: float) -> Float[np.ndarray, " n 1 1"]:
        return (1 + width * (2 * rows[:, column] - 1))[:, None, None]

    turn = 2 * np.pi * augment.hue * (2 * rows[:, _HUE] - 1)
    rotation = np.zeros((len(rows), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(turn)
    rotation[:, 2, 1] = np.sin(turn)
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    linear = np.linalg.inv(_YIQ) @ rotation @ _YIQ
    grey = np.broadcast_to(_LUMA, (3, 3))
    saturation = factor(_SATURATION, augment.saturation)
    linear = (saturation * np.eye(3) + (1 - saturation) * grey) @ linear
    contrast = factor(_CONTRAST, augment.contrast)
    brightness = factor(_BRIGHTNESS, augment.brightness)
    offset = brightness * (1 - contrast) * 255 * np.array(augment.mean)[:, None]
    linear = brightness * contrast * linear
    normalise = _normalisation(augment)
    scale, shift = normalise[:, :3], normalise[:, 3:]
    return np.concatenate([scale @ linear, scale @ offset + shift], axis=2).astype(np.float32)
