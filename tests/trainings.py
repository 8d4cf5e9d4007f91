"""A small training whose memory is predicted, and an allowance of nothing."""

from __future__ import annotations

from typing import Any

from fastddr.config import Config, from_mapping
from fastddr.memory.allowances import Allowance

#: Nothing but the step itself.
NOTHING = Allowance(context=0, workspaces=0, decoder=0, share=0.0, source="none")
#: The smallest training that `fastddr plan` is asked about.
SMALL = ("--preset", "quickstart", "--image-size", "64")


def config(**changes: Any) -> Config:
    """A small ResNet in float32 on a global batch of 24, its photographs in RAM."""
    tree = {"model": "resnet", "resnet": {"depth": 10, "width": 16}, "batch_size": 24, "image_size": 64, "canvas": 64,
            "precision": "fp32", "loading": {"store": "ram"}}  # fmt: skip
    return from_mapping(tree | changes, "test")
