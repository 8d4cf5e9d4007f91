"""A second process that traces what is probably asked for next, while this one traces what is asked for now.

It is a fork, so it need not import anything, and it has to be forked before this process traces: PyTorch's autograd
does not work in a fork of a process in which it has worked. Where it cannot be, or where it ends early, everything is
traced here, one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection
from typing import Any

Question = tuple[Hashable, ...]
#: At most so many questions are handed over.
_MOST = 256
#: The number of a question that is not handed over.
_HERE = -1


class Second:
    """Answers questions ahead, in a process that begins with the first that is handed to it.

    Each question is answered by whoever takes it first, in `_taken`. One that the other process fails to answer is
    answered here, and fails here as it would have.
    """

    def __init__(self, answer: Callable[..., Any]) -> None:
        """`answer` takes a question as its arguments; what it gives is pickled."""
        self._answer = answer
        self._numbers: dict[Hashable, int] = {}
        self._answers: dict[int, Any] = {}
        self._process: Any = None
        self._late = False

    def expect(self, questions: Sequence[Question]) -> None:
        """Hand over questions in the order in which they will be asked; what was handed over before is left out.

        The other process leaves the first one here, where it is asked for at once, and takes every second before the
        rest: so neither waits for the other.
        """
        new = [question for question in dict.fromkeys(questions) if question not in self._numbers]
        over = new[1::2] + new[2::2]
        if not over or (self._process is None and not self._begun()):
            return
        self._numbers[new[0]] = _HERE
        for question in over:
            number = sum(number != _HERE for number in self._numbers.values())
            if number < _MOST:
                self._numbers[question] = number
                try:
                    self._pipe.send((number, question))
                except OSError:
                    return  # it has ended: all is answered here

    def answered(self, question: Question) -> Any | None:
        """The answer to a question; None if it has to be answered here."""
        number = self._numbers.get(question, _HERE)
        if number == _HERE or _take(self._taken, number):
            # From now on it is too late to fork.
            self._late = True
            return None
        try:
            while number not in self._answers:
                found, answer = self._pipe.recv()
                self._answers[found] = answer
        except (EOFError, OSError):
            return None
        return self._answers[number]

    def close(self) -> None:
        """End the other process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()

    def _begun(self) -> bool:
        if self._late or not possible():
            return False
        context = multiprocessing.get_context("fork")
        self._taken: Any = context.Array("b", _MOST)
        self._pipe, other = context.Pipe()
        arguments = (other, self._pipe, self._taken, self._answer)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        return True


def possible() -> bool:
    """Whether a second process helps and can be forked: a core for it, no other thread that might hold a lock."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and threading.active_count() == 1


def _take(taken: Any, number: int) -> bool:
    with taken.get_lock():
        free = not taken[number]
        taken[number] = 1
    return free


def _serve(pipe: Connection, other: Connection, taken: Any, answer: Callable[..., Any]) -> None:
    # The first process's end: as long as it is open here, its end would not be noticed.
    other.close()
    while True:
        try:
            number, question = pipe.recv()
            if _take(taken, number):
                pipe.send((number, _attempt(answer, question)))
        except (EOFError, OSError):
            return


def _attempt(answer: Callable[..., Any], question: Question) -> Any | None:
    try:
        return answer(*question)
    # Whatever it is, the first process meets it as well, and says it.
    except Exception:  # noqa: BLE001
        return None
