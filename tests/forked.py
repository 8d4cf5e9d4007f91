"""Ranks as forks of one process that has imported everything: to launch them takes far longer than what they do.

    python tests/forked.py 2 SCRIPT ...      or -m MODULE ...

The first argument is the number of ranks; several, as in `1,2`, run one after the other. `{ranks}` in an argument
becomes their number. The exit code is the first that is not 0.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys

from fastddr import ranks, trainer  # noqa: F401  # the forks have what this imports


def run(arguments: list[str]) -> None:
    """A script or a module, as Python would run it."""
    module = arguments[0] == "-m"
    sys.modules.pop("__mp_main__", None)  # this file, which a process that somebody spawned would have
    sys.argv = arguments[1:] if module else arguments
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> int:
    codes = []
    for world in map(int, sys.argv[1].split(",")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for number in range(world):
            children.append(os.fork())
            if children[-1] == 0:
                many = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
                os.environ.update({name: str(value) for name, value in many.items()} if world > 1 else {})
                os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # as the launcher does, at which:
                ranks.die_with_parent()
                run([argument.replace("{ranks}", str(world)) for argument in sys.argv[2:]])
                return 0
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
