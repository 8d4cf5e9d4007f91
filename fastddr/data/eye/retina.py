"""The retina: a canvas on which vessels and signs are drawn, and the light that comes back from it."""

from __future__ import annotations

import math

import numpy as np

from fastddr.data.eye.anatomy import Eye
from fastddr.data.eye.camera import SMOOTH, Camera, Map, Mask, Rng, enlarge, illumination, noise, speckle, stray_light

#: How strongly a unit of blood, and of melanin, takes away red, green and blue (natural logarithm).
BLOOD = (0.34, 0.95, 0.78)
MELANIN = (0.55, 0.75, 0.80)


class Canvas:
    """Where things are drawn: maps (S S) of what lies in or on the retina, and the way from eye to pixels."""

    def __init__(self, eye: Eye, camera: Camera, size: int) -> None:
        self.eye, self.camera, self.size = eye, camera, size
        self.unit = camera.radius * size / 2  #: pixels in a field radius
        self.layers: dict[str, Map] = {}
        self.vitreous: Map | None = None  #: (L L) blood in the vitreous, before everything else

    def layer(self, name: str) -> Map:
        """The map of that name, zeros at first: blood, melanin, exudate, cotton, pale, core."""
        if name not in self.layers:
            self.layers[name] = np.zeros((self.size, self.size), np.float32)
        return self.layers[name]

    def point_px(self, x: float, y: float) -> tuple[float, float]:
        """From the eye's coordinates to pixels (x, y), for one point."""
        c, s = math.cos(self.eye.turn), math.sin(self.eye.turn)
        flip = -1 if self.eye.mirrored else 1
        cx, cy = self.camera.centre
        across, down = c * x - s * y, s * x + c * y
        return cx * self.size + flip * self.unit * across, cy * self.size + self.unit * down

    def to_px(self, x: Map, y: Map) -> tuple[Map, Map]:
        """`point_px` for arrays of points."""
        c, s = np.float32(np.cos(self.eye.turn)), np.float32(np.sin(self.eye.turn))
        flip = -1 if self.eye.mirrored else 1
        cx, cy = self.camera.centre
        x_px = np.float32(cx * self.size) + np.float32(flip * self.unit) * (c * x - s * y)
        y_px = np.float32(cy * self.size) + np.float32(self.unit) * (s * x + c * y)
        return np.asarray(x_px, np.float32), np.asarray(y_px, np.float32)

    def smooth_grid(self) -> tuple[Map, Map]:
        """The eye's coordinates (x, y) of the nodes of the smooth maps, (L L) each."""
        axis = (np.arange(SMOOTH, dtype=np.float32) + 0.5) / SMOOTH
        u = (axis[None] - self.camera.centre[0]) * 2 / self.camera.radius * (-1 if self.eye.mirrored else 1)
        v = (axis[:, None] - self.camera.centre[1]) * 2 / self.camera.radius
        c, s = np.float32(np.cos(self.eye.turn)), np.float32(np.sin(self.eye.turn))
        return (c * u + s * v).astype(np.float32), (c * v - s * u).astype(np.float32)

    def stamp(self, name: str, x: Map, y: Map, radius: Map, strength: Map | float) -> None:
        """Draw round columns of what fills layer `name` at points of the eye; overlaps do not add."""
        x_px, y_px = self.to_px(x, y)
        r_px = np.maximum(np.asarray(radius, np.float32) * np.float32(self.unit), np.float32(1e-3))
        # What is thinner than a pixel is drawn a pixel wide and paler.
        wide = np.maximum(r_px, np.float32(0.55)) + np.float32(0.45)
        peak = np.broadcast_to(np.asarray(strength, np.float32), x_px.shape) * np.minimum(r_px / np.float32(0.55), 1)
        flat, size = self.layer(name).reshape(-1), self.size
        half = np.ceil(wide).astype(int)
        inside = (x_px > -wide) & (y_px > -wide) & (x_px < size + wide) & (y_px < size + wide)
        for h in np.unique(half):
            pick = (half == h) & inside
            across, down = x_px[pick][:, None], y_px[pick][:, None]
            left, top = np.floor(across), np.floor(down)
            steps = np.arange(-h, h + 1)
            gx, gy = left.astype(int) + steps, top.astype(int) + steps  # (n, 2h+1) columns and rows
            middle, per = steps.astype(np.float32) + np.float32(0.5), 1 / wide[pick][:, None]
            u, v = ((middle + (left - across)) * per) ** 2, ((middle + (top - down)) * per) ** 2
            u[(gx < 0) | (gx >= size)] = 2  # outside the photograph: no value
            v[(gy < 0) | (gy >= size)] = 2
            fill = (1 - v)[:, :, None] - u[:, None, :]
            some = fill > 0
            value = (np.sqrt(np.maximum(fill, 0)) * peak[pick][:, None, None])[some]
            # float32 into float32 at intp: any other types would take `at` its slow way.
            np.maximum.at(flat, ((gy * size)[:, :, None] + gx[:, None, :])[some], value)

    def trace(self, name: str, x: Map, y: Map, radius: Map, strength: Map | float, keep: Mask | bool = True) -> None:
        """`stamp` along lines (n k), dense enough to leave no gaps, but not at points that are not `keep`."""
        length = np.hypot(np.diff(x, axis=1), np.diff(y, axis=1)).sum(1) / (x.shape[1] - 1) * self.unit
        step = np.maximum(0.8, 0.3 * radius.min(1) * self.unit)
        dense = np.clip(np.ceil(length / step), 1, 64).astype(int)
        strength = np.broadcast_to(np.asarray(strength, np.float32), x.shape)
        keep = np.broadcast_to(keep, x.shape)
        out: list[list[Map]] = [[], [], [], []]
        for d in np.unique(dense):
            rows = dense == d
            w = (np.arange(d, dtype=np.float32) / d)[None, None]
            use = (keep[rows, :-1] & keep[rows, 1:])[..., None] & np.ones_like(w, bool)
            for to, a in zip(out, (x, y, radius, strength), strict=True):
                a = a[rows]
                to.append((a[:, :-1, None] * (1 - w) + a[:, 1:, None] * w)[use])
        px, py, pr, ps = (np.concatenate(a) for a in out)
        near = px**2 + py**2 < 1.05
        self.stamp(name, px[near], py[near], pr[near], ps[near])

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
        """Draw a ragged spot: `soft` = width of its edge over its radius, `stretch` = length over width."""
        x_px, y_px = self.point_px(x, y)
        r = max(radius * self.unit, 0.8)
        h = int(np.ceil(r * stretch * (1 + 2 * ragged + soft) + 2))
        x0, x1 = max(int(x_px) - h, 0), min(int(x_px) + h + 1, self.size)
        y0, y1 = max(int(y_px) - h, 0), min(int(y_px) + h + 1, self.size)
        waves, phases = rng.normal(0, ragged, 3) / (1, 1.5, 2.2), rng.uniform(0, 2 * np.pi, 3)
        if x0 >= x1 or y0 >= y1:
            return
        gx = np.arange(x0, x1, dtype=np.float32)[None] + np.float32(0.5 - x_px)
        gy = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - y_px)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = (c * gx + s * gy) / np.float32(stretch), c * gy - s * gx
        edge: Map | float = r
        if r > 2:  # smaller spots have no shape
            theta = np.arctan2(v, u)
            for k in range(3):
                edge = edge + np.float32(r * waves[k]) * np.cos((k + 2) * theta + np.float32(phases[k]))
        ramp = max(soft * r, 1.0)
        value = np.clip((edge - np.hypot(u, v)) / ramp + 0.5, 0, 1)
        value = strength * value * value * (3 - 2 * value)
        patch = self.layer(name)[y0:y1, x0:x1]
        np.maximum(patch, value, out=patch)


def draw_vessels(canvas: Canvas, swelling: Map | None = None) -> None:
    """Put the eye's vessels on the canvas; `swelling` (n k) multiplies their radii (venous beading)."""
    v = canvas.eye.vessels
    radius = v.radius if swelling is None else v.radius * swelling
    depth = np.where(v.vein, 0.78, 0.50)[:, None] * np.minimum(radius / 0.012, 1) ** 0.6
    canvas.trace("blood", v.x, v.y, radius, depth.astype(np.float32), v.seen)
    roots = v.level == 0
    canvas.trace(
        "core",
        v.x[roots],
        v.y[roots],
        radius[roots] * 0.42,
        np.where(v.vein[roots], 0.12, 0.42)[:, None].astype(np.float32),
    )


#: Colour of what covers the retina, from that of bare retina in the same light: (factor, offset) for each of
#: red, green and blue. In the order in which they are laid on.
COVERS = {
    "pale": ((1.10, 0.08), (1.25, 0.15), (1.10, 0.08)),
    "cotton": ((1.15, 0.12), (1.30, 0.20), (1.30, 0.15)),
    "exudate": ((1.25, 0.10), (1.50, 0.18), (1.10, 0.06)),
}
DISC_RIM = ((1.28, 0.14), (1.38, 0.13), (1.35, 0.06))
DISC_CUP = ((1.35, 0.24), (1.55, 0.27), (1.70, 0.20))


def _disc(canvas: Canvas, rng: Rng, glow: float) -> tuple[tuple[slice, slice], Map, list[Map]]:
    """The optic disc: where it lies, how much of the retina it hides (h w), and its colours (h w)."""
    eye, camera, size = canvas.eye, canvas.camera, canvas.size
    r_px = eye.disc_radius * canvas.unit
    x_px, y_px = canvas.point_px(*eye.disc)
    h = int(1.6 * r_px) + 3
    box = (
        slice(max(int(y_px) - h, 0), max(int(y_px) + h, 0)),
        slice(max(int(x_px) - h, 0), max(int(x_px) + h, 0)),
    )
    v, u = (np.arange(size, dtype=np.float32)[b] for b in box)
    u = (u + 0.5 - x_px)[None] / r_px * (-1 if eye.mirrored else 1)
    v = (v + 0.5 - y_px)[:, None] / r_px
    wobble = 0.03 * np.cos(2 * np.arctan2(v, u) + rng.uniform(0, 6)) + 0.02 * np.cos(3 * np.arctan2(v, u))
    rho = np.hypot(u / 0.93, v) * (1 + wobble)
    edge = np.clip((1 - rho) / rng.uniform(0.10, 0.22) + 0.5, 0, 1)
    cup = np.clip((eye.cup - np.hypot((u - 0.12) / 0.9, v)) / 0.30 + 0.5, 0, 1)
    cup = cup * (1 + 0.06 * enlarge(rng.standard_normal((9, 9), dtype=np.float32), 2 * h)[: len(v), : u.shape[1]])
    # The nasal rim is redder than the temporal one; a scleral crescent hugs the temporal edge.
    warm = np.clip(0.5 - 0.5 * u, 0, 1) * 0.16
    moon = eye.crescent * np.exp(-(((rho - 1.08) / 0.10) ** 2)) * np.clip(u * 1.6 - 0.4, 0, 1)
    alpha = np.maximum(edge * 0.96, moon * 0.7).astype(np.float32)
    colours = []
    for c, base in enumerate(camera.base):
        rim, mid = (k[c][0] * base + k[c][1] for k in (DISC_RIM, DISC_CUP))
        colours.append(((rim + (mid - rim) * cup) * (1 - warm * (0.3, 1.0, 1.0)[c]) * glow).astype(np.float32))
    return box, alpha, colours


def light(canvas: Canvas, rng: Rng) -> list[Map]:
    """What comes back from the eye to the camera: red, green and blue, (S S) each, about 0-1."""
    eye, camera, size = canvas.eye, canvas.camera, canvas.size
    x, y = canvas.smooth_grid()
    fovea = np.hypot(x - eye.fovea[0], (y - eye.fovea[1]) * 1.08)
    dx, dy = x - eye.disc[0], y - eye.disc[1]
    from_disc, angle = np.hypot(dx, dy), np.arctan2(dy, dx)

    # Pigment: patches of all sizes, the macula, and the choroid's vessels as paler bands between them.
    cloud = sum(a * noise(rng, n, n, SMOOTH) for n, a in ((4, 0.10), (9, 0.06), (24, 0.035), (50, 0.02)))
    bands = noise(rng, 26, 15, SMOOTH) + 0.6 * noise(rng, 20, 26, SMOOTH)
    bands = np.exp(-((bands / 0.45) ** 2)) * np.clip((fovea - 0.15) / 0.4, 0, 1)
    melanin = 0.12 + eye.pigment * 0.5 + cloud * (0.6 + eye.pigment) - eye.choroid * 0.15 * (bands - 0.3)
    melanin = melanin + 0.34 * np.exp(-((fovea / 0.17) ** 2)) + 0.34 * np.exp(-((fovea / 0.075) ** 2))

    # Nerve fibres: a sheen in fine streaks that fan out from the disc and thicken along the arcades.
    streaks = noise(rng, 5, 120, SMOOTH)
    rows = np.clip(from_disc * 70, 0, SMOOTH - 1).astype(int)
    streaks = streaks[rows, ((angle / (2 * np.pi) + 0.5) * (SMOOTH - 1)).astype(int)]
    fan = np.exp(-(((np.abs(angle) - 1.15) / 0.5) ** 2)) * np.exp(-from_disc / 0.45)
    gloss = 0.16 * eye.sheen * fan * (1 + 0.55 * streaks)
    gloss = gloss + 0.05 * eye.sheen * np.exp(-(((fovea - 0.16) / 0.035) ** 2))
    gloss = gloss + 0.22 * eye.reflex * np.exp(-((fovea / 0.016) ** 2))

    glow = illumination(camera) * (1 + 0.10 * np.exp(-((from_disc / 0.5) ** 2)))
    at_disc = float(glow.flat[int(np.argmin(from_disc))])
    box, alpha, colours = _disc(canvas, rng, at_disc)
    veil = enlarge(stray_light(camera, rng), size)
    grain = 1 + np.float32(0.016) * enlarge(speckle(rng, 200), size)
    blood = canvas.layer("blood")
    if "core" in canvas.layers:  # the reflex along a vessel's middle
        blood = blood * (1 - canvas.layers["core"])
    covers = [(canvas.layers[k], rule) for k, rule in COVERS.items() if k in canvas.layers]
    glow_full = enlarge(glow.astype(np.float32), size) if covers else grain
    out: list[Map] = []
    for c, base in enumerate(camera.base):
        k = np.float32(MELANIN[c])
        bare = (base * np.exp(-k * melanin) + gloss * (0.75, 0.9, 0.8)[c]) * glow
        back = enlarge(bare.astype(np.float32), size) * grain
        if "melanin" in canvas.layers:
            back *= np.exp(-k * canvas.layers["melanin"])
        back[box] += alpha * (colours[c] - back[box])
        back *= np.exp(-np.float32(BLOOD[c]) * blood)
        for cover, rule in covers:
            back += cover * (np.float32(rule[c][0] * base + rule[c][1]) * glow_full - back)
        if canvas.vitreous is not None:
            back *= enlarge(np.exp(-np.float32(BLOOD[c]) * canvas.vitreous), size)
        out.append(back + veil * (np.float32(camera.veil[c]) - back))
    return out
