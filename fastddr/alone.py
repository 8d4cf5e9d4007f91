"""One Trainer at a time in a process: how many micro batches make a step is Accelerate's for the whole process, and so
is the lock that holds a run's folder. Of several ranks a process has one in its life: at its end they leave each other,
and Accelerate does not let them meet again.
"""

from __future__ import annotations

import sys
import weakref

from accelerate.state import PartialState
from torch import distributed

from fastddr.errors import UserError

#: The Trainer that is open. Weak: one that nobody can close any more is in nobody's way.
_open: weakref.ref[object] | None = None


def check(owner: object = None) -> None:
    """Raise `UserError` where a Trainer is open, but for `owner`."""
    is_open = None if _open is None else _open()
    if is_open is not None and is_open is not owner:
        raise UserError(
            "a Trainer is open in this process, and what Accelerate keeps is of the process: end its `with` block (or "
            "call its close()) first, or do this in a process of its own."
        )


def take(trainer: object, closed: bool = False) -> None:
    """From here on `trainer` is the one that is open.

    Raises:
        UserError: one is, or this one was `closed`; or this process is a worker that imports its parent's script, or
            one of several ranks that have left each other.
    """
    global _open
    if _imports_a_script():
        raise UserError(
            "this Trainer is in a script without a guard, and a process that works for it imports the script and would "
            'train too; write `if __name__ == "__main__":` before what the script does.'
        )
    if closed:
        raise UserError("this Trainer is closed; Trainer(trainer.config) makes a new one, which goes on with its run.")
    if PartialState._shared_state.get("num_processes", 1) > 1 and not distributed.is_initialized():
        raise UserError(
            "of several ranks a process has one Trainer in its life, and this one has had it: its ranks have left each "
            "other; start the command again for the next one."
        )
    check()
    _open = weakref.ref(trainer)


def _imports_a_script() -> bool:
    """Whether this process was spawned and is just importing its parent's script, which is `__main__` after that."""
    script = sys.modules.get("__mp_main__")
    return script is not None and script is not sys.modules["__main__"]


def let_go(trainer: object) -> None:
    """It is closed. Of one that was not open nothing happens."""
    global _open
    if _open is not None and _open() is trainer:
        _open = None
