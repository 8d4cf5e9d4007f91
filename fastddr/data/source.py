"""From the settings of a run to its manifest, checked, and the same on every rank."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from fastddr import ranks
from fastddr.config import Config
from fastddr.data import manifest, problems, survey, synthetic
from fastddr.data.survey import Survey
from fastddr.progress import EpochBar


def open_data(config: Config, console: Console, *, trained_on: str | None = None) -> manifest.Manifest:
    """The manifest of a data set, or of the synthetic set, which is made where it is not there yet.

    What was never decoded is decoded now, by all ranks, unless `config.check` is header: a damaged photograph is found
    before the first step and not in the last epoch. `trained_on`: as `manifest.of`.

    Raises:
        UserError: on every rank, what is wrong with the data; or that the ranks see different ones.
    """

    def take() -> Survey:
        root: str | Path = config.data
        if config.data == "synthetic":
            root = _synthetic(config, console)
        exclude = problems.read_list(config.exclude) if config.exclude else frozenset()
        with EpochBar(console, "reading headers") as bar:
            return survey.take(
                root,
                config.splitting,
                exclude,
                on_progress=lambda done, total: bar.update(done, total=total),
                follow_links=config.follow_links,
                listed=config.exclude,
            )

    # The others find the synthetic set made and the headers cached.
    seen = ranks.main_first(take)
    seen.agree()
    if config.check == "full":
        decode(seen, console)
    # Each machine has a cache of its own; what is known must be the same on all ranks.
    records = seen.records
    seen.records = ranks.from_main(lambda: records)
    found = manifest.of(seen, config.on_bad, config.ungradable, trained_on=trained_on)
    counted = ", ".join(f"{split} {len(found.ids(split)):,}" for split in manifest.SPLITS if found.has(split))
    what = "gradable photographs" if config.ungradable == "exclude" else "photographs"
    console.print(f"  data {found.root}: {counted or 'no'} {what}")
    for note in found.notes:
        console.print(f"  note: {note}")
    return found


def decode(seen: Survey, console: Console) -> None:
    """Decode what no rank 0 of an earlier start has decoded, each rank its part, and remember what was found."""
    began = time.perf_counter()
    with EpochBar(console, "decoding each photograph once") as bar:
        count, lost = seen.decode_shared(lambda done, total: bar.update(done, total=total))
    if not count:
        return
    seconds = time.perf_counter() - began
    kept = "which is remembered" if lost is None else f"and again at the next start ({lost}; set FASTDDR_CACHE)"
    console.print(f"  checked: {count:,} photographs decoded in {seconds:.1f} s, {kept}")


def _synthetic(config: Config, console: Console) -> Path:
    made = config.synthetic
    counts = synthetic.ddr_counts(made.photographs) if made.photographs else synthetic.DEFAULT_COUNTS
    total = sum(map(sum, counts.values()))
    if not synthetic.default_root(counts, made.size, made.seed).is_dir():
        console.print(f"  data synthetic: {total} photographs are made now, once, into the cache …")
    with EpochBar(console, "making synthetic photographs, once", total) as bar:
        return synthetic.ensure(counts, made.size, made.seed, on_progress=lambda done, _: bar.update(done))
