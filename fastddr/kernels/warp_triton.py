"""The Triton kernel of `fastddr.kernels.warp`; imported only where it runs."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a kernel's arguments, so types do not stand there.

from typing import no_type_check

import triton
import triton.language as tl

# `no_type_check`, as jaxtyping's checks of shapes, which tests switch on, wrap every function of the package: Triton
# would then see the wrapper's names and not `tl`.


@triton.jit
@no_type_check
def _tap(photograph, x, y, width, height, weight, inside):
    """The three channels of one of the four neighbours, times its weight; black outside of the photograph."""
    there = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = photograph + (y * width + x) * 3
    red = tl.load(place, mask=there, other=0).to(tl.float32)
    green = tl.load(place + 1, mask=there, other=0).to(tl.float32)
    blue = tl.load(place + 2, mask=there, other=0).to(tl.float32)
    return red * weight, green * weight, blue * weight


@triton.jit
@no_type_check
def warp_kernel(pixels, offset, size, inverse, colour, images, image_size, BLOCK: tl.constexpr):
    """One program makes BLOCK pixels of one image: all three channels, since the colour map mixes them."""
    sample = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < image_size * image_size
    u = (pixel % image_size).to(tl.float32) + 0.5
    v = (pixel // image_size).to(tl.float32) + 0.5

    width = tl.load(size + sample * 2)
    height = tl.load(size + sample * 2 + 1)
    photograph = pixels + tl.load(offset + sample)
    back = inverse + sample * 6
    x = tl.load(back) * u + tl.load(back + 1) * v + tl.load(back + 2) - 0.5
    y = tl.load(back + 3) * u + tl.load(back + 4) * v + tl.load(back + 5) - 0.5
    left, top = tl.floor(x), tl.floor(y)
    right_part, lower_part = x - left, y - top
    x0, y0 = left.to(tl.int32), top.to(tl.int32)

    r0, g0, b0 = _tap(photograph, x0, y0, width, height, (1 - right_part) * (1 - lower_part), inside)
    r1, g1, b1 = _tap(photograph, x0 + 1, y0, width, height, right_part * (1 - lower_part), inside)
    r2, g2, b2 = _tap(photograph, x0, y0 + 1, width, height, (1 - right_part) * lower_part, inside)
    r3, g3, b3 = _tap(photograph, x0 + 1, y0 + 1, width, height, right_part * lower_part, inside)
    red, green, blue = r0 + r1 + r2 + r3, g0 + g1 + g2 + g3, b0 + b1 + b2 + b3

    # 64 bits: a batch may be longer than 2^31 values.
    out = images + (sample.to(tl.int64) * image_size * image_size + pixel) * 3
    mix = colour + sample * 12
    for channel in tl.static_range(3):
        value = tl.load(mix + channel * 4) * red
        value += tl.load(mix + channel * 4 + 1) * green
        value += tl.load(mix + channel * 4 + 2) * blue
        value += tl.load(mix + channel * 4 + 3)
        tl.store(out + channel, value.to(images.dtype.element_ty), mask=inside)
