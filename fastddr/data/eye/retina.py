"""The retina: its vessels and disc, what covers it, and the light that comes back from all of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastddr.data.eye.camera import (
    SHARP,
    SMOOTH,
    Map,
    Rng,
    enlarge,
    enlarged,
    grain,
    illumination,
    noise,
    shoulder,
    soften,
    stray_light,
    widened,
)
from fastddr.data.eye.canvas import Canvas, Places

#: How strongly a unit of blood takes away red, green and blue (natural logarithm): 2, 6 and 5 times `BLOOD`, so
#: that one exponential and some products make all three.
BLOOD = 0.16
BLOOD_POWERS = (2, 6, 5)
#: The same of melanin.
MELANIN = (0.55, 0.75, 0.80)


def draw_vessels(canvas: Canvas, swelling: Map | None = None) -> None:
    """Put the eye's vessels on the canvas; `swelling` (n k) multiplies the large ones' radii (venous beading)."""
    roots = canvas.eye.vessels
    for v, wider in ((roots, swelling), (canvas.eye.branches, None)):
        radius = v.radius if wider is None else v.radius * wider
        depth = np.where(v.vein, np.float32(0.78), np.float32(0.50))[:, None] * np.minimum(radius / 0.012, 1) ** 0.6
        canvas.trace("blood", v.x, v.y, radius, depth, v.seen)
    radius = roots.radius if swelling is None else roots.radius * swelling
    core = np.where(roots.vein, np.float32(0.12), np.float32(0.42))[:, None]
    canvas.trace("core", roots.x, roots.y, radius * np.float32(0.42), core)


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
    h = int(1.6 * r_px + 2 * camera.blur * size / 512) + 3
    box = (
        slice(max(int(y_px) - h, 0), max(int(y_px) + h, 0)),
        slice(max(int(x_px) - h, 0), max(int(x_px) + h, 0)),
    )
    v, u = (np.arange(size, dtype=np.float32)[b] for b in box)
    u = (u + float(0.5 - x_px))[None] * float((-1 if eye.mirrored else 1) / r_px)
    v = (v + float(0.5 - y_px))[:, None] / float(r_px)
    # An outline of two and three waves: powers of the direction as a complex number.
    far = np.sqrt(u * u + v * v) + np.float32(1e-3)
    c1, s1 = u / far, v / far
    c2, s2 = c1 * c1 - s1 * s1, 2 * c1 * s1
    phase = float(rng.uniform(0, 6))
    wobble = 0.03 * float(np.cos(phase)) * c2 - 0.03 * float(np.sin(phase)) * s2 + 0.02 * (c2 * c1 - s2 * s1)
    rho = np.hypot(u / 0.93, v) * (1 + wobble)
    blur = widened(0, camera, size) / r_px
    edge = np.clip((1 - rho) / float(np.hypot(rng.uniform(0.10, 0.22), blur)) + 0.5, 0, 1)
    cup = np.clip((eye.cup - np.hypot((u - 0.12) / 0.9, v)) / float(np.hypot(0.30, blur)) + 0.5, 0, 1)
    uneven = enlarge(rng.standard_normal((9, 9), dtype=np.float32), 2 * h)[: len(v), : u.shape[1]]
    cup *= 1 + np.float32(0.06) * uneven
    # The nasal rim is redder than the temporal one; a scleral crescent hugs the temporal edge.
    warm = np.clip(0.5 - 0.5 * u, 0, 1) * np.float32(0.16)
    alpha = edge * np.float32(0.96)
    if eye.crescent:
        moon = np.exp(-(((rho - 1.08) / float(np.hypot(0.10, 0.7 * blur))) ** 2)) * np.clip(u * 1.6 - 0.4, 0, 1)
        alpha = np.maximum(alpha, moon * np.float32(0.7 * eye.crescent))
    colours = []
    for c, base in enumerate(camera.base):
        rim, mid = (k[c][0] * base + k[c][1] for k in (DISC_RIM, DISC_CUP))
        colours.append((rim + (mid - rim) * cup) * (1 - warm * (0.3, 1.0, 1.0)[c]) * glow)
    return box, alpha, colours


def _pigment(canvas: Canvas, rng: Rng, fovea: Map) -> Map:
    """Melanin, (L L): patches of all sizes, the macula, and the choroid's vessels as paler bands between them."""
    eye = canvas.eye

    def sharp(nodes: int) -> float:
        """What the camera's blur leaves of noise with so many nodes across."""
        return float(np.exp(-0.5 * (np.pi * canvas.camera.blur * nodes / 512) ** 2))

    melanin = np.full_like(fovea, 0.12 + eye.pigment * 0.5 + 0.3 * eye.choroid * 0.15)
    for n, size in ((4, 0.10), (9, 0.06), (24, 0.035), (50, 0.02)):
        melanin += noise(rng, n, n, SMOOTH) * np.float32(size * (0.6 + eye.pigment) * sharp(n))
    bands = noise(rng, 26, 15, SMOOTH) + np.float32(0.6) * noise(rng, 20, 26, SMOOTH)
    bands = np.exp(bands * bands * np.float32(-1 / 0.45**2))
    melanin -= bands * np.clip((fovea - 0.15) / 0.4, 0, 1) * np.float32(eye.choroid * 0.15 * sharp(26))
    square = fovea * fovea
    melanin += 0.34 * (np.exp(square * (-1 / 0.17**2)) + np.exp(square * (-1 / 0.075**2)))
    return melanin


def _gloss(canvas: Canvas, rng: Rng, from_disc: Map, angle: tuple[Map, Map], fovea: Map) -> Map | None:
    """What the inner surface of the retina mirrors, (L L), if anything."""
    eye = canvas.eye
    gloss: Map | None = None
    if eye.sheen:
        # Nerve fibres: a sheen in fine streaks that fan out from the disc and thicken along the arcades.
        streaks = noise(rng, 5, 120, SMOOTH)
        theta = np.arctan2(angle[1], angle[0])
        rows = np.clip(from_disc * 70, 0, SMOOTH - 1).astype(np.intp)
        streaks = streaks[rows, ((theta / (2 * np.pi) + 0.5) * (SMOOTH - 1)).astype(np.intp)]
        fan = np.exp(-(((np.abs(theta) - 1.15) / 0.5) ** 2) - from_disc / 0.45)
        gloss = 0.16 * eye.sheen * fan * (1 + 0.55 * streaks)
        gloss += 0.05 * eye.sheen * np.exp(-(((fovea - 0.16) / 0.035) ** 2))
    if eye.reflex:
        narrow, wide = 0.016**2, 0.016**2 + 2 * (canvas.camera.blur / 256) ** 2  # the blur spreads its light
        spot = 0.22 * eye.reflex * narrow / wide * np.exp(fovea * fovea * (-1 / wide))
        gloss = spot if gloss is None else gloss + spot
    return gloss


class _Spots:
    """A layer where it has anything, which is on few pixels: places in the order of the rows, and how much."""

    def __init__(self, layer: Map) -> None:
        self.size = layer.shape[1]
        self.at = np.flatnonzero(layer)
        self.much = layer.reshape(-1)[self.at]

    def rows(self, rows: slice) -> tuple[Places, Map, Places]:
        """Of those rows: places in them, how much, and places in the smooth maps."""
        first, last = np.searchsorted(self.at, (rows.start * self.size, rows.stop * self.size))
        at = self.at[first:last]
        row, column = np.divmod(at, self.size)
        node = row * SMOOTH // self.size * SMOOTH + column * SMOOTH // self.size
        return at - rows.start * self.size, self.much[first:last], node


def light(canvas: Canvas, rng: Rng) -> Callable[[slice], list[Map]]:
    """What comes back from the eye to the sensor, after the optics.

    Returns what gives for some rows of the photograph red, green and blue, (h S) each, about 0-1.
    """
    eye, camera, size = canvas.eye, canvas.camera, canvas.size
    sigma = camera.blur * size / 512
    for name in ("blood", "melanin", *COVERS):
        canvas.settle(name)
    x, y = canvas.smooth_grid()
    dx, dy = x - eye.disc[0], y - eye.disc[1]
    fovea, from_disc = np.hypot(x - eye.fovea[0], (y - eye.fovea[1]) * 1.08), np.hypot(dx, dy)
    melanin = _pigment(canvas, rng, fovea)
    gloss = _gloss(canvas, rng, from_disc, (dx, dy), fovea)
    glow = illumination(camera) * (1 + 0.10 * np.exp(from_disc * from_disc * -4))
    box, alpha, colours = _disc(canvas, rng, float(glow.flat[int(np.argmin(from_disc))]))
    veil = stray_light(camera, rng)
    clear, stray = 1 - veil, shoulder(veil)
    veil_at_disc, clear_at_disc = enlarge(veil, size, box), enlarge(clear, size, box)
    choroid = grain("choroid", rng, size)

    blood = canvas.layer("blood")
    if "core" in canvas.layers:  # the reflex along a vessel's middle
        blood *= 1 - canvas.layers["core"]
    if sigma > SHARP:
        blood = soften(blood, sigma)
    covers = [
        (_Spots(canvas.layers[name] if canvas.blur else soften(canvas.layers[name], sigma)), rule)
        for name, rule in COVERS.items()
        if name in canvas.layers
    ]
    scars = _Spots(canvas.layers["melanin"]) if "melanin" in canvas.layers else None

    haze = enlarged(stray, size)
    backs, discs, lids, clouds = [], [], [], []
    for c, base in enumerate(camera.base):
        # The veil is before everything, so it is added last. The sensor's shoulder is put to the bare retina under
        # it, which is smooth; what lies on the retina only takes light away. (The shoulder is concave, so the veil's
        # own is never more than that of both.)
        tint = np.float32(camera.veil[c])
        fogged = veil * tint
        bare = np.exp(melanin * np.float32(-MELANIN[c])) * np.float32(base)
        if gloss is not None:
            bare += gloss * np.float32((0.75, 0.9, 0.8)[c])
        bare *= glow
        bare *= clear
        bare += fogged
        backs.append(enlarged(shoulder(bare) - stray * tint, size))
        discs.append(shoulder(colours[c] * clear_at_disc + veil_at_disc * tint))
        lit = glow * clear
        lids.append(
            [
                (shoulder(lit * np.float32(rule[c][0] * base + rule[c][1]) + fogged) - stray * tint).reshape(-1)
                for _, rule in covers
            ]
        )
        if canvas.vitreous is not None:
            clouds.append(enlarged(np.exp(canvas.vitreous * np.float32(-BLOOD * BLOOD_POWERS[c])), size))

    def band(rows: slice) -> list[Map]:
        # All that absorbs as blood does is blurred once, and not in three channels; the choroid's grain is in it.
        if sigma > SHARP:
            absorbing = blood[rows] * np.float32(-BLOOD)
        else:
            above = min(rows.start, 2)
            absorbing = blood[rows.start - above : rows.stop + 2] * np.float32(-BLOOD)
            absorbing = soften(absorbing, sigma)[above : above + rows.stop - rows.start]
        absorbing += choroid[rows] * np.float32(0.018 * BLOOD)
        once = np.exp(absorbing, out=absorbing)
        twice = once * once
        sixfold = twice * twice
        once *= sixfold  # five times
        sixfold *= twice
        fog = haze(rows)
        first, last = max(box[0].start, rows.start), min(box[0].stop, rows.stop)
        in_band = slice(first - rows.start, last - rows.start), box[1]
        in_box = slice(first - box[0].start, last - box[0].start)
        under_scars = scars.rows(rows) if scars is not None else None
        under_lids = [spots.rows(rows) for spots, _ in covers]
        out: list[Map] = []
        for c, passed in enumerate((twice, sixfold, once)):
            back = backs[c](rows)
            tinted = fog * np.float32(camera.veil[c])
            if under_scars is not None:
                at, much, _ = under_scars
                back.reshape(-1)[at] *= np.exp(much * np.float32(-MELANIN[c]))
            if first < last:
                disc = discs[c][in_box] - tinted[in_band]
                disc -= back[in_band]
                disc *= alpha[in_box]
                back[in_band] += disc
            back *= passed
            for (at, much, node), lid in zip(under_lids, lids[c], strict=True):
                under = back.reshape(-1)[at]
                back.reshape(-1)[at] = under + much * (lid[node] - under)
            if clouds:
                back *= clouds[c](rows)
            back += tinted
            out.append(back)
        return out

    return band
