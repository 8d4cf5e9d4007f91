"""Work that is shared among the processes of `accelerate launch`: a part for each, and everything for all.

`fastddr check` and `fastddr prepare` use it, so PyTorch and Accelerate are imported only where there is more than one
process.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def world() -> int:
    """Processes that `accelerate launch` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of the processes of its machine this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores() -> int:
    """Cores that fall to this process of this machine, at least one."""
    return max(1, available_cores() // local_world())


def share(items: Sequence[T]) -> list[T]:
    """This process's part of the items: every `world()`-th, so that neighbours, which cost alike, are spread."""
    return list(items[rank() :: world()])


def gather(items: list[T]) -> list[T]:
    """The items of all processes, rank by rank, on every process."""
    if world() == 1:
        return items
    from accelerate.utils import gather_object

    join()
    found: list[T] = gather_object(items)
    return found


def join() -> None:
    """Join the other processes over the CPU, unless this one has joined them already. Waits for all of them."""
    if world() > 1:
        from accelerate import PartialState

        joined_before = bool(PartialState._shared_state)
        state = PartialState(cpu=True)
        if not joined_before:
            # A process that ends without leaving is aborted now and then, by threads of gloo that still run.
            atexit.register(state.destroy_process_group)
        state.wait_for_everyone()
