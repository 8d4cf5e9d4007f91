"""The command `fastddr VERB`."""

from __future__ import annotations

import sys
from pathlib import Path

from fastddr.errors import EXIT_USER_ERROR, UserError, nearest

USAGE = """usage: fastddr VERB [options]

  train      train, evaluate and report a grader (the same as `accelerate launch fastddr/train.py`, one process)
  synthetic  write a synthetic DDR data set into a folder

`fastddr VERB --help` tells a verb's options; `fastddr --version` the version.
"""

VERBS = ("train", "synthetic")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; its exit code is the command's: 0, or 2 for a mistake of the user's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else EXIT_USER_ERROR
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        from fastddr import __version__

        print(f"fastddr {__version__}")
        return 0
    if verb == "train":
        from fastddr import train

        return train.main(rest, prog="fastddr train")
    if verb == "synthetic":
        return _synthetic(rest)
    print(f"fastddr: there is no verb {verb!r}; {nearest(verb, VERBS)}", file=sys.stderr)
    return EXIT_USER_ERROR


def _synthetic(arguments: list[str]) -> int:
    import tyro
    from rich.console import Console

    from fastddr.data import synthetic
    from fastddr.progress import EpochBar

    def write(out: Path, /, photographs: int = 1000, size: int = 512, seed: int = 0, quality: int = 95) -> int:
        """Write a synthetic DDR, in the official layout and DDR's own proportions of split and grade.

        Args:
            out: New folder for it.
            photographs: How many.
            size: Side in pixels.
            seed: Of the photographs.
            quality: Of the JPEGs, with 4:2:0 chroma.
        """
        with EpochBar(Console(stderr=True), "photographs", photographs) as bar:
            counts = synthetic.ddr_counts(photographs)
            synthetic.generate(
                out, counts=counts, size=size, seed=seed, quality=quality, on_progress=lambda done, _: bar.update(done)
            )
        print(f"{photographs} photographs in {out}; train on them with: fastddr train --data {out}")
        return 0

    try:
        return tyro.cli(write, args=arguments, prog="fastddr synthetic")
    except UserError as error:
        print(f"fastddr: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
