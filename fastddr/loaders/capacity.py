"""How much memory is free, measured, and how much of it decoded photographs may take."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fastddr import control_groups
from fastddr.data.cache import folder
from fastddr.loaders.base import Task

Where = Literal["vram", "ram", "mmap"]

#: Share of what is free that may be taken. The model needs most of a GPU; page cache and others the rest of RAM.
SHARES: dict[Where, float] = {"vram": 0.25, "ram": 0.5, "mmap": 0.5}
#: Share of a GPU's free memory that stays free, where it is known what training takes of the rest.
_SPARE = 0.03


class Free(NamedTuple):
    """Bytes that are free for this rank. `vram` is 0 without a GPU."""

    vram: int
    ram: int
    """This rank's part of the machine's, or of the container's."""
    mmap: int
    """For a file that all ranks of the machine share: what both its RAM and the cache folder's disk have; 0 where that
    folder cannot be written to."""
    taken: int = 0
    """Of `vram`: what the training itself will take, as far as that is known."""

    def allowed(self, where: Where, budget: int | None) -> int:
        """How many bytes may be taken there."""
        share = int(SHARES[where] * getattr(self, where))
        if where == "vram":
            share = max(0, min(share, int((1 - _SPARE) * self.vram) - self.taken))
        return share if budget is None else min(budget, share)


def measure(device: torch.device, local_ranks: int, taken: int = 0) -> Free:
    """What is free now, on this machine with so many ranks on it; `taken` is what training will take of the card."""
    ram = free_ram()
    disk = _free_disk(folder() / "resident")
    vram = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    # A file larger than the page cache would be read from the disk in every epoch: slower than decoding on many.
    return Free(vram=vram, ram=ram // local_ranks, mmap=min(ram, disk), taken=taken)


def least(found: Sequence[Free]) -> Free:
    """What every rank has, so that all of them choose the same."""
    most = max(free.taken for free in found)
    return Free(*(min(values) for values in zip(*found, strict=True)))._replace(taken=most)


def free_ram() -> int:
    """Bytes of RAM that this process can still get: of the machine, and of its control groups (SLURM, containers)."""
    available = _available()
    if available is None:  # not Linux: what is free is unknown, so half of what there is
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([available, *_in_groups()])


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _in_groups(root: Path = control_groups.ROOT, own: Path = control_groups.OWN) -> list[int]:
    """What the limits of this process's control groups leave, its own and those above it."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    found = (_left(group, *names[version]) for group, version in control_groups.groups("memory", root, own))
    return [left for left in found if left is not None]


def _left(group: Path, limit: str, used: str, dropped: str) -> int | None:
    """What one group's limit leaves, None where it has none; page cache that can be dropped counts as free."""
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        taken = int((group / used).read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").split()
    except OSError:
        return None
    if most == "max":
        return None
    cache = int(stat[stat.index(dropped) + 1]) if dropped in stat else 0
    return max(0, int(most) - taken + cache)


def _free_disk(path: Path) -> int:
    """Bytes that are free for a folder that may not be there yet; 0 where it cannot be made or written to."""
    try:
        while not path.exists():
            path = path.parent
        writable = path.is_dir() and os.access(path, os.W_OK | os.X_OK)
        return shutil.disk_usage(path).free if writable else 0
    except OSError:  # a folder on the way to it that may not be entered, for one
        return 0


def decoding_ms(task: Task, most: int = 8) -> float:
    """What it costs to decode a photograph, in milliseconds of one core, from some of them; 0 if none can be."""
    from fastddr.data.photograph import DAMAGED, upright

    ids = task.ids[:: max(1, len(task.ids) // most)][:most]
    took = []
    for id_ in ids.tolist():
        began = time.perf_counter()
        try:
            upright(task.files[id_])
        except DAMAGED:
            # Whoever loads it says what is wrong with it.
            continue
        took.append(time.perf_counter() - began)
    return 1000 * sorted(took)[len(took) // 2] if took else 0.0
