"""Work that is shared among the processes of `accelerate launch`: a part for each, and everything for all.

PyTorch and Accelerate, which commands such as `fastddr check` do without, are imported for more than one process alone.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastddr import control_groups, network
from fastddr.errors import UserError, unusable

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

#: How long ranks wait for each other before training, while rank 0 may look at millions of files, and after it, while
#: it writes a report and trackers upload.
PATIENT = timedelta(hours=2)
#: From Linux's <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1
#: Where the ranks of a job look for why another one ended, and whether one has waited in vain.
_REASON, _WAITED = "fastddr/ended/", "fastddr/waited/"
#: Seconds for which a rank waits for that, and for the others to answer a call.
_PATIENCE = 3.0
#: Groups over the CPU, once the ranks have met: for what they say to each other, and for calls and long waits. Two,
#: since a group in which somebody has waited in vain cannot be called.
_talk: Any = None
_roll_call: Any = None
#: Why a rank ends that was asked to and cannot save.
INTERRUPTED = "interrupted"
#: What gloo's errors say, which have no class of their own: of a connection that broke, and of a wait that was long.
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")
_TIMED_OUT = "Timed out"
#: What NCCL's errors say where another rank is why; all others are of this machine.
_NCCL_LOST = (
    "ncclRemoteError", "remote process", "closed by remote peer", "closed by peer", "reset by peer", "aborted",
    "retrieving ncclUniqueId", "Broken pipe", _TIMED_OUT,
)  # fmt: skip


class RankLost(Exception):
    """Another rank of the job has ended or does not answer; the text says which and why, as far as is known."""


def why(error: BaseException) -> str:
    """Why a run ends, in a line: `INTERRUPTED` where this rank or the lost one was asked to end, else the error."""
    lost = isinstance(error, RankLost) and str(error).endswith(f" ended: {INTERRUPTED}")
    if lost or isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return " ".join(f"{type(error).__name__}: {error}".split())


def die_with_parent() -> None:
    """Let SIGTERM reach this process when its launcher dies: `accelerate launch` of one process forwards none."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent() -> None:
    """Let this process, which `multiprocessing` started, not outlive the one that started it: a killed parent's worker
    would wait for work for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def world() -> int:
    """Processes that `accelerate launch` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of the processes of its machine this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def machine() -> int:
    """Which of the job's machines this one is."""
    return int(os.environ.get("GROUP_RANK", "0"))


def available_cores() -> int:
    """Cores that this process may use, by its affinity and by what a container allows of their time."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = control_groups.cpus()
    return number if allowed is None else max(1, min(number, math.ceil(allowed)))


def cores() -> int:
    """Cores that fall to this process of this machine, at least one.

    Accelerate may bind the process to the cores beside its GPU (ACCELERATE_CPU_AFFINITY), which are those of some of
    the machine's processes and not of all; so what is divided is what all of them began with.
    """
    now = available_cores()
    return max(1, min(now, max(now, _cores_at_start) // local_world()))


#: Before anything binds this process to some of them.
_cores_at_start = available_cores()


def share(items: Sequence[T]) -> list[T]:
    """This process's part of the items: every `world()`-th, so that neighbours, which cost alike, are spread."""
    return list(items[rank() :: world()])


def gather(items: list[T]) -> list[T]:
    """The items of all processes, rank by rank, on every process."""
    if world() == 1:
        return items
    import torch.distributed as dist

    everywhere: list[list[T]] = [[]] * world()
    dist.all_gather_object(everywhere, items, group=talk())
    return [item for part in everywhere for item in part]


def tried(do: Callable[[], T]) -> tuple[list[T], str]:
    """What `do` makes, alone in a list; or the sentence of its `UserError`, or `OSError` as one, for other ranks."""
    try:
        return [do()], ""
    except UserError as error:
        return [], str(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and world() == 1:  # nobody listens any more, which is no place
            raise
        return [], unusable(error) or f"{error}; give a place that can be used."


def on_all(do: Callable[[], T]) -> T:
    """What each rank makes of `do`; what a user can mend on one of them is raised on all. Called by all."""
    made, said = tried(do)
    if told := next(filter(None, gather([said])), ""):
        raise UserError(told)
    return made[0]


def from_main(do: Callable[[], T]) -> T:
    """What rank 0 makes of `do`, on every rank, as is what a user can mend there. Called by all."""
    told: list[Any] = [tried(do) if rank() == 0 else None]
    if world() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(told, src=0, group=talk())
    made, said = told[0]
    if said:
        raise UserError(said)
    value: T = made[0]
    return value


def on_main(do: Callable[[], T]) -> T | None:
    """Do something on rank 0 alone, and give what it makes there, None elsewhere; errors as `from_main`."""
    made: list[T] = []
    from_main(lambda: made.append(do()))
    return made[0] if made else None


def main_first(do: Callable[[], T]) -> T:
    """As `on_all`; rank 0 goes first, and the others find what it has downloaded or cached."""
    first = on_main(do)
    return on_all(lambda: cast(T, first) if rank() == 0 else do())


def agree(what: Callable[[], str], otherwise: str) -> None:
    """To be called by all ranks, with what each has of its own and must be the same.

    Raises:
        UserError: on every rank, with the sentence `otherwise`: it is not.
    """
    if world() > 1 and len(set(gather([what()]))) > 1:
        raise UserError(otherwise)


def expect(minutes: float) -> None:
    """From now on a rank that has not entered a collective for so long is taken for frozen; called by all ranks.

    Before that, while data are looked at, one rank may keep the others waiting for longer.
    """
    if world() == 1:
        return
    import torch.distributed as dist

    timeout = timedelta(minutes=minutes)
    # PyTorch 2.11 has it under its former name.
    set_timeout = getattr(dist.distributed_c10d, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    # NCCL ends a process whose wait was too long, so the wait over the CPU in each step must be the shorter one.
    spare = timedelta(0) if dist.get_backend() == "gloo" else timedelta(minutes=1)
    set_timeout(timeout + spare)
    set_timeout(timeout, talk())


def wait() -> None:
    """Wait for the other ranks, one of which may be long at work of its own: it writes a report, or trackers upload.

    Over the CPU, where a rank that ends is noticed at once. Called by all ranks.
    """
    if world() > 1:
        import torch.distributed as dist

        talk()
        dist.barrier(_roll_call)


def tell(reason: str) -> None:
    """Let the other ranks know why this one ends; they may be waiting for it."""
    import torch.distributed as dist

    if world() > 1 and dist.is_initialized():
        _note(_REASON, reason)


def _note(kind: str, text: str) -> None:
    import torch.distributed as dist

    try:
        _store().set(f"{kind}{rank()}", text)
    except (RuntimeError, dist.DistError):
        return  # whoever keeps the store has ended too, and nobody is there to read it


@contextmanager
def watched() -> Iterator[None]:
    """Turn the error of a collective that another rank left or never entered into `RankLost`, in the main part of a
    job. Every other error passes."""
    import torch.distributed as dist

    try:
        yield
    except dist.DistBackendError as error:
        if not any(words in str(error) for words in _NCCL_LOST):
            said = f"NCCL does not work here: {_last_line(error)}; NCCL_DEBUG=INFO says more."
            tell(said)  # to the others it looks as if this rank were lost
            raise RankLost(said) from error
        raise RankLost(_why(error)) from error
    except RuntimeError as error:
        # Before the ranks have met there is nothing to ask.
        if world() == 1 or not _of_ranks(error) or not _met():
            raise
        raise RankLost(_why(error)) from error


def _met() -> bool:
    import torch.distributed as dist

    return dist.is_initialized()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


def _of_ranks(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(part in str(error) for part in (*_BROKEN, _TIMED_OUT))


def _why(error: RuntimeError) -> str:
    if _TIMED_OUT in str(error):
        _note(_WAITED, "")
        # One that has said why it ends does not answer either, while it writes that down.
        return _in_time(_reason) or _too_late()
    ends = time.monotonic() + _PATIENCE
    while time.monotonic() < ends:
        if (found := _in_time(_reason)) is not None:
            return found
        # Who has waited in vain leaves the others, to whom that looks as if it had ended.
        if _in_time(lambda: any(_noted(_WAITED, other) is not None for other in _others())):
            return _too_late()
        time.sleep(0.1)
    return (
        "another rank ended without a word; the launcher's last lines say which, and -9 means that it was killed "
        f"(what was seen of it here: {_last_line(error)})."
    )


def _others() -> Iterator[int]:
    return (other for other in range(world()) if other != rank())


def _reason() -> str | None:
    """Why another rank has ended, if one has said so."""
    told = ((other, _noted(_REASON, other)) for other in _others())
    return next((f"rank {other} ended: {why}" for other, why in told if why is not None), None)


def _in_time(ask: Callable[[], T]) -> T | None:
    """What is answered; None where nothing is: over a network that is cut, one would wait for ever."""
    found: list[T] = []
    asking = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    asking.start()
    asking.join(2 * _PATIENCE)
    return found[0] if found else None


def _noted(kind: str, other: int) -> str | None:
    import torch.distributed as dist

    key = f"{kind}{other}"
    try:
        found: str | None = _store().get(key).decode() if _store().check([key]) else None
    except (RuntimeError, dist.DistError):
        return None  # the store has ended with its keeper
    return found


def _too_late() -> str:
    return (
        f"{_silent()} did not answer in time and may be frozen or cut off; the job ends here, and the same command "
        "with --run-dir goes on from the last checkpoint (--rank-timeout-minutes sets how long to wait)."
    )


def _silent() -> str:
    """Which ranks do not answer a call now; only rank 0 can tell, and none before they have met."""
    import torch.distributed as dist

    if _roll_call is None:
        return "another rank"

    def call() -> list[str]:
        try:
            dist.monitored_barrier(_roll_call, timeout=timedelta(seconds=_PATIENCE), wait_all_ranks=True)
        except RuntimeError as error:
            return re.findall(r"Ranks ([\d, ]+) failed", str(error))
        return []

    found = _in_time(call)  # the timeout is rank 0's alone
    return f"rank {found[0]}" if found else "another rank"


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def leave() -> None:
    """Leave the other processes, where this one has joined them; the last that it does with them."""
    from accelerate import PartialState

    global _talk, _roll_call
    # A process that ends without leaving is aborted now and then, by threads of gloo that still run; those of a group
    # end with the last that holds it.
    _talk = _roll_call = None
    if PartialState._shared_state:
        PartialState().destroy_process_group()


def join(*, cpu: bool) -> PartialState:
    """Meet the other processes, which train on the CPU or on GPUs. Safe to call again.

    Raises:
        UserError: gloo has no way between this machine and another one.
    """
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    global _talk, _roll_call
    with network.meeting(several=world() > local_world()):
        state = PartialState(cpu=cpu, timeout=PATIENT)
        if _met() and _talk is None:
            _talk, _roll_call = (dist.new_group(backend="gloo", timeout=PATIENT) for _ in range(2))
            if dist.get_backend() == "nccl":
                # Tried now, and it takes its part of the card before anybody looks how much is free.
                dist.barrier(device_ids=[torch.cuda.current_device()])
    return state


def talk() -> Any:
    """The group of all ranks over the CPU, for what they say to each other; those that have not joined meet there."""
    if _talk is None:
        join(cpu=True)
        atexit.register(leave)
    return _talk
