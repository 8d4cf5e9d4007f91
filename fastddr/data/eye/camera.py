"""The camera before a synthetic eye: its looks, and what optics, sensor and JPEG do to the light.

No look is tied to a grade, so that a model can learn nothing of the grade from the camera.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Map = NDArray[np.floating[Any]]  #: float32 wherever it has a value for each pixel
Mask = NDArray[np.bool_]
Rng = np.random.Generator

#: Side of the maps of light, pigment and haze; nothing in them is finer than a hundredth of the field.
SMOOTH = 128


def stream(seed: int, split: str, index: int, purpose: str) -> Rng:
    """Random numbers of one photograph for one purpose; no stream shares a draw with another.

    Eye, camera and signs have streams of their own: the same eye under the same camera comes out whatever the
    grade, so nothing but the signs can tell the grade.
    """
    digest = hashlib.sha256(f"{seed}/{split}/{index}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def noise(rng: Rng, rows: int, cols: int, side: int) -> Map:
    """Smooth noise, (side side), unit variance at its `rows` × `cols` nodes."""
    nodes = Image.fromarray(rng.standard_normal((rows, cols), dtype=np.float32))
    return np.asarray(nodes.resize((side, side), Image.Resampling.BICUBIC))


def speckle(rng: Rng, side: int) -> Map:
    """Unrelated noise in each pixel, (side side), unit variance.

    The sum of two random bytes, which takes a quarter of the time of a normal variate and looks the same.
    """
    dice = rng.integers(0, 256, (2, side, side), dtype=np.uint8)
    grain = np.add(dice[0], dice[1], dtype=np.float32)
    grain -= 255
    grain *= np.float32(1 / 104.5)
    return grain


def enlarge(smooth: Map, side: int) -> Map:
    """A smooth map at another resolution, (side side); bilinear, for it is done often."""
    return np.asarray(Image.fromarray(smooth).resize((side, side), Image.Resampling.BILINEAR))


def soften(x: Map, sigma: float) -> Map:
    """`x` (S S), 0-255, after a Gaussian blur of `sigma` pixels; may write into `x`."""
    if sigma > 1.4:
        blurred = Image.fromarray(x.astype(np.uint8)).filter(ImageFilter.GaussianBlur(sigma))
        return np.array(blurred, np.float32)
    # Five taps along each axis, in place: a third of the time that Pillow takes, and no rounding.
    near, far = (np.float32(np.exp(-0.5 * (d / sigma) ** 2)) for d in (1, 2))
    for y in (x, x.T):
        inner = y[1:-3] + y[3:-1]
        inner *= near
        outer = y[:-4] + y[4:]
        outer *= far
        inner += outer
        inner += y[2:-2]
        np.multiply(inner, 1 / (1 + 2 * near + 2 * far), out=y[2:-2])
    return x


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


def stray_light(camera: Camera, rng: Rng) -> Map:
    """How much of the camera's own light veils the retina, 0-1, (L L)."""
    axis = (np.arange(SMOOTH, dtype=np.float32) + 0.5) / SMOOTH
    u = (axis[None] - camera.centre[0]) * 2 / camera.radius
    v = (axis[:, None] - camera.centre[1]) * 2 / camera.radius
    r = np.hypot(u, v)
    lit = 0.55 + 0.45 * np.cos(np.arctan2(v, u) - camera.rim_from)
    veil = camera.rim * lit * np.clip((r - 0.72) / 0.28, 0, 1) ** 2.2
    veil = veil + camera.haze * (1 + 0.25 * noise(rng, 4, 4, SMOOTH))
    if camera.flare:
        # A crescent that creeps in from the rim, and a diffuse ghost.
        a, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.9, 1.3)
        d = np.hypot(u + 0.7 * np.cos(a), v + 0.7 * np.sin(a))
        veil = veil + camera.flare / (1 + np.exp(-(d - reach) / 0.14))
        x, y = rng.uniform(-0.5, 0.5, 2)
        veil = veil + 0.5 * camera.flare * np.exp(-((np.hypot(u - x, v - y) / rng.uniform(0.3, 0.6)) ** 2))
    return np.clip(veil, 0, 0.97).astype(np.float32)


def illumination(camera: Camera) -> Map:
    """Light that reaches the retina, about 1, (L L)."""
    axis = (np.arange(SMOOTH, dtype=np.float32) + 0.5) / SMOOTH
    u = (axis[None] - camera.centre[0]) * 2 / camera.radius
    v = (axis[:, None] - camera.centre[1]) * 2 / camera.radius
    light = (1 - camera.vignette * (u * u + v * v) ** 1.2) * (1 + camera.tilt[0] * u + camera.tilt[1] * v)
    return (np.maximum(light, 0.05) * camera.gain).astype(np.float32)


def aperture(camera: Camera, size: int) -> Map:
    """What part of each pixel lies in the field, 0-1, (S S)."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    x, y = axis[None] - camera.centre[0] * size, axis[:, None] - camera.centre[1] * size
    unit = camera.radius * size / 2
    edge = max(size / 512 * 1.6, 0.8)
    open_ = (unit - np.sqrt(x * x + y * y)) / edge + 0.5
    if np.isfinite(camera.notch):
        # A tab on the rim: a small disc whose middle lies on it.
        nx, ny = unit * 1.005 * np.cos(camera.notch), unit * 1.005 * np.sin(camera.notch)
        open_ = np.maximum(open_, (unit * 0.035 - np.sqrt((x - nx) ** 2 + (y - ny) ** 2)) / edge + 0.5)
    open_ = np.minimum(open_, (camera.crop * unit - np.abs(y)) / edge + 0.5)
    return np.clip(open_, 0, 1)


def develop(channels: list[Map], camera: Camera, rng: Rng) -> NDArray[np.uint8]:
    """From light at the sensor, three maps (S S) about 0-1, to the photograph, (S S 3)."""
    size = channels[0].shape[0]
    field = aperture(camera, size)
    # Grain of luminance at each pixel, of colour in coarser patches, as a sensor's interpolation leaves it.
    # There is less of it in the dark.
    level = (np.float32(0.25) + np.float32(0.75) * field) * np.float32(camera.noise)
    grain = speckle(rng, size)
    grain *= level * np.float32(0.8)
    chroma = level * enlarge(speckle(rng, size // 2), size) * np.float32(0.5)
    scale = field * np.float32(255 - camera.border)
    photo = np.empty((size, size, 3), np.uint8)
    over = np.empty_like(field)
    for c, x in enumerate(channels):
        # A soft shoulder: an overexposed disc fades into white and has no hard edge.
        np.maximum(x - np.float32(0.72), 0, out=over)
        x = np.minimum(x, np.float32(0.72))
        x += over / (over * np.float32(1 / 0.28) + 1)
        x *= scale
        x += np.float32(camera.border + 0.5)
        x = soften(x, camera.blur * size / 512)
        x += grain
        x += np.float32(1 - c) * chroma
        photo[..., c] = np.clip(x, 0, 255, out=x)
    if camera.jpeg < 100:
        file = io.BytesIO()
        Image.fromarray(photo).save(file, "JPEG", quality=camera.jpeg, subsampling=camera.subsampling)
        photo = np.asarray(Image.open(file))
    return photo
