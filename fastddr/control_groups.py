"""Limits of the control groups that a process is in: SLURM's, and those of a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def groups(controller: str, root: Path = ROOT, own: Path = OWN) -> Iterator[tuple[Path, int]]:
    """The folder of each group that limits this process by a controller, its own and those above it; and the version.

    In a container the group's path may be one that only the host can see; the root is then the container's group.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = root, 2
        elif controller in controllers.split(","):
            base, version = root / controller, 1
        else:
            continue
        group = base / path.lstrip("/")
        for place in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            yield place, version


def cpus(root: Path = ROOT, own: Path = OWN) -> float | None:
    """How many cores' time this process may take (`docker run --cpus`); None without a limit."""
    found = []
    for group, version in groups("cpu", root, own):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            quota, period = " ".join((group / name).read_text(encoding="ascii") for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            found.append(int(quota) / int(period))
    return min(found, default=None)
