"""The anatomy of a healthy synthetic eye: where disc and fovea lie, and how the vessels run between them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastddr.data.eye.camera import Map, Mask, Rng


@dataclass(frozen=True)
class Vessels:
    """Vessels as samples of centre lines: `n` of them, of `k` points."""

    x: Map  #: (n k)
    y: Map  #: (n k)
    radius: Map  #: (n k)
    vein: Mask  #: (n)
    seen: Mask  #: (n k) False from where a vessel meets the avascular zone


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
    vessels: Vessels = field(repr=False)  #: the large ones, from the disc
    branches: Vessels = field(repr=False)  #: theirs, and the branches of those


def draw_eye(rng: Rng) -> Eye:
    """An eye. The fovea is 2.5 disc diameters from the disc and a little below it."""
    fovea = np.array([rng.uniform(0.0, 0.36), rng.normal(0.02, 0.05)])
    radius = rng.uniform(0.108, 0.140)
    disc = fovea - [5.0 * radius * rng.uniform(0.95, 1.06), rng.uniform(0.0, 0.09)]
    vessels, branches = _draw_vessels(rng, disc, fovea)
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
        vessels=vessels,
        branches=branches,
    )


def walk(rng: Rng, x: Map, y: Map, heading: Map, length: Map, bend: Map, wild: Map, steps: int) -> tuple[Map, Map]:
    """Winding lines from (x, y) (n), each (n steps): they turn by `bend` and waver by `wild` radians."""
    n = len(x)
    s = np.linspace(0, 1, steps, dtype=np.float32)
    turns = bend.astype(np.float32)[:, None] * s
    turns += heading.astype(np.float32)[:, None]
    dice = rng.random((2, 3, n, 1), dtype=np.float32)
    for k, waves in enumerate((1.2, 2.7, 5.5)):
        phase = (2 * np.pi * waves) * (np.float32(0.7) + np.float32(0.7) * dice[0, k]) * s
        phase += (2 * np.pi) * dice[1, k]
        wave = np.sin(phase, out=phase)
        wave *= (wild / waves**0.4).astype(np.float32)[:, None]
        turns += wave
    ds = (length / (steps - 1)).astype(np.float32)[:, None]
    lines = []
    for start, direction in ((x, np.cos(turns)), (y, np.sin(turns))):
        direction *= ds
        direction[:, 0] = start
        lines.append(np.cumsum(direction, 1, out=direction))
    return lines[0], lines[1]


#: Points of a large vessel, and of a branch, which is shorter.
_POINTS, _FEWER = 65, 33


def _arcades(rng: Rng, disc: Map, fovea: Map, up: Map, reach: Map) -> tuple[Map, Map]:
    """Large vessels from the disc round the macula, (n k): Bézier curves that waver."""
    t = np.linspace(0, 1, _POINTS)
    n = len(up)
    jitter = rng.normal(0, ((0.012, 0.012), (0.05, 0.05), (0.05, 0.05), (0.10, 0.10)), (n, 4, 2))
    corners = np.stack((disc, disc, fovea, fovea)) + jitter  # (n 4 2)
    corners[:, 0, 1] = disc[1] + up * rng.uniform(0.0, 0.03, n)
    corners[:, :, 0] += (-0.02, 0.03, -0.05, 0.85)
    corners[:, 1:, 1] += np.stack((0.40 * up * reach, 0.80 * up * reach, 0.33 * up), 1)
    weights = np.stack(((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3))
    line = (corners[..., None] * weights[:, None]).sum(1)  # (n 2 k)
    for waves, size in ((2.3, 0.013), (5.1, 0.007), (8.7, 0.003)):
        line += size * np.sin(2 * np.pi * (waves * t + rng.random((n, 2, 1)))) * np.minimum(4 * t, 1)
    return line[:, 0], line[:, 1]


class _Tree:
    """Vessels of one number of points, as they grow."""

    def __init__(self, points: int) -> None:
        self.points = points
        self.parts: list[tuple[Map, Map, Map, Mask]] = []

    def grow(self, line: tuple[Map, Map], first: Map, last: float, vein: Mask) -> None:
        """Add vessels (n k) whose radius goes from `first` (n) to `last` times that."""
        taper = np.linspace(1, last, self.points, dtype=np.float32)
        x, y = (np.asarray(a, np.float32) for a in line)
        self.parts.append((x, y, first.astype(np.float32)[:, None] * taper, vein))

    def whole(self) -> tuple[Map, Map, Map, Mask]:
        """x, y, radius and vein of all of them."""
        x, y, radius, vein = (np.concatenate(a) for a in zip(*self.parts, strict=True))
        return x, y, radius, vein

    def vessels(self, fovea: Map) -> Vessels:
        """All of them; none enters the avascular zone."""
        x, y, radius, vein = self.whole()
        shy = (x - float(fovea[0])) ** 2 + (y - float(fovea[1])) ** 2 < 0.10**2
        return Vessels(x, y, radius, vein, ~np.logical_or.accumulate(shy, 1))


def _draw_vessels(rng: Rng, disc: Map, fovea: Map) -> tuple[Vessels, Vessels]:
    """The large vessels from the disc, and all branches."""
    winding = float(rng.uniform(0.10, 0.28))  # of this eye: some have straight vessels, some have tortuous ones
    # An artery and a vein into each quadrant, the temporal ones as arcades.
    roots, branches = _Tree(_POINTS), _Tree(_FEWER)
    up, veins = np.repeat([-1.0, 1.0], 2), np.tile([False, True], 2)
    reach = np.repeat(rng.uniform(0.88, 1.15, 2), 2) * rng.uniform(0.9, 1.1, 4)
    first = np.where(veins, 0.0150, 0.0112) * rng.uniform(0.85, 1.12, 4)
    roots.grow(_arcades(rng, disc, fovea, up, reach), first, 0.38, veins)
    x0, y0 = disc[0] + rng.normal(-0.03, 0.012, 4), disc[1] + up * rng.uniform(0.0, 0.03, 4)
    heading, one = np.pi - up * rng.uniform(0.5, 1.25, 4), np.ones(4)
    line = walk(rng, x0, y0, heading, 0.85 * one, up * 0.3, winding * one, _POINTS)
    roots.grow(line, np.where(veins, 0.0112, 0.0085) * rng.uniform(0.8, 1.15, 4), 0.4, veins)
    # Fine vessels from the disc's rim, most of them towards the macula.
    n = int(rng.integers(5, 9))
    a = rng.normal(0, 0.9, n)
    x0, y0 = disc[0] + 0.06 * np.cos(a), disc[1] + 0.06 * np.sin(a)
    line = walk(rng, x0, y0, a, rng.uniform(0.25, 0.5, n), -0.4 * a, np.full(n, winding), _FEWER)
    branches.grow(line, rng.uniform(0.0028, 0.0048, n), 0.5, rng.random(n) < 0.5)

    # Branches leave to either side by turns, at an angle, and then bend back towards their parent's way.
    for parents, per, shortest, longest in ((roots, 6, 0.30, 0.80), (branches, 3, 0.12, 0.38)):
        px, py, pr, pv = parents.whole()
        m, step = len(px), (parents.points - 1) // 32
        n, who, order = m * per, np.repeat(np.arange(m), per), np.tile(np.arange(per), m)
        at = ((order + rng.uniform(0.2, 1.0, n)) / per * (parents.points - 6)).astype(int) + 3
        side = np.where((order + np.repeat(rng.integers(0, 2, m), per)) % 2, 1.0, -1.0)
        x0, y0 = px[who, at], py[who, at]
        heading = np.arctan2(y0 - py[who, at - step], x0 - px[who, at - step]) + side * rng.uniform(0.45, 1.1, n)
        length, bend = rng.uniform(shortest, longest, n), -side * rng.uniform(0.0, 0.6, n)
        line = walk(rng, x0, y0, heading, length, bend, np.full(n, winding * 1.3), _FEWER)
        branches.grow(line, np.minimum(pr[who, at] * rng.uniform(0.45, 0.78, n), 0.0085), 0.45, pv[who])
    return roots.vessels(fovea), branches.vessels(fovea)
