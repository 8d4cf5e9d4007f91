"""What all benchmarks share: interleaved rounds, medians with intervals, the machine, and the JSON that they write.

A benchmark calls `begin`, and measures within `writing`.

Rows: {"name", settings..., "median", "low", "high", "unit", "n"}; low and high are the 95 % percentile-bootstrap
interval of the median over n rounds.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import conditions
import numpy as np
import psutil
import torch
from conditions import busy_seconds as busy_seconds
from rich.console import Console
from rich.table import Table
from stored import RESULTS, hardware_name, holds_figures

from fastddr import files
from fastddr.errors import UserError
from fastddr.ranks import available_cores

_PACKAGES = (
    "fastddr", "torch", "torchvision", "accelerate", "pillow", "numpy", "simplejpeg", "spdl", "torchcodec", "timm",
)  # fmt: skip
#: Why a part of what was asked for has no figure, where `--seconds` were over: such a result is not complete.
TIME_UP = "the time was up before its turn came"
#: Whole rounds from which on a race that is stopped keeps its figures.
LEAST_ROUNDS = 3
#: The conditions before the measurement, once `begin` was called.
_before: dict[str, Any] | None = None


def begin(rounds: int = 5) -> dict[str, Any]:
    """Record what else the machine does now, and say so where it is busy; call it before anything is measured.

    `writing` stores it beside the conditions of the end.

    Raises:
        UserError: so few rounds give no interval.
    """
    global _before
    if rounds < 5:
        raise UserError(f"--rounds {rounds}: an interval wants at least 5.")
    _before = conditions.take(before=True)
    say(conditions.sentence(_before, "Before the measurement"))
    return _before


def say(line: str | None) -> None:
    """Print a line as it is, without markup and without breaking it; nothing of None."""
    if line is not None:
        Console(soft_wrap=True).print(line, highlight=False, markup=False)


def interleaved(
    trials: Mapping[str, Callable[[], float]],
    rounds: int,
    on_round: Callable[[int], None] | None = None,
    on_failure: Callable[[str, str], None] | None = None,
    found: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Each trial once a round, round after round, so that a slow minute of the machine falls on all of them.

    With `on_failure` one that fails is left out from there on, and its name and the reason are handed over. The values
    are put into `found`, if that is given, as they come: who is stopped still has them (`whole_rounds`).
    """
    found = {} if found is None else found
    found |= {name: [] for name in trials}
    for number in range(rounds):
        for name in list(found):
            try:
                found[name].append(trials[name]())
            except (UserError, RuntimeError) as problem:
                if on_failure is None:
                    raise
                del found[name]
                on_failure(name, sentence(problem))
        if on_round is not None:
            on_round(number + 1)
    return found


def whole_rounds(found: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The rounds that all trials have had; nothing where these are too few for an interval."""
    rounds = min(map(len, found.values()), default=0)
    return {name: values[:rounds] for name, values in found.items()} if rounds >= LEAST_ROUNDS else {}


def sentence(problem: BaseException) -> str:
    """What an error says, in one line and without its full stop."""
    return " ".join(str(problem).split()).rstrip(".") or type(problem).__name__


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, with the 95 % percentile-bootstrap interval of it."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "n": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios of two trials, round by round: what the machine does to both cancels out."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def machine() -> dict[str, Any]:
    """The hardware that this process sees."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
    }
    if os.environ.get("FASTDDR_PRETENDED_CARD"):  # by `tests/card/run.py`, whose figures are of no GPU
        found["pretended_card"] = True
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpus"] = torch.cuda.device_count()
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _processes(group: int) -> Iterator[psutil.Process]:
    for number in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):  # it has ended meanwhile
            # macOS lists 0, which would mean this process.
            if number and os.getpgid(number) == group:
                yield psutil.Process(number)


def cpu_seconds(group: int) -> float:
    """Processor time of a group's processes, in user mode and in the kernel.

    On Linux also that of ended ones which were waited for; macOS does not tell it.
    """
    taken = 0.0
    for process in _processes(group):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            taken += times.user + times.system + times.children_user + times.children_system
    return taken


def memory(group: int) -> int:
    """Bytes of memory that the processes of a group hold.

    On Linux a page that several processes map counts for each by its share (PSS), so that nothing is counted twice; on
    macOS only those pages count that a process has for itself (USS), and none where the system keeps them secret.
    """
    held = 0
    for process in _processes(group):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found = process.memory_full_info()
            held += getattr(found, "pss", found.uss)
    return held


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"]).lower().replace("_", "-")
        if name in _PACKAGES or name.startswith(("nvidia-dali-cuda", "nvidia-nvimgcodec")):
            # The first on the path is the one that is imported.
            found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


@dataclass
class Written:
    """Where `writing` writes to, and what."""

    out: Path
    benchmark: str
    rows: Sequence[Mapping[str, Any]]
    failures: bool = False
    """Whether rows that failed are worth a file of their own."""
    path: Path | None = None
    """Where the result lies, once it was written."""

    @property
    def worth(self) -> bool:
        """Whether there is anything to write."""
        return holds_figures(self.benchmark, self.rows) or (self.failures and bool(self.rows))

    def save(self) -> None:
        """Write what there is now, if there is a figure: what is yet to come may never end."""
        if self.worth:
            _write(self, complete=False)


def end_with_parent() -> None:
    """For a process that a benchmark starts: where that one is killed, this must not go on and keep the card. Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def writing(
    benchmark: str, rows: Sequence[Mapping[str, Any]], out: Path | None, *, part: str | None = None,
    wandb: bool = False, tiny: bool = False, failures: bool = False,
) -> Generator[Written, None, None]:  # fmt: skip
    """Writes the rows when its block ends, in whatever way: what was measured before a failure is not lost.

    By default to results/NAME_HARDWARE_DATE.json, with a `part` to NAME-PART_...; `tiny` ones lie in runs/benchmarks/.
    With `wandb` the figures become a W&B run as well (`tracked`); whatever happens to that, the JSON is there.

    SIGTERM, by which a suite stops its parts, ends the block as Ctrl-C does. Only where the block came to its end is
    the result complete, unless `--seconds` cut it short. One that is not, or has no figure, is not published: it goes
    to NAME-incomplete_... and so takes the place of no file that could be; a later one that is takes that away. Where
    there is no figure, nothing is written, but with `failures`, of which that is the finding.

    Raises:
        UserError: the result could not be written, which is told before the block begins; or it has no figure.
    """

    def stop(number: int, frame: object) -> None:
        # Asked again: what ends now must not be cut short.
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    written = Written(out or place(benchmark, part, tiny=tiny), benchmark, rows, failures)
    check_out(written.out)
    complete = False
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield written
        complete = True
    finally:
        # Asked to stop again: it is about to.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if written.worth:
                record = _write(written, complete=complete)
                if wandb and written.path is not None:
                    # Here, because each loader's process imports this file.
                    import tracked

                    tracked.keep(record, written.path, say=say)
                say(f"written to {written.path}")
            elif complete:
                raise _nothing(written.out)
            else:
                say(str(_nothing(written.out)))
        finally:
            signal.signal(signal.SIGTERM, before)


def _nothing(path: Path) -> UserError:
    return UserError(f"Nothing was measured, so no result is written to {path}.")


def _write(written: Written, *, complete: bool) -> dict[str, Any]:
    """Write the result as JSON, and return that."""
    now = datetime.now(UTC)
    hardware = machine()
    after = conditions.take(before=False)
    say(conditions.sentence(after, "After the measurement"))
    program = Path(sys.argv[0])
    complete = complete and all(row.get("failed") != TIME_UP for row in written.rows)
    record: dict[str, Any] = {
        "benchmark": written.benchmark,
        "machine": hardware,
        "versions": versions(),
        "date": now.isoformat(timespec="seconds"),
        # The arguments that name a place of this machine would help nobody.
        "command": shlex.join(["python", f"{program.parent.name}/{program.name}", *map(_public, sys.argv[1:])]),
        "conditions": {"before": _before, "after": after},
        "complete": complete,
        "rows": list(written.rows),
    }
    beside = incomplete(written.out)
    publishable = complete and holds_figures(written.benchmark, written.rows)
    written.path = written.out if publishable else beside
    # Who reads it meanwhile, or after a kill, finds a whole one.
    files.put(written.path, f"{json.dumps(record, indent=1)}\n".encode())
    if publishable:
        beside.unlink(missing_ok=True)
    return record


def incomplete(out: Path) -> Path:
    """Where a result goes that is not, or not yet, complete."""
    # As `stored.read` takes a name apart: another word behind NAME is another measurement.
    name, *rest = out.stem.rsplit("_", 2) if out.stem.count("_") >= 2 else [out.stem]
    return out.with_name(f"{'_'.join([f'{name}-incomplete', *rest])}{out.suffix}")


def check_out(out: Path) -> None:
    """See that a result can be written there; its folder is made.

    Raises:
        UserError: it cannot.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file in it, which ends in .json.")
    if out.suffix != ".json":
        raise UserError(f"--out {out}: give a name that ends in .json.")
    check_folder(out.parent)


def check_folder(folder: Path, flag: str = "--out") -> None:
    """See that files can be written into a folder, which is made.

    Raises:
        UserError: they cannot; `flag` gives another place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        why = "it is a file" if folder.is_file() else problem.strerror
        raise UserError(f"{folder} cannot be written to: {why}; give another {flag}.") from None


def place(benchmark: str, part: str | None = None, *, tiny: bool = False) -> Path:
    """Where a result goes without `--out`; a rehearsal's figures are none to publish."""
    hardware, name = hardware_name(machine()), f"{benchmark}-{part}" if part else benchmark
    folder = Path("runs") / "benchmarks" if tiny else RESULTS
    return folder / f"{name}_{'-'.join(hardware.lower().split())}_{datetime.now(UTC):%Y-%m-%d}.json"


def _public(argument: str) -> str:
    """An argument, which may hold flags itself, with each path in it cut to its last name, and names of hubs too."""
    # A path may hold blanks where it stands alone.
    rest = r"[^\s=:]*" if re.search(r"(?:^|=)--[^\s=]+\s|\s--", argument) else "[^=:]*"
    return re.sub(f"{rest}/{rest}", lambda path: Path(path[0]).name, argument)


def show(title: str, rows: Sequence[Mapping[str, Any]], extra: Sequence[str] = ()) -> None:
    """The rows as a table: name, median, interval, and the columns named in `extra`; what a row lacks stays empty."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "median", "95 % interval", "unit", *extra):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for row in rows:
        digits = 0 if row["median"] >= 100 else 2
        figures = [f"{row[key]:,.{digits}f}" for key in ("median", "low", "high")]
        cells = [str(row["name"]), figures[0], f"{figures[1]} – {figures[2]}", str(row["unit"])]
        table.add_row(*cells, *(str(row.get(key, "")) for key in extra))
    # A file or a pipe says it is 80 wide, and names would be cut into pieces.
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150).print(table)
