"""The models that the 2022 report trained, one after the other, and what it says of them.

`ARMS` are in its order. Settings that it leaves out are those of the presets, whose headers say which are assumptions;
of the tuned ConvMixer it says that batch size and crop were chosen on valid, and not what they became.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastddr.data.grades import DDR, UNGRADABLE
from fastddr.runs import RunFolder


@dataclass(frozen=True)
class Arm:
    """A model of the report."""

    key: str
    """Name of its run's folder."""
    family: str
    """Its panel in the picture of the curves."""
    name: str
    preset: str
    flags: tuple[str, ...] = ()
    pretrained: bool = False
    """Whether it begins at pretrained weights."""
    tuned: bool = False
    published: dict[str, float] = field(default_factory=dict)
    """Accuracy of its last epoch by split, in per cent; of DDR."""


ARMS = (
    Arm(
        "cnn-2", "CNN", "CNN, 2 packages", "report-cnn", ("--cnn.blocks", "2"),
        published={"train": 98.0, "test": 52.0},
    ),
    Arm("cnn-4", "CNN", "CNN, 4 packages", "report-cnn", ("--cnn.blocks", "4")),
    Arm("cnn-6", "CNN", "CNN, 6 packages", "report-cnn", ("--cnn.blocks", "6")),
    Arm("resnet-shallow", "ResNet", "ResNet, 18 layers", "report-resnet", ("--resnet.depth", "18")),
    Arm(
        "resnet-40", "ResNet", "ResNet, 40 layers", "report-resnet", ("--resnet.depth", "40"),
        published={"train": 100.0, "test": 60.39},
    ),
    # "About 70 %" before all that follows.
    Arm(
        "convmixer", "ConvMixer", "ConvMixer", "report-convmixer", ("--augment.policy", "none"),
        published={"test": 70.0},
    ),
    Arm("convmixer-augmented", "ConvMixer", "+ augmentation", "report-convmixer"),
    Arm("convmixer-pretrained", "ConvMixer", "+ pretraining", "report-convmixer", pretrained=True),
    Arm(
        "convmixer-tuned", "ConvMixer", "+ tuning", "report-convmixer", pretrained=True, tuned=True,
        published={"train": 93.61, "valid": 83.46, "test": 76.24},
    ),
)  # fmt: skip
#: What the tuned one differs in, unless it is said: our guess, to be replaced by what `ablation.py` finds on valid.
TUNED = ("--batch-size", "32", "--lr", "0.0005", "--optimizer.schedule", "cosine", "--optimizer.warmup-ratio", "0.05")
#: All of it small, for minutes on a CPU.
QUICK = (
    "--image-size", "64", "--canvas", "96", "--batch-size", "16", "--epochs", "2", "--lr", "0.003", "--threads", "1",
    "--synthetic.size", "128", "--synthetic.photographs", "240", "--cnn.width", "8", "--resnet.width", "16",
    "--convmixer.dim", "48", "--convmixer.depth", "3", "--convmixer.kernel-size", "5", "--convmixer.patch-size", "4",
    "--tracking.no-wandb", "--tracking.no-tensorboard",
)  # fmt: skip
#: Overrides of `ARMS` then: 18 and 40 layers take minutes even so narrow.
QUICK_FLAGS = {
    "resnet-shallow": ("--resnet.depth", "10"),
    "resnet-40": ("--resnet.depth", "18"),
    "convmixer-tuned": ("--batch-size", "16", "--optimizer.schedule", "cosine", "--optimizer.warmup-ratio", "0.1"),
}
QUICK_NAMES = {"resnet-shallow": "ResNet, 10 layers", "resnet-40": "ResNet, 18 layers"}


def of(keys: Sequence[str]) -> list[Arm]:
    """The arms of these names, in the report's order; all where there are none."""
    return [arm for arm in ARMS if not keys or arm.key in keys]


def is_whole_ddr(run: Path, data: str) -> bool:
    """Whether a run was made on DDR whole: its numbers of photographs by split and grade, and no synthetic set.

    Only then may the report's figures stand beside ours. The synthetic set can be made with the same numbers; it lists
    its lesions.
    """
    root = Path(data).expanduser()
    if data == "synthetic" or any((root / place / "lesions.csv").exists() for place in (".", "..", "DR_grading")):
        return False
    with RunFolder(run).manifest.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        counts = Counter((row["split"], int(row["grade"])) for row in rows)
    return all(
        counts[split, grade] == count
        for split, counted in DDR.items()
        for grade, count in enumerate(counted[:UNGRADABLE])
    )
