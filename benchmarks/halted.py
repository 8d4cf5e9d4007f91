"""An object in a process group of its own, which is halted while it is not asked.

So memory and processor time are its own, it does not work ahead on the cores of another, and several can take turns
within one run.
"""

from __future__ import annotations

import glob
import multiprocessing
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import harness
import psutil

from fastddr.data import cache
from fastddr.errors import UserError


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    os.setpgid(0, 0)
    # A store that is kept between runs would be found full by the next benchmark.
    os.environ["FASTDDR_CACHE"] = folder
    harness.end_with_parent()  # a halted process would outlive it for ever
    # Ctrl-C is for the parent, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        made = make(*arguments)
    # Whatever it is: the others' figures must not be lost with it.
    except Exception as error:  # noqa: BLE001
        pipe.send(_told(error))
        return
    pipe.send(None)
    try:
        while (question := pipe.recv()) is not None:
            name, given = question
            try:
                pipe.send(getattr(made, name)(*given))
            except Exception as error:  # noqa: BLE001  # as above
                pipe.send(_told(error))
    except EOFError:
        return
    made.close()


def _told(error: Exception) -> UserError:
    """An error as one that can be sent to another process, and be said there."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error, ImportError):  # what is not installed is no fault
        traceback.print_exc()
    return UserError(f"{type(error).__name__}: {' '.join(str(error).split())}")


def own_cache() -> str:
    """A new folder in the user's cache, for whoever keeps photographs there. Those of killed benchmarks are removed."""
    parent = cache.folder()
    parent.mkdir(parents=True, exist_ok=True)
    # Machines may share the folder, and only this one's processes are known here.
    host = platform.node() or "here"
    for folder in parent.glob(f"benchmark-*-{glob.escape(host)}-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"benchmark-{os.getpid()}-{host}-", dir=parent)


class Halted:
    """What `make(*arguments)` gives, an object with a method `close`, in a process that is halted between questions.

    Raises:
        UserError: it cannot be made; why, in a sentence.
    """

    def __init__(self, label: str, make: Callable[..., Any], *arguments: Any) -> None:
        self.label = label
        self.memory = 0
        """Bytes, as `harness.memory`: the most that `watched` has seen."""
        # A fresh interpreter: a forked one would have this one's threads and CUDA context by halves.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._folder = own_cache()
        self._process = context.Process(target=_serve, args=(other, make, arguments, self._folder), name=label)
        self._process.start()
        other.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of {self.label} has died ({self._process.exitcode})") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def ask(self, question: str, *arguments: object) -> Any:
        """Let it go on, and answer by its method of this name; then halt it, also where it fails or this is stopped."""
        self._signal(signal.SIGCONT)
        try:
            self._pipe.send((question, arguments))
            return self._receive()
        except OSError:  # it was ended, or is closed
            raise RuntimeError(f"the process of {self.label} is not there any more") from None
        finally:
            self._signal(signal.SIGSTOP)

    @contextmanager
    def watched(self) -> Generator[None, None, None]:
        """Looks at its memory again and again: for a warm-up, not while a speed is measured."""
        done = threading.Event()

        def look() -> None:
            pause = 0.1
            while not done.wait(pause):
                began = time.perf_counter()
                if self._process.pid is not None:
                    self.memory = max(self.memory, harness.memory(self._process.pid))
                # Linux walks all pages for it, which takes its time where there are gigabytes.
                pause = max(0.1, 20 * (time.perf_counter() - began))

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield
        finally:
            done.set()
            looking.join()
        # Halted, but all there.
        self.memory = max(self.memory, harness.memory(self._process.pid or 0))

    def close(self) -> None:
        """End the object, its workers and its process; at once, where this is interrupted."""
        try:
            self._signal(signal.SIGCONT)
            with suppress(OSError):
                self._pipe.send(None)
            self._process.join(10)
        finally:
            if self._process.is_alive():
                self._signal(signal.SIGKILL)
                # Without its group yet, it has begun nothing else.
                self._process.kill()
                self._process.join()
            self._pipe.close()
            shutil.rmtree(self._folder, ignore_errors=True)


def close_all(objects: Iterable[Any]) -> None:
    """Close each, also where it fails for another or is interrupted: Python waits at its end for a halted process."""
    with ExitStack() as closing:
        for each in objects:
            closing.callback(each.close)
