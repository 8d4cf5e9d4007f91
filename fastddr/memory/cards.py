"""How fast a card can be at most: the roofline of a step, from what its operations compute and move."""

from __future__ import annotations

from typing import NamedTuple

from fastddr.errors import UserError, nearest
from fastddr.memory.tape import Tape


class Card(NamedTuple):
    """A card's limits."""

    device: str
    """What CUDA calls it."""
    memory: float
    """GiB that CUDA gives to programs: less than its name says, which may be GB, and part of which the driver keeps."""
    bandwidth: float
    """Bytes a second."""
    half: float
    """FLOP a second in bf16 or fp16 matrix products, dense."""
    single: float
    """The same in TF32, or in float32 where the card has no TF32."""


#: Memory is what PyTorch tells of such a card ("total capacity of 14.56 GiB"), of what drivers leave the smallest that
#: we know, rounded down. The others are of NVIDIA's data sheets: peaks that no program reaches.
CARDS = {
    "T4": Card("Tesla T4", 14.5, 0.320e12, 65e12, 8.1e12),
    "L4": Card("NVIDIA L4", 21.9, 0.300e12, 121e12, 60e12),
    "RTX 3090": Card("NVIDIA GeForce RTX 3090", 23.5, 0.936e12, 71e12, 35.6e12),
    "RTX 4090": Card("NVIDIA GeForce RTX 4090", 23.5, 1.008e12, 165e12, 82.6e12),
    "L40S": Card("NVIDIA L40S", 44.3, 0.864e12, 362e12, 183e12),
    "A100 80GB": Card("NVIDIA A100-SXM4-80GB", 79.1, 2.039e12, 312e12, 156e12),
    "H100 SXM": Card("NVIDIA H100 80GB HBM3", 79.1, 3.35e12, 989e12, 494e12),
    "H200 SXM": Card("NVIDIA H200", 139.7, 4.8e12, 989e12, 494e12),
}


def known(name: str) -> Card:
    """The card of a name.

    Raises:
        UserError: its limits are not known here.
    """
    found = {key.lower(): card for key, card in CARDS.items()}.get(name.lower())
    if found is None:
        raise UserError(
            f"--card {name}: {nearest(name, CARDS)} Or leave it out and give --vram (GiB), and for images a second "
            "--tbps and --tflops of its data sheet."
        )
    return found


def images_per_second(tape: Tape, micro: int, accumulation: int, bandwidth: float, peak: float) -> float:
    """At most so many: the longer of the times for all FLOP and for all bytes of a step, the update counted in.

    Each operation is taken to read its inputs from memory and to write its results there, as in eager mode. For a
    ConvMixer this comes to nine tenths of the passes that are counted by hand (50 a layer). `bandwidth` is in bytes a
    second, `peak` in FLOP a second.
    """
    flop, moved = tape.cost(micro)
    return micro * accumulation / (accumulation * max(flop / peak, moved / bandwidth))
