"""What a user can get wrong: one clear sentence that says what, where and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

#: Exit code of every command for a mistake of the user's.
EXIT_USER_ERROR = 2
#: Exit code of a training that was asked to stop, has saved, and can go on.
EXIT_STOPPED = 3
#: Exit code of every command after Ctrl-C where nothing waits for it: that of a shell.
EXIT_INTERRUPTED = 130


def _numbers(*names: str) -> set[int]:
    return {getattr(errno, name) for name in names if hasattr(errno, name)}  # not every system knows each of them


#: What the system says where there is no room.
_FULL = _numbers("ENOSPC", "EDQUOT", "EFBIG")
_AWAY = _numbers("EIO", "ESTALE", "ETIMEDOUT", "ESHUTDOWN", "ENOTCONN", "EHOSTDOWN", "EREMOTEIO", "ENOLCK")
#: What may pass by itself, as where a server is away for a moment; it says nothing of what lies there.
PASSING = _AWAY | _numbers("EMFILE", "ENFILE", "ENOMEM")
#: What it says where a place cannot be used, for these reasons or others.
CANNOT_USE = _FULL | _AWAY | _numbers(
    "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ENAMETOOLONG", "EBUSY",
    "EOPNOTSUPP", "ENOSYS", "ENXIO",
)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend. Its text is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with `EXIT_USER_ERROR`.
    """


def need(holds: bool, sentence: str) -> None:
    """Raise `UserError` with the sentence unless what is said `holds`."""
    if not holds:
        raise UserError(sentence)


def unusable(error: BaseException, where: object = None) -> str | None:
    """What to say of an error of the disk or of a folder, in one sentence; None of other errors.

    `where`: what was at work, for errors that name no file, as those of writing and reading.
    """
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in CANNOT_USE):
        return None
    place = error.filename or where
    way = "give"
    if error.errno in _FULL:
        way = "make room, or give"
    elif error.errno in (errno.EACCES, errno.EPERM):
        way = "give yourself the right to it, or give"
    elif error.errno in PASSING:
        way = "give the same command again, or"
    return f"{f'{place}: ' if place else ''}{error.strerror or error}; {way} a place that can be used."


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}."
