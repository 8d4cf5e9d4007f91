"""What no loader on this machine can be faster than, measured.

`libjpeg-turbo`: whole photographs decoded from memory by simplejpeg (a thin layer on libjpeg-turbo) in one thread,
times the cores. simplejpeg cannot decode a window; a loader that decodes only the window it needs may pass this line,
so what DALI comes to with reading and decoding windows alone is drawn too (from `stages`).
`copying`: how many images a second the memory could take in and give out, if a batch were nothing but one pass over
its uint8 windows and its float32 result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from timing import Clock

from fastddr.errors import UserError


def decoded(files: Sequence[str], seconds: float, rounds: int) -> list[float]:
    """Whole photographs a second that libjpeg-turbo decodes to RGB in one thread, once a round.

    Its default settings, which are those of PIL, torchvision and DALI: the accurate inverse transform, smooth chroma.

    Raises:
        UserError: one of them is no JPEG that it makes RGB of.
    """
    encoded = [Path(file).read_bytes() for file in files]
    rates, place = [], 0
    for _ in range(rounds + 1):
        count, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            file = place % len(encoded)
            try:
                # What only draws a warning of libjpeg's is no failure in any loader either.
                simplejpeg.decode_jpeg(encoded[file], colorspace="RGB", fastdct=False, fastupsample=False, strict=False)
            except ValueError as problem:
                raise UserError(f"{files[file]} cannot be decoded by libjpeg-turbo ({problem}).") from None
            count, place = count + 1, place + 1
        rates.append(count / took)
    return rates[1:]  # the first one warms up


def copied(device: torch.device, threads: int, rounds: int, megabytes: int = 256) -> list[float]:
    """Bytes a second that pass through memory, read and written ones counted, when a large buffer is copied.

    On a CPU by `threads` threads, from memory to memory; on a GPU within its own.
    """
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    clock, times = Clock(device), 200 if device.type == "cuda" else 4
    before = torch.get_num_threads()
    torch.set_num_threads(max(threads, 1))
    try:
        took = [clock.seconds(lambda: target.copy_(source), times) for _ in range(rounds + 1)]
    finally:
        torch.set_num_threads(before)
    return [2 * len(source) / seconds for seconds in took[1:]]


def bytes_moved(image_size: int, dtype: torch.dtype = torch.float32) -> int:
    """Least bytes that an image costs: its window in uint8 is read, its values are written."""
    return image_size**2 * 3 * (1 + dtype.itemsize)


def spaced(files: Sequence[str], count: int) -> list[str]:
    """So many of the files, evenly from all of them."""
    return [files[place] for place in np.unique(np.linspace(0, len(files) - 1, count).astype(int))]
