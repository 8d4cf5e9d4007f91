"""The verbs about data, `fastddr check`, `prepare` and `synth`, and about memory, `fastddr plan`.

None of them loads PyTorch by itself.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from fastddr import ranks
from fastddr.cli import flags, known
from fastddr.collector import no_collector
from fastddr.config import SplitConfig, check_splitting
from fastddr.memory.asked import Plan
from fastddr.progress import EpochBar

#: Exit code of `fastddr check` where the set has errors.
EXIT_NOT_CLEAN = 1


@dataclass(frozen=True)
class Check:
    """Decode every photograph of a data set, and say what is wrong with it and what is worth knowing.

    Exit code 0 = no errors, 1 = errors, 2 = the set cannot be read at all. What is found is remembered for training.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder of the photographs (any layout), or a label table (.csv)."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of tables."""
    fix_list: Path | None = None
    """Write the errors as CSV, which training takes as --exclude. A file that is there already is refused."""
    exclude: Path | None = None
    """Such a list; what stands in it is left out."""
    follow_links: bool = False
    """Also read photographs to which links lead out of the folder."""
    splitting: SplitConfig = field(default_factory=SplitConfig)
    """How to split what has no splits of its own."""

    def run(self) -> int:
        """The exit code."""
        from fastddr.data import output, problems, survey
        from fastddr.reporting import checks

        # Only rank 0 speaks; the bar goes where it does not mix with what is piped on.
        console, main = Console(stderr=True), ranks.rank() == 0

        def take() -> tuple[survey.Survey, frozenset[str]]:
            check_splitting(self.splitting)
            exclude = problems.read_list(self.exclude) if self.exclude else frozenset()
            if self.fix_list and main:
                # Before the work, not after; and there is no list until all of it is known, since an empty one leaves
                # out nothing.
                problems.refuse_list(self.fix_list)
                output.check_place(self.fix_list, "--fix-list")
            with EpochBar(console, "reading headers", quiet=not main) as bar:
                seen = survey.take(
                    self.data, self.splitting, exclude, lambda done, total: bar.update(done, total=total), afresh=True,
                    follow_links=self.follow_links, listed=self.exclude,
                )  # fmt: skip
            return seen, exclude

        seen, exclude = ranks.on_all(take)
        seen.agree()
        with EpochBar(console, "decoding each photograph", quiet=not main) as bar:
            seen.decode_shared(lambda done, total: bar.update(done, total=total))
        listed = seen.problems()
        bad = problems.errors(listed)
        if main:
            if self.fix_list:
                # Training takes one list: this one takes the place of that of --exclude.
                told = [problems.Problem(path, "excluded", "it stood in the list of --exclude") for path in exclude]
                text = problems.write_list([*bad, *told])
                problems.refuse_list(self.fix_list)
                # Where it is a link, what it leads to.
                output.put(self.fix_list.resolve(), text.encode("utf-8", "surrogateescape"))
            if self.as_json:
                json.dump(checks.as_json(seen, listed), sys.stdout, indent=1)
                print()
            else:
                checks.show(seen, listed, Console(highlight=False, markup=False, emoji=False), self.fix_list)
            sys.stdout.flush()
        # The launcher ends all ranks when one ends with an error: they wait, and leave the verdict to rank 0.
        ranks.wait()
        return EXIT_NOT_CLEAN if bad and main else 0


@dataclass(frozen=True)
class Prepare:
    """Crop every photograph to the disc of the retina, pad it to a square and make it smaller, into a set of its own.

    The new set has the layout and the labels of the old one, which is never touched. What was killed goes on where it
    was; a second run does nothing.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder of the photographs (any layout), or a label table (.csv)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """New folder for the prepared ones, or one to go on with."""
    size: int = 512
    """Side in pixels."""
    format: Literal["jpeg", "png"] = "jpeg"
    """JPEG of quality 100 with full chroma, or PNG."""
    exclude: Path | None = None
    """List of photographs to leave out: what `fastddr check --fix-list` writes, or a path a line."""
    on_bad: Literal["raise", "exclude"] = "raise"
    """A photograph or label that cannot be used: end with an error when all others are done, or leave it out."""
    follow_links: bool = False
    """Also read photographs to which links lead out of the folder."""
    sheet: int = 200
    """Photographs on the contact sheets, the ones whose retina was hardest to find; 0 = no sheets."""

    def run(self) -> int:
        """The exit code."""
        from fastddr.data import crop, prepare, problems

        named = self.exclude
        exclude = ranks.on_all(lambda: problems.read_list(named)) if named else frozenset()
        main = ranks.rank() == 0
        with EpochBar(Console(stderr=True), "preparing photographs", quiet=not main) as bar:
            found = prepare.run(
                self.data,
                self.out,
                crop.Recipe(self.size, self.format),
                exclude=exclude,
                listed=named,
                on_bad=self.on_bad,
                follow_links=self.follow_links,
                sheet=self.sheet,
                on_progress=lambda done, total: bar.update(done, total=total),
            )
        if main:
            removed = f", {found.removed} removed that are no longer in {self.data}" if found.removed else ""
            print(f"{found.done:,} photographs prepared, {found.skipped:,} were done already{removed}: {found.root}")
            for problem in found.bad:
                print(f"left out: {problems.one_line(f'{problem.path}: {problem.reason}')}")
            for note in found.notes:
                print(f"note: {problems.one_line(note)}")
            if found.sheets:
                print(f"look at {found.sheets[0]}: the retinas that were hardest to find come first")
            print(f"train on them with: accelerate launch -m fastddr train --data {shlex.quote(str(self.out))}")
        return 0


@dataclass(frozen=True)
class Synth:
    """Write a synthetic data set, in DDR's own proportions of split and grade."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """New folder for it."""
    count: int = 1000
    """How many photographs; at least 36."""
    size: int = 512
    """Side in pixels."""
    seed: int = 0
    """Of the photographs."""
    quality: int = 95
    """Of the JPEGs, with 4:2:0 chroma."""
    layout: Literal["official", "kaggle", "gdrbench", "folders", "csv"] = "official"
    """In which form it lies on disk. `kaggle` and `gdrbench` leave out what these copies do not have."""
    progressive: float = 0.0
    """Share of progressive JPEGs."""
    corrupt: int = 0
    """So many photographs get a fault each, of every kind in turn; faults.csv lists them."""

    def run(self) -> int:
        """The exit code."""
        from fastddr.data import synthetic

        made = 0

        def count(done: int, total: int) -> None:
            nonlocal made
            made = done
            bar.update(done, total=total)

        with EpochBar(Console(stderr=True), "photographs", self.count) as bar:
            synthetic.generate(
                self.out,
                counts=synthetic.ddr_counts(self.count),
                size=self.size,
                seed=self.seed,
                quality=self.quality,
                layout=self.layout,
                progressive=self.progressive,
                corrupt=self.corrupt,
                on_progress=count,
            )
        out = shlex.quote(str(self.out))
        print(f"{made:,} photographs in {out}; train on them with: accelerate launch -m fastddr train --data {out}")
        return 0


VERBS = {"check": Check, "prepare": Prepare, "synth": Synth}


def main(verb: str, arguments: Sequence[str]) -> int:
    """Run one of `VERBS`, or `plan`; its exit code."""
    if verb == "plan":
        plan, training = known(Plan, arguments, "fastddr plan")
        with no_collector():
            from fastddr.memory import questions
        return questions.run(plan, list(training))
    make: Callable[..., Check | Prepare | Synth] = VERBS[verb]
    return flags(make, arguments, f"fastddr {verb}").run()
