"""How much memory is free, measured, and how much of it decoded photographs may take."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
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


def measure(device: torch.device, local_ranks: int, taken: int = 0, kept: int = 0) -> Free:
    """What is free now, on this machine with so many ranks on it.

    `taken`: bytes of the card that training will take; `kept`: bytes that files of the photographs take on the disk
    from an earlier start (`stores.on_disk`).
    """
    ram = free_ram()
    # Else the file of a run that filled its disk would have no room for itself when the run goes on.
    place = folder() / "resident"
    disk = _free_disk(place, kept)
    vram = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    # A file larger than the page cache would be read from the disk in every epoch: slower than decoding on many.
    cached = ram + kept if _in_memory(place) else ram
    return Free(vram=vram, ram=ram // local_ranks, mmap=min(cached, disk), taken=taken)


def least(found: Sequence[Free]) -> Free:
    """What every rank has, so that all of them choose the same."""
    most = max(free.taken for free in found)
    return Free(*(min(values) for values in zip(*found, strict=True)))._replace(taken=most)


def free_ram() -> int:
    """Bytes of RAM that this process can still get: of the machine, and of its control groups (SLURM, containers)."""
    return min([psutil.virtual_memory().available, *_in_groups()])


def _in_groups(root: Path = control_groups.ROOT, own: Path = control_groups.OWN) -> list[int]:
    """What the limits of this process's control groups leave, its own and those above it."""
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
    found = (_left(group, *names[version]) for group, version in control_groups.groups("memory", root, own))
    return [left for left in found if left is not None]


#: Of a group's page cache, what the kernel drops before it refuses memory, also where it was read more than once; and
#: what of it has to be written first. Version 1 tells of the groups below in lines that begin with `total_`.
_DROPPED, _UNWRITTEN = ("inactive_file", "active_file"), ("file_dirty", "file_writeback", "dirty", "writeback")


def _left(group: Path, limit: str, used: str) -> int | None:
    """What one group's limit leaves, None where it has none; page cache that can be dropped counts as free."""
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        taken = int((group / used).read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if most == "max":
        return None
    stat = dict(line.split(maxsplit=1) for line in lines)
    prefix = "total_" if limit == "memory.limit_in_bytes" else ""
    dropped, unwritten = (sum(int(stat.get(prefix + name, 0)) for name in names) for names in (_DROPPED, _UNWRITTEN))
    return max(0, int(most) - taken + max(0, dropped - unwritten))


def _free_disk(path: Path, kept: int) -> int:
    """Bytes free for a folder that may not be there yet, and those kept in it; 0 where it cannot be made or written."""
    try:
        while not path.exists():
            path = path.parent
        writable = path.is_dir() and os.access(path, os.W_OK | os.X_OK)
        return shutil.disk_usage(path).free + kept if writable else 0
    except OSError:  # a folder on the way to it that may not be entered, for one
        return 0


def _in_memory(path: Path) -> bool:
    """Whether files there are themselves memory, which is then not free: elsewhere it is page cache, which is."""
    kinds = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    place = Path(os.path.realpath(path))
    return next((kinds[str(at)] for at in (place, *place.parents) if str(at) in kinds), "") in ("tmpfs", "ramfs")


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
