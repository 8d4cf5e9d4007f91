"""Which loader, and where decoded photographs are kept: chosen from what is measured, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from fastddr import ranks
from fastddr.data.cache import folder
from fastddr.errors import UserError
from fastddr.kernels.warp import fails
from fastddr.loaders import dali_decoder, stores
from fastddr.loaders.base import StoreName, Task
from fastddr.loaders.capacity import Free, Where, decoding_ms, measure


@dataclass(frozen=True)
class Choice:
    """What `auto` became."""

    loader: str
    store: StoreName
    """Where `resident` keeps photographs; `none` for the other loaders."""
    reason: str


def choose(asked: str, tasks: Sequence[Task], epochs: int, free: Free) -> Choice:
    """The loader that `asked` stands for, a name or `auto`, and the store.

    `tasks`: what is loaded in each of the epochs, training and validation; `free`: of all ranks the least, so that all
    choose alike.

    Raises:
        UserError: two builds of DALI are installed over each other; or a store was asked for that has no room.
    """
    stream, installed = streaming()
    if asked not in ("auto", "resident"):
        return Choice(asked, "none", "--loader asked for it")
    store, fits = _place(tasks, free)
    if asked == "resident":
        if store is None:
            raise UserError(
                f"--loader resident: {fits}; take --loading.store none (the same pixels, decoded in every epoch), or "
                f"for a new run --loader {stream}."
            )
        return Choice("resident", store, f"--loader asked for it; {fits}")
    if epochs == 1:
        return Choice(stream, "none", f"with one epoch nothing is decoded twice; {installed}")
    if store is None:
        return Choice(stream, "none", f"{fits}; {installed}")
    wrong = fails(tasks[0].device) if tasks[0].device.type == "cuda" else None
    if wrong is not None:
        return Choice(stream, "none", f"no resident on this GPU: {wrong}; {installed}")
    cost = decoding_ms(tasks[0])
    return Choice("resident", store, f"{fits}; decoding costs {cost:.1f} ms a photograph, once instead of every epoch")


def settled(asked: str, task: Task) -> Choice:
    """The choice for a task alone, as for many epochs, where every process of the machine has such a one.

    Raises:
        UserError: as `choose`.
    """
    free = measure(task.device, ranks.local_world(), kept=stores.on_disk([task]))
    return choose(asked, [task], epochs=2, free=free)


def streaming() -> tuple[str, str]:
    """The best loader that keeps nothing, and the reason.

    Raises:
        UserError: two builds of DALI are installed over each other.
    """
    if dali_decoder.installed():
        return "dali", "NVIDIA DALI is installed"
    return "torchvision", "NVIDIA DALI, which would be faster, is not installed (Linux only)"


def _place(tasks: Sequence[Task], free: Free) -> tuple[StoreName | None, str]:
    """The first place with room for the tasks' photographs, and the reason; None and the reason where none has."""
    asked, budget = tasks[0].store, tasks[0].budget
    need = sum(stores.place(task).total for task in tasks)
    if asked == "none":
        return "none", "nothing is kept (--loading.store none)"
    wanted: tuple[Where, ...] = (asked,) if asked != "auto" else get_args(Where)
    refused = []
    for where in wanted:
        if where == "vram" and tasks[0].device.type != "cuda":
            if asked == "vram":
                raise UserError("--loading.store vram: there is no GPU; take ram, mmap or auto.")
            continue
        allowed = free.allowed(where, budget)
        if need <= allowed:
            return where, f"{_size(need)} of decoded photographs fit into {where} ({_size(allowed)} allowed)"
        why = ""
        if where == "mmap" and not free.mmap:
            why = f": {folder() / 'resident'} is full or may not be written to"
        refused.append(f"{where} {_size(allowed)}{why}")
    return None, f"{_size(need)} of decoded photographs are more than is allowed ({', '.join(refused)})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
