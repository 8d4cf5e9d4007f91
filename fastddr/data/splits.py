"""Splits where a layout has none: the official test split of DDR by name, the rest by seed, grade and patient."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import takewhile

from fastddr.config import SplitConfig
from fastddr.data.grades import DDR, UNGRADABLE
from fastddr.data.layouts import SPLITS, Entry, Listing
from fastddr.errors import UserError

#: The sentence about settings without effect.
UNUSED = "The set has splits of its own, so --splitting draws none."


def assign(listing: Listing, config: SplitConfig) -> tuple[list[Entry], list[str]]:
    """The entries of a listing, each with a split, and sentences about what was done.

    A listing with train and valid stays as it is. Without valid, one is cut from train. Without any split the test
    split is DDR's own where the counts of each grade show that it is all of DDR (`config.test` auto or official);
    else it is cut off by chance too. What is cut off is stratified by grade and whole patients where these are known.

    Raises:
        UserError: some photographs have a split and others none, or the official test split was asked for and cannot be
            restored.
    """
    there, entries = listing.entries, _counted(listing)
    given = {entry.split for entry in entries}
    pool = [entry for entry in entries if entry.split in (None, "train")]
    what = f"by chance (seed {config.seed}), stratified by grade, {_by(pool)}"
    share = config.valid_share / (1 - config.test_share)
    if given <= {None}:
        notes = []
        called = _called(pool)
        official = _official_test(entries) if config.test != "random" else None
        if official is None and config.test == "official":
            counts = "/".join(str(n) for n in _by_grade(entries))
            raise UserError(
                f"{listing.root}: the official test split of DDR cannot be restored: the photographs of grade 0-4 "
                f"should be {'/'.join(map(str, _DDR_ALL))}, but are {counts}; use --splitting.test random."
            )
        if official is not None:
            test = official
            ungradable = sum(entry.grade == UNGRADABLE for entry in entries)
            without = f", without the {ungradable} ungradable photographs (grade 5), none of which is in it"
            notes.append(
                "The set has no splits: the official test split of DDR was restored by file name"
                f"{without if ungradable else ''}."
            )
        else:
            test = _cut(entries, called, config.test_share, config.seed, "test")
            notes.append(f"The set has no splits: {config.test_share:.0%} for test were drawn {what}.")
        rest = [entry for entry in entries if entry.path not in test]
        valid = _cut(rest, called, share, config.seed, "valid")
        notes.append(f"Of the rest, {share:.0%} for valid were drawn {what}.")
        found = [
            e._replace(split="test" if e.path in test else "valid" if e.path in valid else "train") for e in entries
        ]
    elif None in given:
        lacking = next(entry for entry in entries if entry.split is None)
        raise UserError(
            f"{listing.root / (lacking.label or lacking.path)}, line {lacking.line}: {lacking.token} has no split, but "
            "others have; give every photograph one, or none."
        )
    elif "valid" not in given and "train" in given:
        called = _called(pool)
        valid = _cut(pool, called, share, config.seed, "valid")
        notes = [f"The set has no valid split: {share:.0%} of train were drawn for it {what}."]
        found = [e._replace(split="valid") if e.path in valid else e for e in entries]
    else:
        notes = [] if config == SplitConfig() else [UNUSED]
        found = entries
    if "train" in given and "test" not in given and not any("test split" in note for note in listing.notes):
        notes.append("There is no test split, so nothing is scored on it.")
    return found[: len(there)], notes


def draws_test(listing: Listing, config: SplitConfig) -> bool:
    """Whether the test split that `assign` gives is drawn by chance: neither the set's own, nor DDR's official one."""
    entries = _counted(listing)
    return all(e.split is None for e in entries) and (config.test == "random" or _official_test(entries) is None)


def _counted(listing: Listing) -> list[Entry]:
    """The entries that splits are made of: a prepared set without any is split as its source is, whatever was left out
    of it."""
    there = listing.entries
    return there + (listing.absent if all(entry.split is None for entry in there) else [])


_DDR_ALL = tuple(sum(DDR[split][grade] for split in SPLITS) for grade in range(UNGRADABLE))


def _by_grade(entries: Sequence[Entry]) -> tuple[int, ...]:
    counts = Counter(entry.grade for entry in entries)
    return tuple(counts[grade] for grade in range(UNGRADABLE))


def _official_test(entries: Sequence[Entry]) -> frozenset[str] | None:
    """The paths of DDR's test split: of each grade the last by sorted name; None where the set is not all of DDR."""
    if _by_grade(entries) != _DDR_ALL:
        return None
    found: set[str] = set()
    for grade in range(UNGRADABLE):
        names = sorted((entry.path.rpartition("/")[2], entry.path) for entry in entries if entry.grade == grade)
        found.update(path for _, path in names[-DDR["test"][grade] :])
    return frozenset(found)


def _by(entries: Sequence[Entry]) -> str:
    """Whether patients or photographs are drawn; of how many photographs the patient is known, where not of all."""
    known = sum(bool(entry.patient) for entry in entries)
    if known in (0, len(entries)):
        return "patient by patient" if known else "photograph by photograph"
    return f"patient by patient (known of {known} of {len(entries)} photographs; the others one by one)"


def _bare(path: str) -> str:
    return os.path.splitext(path.rpartition("/")[2])[0]


def _called(entries: Sequence[Entry]) -> dict[str, str]:
    """What each photograph without a known patient is called in the draw, by path.

    Its name without folder and extension, so that its prepared copy falls into the same split. Of a name that several
    bear (`007/fundus.jpg`) the hash would be one, and the order of folders would draw: they are called by their paths
    below the folder that holds all.
    """
    alone = [entry.path for entry in entries if not entry.patient]
    bearers = Counter(map(_bare, alone))
    folders = [path.split("/")[:-1] for path in alone] or [[]]
    # What the first and the last of them share, all do.
    shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(min(folders), max(folders), strict=False)))

    def name(path: str) -> str:
        bare = _bare(path)
        return bare if bearers[bare] == 1 else os.path.splitext("/".join(path.split("/")[shared:]))[0]

    return {path: name(path) for path in alone}


def _cut(entries: Sequence[Entry], called: dict[str, str], share: float, seed: int, purpose: str) -> frozenset[str]:
    """Paths of a share of the entries, whole patients, the same share of each grade (a patient's is the worst).

    A patient's place in the draw comes from a hash of seed and name, so that one more patient moves no other.
    """
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[f"patient {entry.patient}" if entry.patient else entry.path].append(entry)

    def in_the_draw(name: str) -> tuple[bytes, str]:
        # A patient's name is whole: a dot or a slash in it is part of it.
        key = f"{seed}/{purpose}/{called.get(name, name)}"
        return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest(), name

    strata: dict[int, list[str]] = defaultdict(list)
    for name, members in groups.items():
        strata[max(entry.grade for entry in members)].append(name)
    found: set[str] = set()
    for names in strata.values():
        drawn = sorted(names, key=in_the_draw)
        count = round(share * len(drawn))
        if len(drawn) >= 3 and share > 0:
            count = max(1, count)
        found.update(entry.path for name in drawn[:count] for entry in groups[name])
    return frozenset(found)
