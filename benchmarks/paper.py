"""Scaling on paper: step time, gradients, photographs and storage of 8 to 1,024 GPUs, from published figures.

Nothing here is measured. A step takes as long as its arithmetic or its memory traffic at the card's limits, whichever
is longer, so it is shorter than any real one, and communication and storage look worse than they will be. An all-reduce
takes the ring's 2 (n-1)/n times the gradient's bytes at the slowest link on its way, plus a latency for each doubling
of the machines, and is counted as if nothing of it overlapped with the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flops import Mixer

#: NVIDIA's H100 SXM data sheet (2023): bf16 without sparsity, HBM3, and NVLink in one of its two directions.
FLOP_PER_SECOND, MEMORY_BYTES_PER_SECOND, NVLINK_BYTES_PER_SECOND = 989e12, 3.35e12, 450e9
GPUS_A_MACHINE = 8
#: Bytes a second of a machine's network: a DGX H100's eight 400 Gbit/s InfiniBand ports, or one port of Ethernet.
NETWORKS = {"8 × 400 Gbit/s InfiniBand": 8 * 400e9 / 8, "100 Gbit/s Ethernet": 100e9 / 8}
#: Seconds that one more doubling of the machines costs; assumed, and generous for either network.
LATENCY = {"8 × 400 Gbit/s InfiniBand": 10e-6, "100 Gbit/s Ethernet": 50e-6}
#: Photographs: EyePACS's training and test sets (Kaggle, 2015: 35,126 and 53,576), and sets that nobody has published.
SETS = {"EyePACS": 88_702, "one million": 1_000_000, "ten millions": 10_000_000}
#: A photograph's bytes: a 512 px master as JPEG (assumed), and decoded.
JPEG_BYTES, PIXEL_BYTES = 100_000, 3 * 512 * 512
#: Bytes a second that one machine reads from shared storage: a 100 Gbit/s port.
STORAGE_BYTES_PER_SECOND = 100e9 / 8
GPUS = (8, 16, 64, 256, 1024)
BATCH, IMAGE_SIZE = 64, 256


@dataclass(frozen=True)
class Network:
    """A model, by what its step costs."""

    name: str
    mixer: Mixer

    @property
    def parameters(self) -> int:
        """Of patches, layers and head, with their biases and norms; five grades."""
        m = self.mixer
        patches = 3 * m.patch**2 * m.dim + 3 * m.dim
        layer = (m.kernel**2 * m.dim + 3 * m.dim) + (m.dim**2 + 3 * m.dim)
        return patches + m.depth * layer + 5 * m.dim + 5

    def step(self, batch: int) -> float:
        """Seconds of a compiled bf16 step on one card, at its limits."""
        flop = batch * self.mixer.training(IMAGE_SIZE) / FLOP_PER_SECOND
        moved = batch * self.mixer.moved(IMAGE_SIZE, 2, compiled=True) / MEMORY_BYTES_PER_SECOND
        return max(flop, moved)

    def all_reduce(self, gpus: int, network: str) -> float:
        """Seconds that float32 gradients take to be summed over so many cards."""
        link = NVLINK_BYTES_PER_SECOND
        machines = -(-gpus // GPUS_A_MACHINE)
        if machines > 1:
            # Rings through all cards of a machine share its network.
            link = min(link, NETWORKS[network])
        latency = LATENCY[network] * math.ceil(math.log2(machines)) if machines > 1 else 0.0
        return 2 * (gpus - 1) / gpus * 4 * self.parameters / link + latency


MODELS = (
    Network("ConvMixer 512/12 k9 p8", Mixer(512, 12, 9, 8)),
    Network("ConvMixer 768/32 k7 p7", Mixer(768, 32, 7, 7)),
)


def rows() -> list[dict[str, Any]]:
    """Everything that the page says, a row a figure."""
    made: list[dict[str, Any]] = []

    def row(kind: str, name: str, value: float, unit: str, **more: Any) -> None:
        figures = {"median": value, "low": value, "high": value}
        made.append({"name": name, "kind": f"paper {kind}", **more, **figures, "unit": unit, "n": 1})

    for model in MODELS:
        row("model", f"{model.name}: parameters", model.parameters / 1e6, "million", model=model.name)
        row("model", f"{model.name}: gradients", 4 * model.parameters / 1e6, "MB", model=model.name)
        row("model", f"{model.name}: a step", 1e3 * model.step(BATCH), "ms", model=model.name, batch_size=BATCH)
        for network in NETWORKS:
            for gpus in GPUS:
                about = {"model": model.name, "gpus": gpus, "network": network, "batch_size": BATCH * gpus}
                step, reduced = model.step(BATCH), model.all_reduce(gpus, network)
                row("all-reduce", f"{model.name}, {gpus} GPUs, {network}", 1e3 * reduced, "ms", **about)
                efficiency = step / (step + reduced)
                row("weak", f"{model.name}, {gpus} GPUs, {network}", efficiency, "of linear", **about)
                # Strong scaling: a global batch of 1,024, as long as every card has a photograph.
                own = 1024 / gpus
                step = model.step(1) * own
                about["batch_size"] = 1024
                row("strong", f"{model.name}, {gpus} GPUs, {network}", step / (step + reduced), "of linear", **about)
    for gpus in GPUS:
        machines = -(-gpus // GPUS_A_MACHINE)
        for model in MODELS:
            wanted = gpus * BATCH / model.step(BATCH)
            about = {"model": model.name, "gpus": gpus}
            row("photographs", f"{model.name}, {gpus} GPUs", wanted, "images/s", **about)
            read = wanted * JPEG_BYTES / machines
            row("storage", f"{model.name}, {gpus} GPUs", read / 1e9, "GB/s a machine", **about)
    for name, photographs in SETS.items():
        about = {"photographs": photographs}
        row("set", f"{name}: JPEGs", photographs * JPEG_BYTES / 1e9, "GB", **about)
        row("set", f"{name}: decoded", photographs * PIXEL_BYTES / 1e9, "GB", **about)
        for gpus in GPUS:
            steps = photographs / (BATCH * gpus)
            row("steps", f"{name}, {gpus} GPUs", steps, "steps an epoch", gpus=gpus, **about)
    return made
