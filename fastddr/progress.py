"""The bar of an epoch: images/s, data wait and time left on a terminal; nothing in a log file."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

#: Columns of the terminal that are kept free for the bar itself, its ETA and the gaps between.
_KEPT = 5 + len(" ETA 0:00:00") + 4


def terminal(quiet: bool = False) -> Console:
    """What is said to the terminal or the notebook; nothing where it is `quiet`."""
    # Soft wrap: what a user may copy must not be broken into lines. As plain text in a notebook too: what rich makes
    # for it never arrives from a process that the notebook has forked.
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True, force_jupyter=False)


class EpochBar:
    """A progress bar that goes away when its `with` block ends."""

    def __init__(
        self, console: Console, title: str, total: int | None = None, start: int = 0, quiet: bool = False
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[speed]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            # Disabled it redirects nothing: what a quiet rank writes to stderr must be seen. FORCE_COLOR, as in CI,
            # makes rich take a log file for a terminal.
            disable=quiet or console.quiet or not (console.is_terminal and console.file.isatty()),
        )
        self._all_kept = False
        self._bar = self._progress.add_task(title, total=total, completed=start, speed="")

    def update(
        self,
        done: int,
        images_per_second: float | None = None,
        data_wait: float | None = None,
        total: int | None = None,
        kept: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Move to `done` of the total; the first two figures are of the last logged steps, as far as there is room.

        `kept` gives the share of the photographs that are decoded and kept, shown until it is all of them. It is asked
        only where the bar is seen: a large set has many.
        """
        if self._progress.disable:
            return
        share = None if self._all_kept else kept()
        self._all_kept = share is None or share == 1
        said = []
        if images_per_second is not None:
            said.append(f"{images_per_second:,.0f} images/s")
        if not self._all_kept:
            said.append(f"decoded and kept {share:.0%}")
        elif said:
            said.append(f"data wait {data_wait:.0%}")
        self._progress.update(self._bar, completed=done, total=total)
        self._progress.update(self._bar, speed=self._fitting(said))

    def _fitting(self, said: list[str]) -> str:
        """As many of these words as leave the bar, its count and its time whole: rich would cut all of them alike."""
        task = self._progress.tasks[0]
        digits = len(str(int(task.completed))) if task.total is None else len(str(int(task.total)))
        room = self._progress.console.width - len(task.description) - (2 * digits + 1) - _KEPT
        while said and len(", ".join(said)) > room:
            said = said[:-1]
        return ", ".join(said)

    def __enter__(self) -> EpochBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
