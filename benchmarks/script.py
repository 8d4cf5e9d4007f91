"""How every script of this folder begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro

from fastddr.errors import UserError

Options = TypeVar("Options")


def run(main: Callable[[Options], int | None], options: type[Options]) -> NoReturn:
    """`main` with what the command line says; ends with its exit code, or 1 and a sentence for a user's mistake."""
    try:
        sys.exit(main(tyro.cli(options)))
    except UserError as mistake:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {mistake}") from None
