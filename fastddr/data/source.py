"""From the setting `data` to a manifest, the same on every rank."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastddr import runtime
from fastddr.config import Config
from fastddr.data import manifest, synthetic
from fastddr.errors import UserError
from fastddr.progress import EpochBar


def open_data(config: Config, console: Console) -> manifest.Manifest:
    """The manifest of a folder, or of the synthetic set, which is made where it is not there yet.

    Rank 0 goes first: the others then find the set made and the headers cached.

    Raises:
        UserError: on every rank, what is wrong with the data; or that a rank sees others than rank 0 does.
    """

    def read() -> manifest.Manifest:
        root: str | Path = config.data
        if config.data == "synthetic":
            made = config.synthetic
            counts = synthetic.ddr_counts(made.photographs) if made.photographs else synthetic.default_counts()
            if not synthetic.default_root(counts, made.size, made.seed).is_dir():
                console.print("  data synthetic: made now, once, into the cache; about a minute on two cores …")
            with EpochBar(console, "making synthetic photographs, once", sum(map(sum, counts.values()))) as bar:
                root = synthetic.ensure(counts, made.size, made.seed, on_progress=lambda done, _: bar.update(done))
        with EpochBar(console, "reading headers") as bar:
            return manifest.read(root, on_progress=lambda done, total: bar.update(done, total=total))

    found: manifest.Manifest | None = None

    def read_on_main() -> str:
        nonlocal found
        found = read()
        return found.fingerprint

    fingerprint = runtime.from_main(read_on_main)
    if found is None:
        found = read()
    if found.fingerprint != fingerprint:
        raise UserError(f"{found.root}: the photographs here are not those that rank 0 sees; give all ranks the same.")
    counted = ", ".join(f"{split} {sum(counts[:5]):,}" for split, counts in found.counts().items())
    console.print(f"  data {found.root}: {counted} gradable photographs")
    for note in found.notes:
        console.print(f"  note: {note}")
    return found
