"""A part of the work in every process that a rank may have, or in its threads."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from fastddr import ranks
from fastddr.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

#: Jobs that threads are given ahead: as many as keep them busy beside a slow one, for each weighs more than a kilobyte.
AHEAD = 1024
#: Threads that ask the disk at once.
_ASKING = 16


def threaded(
    pool: ThreadPoolExecutor, do: Callable[[T], R], jobs: Iterable[T], ahead: int = AHEAD
) -> Generator[R, None, None]:
    """What `do` makes of each job, in the order of the jobs, as `pool.map`, which takes all of them at once."""
    waiting: deque[Future[R]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(do, job))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def asked(do: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    """What `do` makes of each job that is no more than a question to the disk: on a slow one each waits for it."""
    with ThreadPoolExecutor(_ASKING) as pool:
        return list(threaded(pool, do, jobs))


@contextmanager
def each(do: Callable[[T], R], jobs: Sequence[T], workers: int, *, lost: str) -> Iterator[Iterator[R]]:
    """What `do` makes of each job, in the order of the jobs, each as soon as it is there.

    Args:
        do: of a module, so that another process finds it.
        jobs: what it is given, one by one.
        workers: processes; 1 = none but this one.
        lost: one of these processes, as the error names it where it has ended.

    Raises:
        UserError: one has.
    """
    if workers == 1:
        yield map(do, jobs)
        return
    # Spawned, not forked: the caller may hold CUDA and threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield pool.map(do, jobs, chunksize=max(1, min(8, -(-len(jobs) // workers))))
    except BrokenProcessPool:
        raise UserError(
            f"{lost} was killed, as happens when memory runs out, or did not begin, as in a script that works without "
            '`if __name__ == "__main__":`, which each process imports; mend that, and run again.'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Let no worker outlive a parent that was killed, and none answer the Ctrl-C that is meant for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ranks.end_with_parent()
