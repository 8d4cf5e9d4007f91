"""How every script of this folder begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro

from fastddr.errors import UserError

Options = TypeVar("Options")


@dataclass
class Output:
    """Where the figures go: the first options of every script that measures."""

    out: Path | None = None
    """The JSON; by default results/NAME_HARDWARE_DATE.json."""
    wandb: bool = False
    """Also keep the figures as a W&B run of job type `benchmark`."""


def run(main: Callable[[Options], int | None], options: type[Options]) -> NoReturn:
    """`main` with what the command line says; ends with its exit code, or 1 and a sentence for a user's mistake."""
    try:
        sys.exit(main(tyro.cli(options)))
    except UserError as mistake:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {mistake}") from None


def named(flag: str, text: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """`NAME[:OPTION[,OPTION]]` as the name and its options; of one that is a word alone the value is empty.

    Raises:
        UserError: there is no such name.
    """
    name, _, rest = text.partition(":")
    if name not in known:
        raise UserError(f"{flag} {text}: known are {', '.join(known)}.")
    pairs = (option.partition("=") for option in rest.split(",") if option)
    return name, {key: value for key, _, value in pairs}
