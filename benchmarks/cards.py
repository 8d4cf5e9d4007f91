"""The largest batch that trains by the size of the card, as `fastddr plan` predicts it. No GPU is needed.

    python benchmarks/cards.py
    python benchmarks/cards.py --cards 11 22 --image-sizes 384

Each figure is the most photographs that one card holds at once: weights, moments, gradients, activations, the batches
on their way, the decoder, and what CUDA takes, with nothing of the card for decoded photographs. `memory.py --cards`
finds the same by training on a GPU whose memory is capped. 0: not even one photograph fits; 8,191: so many, or more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import accounts
import harness
import script

from fastddr.errors import UserError
from fastddr.memory import allowances, planning, questions
from fastddr.memory.allowances import Allowance
from fastddr.memory.predicting import Case, usable

#: By name, the flags of the trainings that are asked about; precision is bf16 where none is named.
TRAININGS = {
    "ConvMixer 512/12": ("--model", "convmixer"),
    "CNN, 4 packages": ("--model", "cnn", "--cnn.blocks", "4"),
    "ResNet, 40 layers": ("--model", "resnet", "--resnet.depth", "40"),
    "ResNet, 40 layers, stem of stride 1, fp32": (
        "--model", "resnet", "--resnet.depth", "40", "--resnet.stem", "stride1", "--precision", "fp32"),
    "ConvNeXt-T of preset best": ("--preset", "best"),
}  # fmt: skip


@dataclass
class Options(script.Output):
    """Predict the largest batch of cards."""

    cards: tuple[float, ...] = (4, 6, 8, 12, 16, 24, 48, 80)
    """Sizes in GiB."""
    image_sizes: tuple[int, ...] = (256, 512)
    """Sides of the images in pixels."""


def rows_of(name: str, flags: tuple[str, ...], options: Options, allowance: Allowance) -> Iterator[dict[str, Any]]:
    """A row for each size of image and of card.

    Raises:
        UserError: a flag or a size that cannot be.
    """
    for side in options.image_sizes:
        config = questions.configured([*flags, "--image-size", str(side)])
        config = replace(config, loading=replace(config.loading, store="ram"))
        for card in options.cards:
            most = planning.largest(Case(config, 1), usable(card, allowance), allowance)
            yield {
                "name": f"{name}, {side} px, {card:g} GiB", "kind": "predicted", "training": name,
                "image_size": side, "card_gib": card, "precision": config.precision, "median": most, "low": most,
                "high": most, "n": 1, "unit": "photographs", "allowance": allowance.source,
            }  # fmt: skip


def main(options: Options) -> None:
    """Predict, print and write.

    Raises:
        UserError: a size that cannot be.
    """
    if not options.cards or min(options.cards) <= 0 or not options.image_sizes or min(options.image_sizes) < 32:
        raise UserError("--cards are sizes in GiB above 0, --image-sizes sides of 32 px at least; give one of each.")
    harness.begin()
    # Not what a GPU of this machine was calibrated to: the cards are others.
    allowance = allowances.DECLARED
    rows: list[dict[str, Any]] = []
    with harness.writing("cards", rows, options.out, wandb=options.wandb):
        for name, flags in TRAININGS.items():
            if "best" in flags and importlib.util.find_spec("timm") is None:
                harness.say(f"{name}: left out, since timm is not installed; pip install -e '.[timm]'")
                continue
            rows += rows_of(name, flags, options, allowance)
            harness.say(f"{name}: {', '.join(str(row['median']) for row in rows if row['training'] == name)}")
        harness.say(accounts.cards(rows))


if __name__ == "__main__":
    script.run(main, Options)
