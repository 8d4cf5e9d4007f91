"""A data set as it is: its listing, what is known of each file, and all that is wrong or worth knowing.

    take      labels, splits and headers: seconds
    decode    what was never decoded, on all cores: once a file, then remembered
    problems  all of it, each with its kind

Training, `fastddr check` and `fastddr prepare` see a data set through this, so they agree about it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastddr import ranks
from fastddr.collector import no_collector
from fastddr.config import SplitConfig
from fastddr.data import cache, layouts, photograph, splits, workers
from fastddr.data.cache import Record
from fastddr.data.grades import UNGRADABLE, UNKNOWN
from fastddr.data.layouts import SPLITS, Entry
from fastddr.data.layouts.common import Fence, is_photograph, located
from fastddr.data.photograph import BadPhotograph
from fastddr.data.problems import Problem, errors
from fastddr.errors import UserError

#: Called with (done, total) now and then.
Progress = Callable[[int, int], None]
#: Files a thread takes at once while headers are read.
_CHUNK = 256
#: Seconds a file from which on the storage, and not the interpreter, is what is waited for; then so many threads wait.
_SLOW, _THREADS = 1e-3, 16
#: Seconds between two savings of the cache while photographs are decoded: so much is lost by a kill.
_SAVE_EVERY = 60.0
#: Errors of a file that a look at it may undo without its size or time of change saying so (rights, links).
_OUTER = ("missing", "broken-link", "outside", "unreadable", "unreadable-now", "format")


@dataclass
class Survey:
    """A data set as it is. Made by `take`."""

    asked: str
    """What the user called it, and the flags that it was looked at with but `--exclude`, as on a command line."""
    root: Path
    layout: str
    entries: list[Entry]
    """By split and path. What the labels name, bad photographs among them, without those of `--exclude`."""
    records: dict[str, Record]
    """What is known of each entry's file."""
    label_problems: list[Problem]
    notes: list[str]
    """Sentences for the report."""
    excluded: list[Problem] = field(default_factory=list)
    """What `--exclude` took out."""
    absent: list[Entry] = field(default_factory=list)
    """What labels name and `entries` lack: by `--exclude`, or left out when the set was prepared."""
    listed: str | Path | None = None
    """The list of `--exclude`."""
    test_drawn: bool = False
    """Whether the test split was drawn by chance."""

    @property
    def command(self) -> str:
        """The `fastddr check` that looks at the same photographs; another one would find other errors."""
        exclude = f" --exclude {shlex.quote(str(self.listed))}" if self.listed else ""
        return f"fastddr check {self.asked}{exclude}"

    # ------------------------------------------------------------------------------------------ what is wrong

    def problems(self) -> list[Problem]:
        """All that is wrong or worth knowing, sorted; of an undecoded file what its header says."""
        found = list(self.label_problems)
        for entry in self.entries:
            record, path = self.records[entry.path], entry.path
            if record.kind:
                found.append(Problem(path, record.kind, entry.where + record.reason))
            if record.traits:
                found += [Problem(path, trait, f"it is {_TRAITS[trait]}") for trait in record.traits.split(",")]
            name = path.rpartition("/")[2]
            if not path.isascii() and any("\udc80" <= letter <= "\udcff" for letter in path):
                found.append(Problem(path, "encoding", "its name is not UTF-8"))
            elif " " in name or not (name.isascii() and name.isprintable()):
                found.append(Problem(path, "name", "its name holds a space, a control or a non-ASCII character"))
        found += self._same_names()
        found += self._same_patients()
        found += self._same_pixels()
        return sorted(found)

    def _same_names(self) -> Iterable[Problem]:
        if len({entry.path.rpartition("/")[2] for entry in self.entries}) == len(self.entries):
            return
        by_name: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            by_name[entry.path.rpartition("/")[2]].append(entry)
        for same in by_name.values():
            if len({entry.split for entry in same}) > 1:
                for entry, other in zip(same, same[1:] + same[:1], strict=True):
                    yield Problem(entry.path, "same-name", f"{other.path} bears the same name")

    def _same_patients(self) -> Iterable[Problem]:
        by_patient: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.patient and entry.grade != UNKNOWN:
                by_patient[entry.patient].append(entry)
        for patient, same in by_patient.items():
            yield from _leaks(same, "patient-in-two-splits", f"patient {patient}")

    def _same_pixels(self) -> Iterable[Problem]:
        by_digest: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            digest = self.records[entry.path].digest
            if digest and entry.grade != UNKNOWN:
                by_digest[digest].append(entry)
        for same in by_digest.values():
            yield from _leaks(same, "picture-in-two-splits", "the same picture")
            for split in SPLITS:
                inside = [entry for entry in same if entry.split == split]
                for entry in inside[1:]:
                    grades = "" if entry.grade == inside[0].grade else f", of grade {inside[0].grade}"
                    own = f" of grade {entry.grade}" if grades else ""
                    yield Problem(entry.path, "duplicate", f"its pixels{own} are those of {inside[0].path}{grades}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (relative path, bytes, grade, split) of all entries, in hex; bytes is -1 where there
        is no file. The same as the manifest's where every photograph can be used."""
        return fingerprint((e.path, self.records[e.path].size, e.grade, e.split or "") for e in self.entries)

    def counts(self) -> dict[str, dict[str, int]]:
        """Photographs of each grade, by split; "unknown" only where there are."""
        found = {
            split: {str(grade): 0 for grade in range(UNGRADABLE + 1)}
            for split in SPLITS
            if any(entry.split == split for entry in self.entries)
        }
        for entry in self.entries:
            if entry.split is not None:
                grade = "unknown" if entry.grade == UNKNOWN else str(entry.grade)
                found[entry.split][grade] = found[entry.split].get(grade, 0) + 1
        return found

    # ------------------------------------------------------------------------------------------ decoding

    def undecoded(self) -> list[str]:
        """Paths of the photographs of which only the header is known, sorted."""
        return sorted(entry.path for entry in self.entries if not self.records[entry.path].decoded)

    def decode(
        self, paths: Sequence[str], threads: int, on_progress: Progress | None = None, *, keep: bool = True
    ) -> dict[str, Record]:
        """Decode these photographs, and take over what was found.

        Args:
            paths: of `undecoded`.
            threads: how many decode at a time.
            on_progress: called with (done, total) after each.
            keep: save what is found now and then, so that a kill loses little; of several ranks only one may.
        """
        found: dict[str, Record] = {}
        saved = time.monotonic()
        with photograph.strict_sizes(), ThreadPoolExecutor(threads) as pool:
            for path, record in zip(paths, workers.threaded(pool, self._decoded, paths), strict=True):
                found[path] = record
                if on_progress:
                    on_progress(len(found), len(paths))
                if keep and time.monotonic() - saved > _SAVE_EVERY:
                    self.learn(found)
                    saved = time.monotonic()
        self.learn(found, keep=keep)
        return found

    def agree(self) -> None:
        """Raise `UserError` on all ranks where they see different photographs; called by all."""
        told = f"{self.root}: the ranks see different photographs here; give all of them the same."
        ranks.agree(lambda: self.fingerprint, told)

    def decode_shared(self, on_progress: Progress) -> tuple[int, str | None]:
        """Decode what is not, each rank its part, and take it over on all; called by all.

        How many photographs that were; and why what was found could not be kept for the next start, if so.
        """
        main = ranks.rank() == 0
        # Rank 0's list: were each rank to cut its own, lists that differ would leave photographs to nobody.
        paths = ranks.gather(self.undecoded() if main else [])
        if not paths:
            return 0, None
        found = self.decode(ranks.share(paths), ranks.cores(), on_progress, keep=main)
        return len(paths), self.learn(dict(ranks.gather(list(found.items()))), keep=ranks.local_rank() == 0)

    def _decoded(self, path: str) -> Record:
        record = self.records[path]
        try:
            return record._replace(digest=photograph.digest(os.path.join(self.root, path)))
        except BadPhotograph as bad:
            return record._replace(kind=bad.kind, reason=bad.reason)

    def learn(self, found: dict[str, Record], *, keep: bool = True) -> str | None:
        """Take over what was found, here or on another rank. Says why it could not be kept for the next start."""
        # The time of change stays this machine's own: another one's copy of the file may have another.
        own = {path: record._replace(changed=self.records[path].changed) for path, record in found.items()}
        self.records.update(own)
        return _keep(self.root, self.records, cache.load(self.root)) if keep else None


_TRAITS = {
    "greyscale": "greyscale",
    "cmyk": "CMYK",
    "turned": "turned by its EXIF orientation",
    "progressive": "a progressive JPEG",
    "extension": "of another format than its name says",
}


@no_collector()
def take(
    data: str | Path,
    splitting: SplitConfig | None = None,
    exclude: frozenset[str] = frozenset(),
    on_progress: Progress | None = None,
    *,
    afresh: bool = False,
    follow_links: bool = False,
    listed: str | Path | None = None,
) -> Survey:
    """A survey by labels and headers; nothing is decoded.

    Args:
        data: the folder in any layout (`fastddr.data.layouts`), or a label table.
        splitting: how to split what has no splits.
        exclude: paths to leave out, as `fastddr check --fix-list` writes them; of a prepared set, or of its source.
        on_progress: called with (headers read, photographs) now and then.
        afresh: look at every file, whatever is known of it.
        follow_links: also read what links lead to that lies outside of the folder.
        listed: the file that `exclude` was read from, for the commands that are named to the user.

    Raises:
        UserError: no such place, no known layout, labels that cannot be read, or a split that is missing.
    """
    listing = layouts.find(data, follow_links)
    # Split first: what is left out later must not move others from one split to another.
    entries, notes = splits.assign(listing, splitting or SplitConfig())
    if exclude:
        named = {one.path for found in (entries, listing.absent, listing.problems) for one in found}
        here = _of_masters(named, listing.root)
        exclude = frozenset(map(here, exclude))
    kept = [entry for entry in entries if entry.path not in exclude]
    # By split and path: ids, and with them a run's windows, must not depend on the order of lines in a file.
    order = {split: place for place, split in enumerate(SPLITS)}
    kept.sort(key=lambda entry: (order[entry.split or ""], entry.path))
    photographs = {entry.path for entry in entries} if exclude else set()
    left_out = sorted(exclude & (photographs | {problem.path for problem in listing.problems}))
    if exclude:
        for line in sorted(exclude.difference(left_out)):
            # A note beside the path: it would be trained on.
            pieces = [*re.split(r"[,;\t|#:]", line), *(line[: gap.start()] for gap in re.finditer(r"\s", line))]
            if not photographs.isdisjoint(here(piece.strip()) for piece in pieces):
                raise UserError(
                    f"--exclude: its line {line!r} holds more than the path of a photograph, if only a blank; write "
                    "the path alone, or the names of the columns above the first line, as in path,reason."
                )
        if not left_out and not exclude & {entry.path for entry in listing.absent}:
            like = f", like {entries[0].path}" if entries else ""
            raise UserError(
                f"--exclude: none of its {len(exclude)} paths is a photograph of {listing.root}; they are relative to "
                f"it{like}."
            )
        more = f" {absent} more of that list are not in the set." if (absent := len(exclude) - len(left_out)) else ""
        notes = [*notes, f"{len(left_out)} photographs are left out, as --exclude lists them.{more}"]
    fence = Fence(located(data), follow_links)
    records = _headers(listing.root, [entry.path for entry in kept], on_progress, afresh, fence)
    return Survey(
        asked=_asked(data, splitting or SplitConfig(), follow_links),
        root=listing.root,
        layout=listing.layout,
        entries=kept,
        records=records,
        label_problems=[problem for problem in listing.problems if problem.path not in exclude],
        notes=listing.notes + notes,
        absent=[entry for entry in entries if entry.path in exclude] + listing.absent,
        excluded=[Problem(path, "excluded", "it stands in the list of --exclude") for path in left_out],
        listed=listed,
        test_drawn=splits.draws_test(listing, splitting or SplitConfig()),
    )


def _of_masters(named: Container[str], root: Path) -> Callable[[str], str]:
    """How a prepared set calls a photograph of `--exclude`, which may be of the list that belongs to its source."""
    from fastddr.data import crop, masters  # SciPy takes its time, and most have no list

    recipe = masters.of_folder(root)

    def here(path: str) -> str:
        if recipe is None:
            return path
        renamed = crop.name_of(path, recipe.format)
        return renamed if path not in named and is_photograph(path) and renamed in named else path

    return here


def _asked(data: str | Path, splitting: SplitConfig, follow_links: bool) -> str:
    changed = sorted(asdict(splitting).items() - asdict(SplitConfig()).items())
    flags = [f"--splitting.{key.replace('_', '-')} {value}" for key, value in changed]
    return " ".join([shlex.quote(str(data)), *(["--follow-links"] if follow_links else []), *flags])


def _leaks(same: Sequence[Entry], kind: str, what: str) -> Iterable[Problem]:
    """A problem for each entry that also stands in a split that is held out further: train gives way to valid and test,
    valid to test, so that leaving the bad ones out leaves the held-out photographs."""
    if len(same) < 2:
        return
    rank = [SPLITS.index(entry.split or "train") for entry in same]
    furthest = max(rank)
    other = same[rank.index(furthest)]
    for entry, own in zip(same, rank, strict=True):
        if own < furthest:
            yield Problem(entry.path, kind, f"{what} is in {other.split} too, as {other.path}")


def _headers(
    root: Path, paths: Sequence[str], on_progress: Progress | None, afresh: bool, fence: Fence
) -> dict[str, Record]:
    """A record of each file; from the cache where size and time of change are the same."""
    cached = cache.load(root)
    folder, fresh = str(root), 0

    def look(path: str) -> Record:
        nonlocal fresh
        file = f"{folder}/{path}"
        try:
            size, changed = photograph.status(file)
            if (why := fence.outside(folder, path)) is not None:
                raise BadPhotograph("outside", why)
        except BadPhotograph as bad:
            return Record(-1, 0, kind=bad.kind, reason=bad.reason)
        old = cached.get(path)
        if not afresh and old is not None and (old.size, old.changed) == (size, changed):
            return old
        fresh += 1
        try:
            found = photograph.header(file)
        except BadPhotograph as bad:
            return Record(size, changed, kind=bad.kind, reason=bad.reason)
        return Record(
            size, changed, found.width, found.height, found.format, found.sampling, ",".join(found.traits)
        )  # fmt: skip

    def look_at(chunk: Sequence[str]) -> list[Record]:
        return [look(path) for path in chunk]

    records: dict[str, Record] = {}
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with photograph.strict_sizes(), ThreadPoolExecutor(_THREADS) as pool:
        began = time.perf_counter()
        first = [look_at(chunk) for chunk in chunks[:1]]
        # Threads hide the latency of a network; where there is none they only fight for the interpreter.
        slow = time.perf_counter() - began > _SLOW * _CHUNK
        rest = (pool.map if slow else map)(look_at, chunks[1:])
        for chunk, found in zip(chunks, itertools.chain(first, rest), strict=True):
            records.update(zip(chunk, found, strict=True))
            if on_progress:
                on_progress(len(records), len(paths))
    if fresh:
        _keep(root, records, cached)
    return records


def _keep(root: Path, records: dict[str, Record], before: dict[str, Record]) -> str | None:
    """Store what is known, over what was known: a header alone does not displace what decoding has told."""
    # What this list of --exclude leaves out stays known.
    after = dict(before)
    for path, record in records.items():
        if record.kind in _OUTER:
            continue
        old = before.get(path)
        same = old is not None and (old.size, old.changed) == (record.size, record.changed)
        if record.decoded or not (same and old is not None and old.decoded):
            after[path] = record
    return cache.store(root, after) if after != before else None


def fingerprint(rows: Iterable[tuple[str, int, int, str]]) -> str:
    """SHA-256 over sorted (relative path, bytes, grade, split), in hex."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def bad_paths(problems: Iterable[Problem]) -> frozenset[str]:
    """Paths of the photographs that cannot be used."""
    return frozenset(problem.path for problem in errors(problems))
