"""The anatomy of a healthy synthetic eye: where disc and fovea lie, and how the vessels run between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastddr.data.eye.camera import Map, Mask, Rng


@dataclass(frozen=True)
class Vessels:
    """A vessel tree as samples of centre lines: `n` branches of `k` points."""

    x: Map  #: (n k)
    y: Map  #: (n k)
    radius: Map  #: (n k)
    vein: Mask  #: (n)
    level: NDArray[np.integer[Any]]  #: (n) 0 = from the disc, 1 = its branches, 2 = theirs
    seen: Mask  #: (n k) False from where a branch meets the avascular zone


@dataclass(frozen=True)
class Eye:
    """One eye, looked at so that its disc is on the left; `mirrored` puts it on the right."""

    mirrored: bool
    turn: float  #: of the head, radians
    disc: tuple[float, float]
    disc_radius: float
    fovea: tuple[float, float]
    cup: float  #: radius of the cup over that of the disc
    crescent: float  #: pale atrophy at the disc's temporal edge, 0-1
    pigment: float  #: how dark the fundus is, 0-1
    choroid: float  #: how visible the choroid's vessels are, 0-1
    sheen: float  #: how visible the nerve fibres are, 0-1
    reflex: float  #: brightness of the foveal reflex, 0-1
    vessels: Vessels = field(repr=False)


def draw_eye(rng: Rng) -> Eye:
    """An eye. The fovea is 2.5 disc diameters from the disc and a little below it."""
    fovea = np.array([rng.uniform(0.0, 0.36), rng.normal(0.02, 0.05)])
    radius = rng.uniform(0.108, 0.140)
    disc = fovea - [5.0 * radius * rng.uniform(0.95, 1.06), rng.uniform(0.0, 0.09)]
    return Eye(
        mirrored=bool(rng.random() < 0.5),
        turn=float(rng.normal(0, 0.07)),
        disc=(float(disc[0]), float(disc[1])),
        disc_radius=float(radius),
        fovea=(float(fovea[0]), float(fovea[1])),
        cup=float(rng.uniform(0.3, 0.62)),
        crescent=float(rng.uniform(0.4, 1.0) if rng.random() < 0.3 else 0.0),
        pigment=float(rng.uniform(0.0, 0.5)),
        choroid=float(rng.uniform(0.3, 1.0) if rng.random() < 0.45 else rng.uniform(0, 0.2)),
        sheen=float(rng.uniform(0.3, 1.0) if rng.random() < 0.4 else 0.0),
        reflex=float(rng.uniform(0.2, 0.8) if rng.random() < 0.4 else 0.0),
        vessels=_draw_vessels(rng, disc, fovea),
    )


def walk(rng: Rng, x: Map, y: Map, heading: Map, length: Map, bend: Map, wild: Map, steps: int) -> tuple[Map, Map]:
    """Winding lines from (x, y) (n), each (n steps): they turn by `bend` and waver by `wild` radians."""
    n = len(x)
    s = np.linspace(0, 1, steps)[None]
    turns = heading[:, None] + bend[:, None] * s
    for waves in (1.2, 2.7, 5.5):
        start = rng.uniform(0, 2 * np.pi, (n, 1))
        phase = start + 2 * np.pi * waves * rng.uniform(0.7, 1.4, (n, 1)) * s
        turns = turns + wild[:, None] / waves**0.4 * np.sin(phase)
    ds = (length / (steps - 1))[:, None]
    dx, dy = np.cos(turns) * ds, np.sin(turns) * ds
    dx[:, 0] = dy[:, 0] = 0
    return x[:, None] + np.cumsum(dx, 1), y[:, None] + np.cumsum(dy, 1)


#: Points of a branch.
_POINTS = 65


def _arcade(rng: Rng, disc: Map, fovea: Map, up: float, reach: float) -> tuple[Map, Map]:
    """A large vessel from the disc round the macula, (1 k): a Bézier curve that wavers."""
    t = np.linspace(0, 1, _POINTS)[:, None]
    corners = (
        disc + np.array([rng.normal(-0.02, 0.012), up * rng.uniform(0.0, 0.03)]),
        disc + np.array([0.03, 0.40 * up * reach]) + rng.normal(0, 0.05, 2),
        fovea + np.array([-0.05, 0.80 * up * reach]) + rng.normal(0, 0.05, 2),
        fovea + np.array([0.85, 0.33 * up]) + rng.normal(0, 0.10, 2),
    )
    weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
    line = sum((w * c for w, c in zip(weights, corners, strict=True)), np.zeros((_POINTS, 2)))
    for waves, size in ((2.3, 0.013), (5.1, 0.007), (8.7, 0.003)):
        line = line + size * np.sin(2 * np.pi * (waves * t + rng.random((1, 2)))) * np.minimum(4 * t, 1)
    return line[None, :, 0], line[None, :, 1]


def _draw_vessels(rng: Rng, disc: Map, fovea: Map) -> Vessels:
    winding = float(rng.uniform(0.10, 0.28))  # of this eye: some have straight vessels, some have tortuous ones
    parts: list[tuple[Map, Map, Map, Mask, int]] = []

    def grow(line: tuple[Map, Map], first: Map, last: float, vein: Mask, level: int) -> None:
        """Add branches (n k) whose radius goes from `first` (n) to `last` times that."""
        parts.append((*line, first[:, None] * np.linspace(1, last, _POINTS)[None], vein, level))

    # Roots: an artery and a vein into each quadrant, the temporal ones as arcades.
    for up in (-1.0, 1.0):
        reach = float(rng.uniform(0.88, 1.15))
        for is_vein in (False, True):
            line = _arcade(rng, disc, fovea, up, reach * float(rng.uniform(0.9, 1.1)))
            first = (0.0150 if is_vein else 0.0112) * rng.uniform(0.85, 1.12, 1)
            grow(line, first, 0.38, np.array([is_vein]), 0)
        for is_vein in (False, True):
            start = disc + np.array([rng.normal(-0.03, 0.012), up * rng.uniform(0.0, 0.03)])
            heading, one = np.pi - up * rng.uniform(0.5, 1.25, 1), np.ones(1)
            line = walk(rng, start[:1], start[1:], heading, 0.85 * one, up * 0.3 * one, winding * one, _POINTS)
            first = (0.0112 if is_vein else 0.0085) * rng.uniform(0.8, 1.15, 1)
            grow(line, first, 0.4, np.array([is_vein]), 0)
    roots = len(parts)
    # Fine vessels from the disc's rim, most of them towards the macula.
    n = int(rng.integers(5, 9))
    a = rng.normal(0, 0.9, n)
    x0, y0 = disc[0] + 0.06 * np.cos(a), disc[1] + 0.06 * np.sin(a)
    line = walk(rng, x0, y0, a, rng.uniform(0.25, 0.5, n), -0.4 * a, np.full(n, winding), _POINTS)
    grow(line, rng.uniform(0.0028, 0.0048, n), 0.5, rng.random(n) < 0.5, 1)

    # Branches leave to either side by turns, at an angle, and then bend back towards their parent's way.
    parents = slice(0, roots)
    for level, per, shortest, longest in ((1, 6, 0.30, 0.80), (2, 3, 0.12, 0.38)):
        px, py, pr, pv = (np.concatenate([p[i] for p in parts[parents]]) for i in range(4))
        parents = slice(roots, None)
        m = len(px)
        n, who, order = m * per, np.repeat(np.arange(m), per), np.tile(np.arange(per), m)
        at = ((order + rng.uniform(0.2, 1.0, n)) / per * (_POINTS - 6)).astype(int) + 3
        side = np.where((order + np.repeat(rng.integers(0, 2, m), per)) % 2, 1.0, -1.0)
        x0, y0 = px[who, at], py[who, at]
        heading = np.arctan2(y0 - py[who, at - 2], x0 - px[who, at - 2]) + side * rng.uniform(0.45, 1.1, n)
        length, bend = rng.uniform(shortest, longest, n), -side * rng.uniform(0.0, 0.6, n)
        line = walk(rng, x0, y0, heading, length, bend, np.full(n, winding * 1.3), _POINTS)
        grow(line, np.minimum(pr[who, at] * rng.uniform(0.45, 0.78, n), 0.0085), 0.45, pv[who], level)
    x, y, radius, vein = (np.concatenate([p[i] for p in parts]) for i in range(4))
    levels = np.concatenate([np.full(len(p[0]), p[4]) for p in parts])
    # No vessel enters the avascular zone.
    shy = np.hypot(x - fovea[0], y - fovea[1]) < 0.10
    seen = ~np.logical_or.accumulate(shy, 1)
    return Vessels(x.astype(np.float32), y.astype(np.float32), radius.astype(np.float32), vein, levels, seen)
