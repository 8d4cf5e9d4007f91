"""Where the retina lies in a fundus photograph: the lit disc that the camera's round stop leaves on a dark ground.

The disc is a circle fitted to the rim, so it is known also where the frame, a flat stop or poor light hides part
of it. Nothing is learned, and the same pixels give the same circle.

Circles through three points of the rim (RANSAC; Fischler and Bolles, Communications of the ACM, 1981) are ranked by how
much the light drops across their arc: the integro-differential operator by which Daugman found the iris ("High
confidence visual recognition of persons by a test of statistical independence", IEEE PAMI, 1993). The best is moved to
where the light drops most steeply along each ray, by least squares with weights that fall off with the error (Geman and
McClure, Bulletin of the ISI, 1987), so that tab, flare and vessels do not pull at it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageChops
from scipy import ndimage

#: Longest side of the reduced copy. The rim is found to a small part of a pixel, which is 0.4 % of the diameter.
_SIDE = 256
#: Thresholds, as parts of the way from the border's level to the bright level. The low one finds a rim in poor
#: light, the high one passes over haze in the border.
_PARTS = (0.06, 0.15, 0.35)
#: Rays from the middle of a circle, evenly spaced.
_ANGLES = 2 * np.pi * (np.arange(144) + 0.5) / 144
_RAYS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])
#: Share of a radius by which the crop is wider than the disc at each side.
_MARGIN = 0.01
#: A circle is no disc where less rim than this part of a turn is seen, or where it cuts about as much as it bounds,
#: as a circle in a rectangle of light does.
_LEAST_SCORE = 0.08
_LEAST_CONFIDENCE = 0.02


@dataclass(frozen=True)
class Disc:
    """The circle round the retina, in continuous pixels of the photograph: pixel i covers [i, i + 1)."""

    x: float
    y: float
    radius: float  #: the rim may lie outside the photograph
    confidence: float  #: 0-1; it ranks photographs and is no probability
    method: str  #: "edge", or "frame" where no rim was found and the disc stands for the whole photograph


@dataclass(frozen=True)
class _Light:
    """A reduced photograph."""

    level: Float[np.ndarray, "h w"]  #: 0 at the level of the border, 1 at the bright level
    noise: float  #: standard deviation in the border, on the same scale


def find_disc(pixels: UInt8[np.ndarray, "h w 3"]) -> Disc:
    """The disc of a photograph, finite whatever the pixels are. It has to cover a tenth of the frame to be found."""
    height, width = pixels.shape[:2]
    step = max(1, math.ceil(max(height, width) / _SIDE))
    light = _light(pixels, step)
    whole = Disc(width / 2, height / 2, max(width, height) / 2, 0.0, "frame")
    if light is None:
        return whole
    circles = _candidates(_rim_points(light), light.level.shape)
    if not len(circles):
        return whole
    circles = circles[np.argsort(-_score(light, circles), kind="stable")]
    # The best, and the best of those that are another circle altogether: before they are refined the order of
    # two such can be wrong.
    other = np.linalg.norm(circles - circles[0], axis=1) > 0.1 * circles[0, 2]
    refined = np.stack([_refine(light, c) for c in (circles[0], *circles[other][:1])])
    scores = _score(light, refined)
    circle = refined[scores.argmax()]
    confidence = _confidence(light, circle)
    if scores.max() < _LEAST_SCORE or confidence < _LEAST_CONFIDENCE:
        return whole
    x, y, radius = (float(v) * step for v in circle)
    return Disc(x, y, radius, confidence, "edge")


def square(disc: Disc, width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the square round the disc in a photograph of this size, in whole pixels.

    It is a little wider than the disc, so that a circle slightly too small cuts no retina. It may reach out of the
    photograph.
    """
    if disc.method == "frame":
        side = max(width, height)
        return (width - side) // 2, (height - side) // 2, side
    reach = disc.radius * (1 + _MARGIN)
    left, top = math.floor(disc.x - reach), math.floor(disc.y - reach)
    return left, top, max(math.ceil(disc.x + reach) - left, math.ceil(disc.y + reach) - top)


def _light(pixels: UInt8[np.ndarray, "h w 3"], step: int) -> _Light | None:
    """The light of a reduced copy, or None where nothing stands out from its border, or the border is the lightest."""
    red, green, blue = Image.fromarray(pixels).reduce(step).split()
    small = np.asarray(ImageChops.lighter(ImageChops.lighter(red, green), blue))
    level = ndimage.gaussian_filter(small.astype(np.float32), min(1.0, max(small.shape) / 100), truncate=3)
    some = level[::2, ::2]
    bright = float(np.percentile(some, 95))
    # The border is where a walk round the frame is darkest: a flare may light the rest of it.
    walk = np.concatenate([level[0], level[:, -1], level[-1, ::-1], level[::-1, 0]])
    length = max(3, len(walk) // 40)
    mean = ndimage.uniform_filter1d(walk, length, mode="wrap")
    darkest = int(mean.argmin())
    dark = float(mean[darkest])
    noise = float(walk.take(np.arange(length) + darkest - length // 2, mode="wrap").std())
    if bright - dark < 0.5:
        return None
    # On a light ground no light drops at the rim: the circles that are found lie within the retina.
    if np.median(walk) >= max(float(np.median(some)), (bright + dark) / 2):
        return None
    return _Light((level - np.float32(dark)) / np.float32(bright - dark), noise / (bright - dark))


def _rim_points(light: _Light) -> Float[np.ndarray, "2 n"]:
    """x and y of where rows and columns begin and end to be lit, in pixels of the reduced copy.

    A line that is lit from the frame on gives no point: there the frame ends the disc, not its rim.
    """
    found = []
    for part in _PARTS:
        for swap in (False, True):
            lit = (light.level.T if swap else light.level) > max(part, 3 * light.noise)
            length = lit.shape[1]
            lines = np.flatnonzero(lit.any(axis=1))
            first = lit[lines].argmax(axis=1)
            last = length - lit[lines, ::-1].argmax(axis=1)
            for ends, inside in ((first, first > 1), (last, last < length - 1)):
                along, across = ends[inside].astype(np.float32), lines[inside] + np.float32(0.5)
                found.append(np.stack([across, along] if swap else [along, across]))
    return np.concatenate(found, axis=1)


def _candidates(
    points: Float[np.ndarray, "2 n"], shape: tuple[int, ...], tries: int = 400, keep: int = 32
) -> np.ndarray:
    """The circles (k 3) through three of the points that most of the points lie on."""
    count = points.shape[1]
    if count < 12:
        return np.empty((0, 3))
    rng = np.random.Generator(np.random.Philox(key=0))
    (ax, bx, cx), (ay, by, cy) = points[:, rng.integers(count, size=(3, tries))].astype(np.float64)
    # The circle through a, b and c: the crossing of two perpendicular bisectors.
    bx, by, cx, cy = bx - ax, by - ay, cx - ax, cy - ay
    twice = 2 * (bx * cy - by * cx)
    usable = np.abs(twice) > 1e-6
    twice = np.where(usable, twice, 1)
    b2, c2 = bx * bx + by * by, cx * cx + cy * cy
    ux, uy = (cy * b2 - by * c2) / twice, (bx * c2 - cx * b2) / twice
    circles = np.stack([ux + ax, uy + ay, np.hypot(ux, uy)], axis=1)
    height, width = shape
    long = max(height, width)
    usable &= (circles[:, 2] > 0.1 * long) & (circles[:, 2] < 0.8 * math.hypot(height, width))
    usable &= (circles[:, 0] > 0) & (circles[:, 0] < width) & (circles[:, 1] > 0) & (circles[:, 1] < height)
    circles = circles[usable]
    few = points[:, :: max(1, count // 300)].astype(np.float32)
    x, y, r = circles.T[:, :, None].astype(np.float32)
    off = (np.hypot(few[0] - x, few[1] - y) - r) / np.maximum(0.012 * r, 1)
    support = np.maximum(0, 1 - off * off).sum(axis=1)
    return circles[np.argsort(-support, kind="stable")[:keep]]


def _sample(light: _Light, circles: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Light at parts `radii` (k m) of the radius of circles (k 3) along all rays, (k a m); NaN outside the frame."""
    reach = circles[:, 2, None] * radii
    x, y = (circles[:, c, None, None] + _RAYS[c][:, None] * reach[:, None] - 0.5 for c in (0, 1))
    height, width = light.level.shape
    out = (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1)
    values = ndimage.map_coordinates(light.level, [y, x], order=1, mode="nearest")
    values[out] = np.nan
    return values


def _drop(light: _Light, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """By what part the light falls from inside to outside, 0-1, as much in poor light as in good; NaN stays."""
    inside, outside = np.maximum(inside, 0), np.maximum(outside, 0)
    return np.clip((inside - outside) / (inside + outside + 0.04 + 2 * light.noise), 0, 1)


def _rim(light: _Light, circles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The drop across circles (k 3) along all rays, (k a), NaN outside the frame; and where they cut lit retina."""
    apart = np.maximum(0.03, 1.5 / circles[:, 2, None])
    inside, outside = (_sample(light, circles, 1 + sign * apart)[..., 0] for sign in (-1, 1))
    drop = _drop(light, inside, outside)
    return drop, (outside > 0.2) & (drop < 0.3)


def _score(light: _Light, circles: np.ndarray) -> np.ndarray:
    """How much rim is seen round each circle (k 3), as a part of a full turn; lit retina outside counts against."""
    drop, cut = _rim(light, circles)
    return (np.nan_to_num(drop) - 0.5 * cut).mean(axis=1)


def _refine(light: _Light, circle: np.ndarray) -> np.ndarray:
    """The circle moved onto the steepest drop along each ray."""
    design = np.stack([*_RAYS, np.ones_like(_ANGLES)], axis=1)
    rows = np.arange(len(design))
    for window in (0.08, 0.04, 0.03):
        # 41 samples across the window and a quarter of it more at each side; the drop spans 8 of them.
        radii = 1 + window * np.linspace(-1.25, 1.25, 41)
        profile = _sample(light, circle[None], radii[None])[0]
        inner, outer, offset = profile[:, :-8], profile[:, 8:], radii[4:-4] - 1
        # Of two like drops the one nearer to the circle.
        fall = (inner - outer) * np.exp(-0.5 * (offset / window) ** 2)
        best = np.where(np.isnan(fall), -1, fall).argmax(axis=1)
        weight = np.nan_to_num(_drop(light, inner[rows, best], outer[rows, best]))
        seen = weight > 0.3
        if seen.sum() < 8:
            break
        where = offset[best] * circle[2]
        move = np.zeros(3)
        for _ in range(5):
            error = where - design @ move
            scale = max(0.5, 1.5 * float(np.median(np.abs(error[seen]))))
            trust = weight / (1 + (error / scale) ** 2) ** 2
            # The little weight on the diagonal holds what a short arc leaves open.
            normal = design.T @ (design * trust[:, None]) + 0.01 * np.eye(3)
            move = np.linalg.solve(normal, design.T @ (trust * where))
        if np.abs(move).max() > 0.2 * circle[2]:
            # Further than the window: the arc is too short to tell.
            break
        circle = circle + move
    return circle


def _confidence(light: _Light, circle: np.ndarray) -> float:
    """Mean drop round the arc in the frame, less where it cuts retina or where little of it is in the frame."""
    drop, cut = (v[0] for v in _rim(light, circle[None]))
    seen = ~np.isnan(drop)
    mean = (drop[seen] - cut[seen]).mean() if seen.any() else 0.0
    return float(np.clip(mean * min(1.0, seen.mean() / 0.3), 0, 1))
