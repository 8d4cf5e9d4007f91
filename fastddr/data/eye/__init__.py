"""Eyes that never were: the drawing of one synthetic fundus photograph, from anatomy to JPEG.

The picture is built the way a fundus camera makes one. Light that falls unevenly on the retina comes back
through absorbers (blood in vessels, pigment in choroid and macula), is veiled by haze, and is then changed by
optics, sensor and JPEG. All but the last steps multiply, so dark things stay dark in a bright photograph.

`anatomy` draws the eye, `lesions` its disease on a `canvas`, `retina` the light that comes back from both, `camera`
what is made of that light. Lengths are in field radii, with the origin at the middle of the field and y down, unless
a name ends in `_px`. `S` is the side of the square photograph, `L` = 128 the side of the maps of everything
smooth. No matrix product is taken anywhere, so BLAS starts no threads and its version changes no pixel.

It is quick where it is done at the lowest resolution that shows it: all that is smooth at `L`, vessels and signs as
one map of what absorbs, which alone is blurred, and only their product for each pixel and colour, in bands of rows.
"""
