"""What no trace can see: the CUDA context, workspaces of cuBLAS and cuDNN, the decoder, and what others keep.

Declared below until `fastddr plan --calibrate` has measured a card; its figures then lie in the user's cache. Figures
of another card are never taken.
"""

from __future__ import annotations

import gc
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from fastddr.data import cache
from fastddr.errors import UserError
from fastddr.loaders.dali_decoder import SCRATCH

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Allowance:
    """Bytes of a card that are not the step's own."""

    context: int
    """CUDA's context and the code of the libraries."""
    workspaces: int
    """What cuBLAS keeps, and what a convolution takes while it runs."""
    decoder: int
    """Scratch of DALI's decoder on the card."""
    share: float
    """Part of the card that is left free: a display, other programs, and the error of all this."""
    source: str
    """Where the figures come from."""


#: Not measured: guesses on the safe side. cuBLAS alone takes 8 MiB, on Hopper 32 MiB (PyTorch's defaults); training and
#: validation have a pipeline each, whose threads have their scratch.
DECLARED = Allowance(
    context=640 * MIB,
    workspaces=256 * MIB,
    decoder=2 * SCRATCH + 128 * MIB,
    share=0.03,
    source="declared, not measured on this card",
)


def _file(card: str) -> Path:
    return cache.folder() / "memory" / "cards" / f"{re.sub(r'[^a-z0-9]+', '-', card.lower())}.json"


def load(card: str | None) -> Allowance:
    """What was measured on the card of this name, else what is declared."""
    if card is None:
        return DECLARED
    try:
        return Allowance(**json.loads(_file(card).read_text(encoding="utf-8")))
    except (FileNotFoundError, PermissionError):  # of another user: no reason to train less
        return DECLARED
    except (OSError, ValueError, TypeError):
        raise UserError(f"{_file(card)} cannot be read; remove it, and run `fastddr plan --calibrate` again.") from None


def store(card: str, allowance: Allowance) -> Path:
    """Keep what was measured on a card, and return where."""
    path = _file(card)
    cache.keep(path, json.dumps(asdict(allowance), indent=1) + "\n")
    return path


def calibrate() -> tuple[Allowance, Path]:
    """Measure the allowance of this machine's first GPU, keep it, and return where. Nobody else may use the card.

    Three small models take three real steps each. What PyTorch's allocator held beyond their tapes are workspaces; what
    the driver says is used beyond what the allocator reserved is the context, with whatever else is on the card.

    Raises:
        UserError: there is no GPU, or one that PyTorch is not built for.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("--calibrate measures a GPU, and PyTorch sees none here; without it declared allowances count.")
    from fastddr import models, runtime
    from fastddr.memory.tracing import Steps, Training, trace

    device = torch.device("cuda", 0)
    capability, card = runtime.card_of(device)
    half, _ = runtime.choose_precision("auto", "", capability, card)
    runtime.numerics(False, cpu=False)
    beyond = context = 0
    for name in models.names():
        for precision in dict.fromkeys(("fp32", half)):
            steps = Steps(256, precision=precision)

            def make(name: str = name) -> torch.nn.Module:
                return models.build(name, num_classes=5, image_size=256)

            gc.collect()  # a model in half precision is freed by nothing else
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            training = Training(make().to(device), steps, 16)
            # In the first step cuDNN tries algorithms with all the memory that it gets; training goes on without it.
            training.step(0)
            torch.cuda.reset_peak_memory_stats(device)
            for number in range(1, 3):
                training.step(number)
            torch.cuda.synchronize(device)
            beyond = max(beyond, torch.cuda.max_memory_allocated(device) - before - trace(make, steps).peak(16).held)
            free, total = torch.cuda.mem_get_info(device)
            context = max(context, total - free - torch.cuda.memory_reserved(device))
            del training
    found = Allowance(context, max(beyond, 0), DECLARED.decoder, DECLARED.share, f"calibrated on {card}")
    return found, store(card, found)
