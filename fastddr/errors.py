"""What a user can get wrong: one clear sentence that says what, where and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Exit code of every command for a mistake of the user's.
EXIT_USER_ERROR = 2
#: Exit code of a training that was asked to stop, has saved, and can go on.
EXIT_STOPPED = 3
#: Exit code of every command after Ctrl-C where nothing waits for it: that of a shell.
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can mend. Its text is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with `EXIT_USER_ERROR`.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}."
