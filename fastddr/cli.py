"""From a command line to a configuration, or to one sentence about what is wrong with it."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import Any, TypeVar

from fastddr import ranks
from fastddr.config import MODELS, Config, check, flatten, load_preset, preset_names
from fastddr.config.sections import governed, sized
from fastddr.errors import EXIT_USER_ERROR, UserError, nearest, unusable

T = TypeVar("T")


def parse(arguments: Sequence[str], prog: str, *, notes: bool = True) -> Config:
    """The configuration of a command line: its preset, with its flags laid over it.

    `notes`: whether flags without effect are named.

    Raises:
        UserError: one sentence about the flag that is unknown or has a wrong value.
        SystemExit: code 0, after `--help`.
    """
    base = load_preset(_preset_argument(arguments))
    # As in YAML, a policy or a size sets all that it governs, and the other flags lie over it. A wrong name is refused
    # by tyro.
    policy = governed(last_value(arguments, "--augment.policy"))
    size = sized(last_value(arguments, "--convmixer.size"))
    base = replace(base, augment=replace(base.augment, **policy), convmixer=replace(base.convmixer, **size))
    about = f"{Config.__doc__} Presets: {', '.join(preset_names())}."
    config, unknown = known(Config, arguments, prog, default=base, description=about)
    if unknown:
        raise _unknown(unknown[0], ["--" + key.replace("_", "-") for key in flatten(asdict(base))])
    checked = check(config, "command line")
    for flag in dict.fromkeys(argument.partition("=")[0].replace("_", "-") for argument in arguments):
        why = _unused(flag, config)
        if notes and why is not None and ranks.rank() == 0:
            # No error: one command may hold settings for several models, and name another each time.
            sys.stderr.write(f"fastddr: {flag} is not used: it is of {why}\n")
    return checked


def _unused(flag: str, config: Config) -> str | None:
    """Why a flag has no effect beside the other settings: of what it is, and what is set instead; else None."""
    section, _, key = flag.removeprefix("--").partition(".")
    if key and section in MODELS and section != config.model:
        return f"{section}, and the model is {config.model}"
    if section == "synthetic" and config.data != "synthetic":
        return f"the synthetic set, and the data are {config.data}"
    optimizer = config.optimizer.name
    if (flag == "--optimizer.momentum" and optimizer != "sgd") or (flag == "--optimizer.betas" and optimizer == "sgd"):
        return f"{'sgd' if optimizer != 'sgd' else 'adam and adamw'}, and the optimizer is {optimizer}"
    if flag == "--loss.beta" and config.loss.class_weights != "effective":
        return f"the class weights `effective`, and they are `{config.loss.class_weights}`"
    if flag in ("--loading.store", "--loading.store-gib") and config.loader not in ("auto", "resident"):
        return f"the loader resident, and the loader is {config.loader}"
    if flag == "--loading.regions" and config.loader in ("resident", "torchvision"):
        return f"the loader dali, and the loader is {config.loader}"
    if flag == "--loading.jpeg-engines" and config.loader == "torchvision":
        return "the loaders dali and resident, and the loader is torchvision"
    return None


def flags(make: Callable[..., T], arguments: Sequence[str], prog: str) -> T:
    """What a verb is asked: a dataclass `make`, from its command line.

    Raises:
        UserError: one sentence about the flag that is unknown or has a wrong value.
        SystemExit: code 0, after `--help`.
    """
    found, unknown = known(make, arguments, prog)
    if unknown:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            known(make, ["--help"], prog)
        raise _unknown(unknown[0], re.findall(r"--[a-z][\w.-]*", said.getvalue()))
    return found


def known(make: Callable[..., T], arguments: Sequence[str], prog: str, **more: Any) -> tuple[T, list[str]]:
    """As `flags`, and the arguments that it does not know; `more` goes to `tyro.cli`, whose box becomes a sentence."""
    import tyro

    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            found: tuple[T, list[str]] = tyro.cli(
                make, args=list(arguments), prog=prog, return_unknown_args=True, **more
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_sentence(console.getvalue())) from None
    return found


def _unknown(argument: str, flags: Sequence[str]) -> UserError:
    offender = argument.partition("=")[0]
    if not offender.startswith("--"):
        return UserError(f"unknown argument {offender!r}; flags begin with two dashes, see --help.")
    hint = nearest(offender, flags)
    return UserError(f"unknown argument {offender!r}; {'see --help.' if 'known are' in hint else hint}")


def answered(work: Callable[[], int]) -> int:
    """Do a verb's work; its exit code, or 2 for a mistake of the user's and 1 for a lost rank, told in one sentence."""
    try:
        return work()
    except UserError as error:
        said, code = str(error), EXIT_USER_ERROR
    except ranks.RankLost as error:
        said, code = str(error), 1
    except OSError as error:
        told = unusable(error)
        if told is None:
            raise
        said, code = told, EXIT_USER_ERROR
    print(f"fastddr: {said}", file=sys.stderr)
    return code


def _preset_argument(arguments: Sequence[str]) -> str:
    if list(arguments[-1:]) == ["--preset"]:
        raise UserError("--preset needs a name; known are: " + ", ".join(preset_names()) + ".")
    found = last_value(arguments, "--preset")
    return Config.preset if found is None else found


def last_value(arguments: Sequence[str], flag: str) -> str | None:
    """What the flag is set to where it stands last, before the command line is parsed; None where it does not."""
    found = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else following
    return found


def _one_sentence(box: str) -> str:
    """What tyro draws as a box, as the sentence in its first part."""
    lines = [line.strip(" │").strip() for line in box.splitlines()]
    if len(lines) > 1 and _ruled(lines[1]):  # a terminal without UTF-8 has a title over a line of dashes
        lines = lines[2:]
    said: list[str] = []
    for line in lines:
        if line.startswith("╭"):
            continue
        if not line or _ruled(line) or line.startswith(("─", "╰", "Got errors")):
            break
        said.append(line)
    return _no_number(re.sub(r"\s+", " ", " ".join(said)).rstrip(".") + ".")


def _ruled(line: str) -> bool:
    return set(line) == {"-"}


def _no_number(said: str) -> str:
    """What tyro says of a value that is not the number it should be, in plain words; else the sentence as it is."""
    match = re.fullmatch(r"""Error parsing (--\S+): (.*?)\[?['"](.*)['"]\]?(.*)""", said)
    if match is None:
        return said
    flag, before, value, behind = match.groups()
    kind = (before + behind).lower()
    if ("tuple" in kind and "float" in kind) or "float float" in kind:
        wanted = "numbers alone, like 0.9 0.999"
    elif "int|" in kind or "|int" in kind or "int()" in kind:
        wanted = "a whole number alone, like 8"
    elif "float" in kind:
        wanted = "a number alone, like 8 or 0.5"
    else:
        return said
    shown = " ".join(re.split(r"""['"], ['"]""", value))
    return f"{flag} {shown}: give {wanted}{', or auto' * ('{auto}' in kind)}."
