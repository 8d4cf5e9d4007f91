"""The canvas: maps of what lies in or on the retina, and the three ways of drawing on them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastddr.data.eye.anatomy import Eye
from fastddr.data.eye.camera import SHARP, Camera, Map, Mask, Rng, field_grid

Places = NDArray[np.intp]

#: How many pixels across a line are filled at once; what is wider than its line is filled with nought there.
_LENGTHS = np.array([3, 4, 5, 7, 9, 12, 16, 24, 32, 64, 128, 256, 512])
#: Which of them takes a line that is so many whole pixels wide.
_GROUP = np.searchsorted(_LENGTHS, np.arange(1, 512)).astype(np.int8)


class _Blob(NamedTuple):
    """A ragged spot in pixels, not yet drawn; see `Canvas.blob`."""

    x: float
    y: float
    radius: float
    strength: float
    ramp: float  #: width of its edge
    stretch: float
    angle: float
    waves: tuple[float, ...]  #: cosines and sines of the outline's three waves, six numbers
    reach: int  #: of its patch, in pixels to either side


class Canvas:
    """Where things are drawn: maps (S S) of what lies in or on the retina, and the way from eye to pixels."""

    def __init__(self, eye: Eye, camera: Camera, size: int) -> None:
        self.eye, self.camera, self.size = eye, camera, size
        self.unit = camera.radius * size / 2  #: pixels in a field radius
        self.layers: dict[str, Map] = {}
        self.vitreous: Map | None = None  #: (L L) blood in the vitreous, before everything else
        #: What the optics add to a spot's edge, where they are sharp enough that it need not be blurred afterwards.
        self.blur = sigma if (sigma := camera.blur * size / 512) <= SHARP else 0.0
        self._cos, self._sin = math.cos(eye.turn), math.sin(eye.turn)
        self._waiting: dict[str, list[_Blob]] = {}

    def layer(self, name: str) -> Map:
        """The map of that name, zeros at first: blood, melanin, exudate, cotton, pale, core."""
        if name not in self.layers:
            self.layers[name] = np.zeros((self.size, self.size), np.float32)
        return self.layers[name]

    def point_px(self, x: float, y: float) -> tuple[float, float]:
        """From the eye's coordinates to pixels (x, y), for one point."""
        flip = -1 if self.eye.mirrored else 1
        cx, cy = self.camera.centre
        across, down = self._cos * x - self._sin * y, self._sin * x + self._cos * y
        return cx * self.size + flip * self.unit * across, cy * self.size + self.unit * down

    def to_px(self, x: Map, y: Map) -> tuple[Map, Map]:
        """`point_px` for arrays of points."""
        flip = -1 if self.eye.mirrored else 1
        cx, cy = self.camera.centre
        x_px = cx * self.size + flip * self.unit * (self._cos * x - self._sin * y)
        y_px = cy * self.size + self.unit * (self._sin * x + self._cos * y)
        return np.asarray(x_px, np.float32), np.asarray(y_px, np.float32)

    def smooth_grid(self) -> tuple[Map, Map]:
        """The eye's coordinates (x, y) of the nodes of the smooth maps, (L L) each."""
        u, v = field_grid(self.camera)
        u = u * (-1 if self.eye.mirrored else 1)
        return self._cos * u + self._sin * v, self._cos * v - self._sin * u

    def stamp(self, name: str, x: Map, y: Map, radius: Map, strength: Map) -> None:
        """Draw round columns (n) of what fills layer `name` at points of the eye; overlaps do not add."""
        wide, peak = _profile(radius * np.float32(self.unit), strength)
        self._stamp_px(name, *self.to_px(x, y), wide, peak)

    def _stamp_px(self, name: str, x: Map, y: Map, wide: Map, peak: Map) -> None:
        half = int(np.ceil(wide.max(initial=0)))
        left, top, steps = np.floor(x), np.floor(y), np.arange(-half, half + 1)
        columns = left.astype(np.intp)[:, None] + steps  # (n 2h+1)
        rows = top.astype(np.intp)[:, None] + steps
        middle, per = steps.astype(np.float32) + np.float32(0.5), 1 / wide[:, None]
        u = ((middle + (left - x)[:, None]) * per) ** 2
        v = ((middle + (top - y)[:, None]) * per) ** 2
        fill = (1 - v)[:, :, None] - u[:, None, :]
        self._lay_patches(name, columns, rows, np.sqrt(np.clip(fill, 0, None)) * peak[:, None, None])

    def _lay_patches(self, name: str, columns: Places, rows: Places, value: Map) -> None:
        """`_lay` of patches (n h w) at columns (n w) and rows (n h), nought left out."""
        some = np.flatnonzero(value)
        h, w = value.shape[1:]
        which, rest = np.divmod(some, h * w)
        row, column = np.divmod(rest, w)
        self._lay(name, columns[which, column], rows[which, row], value.reshape(-1)[some])

    def _lay(self, name: str, columns: Places, rows: Places, value: Map) -> None:
        """Raise single pixels of a layer to `value` where they are lower; pixels off the canvas are dropped."""
        if not len(value):
            return
        if min(columns.min(), rows.min()) < 0 or max(columns.max(), rows.max()) >= self.size:
            on = (columns >= 0) & (columns < self.size) & (rows >= 0) & (rows < self.size)
            columns, rows, value = columns[on], rows[on], value[on]
        # float32 into float32 at intp: any other types would take `at` its slow way.
        np.maximum.at(self.layer(name).reshape(-1), rows * self.size + columns, value)

    def trace(self, name: str, x: Map, y: Map, radius: Map, strength: Map | float, keep: Mask | bool = True) -> None:
        """Draw lines (n k) of varying radius, but not between points that are not `keep`; overlaps do not add.

        For each pixel that a line passes along the axis on which it runs faster, the pixels across it are filled:
        one visit of each pixel of the line, where a row of discs would visit it a dozen times.
        """
        x_px, y_px = self.to_px(x, y)
        wide, peak = _profile(radius * np.float32(self.unit), np.broadcast_to(np.float32(strength), x.shape))
        dx, dy = np.diff(x_px, axis=1), np.diff(y_px, axis=1)
        steep = np.abs(dy) > np.abs(dx)
        far = np.where(steep, np.abs(dy), np.abs(dx))
        shown = x * x + y * y < 1.05
        shown &= keep
        # Where the fast axis changes, and at the ends, the fillings leave a corner: there a disc is put.
        bare = np.ones(x.shape, bool)
        np.not_equal(steep[:, 1:], steep[:, :-1], out=bare[:, 1:-1])
        bare &= shown
        bare &= wide > 2.5
        if bare.any():
            self._stamp_px(name, x_px[bare], y_px[bare], wide[bare], peak[bare])

        line = shown[:, :-1] & shown[:, 1:]
        line &= far > 0
        segment = np.flatnonzero(line)
        start = segment + segment // dx.shape[1]  # its first point: the points have one more column
        far = far.reshape(-1)[segment]
        count = np.ceil(far).astype(np.intp)
        which = np.repeat(np.arange(len(segment)), count)
        before = np.cumsum(count) - count
        t = (np.arange(len(which)) - before[which]).astype(np.float32)
        t /= count[which]

        steep = steep.reshape(-1)[segment]
        x0, y0 = x_px.reshape(-1)[start], y_px.reshape(-1)[start]
        dx, dy = dx.reshape(-1)[segment], dy.reshape(-1)[segment]
        along, slope = np.where(steep, dy, dx), np.where(steep, dx, dy)
        slope /= along
        a0, c0 = np.where(steep, y0, x0), np.where(steep, x0, y0)
        main = np.floor(a0[which] + along[which] * t)
        # A column (or row) is filled once, though two short segments may lie in it.
        fresh = np.ones(len(which), bool)
        np.not_equal(main[1:], main[:-1], out=fresh[1:])
        fresh[1:] |= start[which[1:]] > start[which[:-1]] + 1
        fresh[1:] |= steep[which[1:]] != steep[which[:-1]]
        which, t, main = which[fresh], t[fresh], main[fresh]
        steep = steep[which]

        def between(values: Map) -> Map:
            flat = values.reshape(-1)
            first = flat[start]
            return first[which] + (flat[start + 1] - first)[which] * t

        # Where the line crosses the middle of that column, and how far its rim is from there.
        cross = c0[which] + (main + np.float32(0.5) - a0[which]) * slope[which]
        rim = between(wide) * np.sqrt(1 + slope * slope)[which]
        lowest = np.ceil(cross - rim - np.float32(0.5))
        group = _GROUP[(2 * rim).astype(np.intp)]
        main_at, low_at = main.astype(np.intp), lowest.astype(np.intp)
        stride = np.where(steep, 1, self.size)
        first_at = main_at * (self.size + 1 - stride) + low_at * stride
        inside = (main_at >= 0) & (main_at < self.size) & (low_at >= 0) & (low_at + _LENGTHS[group] <= self.size)
        group[~inside] = len(_LENGTHS)
        order = np.argsort(group, kind="stable")
        ends = np.cumsum(np.bincount(group, minlength=len(_LENGTHS)))
        off = (lowest + np.float32(0.5) - cross)[order, None]
        per, peak = (1 / rim)[order, None], between(peak)[order, None]
        first_at, stride = first_at[order, None], stride[order, None]
        flat, begin = self.layer(name).reshape(-1), 0
        for length, end in zip(_LENGTHS.tolist(), ends.tolist(), strict=False):
            if begin < end:
                pick, steps = slice(begin, end), np.arange(length)
                fill = off[pick] + steps.astype(np.float32)
                fill *= per[pick]
                fill *= fill
                np.subtract(1, fill, out=fill)
                np.clip(fill, 0, None, out=fill)
                np.sqrt(fill, out=fill)
                fill *= peak[pick]
                at = first_at[pick] + steps * stride[pick]
                # One line of float32 into float32 at intp: anything else would take `at` its slow way.
                np.maximum.at(flat, at.reshape(-1), fill.reshape(-1))
            begin = end

    def blob(
        self,
        name: str,
        rng: Rng,
        x: float,
        y: float,
        radius: float,
        strength: float,
        *,
        soft: float = 0.3,
        ragged: float = 0.15,
        stretch: float = 1.0,
        angle: float = 0.0,
    ) -> None:
        """Draw a ragged spot: `soft` = width of its edge over its radius, `stretch` = length over width.

        It is on its layer after the next `settle`: many spots are drawn at once, which takes less time.
        """
        x_px, y_px = self.point_px(x, y)
        r = max(radius * self.unit, 0.8)
        edge = math.hypot(max(soft * r, 1.0), 2.5 * self.blur)
        shape = r * ragged if r > 2 else 0.0  # smaller spots have none
        # Drawn whatever the size, so that the next spot is in the same place on every canvas.
        sizes = [w * shape / k for w, k in zip(rng.standard_normal(3).tolist(), (1, 1.5, 2.2), strict=True)]
        phases = [2 * math.pi * p for p in rng.random(3).tolist()]
        waves = tuple(w * f(p) for w, p in zip(sizes, phases, strict=True) for f in (math.cos, math.sin))
        lumps = sum(map(abs, sizes))
        reach = math.ceil(stretch * (r + lumps + edge / 2)) + 1
        self._waiting.setdefault(name, []).append(_Blob(x_px, y_px, r, strength, edge, stretch, angle, waves, reach))

    def settle(self, name: str) -> None:
        """Draw the spots that wait for layer `name`."""
        waiting = sorted(self._waiting.pop(name, []), key=lambda b: b.reach)
        while waiting:
            # Patches of about the same reach, drawn as if they had the largest one's.
            n = sum(b.reach <= max(1.3 * waiting[0].reach, waiting[0].reach + 2) for b in waiting)
            self._draw(name, waiting[:n])
            waiting = waiting[n:]

    def _draw(self, name: str, blobs: list[_Blob]) -> None:
        """Draw spots in patches of one size, (n 2h+1 2h+1)."""
        h = blobs[-1].reach

        def column(values: list[float]) -> Map:
            return np.array(values, np.float32)[:, None, None]

        r, strength = column([b.radius for b in blobs]), column([b.strength for b in blobs])
        edge, stretch = column([b.ramp for b in blobs]), column([b.stretch for b in blobs])
        c, s = column([math.cos(b.angle) for b in blobs]), column([math.sin(b.angle) for b in blobs])
        steps = np.arange(-h, h + 1)
        columns = np.array([int(b.x) for b in blobs])[:, None] + steps
        rows = np.array([int(b.y) for b in blobs])[:, None] + steps
        gx = (steps + np.array([0.5 + int(b.x) - b.x for b in blobs])[:, None]).astype(np.float32)[:, None, :]
        gy = (steps + np.array([0.5 + int(b.y) - b.y for b in blobs])[:, None]).astype(np.float32)[:, :, None]
        u, v = (c * gx + s * gy) / stretch, c * gy - s * gx
        far = np.sqrt(u * u + v * v)
        value: Map = r - far
        if any(any(b.waves) for b in blobs):
            # Waves of two, three and four periods round the rim: powers of the direction as a complex number.
            per = 1 / np.maximum(far, np.float32(1e-3))
            c1, s1 = u * per, v * per
            ck, sk = c1, s1
            for k in range(3):
                ck, sk = ck * c1 - sk * s1, ck * s1 + sk * c1
                value += column([b.waves[2 * k] for b in blobs]) * ck
                value -= column([b.waves[2 * k + 1] for b in blobs]) * sk
        value /= edge
        value += np.float32(0.5)
        np.clip(value, 0, 1, out=value)
        value *= value * (3 - 2 * value)
        value *= strength
        self._lay_patches(name, columns, rows, value)


def _profile(radius: Map, strength: Map) -> tuple[Map, Map]:
    """Half width and peak, in pixels, of a round column; one thinner than a pixel is a pixel wide and paler."""
    least = np.float32(0.55)
    return np.maximum(radius, least) + np.float32(0.45), strength * np.minimum(radius / least, 1)
