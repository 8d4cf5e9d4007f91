"""Signs of diabetic retinopathy on a synthetic eye, by grade of the ICDR scale, each with its place.

What each grade shows follows the scale's own definitions (Wilkinson et al., Ophthalmology 2003): 1
microaneurysms only; 2 more than that and less than severe; 3 many haemorrhages in all four quadrants, venous
beading, IRMA, no new vessels; 4 new vessels or blood before the retina. The scale's "more than 20 in each
quadrant" is more than 20 in all here, so that at 256 pixels a lesion is still a thing to be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastddr.data.eye.anatomy import walk
from fastddr.data.eye.camera import SMOOTH, Map, Rng, noise
from fastddr.data.eye.canvas import Canvas
from fastddr.data.eye.retina import draw_vessels

#: What a lesion can be. Blood in the vitreous counts as `preretinal_haemorrhage`: it lies there, too.
KINDS = (
    "microaneurysm", "haemorrhage", "exudate", "cotton_wool", "venous_beading", "irma",
    "neovascularisation", "preretinal_haemorrhage", "laser_scar",
)  # fmt: skip


@dataclass(frozen=True)
class Lesion:
    """One lesion, or one cluster of exudates: the circle that holds it."""

    kind: str
    x: float  #: pixels from the photograph's left edge
    y: float  #: pixels from its upper edge
    radius: float  #: pixels


class _Painter:
    """Places lesions on a canvas and keeps their list."""

    def __init__(self, canvas: Canvas, rng: Rng) -> None:
        self.canvas, self.rng, self.lesions = canvas, rng, list[Lesion]()
        self.taken: list[tuple[float, float, float]] = []

    def note(self, kind: str, x: float, y: float, radius: float) -> None:
        x_px, y_px = self.canvas.point_px(x, y)
        self.lesions.append(Lesion(kind, x_px, y_px, max(radius * self.canvas.unit, 1.0)))

    def visible(self, x: float, y: float, margin: float) -> bool:
        """Is a circle about (x, y) wholly in the photograph?"""
        canvas = self.canvas
        x_px, y_px = canvas.point_px(x, y)
        middle = canvas.camera.centre[1] * canvas.size
        m = margin * canvas.unit
        return (
            math.hypot(x, y) + margin < 0.97
            and abs(y_px - middle) + m < canvas.camera.crop * canvas.unit
            and min(x_px, y_px, canvas.size - x_px, canvas.size - y_px) > m
        )

    def free(self, x: float, y: float, margin: float) -> bool:
        """Does a circle about (x, y) keep clear of the lesions that there are?"""
        for u, v, m in self.taken:  # noqa: SIM110 - `all` over a generator takes twice the time
            if (x - u) * (x - u) + (y - v) * (y - v) < (margin + m) * (margin + m):
                return False
        return True

    def spot(
        self, margin: float, quadrant: int | None = None, far: float = 0.82, near: float = 0.0
    ) -> tuple[float, float]:
        """A free place (x, y) off the disc, between `near` and `far` from the middle of the field."""
        eye, chance = self.canvas.eye, self.rng.random
        middle = (eye.disc[0] + eye.fovea[0]) / 2, (eye.disc[1] + eye.fovea[1]) / 2
        for attempt in range(80):
            r, a = math.sqrt(near**2 + (far**2 - near**2) * chance()), 2 * math.pi * chance()
            x, y = r * math.cos(a), r * math.sin(a)
            if quadrant is not None and quadrant != 2 * (y > middle[1]) + (x > middle[0]):
                continue
            if math.hypot(x - eye.disc[0], y - eye.disc[1]) < 1.25 * eye.disc_radius + margin:
                continue
            if self.visible(x, y, margin) and (attempt >= 40 or self.free(x, y, margin)):
                break
        self.taken.append((x, y, margin))
        return x, y

    def microaneurysms(self, n: int) -> None:
        radii = self.rng.uniform(0.0065, 0.0115, n).astype(np.float32)
        places = np.array([self.spot(float(r)) for r in radii], np.float32).reshape(n, 2)
        strength = self.rng.uniform(0.7, 1.15, n).astype(np.float32)
        self.canvas.stamp("blood", places[:, 0], places[:, 1], radii, strength)
        for (x, y), r in zip(places, radii, strict=True):
            self.note("microaneurysm", float(x), float(y), float(r))

    def haemorrhages(self, n: int, largest: float) -> None:
        for i in range(n):
            rng, eye = self.rng, self.canvas.eye
            r = float(0.012 + (largest - 0.012) * rng.random() ** 2.2)
            x, y = self.spot(r * 1.2, quadrant=i % 4)
            flame = rng.random() < 0.3
            along = np.arctan2(y - eye.disc[1], x - eye.disc[0]) + rng.normal(0, 0.3)
            angle = self.angle_px(float(along))
            stretch = float(rng.uniform(1.8, 3.2)) if flame else float(rng.uniform(1.0, 1.4))
            dense = float(rng.uniform(0.55, 1.4))
            narrow, soft = r / np.sqrt(stretch), 0.9 if flame else 0.7
            self.canvas.blob("blood", rng, x, y, narrow, dense, soft=soft, ragged=0.13, stretch=stretch, angle=angle)
            self.note("haemorrhage", x, y, r * np.sqrt(stretch))

    def angle_px(self, angle: float) -> float:
        """A direction in the eye as one in the photograph, radians."""
        return np.pi - angle - self.canvas.eye.turn if self.canvas.eye.mirrored else angle + self.canvas.eye.turn

    def exudates(self, clusters: int) -> None:
        for _ in range(clusters):
            rng = self.rng
            size = float(rng.uniform(0.05, 0.15))
            x, y = self.spot(size, far=0.6)
            circinate = rng.random() < 0.35
            n = int(rng.integers(10, 34))
            a = rng.uniform(0, 2 * np.pi, n)
            d = size * (rng.normal(0.82, 0.1, n) if circinate else np.abs(rng.normal(0, 0.45, n)))
            d = np.minimum(d, size)
            for u, v in zip(x + d * np.cos(a), y + 0.8 * d * np.sin(a), strict=True):
                r, dense = float(0.004 + 0.013 * rng.random() ** 2.2), float(rng.uniform(0.5, 0.95))
                self.canvas.blob("exudate", rng, float(u), float(v), r, dense, soft=0.7, ragged=0.25)
            self.note("exudate", x, y, size)

    def cotton_wool(self, n: int) -> None:
        for _ in range(n):
            rng = self.rng
            r = float(rng.uniform(0.024, 0.05))
            x, y = self.spot(r * 1.5, far=0.7)
            for _ in range(3):
                dx, dy = rng.normal(0, 0.4 * r, 2)
                dense, longer, angle = (float(rng.uniform(*span)) for span in ((0.4, 0.7), (1, 1.6), (0, 3)))
                spot = x + dx, y + dy, r * 0.8, dense
                self.canvas.blob("cotton", rng, *spot, soft=1.4, ragged=0.1, stretch=longer, angle=angle)
            self.note("cotton_wool", x, y, r * 1.3)

    def beading(self, n: int) -> Map:
        """Widths of the vessels, as multiples (n k), with sausages on `n` stretches of the large veins."""
        v, rng = self.canvas.eye.vessels, self.rng
        swelling = np.ones(v.x.shape, np.float32)
        veins = rng.permutation(np.flatnonzero(v.vein))
        for i in veins[:n]:
            start, k = int(rng.integers(14, 26)), 18
            span = slice(start, start + k)
            swelling[i, span] = 1 + 0.6 * np.sin(np.linspace(0, 2 * np.pi * 4, k)) + 0.2
            x, y = v.x[i, start + k // 2], v.y[i, start + k // 2]
            half = float(np.hypot(v.x[i, start] - v.x[i, start + k], v.y[i, start] - v.y[i, start + k]) / 2)
            if self.visible(float(x), float(y), 0.0):
                self.note("venous_beading", float(x), float(y), half)
        return swelling

    def tangle(self, kind: str, x: float, y: float, size: float, lines: int, width: float, depth: float) -> None:
        """Fine wild vessels from (x, y) to `size` about it: IRMA in the retina, new vessels before it."""
        rng = self.rng
        du, dv = rng.normal(0, 0.12 * size, (2, lines))
        heading, length = rng.uniform(0, 2 * np.pi, lines), size * rng.uniform(1.1, 2.0, lines)
        bend, wild = rng.normal(0, 2.5, lines), np.full(lines, 0.9)
        u, v = walk(rng, x + du, y + dv, heading, length, bend, wild, 49)
        r = width * rng.uniform(0.7, 1.3, (lines, 1)) * np.linspace(1.1, 0.7, 49)[None]
        keep = np.logical_and.accumulate(np.hypot(u - x, v - y) < size, 1)
        u32, v32, r32 = (a.astype(np.float32) for a in (u, v, r))
        self.canvas.trace("blood", u32, v32, r32, depth, keep)
        self.note(kind, x, y, size)

    def irma(self, n: int) -> None:
        for _ in range(n):
            size = float(self.rng.uniform(0.06, 0.10))
            x, y = self.spot(size, far=0.7)
            self.tangle("irma", x, y, size, int(self.rng.integers(4, 7)), 0.0042, 0.75)

    def new_vessels(self, on_disc: bool, elsewhere: int) -> None:
        rng, eye = self.rng, self.canvas.eye
        if on_disc:
            size = eye.disc_radius * float(rng.uniform(1.2, 1.9))
            x, y = (float(c + rng.normal(0, 0.3 * eye.disc_radius)) for c in eye.disc)
            self.tangle("neovascularisation", x, y, size, int(rng.integers(14, 26)), 0.0040, 0.8)
        for _ in range(elsewhere):
            size = float(rng.uniform(0.10, 0.19))
            x, y = self.spot(size, far=0.75, near=0.3)
            self.tangle("neovascularisation", x, y, size, int(rng.integers(12, 24)), 0.0040, 0.8)

    def boat(self) -> None:
        """Blood between retina and vitreous: flat on top, where it has settled, and round below."""
        rng, canvas = self.rng, self.canvas
        r = float(rng.uniform(0.12, 0.24))
        x, y = self.spot(r, far=0.7)
        canvas.blob("boat", rng, x, y, r, float(rng.uniform(1.5, 2.1)), soft=0.22, ragged=0.07, stretch=1.2)
        canvas.settle("boat")
        y_px = canvas.point_px(x, y)[1]
        level = y_px - r * canvas.unit * float(rng.uniform(-0.1, 0.45))
        ramp = np.clip((np.arange(canvas.size) + 0.5 - level) / max(0.12 * r * canvas.unit, 1) + 0.5, 0, 1)[:, None]
        layer = canvas.layer("blood")
        np.maximum(layer, canvas.layers.pop("boat") * ramp.astype(np.float32), out=layer)
        self.note("preretinal_haemorrhage", x, y, r)

    def vitreous(self) -> None:
        """Blood adrift in the vitreous: a dark cloud with strands, anywhere."""
        rng, canvas = self.rng, self.canvas
        size = float(rng.uniform(0.25, 0.45))
        x, y = self.spot(0.2, far=0.6)
        u, v = canvas.smooth_grid()
        d = np.hypot(u - x, v - y) / size
        strands = 0.55 * noise(rng, 8, 8, SMOOTH) + 0.35 * noise(rng, 22, 22, SMOOTH)
        cloud = np.exp(-(d**2)) * np.clip(1.1 + strands, 0, 2.5) + 0.12
        canvas.vitreous = (cloud * rng.uniform(0.7, 1.2)).astype(np.float32)
        self.note("preretinal_haemorrhage", x, y, size)

    def laser(self) -> None:
        """Scars of panretinal laser: pale rounds with pigment in them, in loose rows, outside the arcades."""
        rng, eye = self.rng, self.canvas.eye
        sector = rng.uniform(0, 2 * np.pi)
        for r in np.arange(0.62, 0.96, 0.085):
            for a in np.arange(0, 2 * np.pi, 0.085 / r) + rng.uniform(0, 0.1):
                x, y = (float(v + rng.normal(0, 0.012)) for v in (r * np.cos(a), r * np.sin(a)))
                size = float(rng.uniform(0.016, 0.027))
                if np.cos(a - sector) < -0.2 or rng.random() < 0.25 or not self.visible(x, y, size):
                    continue
                if np.hypot(x - eye.disc[0], y - eye.disc[1]) < 2 * eye.disc_radius:
                    continue
                self.canvas.blob("pale", rng, x, y, size, float(rng.uniform(0.25, 0.6)), soft=0.5)
                if rng.random() < 0.6:
                    self.canvas.blob("melanin", rng, x, y, size * 0.6, float(rng.uniform(0.4, 1.2)), soft=0.8)
                self.note("laser_scar", x, y, size)


#: Signs by grade, in the order in which they are drawn: how, fewest, most, the chance of any, and what else it takes.
_SIGNS: tuple[tuple[tuple[Callable[..., None], int, int, float, *tuple[float, ...]], ...], ...] = (
    (),
    ((_Painter.microaneurysms, 4, 12, 1),),
    (
        (_Painter.exudates, 1, 4, 0.7),
        (_Painter.cotton_wool, 1, 3, 0.35),
        (_Painter.haemorrhages, 4, 14, 1, 0.034),
        (_Painter.microaneurysms, 6, 17, 1),
    ),
    (
        (_Painter.irma, 1, 3, 0.65),
        (_Painter.exudates, 1, 4, 0.6),
        (_Painter.cotton_wool, 1, 5, 0.55),
        (_Painter.haemorrhages, 26, 55, 1, 0.046),
        (_Painter.microaneurysms, 10, 25, 1),
    ),
    (
        (_Painter.exudates, 1, 3, 0.5),
        (_Painter.cotton_wool, 1, 3, 0.3),
        (_Painter.haemorrhages, 4, 25, 1, 0.042),
        (_Painter.microaneurysms, 4, 17, 1),
    ),
)


def _advanced(p: _Painter) -> None:
    """What makes grade 4, and laser against it."""
    rng = p.rng
    on_disc, elsewhere = bool(rng.random() < 0.55), int(rng.integers(0, 4))
    blood, cloud = rng.random() < 0.5, rng.random() < 0.25
    if rng.random() < 0.35:
        p.laser()
    if cloud:
        p.vitreous()
    if blood:
        p.boat()
    # New vessels or blood before the retina make the grade: without the one there is the other.
    p.new_vessels(on_disc, max(elsewhere, 0 if on_disc or blood else 1))


def draw_signs(canvas: Canvas, rng: Rng, grade: int) -> list[Lesion]:
    """Draw the vessels and the signs of `grade` (0-4) on the canvas; returns where the signs are."""
    painter = _Painter(canvas, rng)
    swelling = None
    if grade == 3 and rng.random() < 0.75:
        swelling = painter.beading(int(rng.integers(2, 4)))
    if grade == 4 and rng.random() < 0.3:
        swelling = painter.beading(2)
    draw_vessels(canvas, swelling)
    if grade == 4:
        _advanced(painter)
    for draw, fewest, most, chance, *more in _SIGNS[grade]:
        if chance == 1 or rng.random() < chance:
            draw(painter, int(rng.integers(fewest, most + 1)), *more)
    return painter.lesions
