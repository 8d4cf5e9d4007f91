"""The camera before a synthetic eye: its looks, and what optics, sensor and JPEG do to the light.

No look is tied to a grade, so that a model can learn nothing of the grade from the camera.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Map = NDArray[np.floating[Any]]  #: float32 wherever it has a value for each pixel
Mask = NDArray[np.bool_]
Rng = np.random.Generator

#: Side of the maps of light, pigment and haze; nothing in them is finer than a hundredth of the field.
SMOOTH = 128
#: Largest blur, as a standard deviation in pixels, that is drawn or done in a few taps.
SHARP = 1.4


def stream(seed: int, split: str, index: int, purpose: str) -> Rng:
    """Random numbers of one photograph for one purpose; no stream shares a draw with another.

    Eye, camera and signs have streams of their own: the same eye under the same camera comes out whatever the
    grade, so nothing but the signs can tell the grade.
    """
    digest = hashlib.sha256(f"{seed}/{split}/{index}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@lru_cache(maxsize=64)
def _taps(nodes: int, side: int, cubic: bool) -> tuple[tuple[NDArray[np.intp], Map], ...]:
    """What each of `side` pixels takes from a row of `nodes`: (indices, weights) of 4 taps (cubic) or 2 (linear)."""
    at = (np.arange(side) + 0.5) * nodes / side - 0.5
    whole = np.floor(at)
    t = at - whole
    weights: tuple[Map, ...] = (1 - t, t)
    if cubic:
        weights = (
            ((-0.5 * t + 1.0) * t - 0.5) * t,
            (1.5 * t - 2.5) * t * t + 1,
            ((-1.5 * t + 2.0) * t + 0.5) * t,
            (0.5 * t - 0.5) * t * t,
        )
    first = -1 if cubic else 0
    return tuple(
        (np.clip(whole.astype(np.intp) + first + k, 0, nodes - 1), w.astype(np.float32)) for k, w in enumerate(weights)
    )


def _sample(nodes: Map, axis: int, side: int, part: slice, cubic: bool) -> Map:
    """`nodes` with `side` values along `axis`, of which `part` is returned."""
    out: Map | None = None
    for i, w in _taps(nodes.shape[axis], side, cubic):
        tap = nodes.take(i[part], axis)
        tap *= w[part] if axis else w[part, None]
        out = tap if out is None else np.add(out, tap, out=out)
    assert out is not None
    return out


#: The whole of a map, where only a box of it could be asked for.
WHOLE = (slice(None), slice(None))


def noise(rng: Rng, rows: int, cols: int, side: int) -> Map:
    """Smooth noise, (side side), unit variance at its `rows` × `cols` nodes."""
    nodes = rng.standard_normal((rows, cols), dtype=np.float32)
    return _sample(_sample(nodes, 1, side, WHOLE[1], True), 0, side, WHOLE[0], True)


@lru_cache(maxsize=8)
def _tile(name: str, side: int) -> Map:
    """Noise of the same kind everywhere, (side side); the same in every process.

    `sensor` is unrelated from pixel to pixel (standard deviation 0.8), `chroma` from patch to patch of 2 × 2 (0.35)
    and `choroid` at 256 nodes a photograph (1), whose side the tile exceeds by `TILE_MARGIN`.
    """
    rng = stream(0, name, 0, "tile")
    if name == "sensor":
        return rng.standard_normal((side, side), dtype=np.float32) * np.float32(0.8)
    if name == "chroma":
        patches = rng.standard_normal((-(-side // 2),) * 2, dtype=np.float32) * np.float32(0.35)
        return patches.repeat(2, 1).repeat(2, 0)[:side, :side]
    nodes = max(256 * side // max(side - TILE_MARGIN, 1), 2)
    return enlarge(rng.standard_normal((nodes, nodes), dtype=np.float32), side)


#: By how much a tile of noise is larger than a photograph.
TILE_MARGIN = 256


def grain(name: str, rng: Rng, side: int) -> Map:
    """A window of the tile of that name, (side side), turned over at random; not to be written to.

    Noise has no shapes that could be recognised, and fresh noise for each photograph takes as long as its light.
    """
    row, column, turn = rng.integers(0, (TILE_MARGIN, TILE_MARGIN, 4))
    window = _tile(name, side + TILE_MARGIN)[row : row + side, column : column + side]
    return window[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]


def enlarge(smooth: Map, side: int, box: tuple[slice, slice] = WHOLE) -> Map:
    """A smooth map at another resolution, (side side), or `box` of that; bilinear."""
    return _sample(_sample(smooth, 1, side, box[1], False), 0, side, box[0], False)


def enlarged(smooth: Map, side: int) -> Callable[[slice], Map]:
    """`enlarge`, some rows (h side) at a time."""
    # Along the rows at once, turned round, for whole rows are gathered sooner than columns.
    across = _between(np.ascontiguousarray(smooth.T), side)(slice(0, side)).T
    return _between(np.ascontiguousarray(across), side)


def _between(nodes: Map, side: int) -> Callable[[slice], Map]:
    """Linear interpolation along the first axis, to `side` values, some at a time."""
    times, rest = divmod(side, len(nodes))
    if rest or times % 2:
        return lambda rows: _sample(nodes, 0, side, rows, False)
    # Between any two nodes there are `times` values with the same weights, so nothing is gathered.
    half = times // 2
    weights = ((np.arange(times, dtype=np.float32) + np.float32(0.5)) / times)[:, None]
    first = np.concatenate((nodes[:1], nodes))
    step = np.diff(first, axis=0, append=nodes[-1:])

    def some(rows: slice) -> Map:
        low, high = (rows.start + half) // times, -(-(rows.stop + half) // times)
        out = step[low:high, None] * weights
        out += first[low:high, None]
        skip = rows.start + half - low * times
        return out.reshape(-1, out.shape[2])[skip : skip + rows.stop - rows.start]

    return some


def soften(x: Map, sigma: float) -> Map:
    """`x` (h S), not negative if blurred far, after a Gaussian blur of `sigma` pixels; may write into `x`."""
    if sigma > SHARP:
        # Pillow blurs bytes only. What is blurred that far is under haze and noise coarser than a byte's steps.
        scale = 255 / max(float(x.max()), 1e-6)
        small = Image.fromarray((x * np.float32(scale) + np.float32(0.5)).astype(np.uint8))
        return np.asarray(small.filter(ImageFilter.GaussianBlur(sigma))) * np.float32(1 / scale)
    # Three or five taps along each axis. Along the rows the map is one long line, which is quicker; two rows' ends
    # meet outside the field or two pixels from its rim.
    near, far = (float(np.exp(-0.5 * (d / sigma) ** 2)) for d in (1, 2))
    if sigma < 0.7:
        near, far = sigma**2 / 2 / (1 - sigma**2), 0.0  # the same variance
    whole = 1 + 2 * near + 2 * far
    for y in (x, x.reshape(-1)):
        sides = y[1:-3] + y[3:-1]
        sides *= np.float32(near / whole)
        if far:
            outer = y[:-4] + y[4:]
            outer *= np.float32(far / whole)
            sides += outer
        y[2:-2] *= np.float32(1 / whole)
        y[2:-2] += sides
    return x


def shoulder(light: Map) -> Map:
    """Light as the sensor takes it: above 0.72 it fades towards 1, so that an overexposed disc has no hard edge."""
    over = np.clip(light - np.float32(0.72), 0, None)
    return np.clip(light, None, 0.72) + over / (over * np.float32(1 / 0.28) + 1)


@dataclass(frozen=True)
class Camera:
    """One camera on one day."""

    base: tuple[float, float, float]  #: colour of bare retina in full light, 0-1
    gain: float  #: exposure
    radius: float  #: of the field, as a fraction of half the side of the photograph
    centre: tuple[float, float]  #: of the field, as a fraction of the side
    crop: float  #: the field is cut off at this height above and below its middle, in field radii
    notch: float  #: angle of the tab at the rim that tells up from down; NaN = none
    veil: tuple[float, float, float]  #: colour of stray light
    rim: float  #: stray light at the rim, 0-1
    rim_from: float  #: angle from which the rim is lit
    haze: float  #: stray light everywhere (a cataract), 0-1
    vignette: float  #: light lost at the rim, 0-1
    tilt: tuple[float, float]  #: slope of the light across the field
    blur: float  #: standard deviation of the optics, in pixels of a 512-pixel photograph
    noise: float  #: standard deviation of the sensor, in levels of 255
    jpeg: int  #: quality at which the camera itself had saved it; 100 = it had not
    subsampling: int  #: Pillow's number for the chroma of that save
    border: float  #: level outside the field, of 255
    flare: float = 0.0  #: a reflection over the picture, 0-1


#: Looks of cameras in public sets, as (bare retina, stray light, how much of that at the rim).
LOOKS = (
    ((0.78, 0.45, 0.25), (0.75, 0.70, 0.60), 0.15),  # orange
    ((0.56, 0.37, 0.22), (0.50, 0.60, 0.55), 0.25),  # brown, dim
    ((0.88, 0.57, 0.46), (0.90, 0.95, 1.00), 0.45),  # pink, bright, blue-white rim
    ((0.62, 0.25, 0.09), (0.60, 0.30, 0.10), 0.05),  # red, saturated
    ((0.78, 0.55, 0.35), (0.95, 0.85, 0.70), 0.10),  # tan, sharp
    ((0.60, 0.42, 0.36), (0.55, 0.75, 0.80), 0.45),  # grey, cyan rim
)


def draw_camera(rng: Rng) -> Camera:
    """A camera: one of `LOOKS`, then everything jittered."""
    base, veil, rim = LOOKS[int(rng.integers(len(LOOKS)))]
    tint = rng.normal(1.0, 0.05, 3)
    cut = rng.random() < 0.4
    return Camera(
        base=(float(base[0] * tint[0]), float(base[1] * tint[1]), float(base[2] * tint[2])),
        gain=float(rng.uniform(0.8, 1.12)),
        radius=float(rng.uniform(0.94, 1.08) if cut else rng.uniform(0.9, 0.99)),
        centre=(float(0.5 + rng.normal(0, 0.006)), float(0.5 + rng.normal(0, 0.006))),
        crop=float(rng.uniform(0.78, 0.92)) if cut else 2.0,
        notch=float(-rng.uniform(0.6, 0.9)) if rng.random() < 0.45 else float("nan"),
        veil=veil,
        rim=float(rim * rng.uniform(0.3, 1.5)),
        rim_from=float(rng.uniform(0, 2 * np.pi)),
        haze=float(rng.uniform(0.08, 0.25) if rng.random() < 0.2 else rng.uniform(0, 0.05)),
        vignette=float(rng.uniform(0.15, 0.55)),
        tilt=(float(rng.normal(0, 0.12)), float(rng.normal(0, 0.12))),
        blur=float(rng.uniform(0.4, 1.3)),
        noise=float(rng.uniform(0.8, 3.0)),
        jpeg=int(rng.choice([80, 90, 100, 100, 100])),
        subsampling=int(rng.choice([0, 2])),
        border=float(rng.uniform(1, 7)),
    )


def spoil(camera: Camera, rng: Rng) -> Camera:
    """The same camera on a photograph that cannot be graded: out of focus, too dark, washed out or flared."""
    how = int(rng.integers(4))
    if how == 0:
        return replace(camera, blur=float(rng.uniform(6, 12)))
    if how == 1:
        return replace(camera, gain=float(rng.uniform(0.12, 0.25)), blur=2.0, noise=4.0)
    milk = (0.5 * camera.veil[0] + 0.42, 0.5 * camera.veil[1] + 0.38, 0.5 * camera.veil[2] + 0.33)
    if how == 2:
        return replace(camera, veil=milk, haze=float(rng.uniform(0.7, 0.85)), blur=float(rng.uniform(2, 5)))
    flare = float(rng.uniform(0.6, 0.9))
    return replace(camera, veil=milk, flare=flare, haze=0.35, blur=float(rng.uniform(2, 5)))


def field_grid(camera: Camera) -> tuple[Map, Map]:
    """Place of the nodes of the smooth maps in the field, in field radii: x (1 L) and y (L 1)."""
    axis = (np.arange(SMOOTH, dtype=np.float32) + np.float32(0.5)) / SMOOTH
    return (axis[None] - camera.centre[0]) * (2 / camera.radius), (axis[:, None] - camera.centre[1]) * (
        2 / camera.radius
    )


def stray_light(camera: Camera, rng: Rng) -> Map:
    """How much of the camera's own light veils the retina, 0-1, (L L)."""
    u, v = field_grid(camera)
    r = np.sqrt(u * u + v * v)
    lit = 0.55 + 0.45 * (u * float(np.cos(camera.rim_from)) + v * float(np.sin(camera.rim_from))) / (r + 1e-6)
    veil = camera.rim * lit * np.clip((r - 0.72) / 0.28, 0, 1) ** 2
    veil += camera.haze * (1 + 0.25 * noise(rng, 4, 4, SMOOTH))
    if camera.flare:
        # A crescent that creeps in from the rim, and a diffuse ghost.
        a, reach = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.9, 1.3))
        d = np.hypot(u + 0.7 * float(np.cos(a)), v + 0.7 * float(np.sin(a)))
        veil += camera.flare / (1 + np.exp((reach - d) / 0.14))
        x, y, wide = float(rng.uniform(-0.5, 0.5)), float(rng.uniform(-0.5, 0.5)), float(rng.uniform(0.3, 0.6))
        veil += 0.5 * camera.flare * np.exp(((u - x) ** 2 + (v - y) ** 2) * (-1 / wide**2))
    return np.clip(veil, 0, 0.97)


def illumination(camera: Camera) -> Map:
    """Light that reaches the retina, about 1, (L L)."""
    u, v = field_grid(camera)
    light = (1 - camera.vignette * (u * u + v * v) ** 1.2) * (1 + camera.tilt[0] * u + camera.tilt[1] * v)
    return np.clip(light, 0.05, None) * camera.gain


def widened(edge_px: float, camera: Camera, size: int) -> float:
    """Width in pixels of an edge that was `edge_px` wide, after the camera's optics."""
    return float(np.hypot(edge_px, 3.5 * camera.blur * size / 512))


def aperture(camera: Camera, size: int, rows: slice) -> Map:
    """What part of each pixel's light comes from the field, 0-1, in some rows of the photograph, (h S)."""
    axis = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x, y = axis - camera.centre[0] * size, axis[rows] - camera.centre[1] * size
    unit = camera.radius * size / 2
    edge = widened(max(size / 512 * 1.6, 0.8), camera, size)
    # How far inside the rim, in widths of the edge: the difference of squares, which is that near the rim.
    per = 1 / (2 * unit * edge)
    inside = ((unit * unit - y * y) * per + 0.5)[:, None] - x * x * per
    if np.isfinite(camera.notch):
        # A tab on the rim: a small disc whose middle lies on it.
        nx, ny = (float(unit * 1.005 * f(camera.notch)) for f in (np.cos, np.sin))
        r = unit * 0.035
        near = slice(*np.searchsorted(x, (nx - r - edge, nx + r + edge)))
        low, high = np.searchsorted(y, (ny - r - edge, ny + r + edge))
        if low < high:
            tab = (r - np.hypot(x[near] - nx, y[low:high, None] - ny)) / edge + 0.5
            np.maximum(inside[low:high, near], tab, out=inside[low:high, near])
    if camera.crop < 1:
        np.minimum(inside, ((camera.crop * unit - np.abs(y)) / edge + 0.5)[:, None], out=inside)
    return np.clip(inside, 0, 1, out=inside)


def bands(size: int) -> list[slice]:
    """A photograph's rows in bands: what is made of one at a time stays in the processor's cache."""
    height = max(2**15 // size, 8)
    return [slice(top, min(top + height, size)) for top in range(0, size, height)]


def develop(light: Callable[[slice], list[Map]], size: int, camera: Camera, rng: Rng) -> Image.Image:
    """From light at the sensor to the photograph.

    `light` gives for some rows three maps (h S) of about 0-1, red, green and blue, which are written into.
    """
    # Grain of luminance at each pixel, of colour in patches of 2 × 2, as a sensor's interpolation leaves it.
    sensor, patches = grain("sensor", rng, size), grain("chroma", rng, size)
    photo = np.empty((size, size, 3), np.uint8)
    for rows in bands(size):
        field = aperture(camera, size, rows)
        level = field * np.float32(0.75 * camera.noise)  # there is less noise in the dark
        level += np.float32(0.25 * camera.noise)
        luma = level * sensor[rows]
        luma += np.float32(camera.border + 0.5)
        chroma = level
        chroma *= patches[rows]
        field *= np.float32(255 - camera.border)
        for c, x in enumerate(light(rows)):
            x *= field
            x += luma
            if c == 0:
                x += chroma
            elif c == 2:
                x -= chroma
            photo[rows, :, c] = np.clip(x, 0, 255, out=x)
    image = Image.fromarray(photo)
    if camera.jpeg == 100:
        return image
    file = io.BytesIO()
    image.save(file, "JPEG", quality=camera.jpeg, subsampling=camera.subsampling)
    return Image.open(file)
