"""A second process that answers what is probably asked for next, while this one answers what is asked for now.

It is a fork, so it need not import anything. It has to be forked before this process has answered anything: PyTorch's
autograd does not work in a fork of a process in which it has worked, and CUDA in none in which it was begun. Where it
cannot be forked, or where it ends early, everything is answered here, one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
Question = tuple[Hashable, ...]
#: At most so many questions are handed over.
_MOST = 64
#: The number of a question that is not handed over.
_HERE = -1
#: After so many seconds without an answer it is given up.
_PATIENCE = 120


class Second:
    """Answers questions ahead, in a process that begins with the first that are handed over.

    Each of them is answered by whoever takes it first, in `_taken`. One that the other process fails to answer is
    answered here, and fails here as it would have.
    """

    #: Whether something was answered in this process, so that it is too late to fork.
    late: ClassVar[bool] = False

    def __init__(self, answer: Callable[..., Any]) -> None:
        """`answer` takes a question as its arguments; what it gives is pickled."""
        self._answer = answer
        self._numbers: dict[Hashable, int] = {}
        self._over = 0
        self._answers: dict[int, Any] = {}
        self._process: Any = None

    def hand_over(self, questions: Sequence[Question]) -> None:
        """Hand over questions in the order in which they will be asked; what was handed over before is left out.

        The other process leaves the first one here, where it is asked for at once, and takes every second before the
        rest: so neither waits for the other.
        """
        new = [question for question in dict.fromkeys(questions) if question not in self._numbers]
        if not new or (self._process is None and not self._begun()):
            return
        self._numbers[new[0]] = _HERE
        for question in (new[1::2] + new[2::2])[: _MOST - self._over]:
            self._numbers[question] = self._over
            try:
                self._pipe.send((self._over, question))
            except OSError:
                return  # it has ended: all is answered here
            self._over += 1

    def answered(self, question: Question) -> Any | None:
        """The answer to a question; None if it has to be answered here."""
        number = self._numbers.get(question, _HERE)
        if number == _HERE or _take(self._taken, number):
            Second.late = True
            return None
        try:
            while number not in self._answers and self._pipe.poll(_PATIENCE):
                found, answer = self._pipe.recv()
                self._answers[found] = answer
        except (EOFError, OSError):
            pass  # it has ended
        if number not in self._answers:
            self._process.kill()
        return self._answers.get(number)

    def close(self) -> None:
        """End the other process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()

    def _begun(self) -> bool:
        if not possible():
            return False
        context = multiprocessing.get_context("fork")
        try:
            self._taken: Any = context.Array("b", _MOST)
            self._pipe, other = context.Pipe()
            arguments = (other, self._pipe, self._taken, self._answer)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
        except OSError:  # no memory, no further process, no place for what is shared
            Second.late = True
            return False
        self._process = process
        other.close()
        return True


def apart(answer: Callable[[], T]) -> T:
    """An answer from a process that ends with it: what is begun for it, such as CUDA, would keep this one from forking.

    Where there can be no other process it is given here.
    """
    if not possible():
        return answer()
    context = multiprocessing.get_context("fork")
    try:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(send, answer))
        process.start()
    except OSError:  # no memory, or no further process
        return answer()
    send.close()
    try:
        found: T = receive.recv()
    except EOFError:  # it has ended
        found = answer()
    process.join()
    return found


def _send(pipe: Connection, answer: Callable[[], Any]) -> None:
    pipe.send(answer())


def possible() -> bool:
    """Whether a second process helps and can be forked: a core for it, and no other thread that might hold a lock."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    torch = sys.modules.get("torch")  # who has not imported it has not begun CUDA
    begun = torch is not None and torch.cuda.is_initialized()
    return cores > 1 and threading.active_count() == 1 and not (Second.late or begun)


def _take(taken: Any, number: int) -> bool:
    with taken.get_lock():
        free = not taken[number]
        taken[number] = 1
    return free


def _serve(pipe: Connection, other: Connection, taken: Any, answer: Callable[..., Any]) -> None:
    # Ctrl-C is for the first process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The first process's end: as long as it is open here, its end would not be noticed.
    other.close()
    with suppress(EOFError, OSError):
        while True:
            number, question = pipe.recv()
            if _take(taken, number):
                pipe.send((number, _attempt(answer, question)))


def _attempt(answer: Callable[..., Any], question: Question) -> Any | None:
    try:
        return answer(*question)
    # Whatever it is, the first process meets it as well, and says it.
    except Exception:  # noqa: BLE001
        return None
