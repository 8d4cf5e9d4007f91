"""`fastddr prepare`: crop every photograph of a data set to the disc of the retina, once, into a set of its own.

    OUT/...                        the photographs and label files, in the layout of the source
    OUT/prepared/prepared.csv      a row a photograph: source, square, disc
    OUT/prepared/settings.json     what all of it was made with
    OUT/prepared/excluded.csv      what was left out because it could not be used
    OUT/prepared/absent.csv        all that labels name and that was left out: it takes part where splits are drawn
    OUT/prepared/sheet-001.jpg     the discs that were hardest to find, to be looked at
    OUT/prepared/journal-0.jsonl   while it is unfinished: a line a finished photograph, for each rank
    OUT/prepared/.lock             locked while a process is at it; empty
    OUT/.unfinished/...            while it is unfinished: the photographs, out of sight of every layout

A run that was killed goes on where it was. What is in OUT at the end depends on the source and the settings alone: not
on the number of processes, on kills, or on the day.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastddr import files, ranks
from fastddr.config import SplitConfig
from fastddr.data import crop, layouts, relabel, splits, survey
from fastddr.data import sheet as contact
from fastddr.data.cache import Record
from fastddr.data.crop import Job, Recipe, Result, Row
from fastddr.data.layouts import Entry
from fastddr.data.layouts.common import grade_of, located
from fastddr.data.output import FOLDER, Output, put
from fastddr.data.problems import LEAKS, Problem, errors, lister, one_line
from fastddr.data.relabel import Kept
from fastddr.data.survey import Progress, Survey
from fastddr.data.workers import each
from fastddr.errors import UserError
from fastddr.runs import expanded

T = TypeVar("T")

#: Where class folders without splits go: beside them a folder `prepared` would be taken for a misspelt grade.
_INNER = "photographs/"
#: Photographs for which one more process pays: it takes a second or two to start.
_A_WORKER = 64


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    root: Path
    """Folder of the new set, as a layout has it."""
    done: int
    """Photographs made, by all ranks."""
    skipped: int
    """Photographs that were done already."""
    removed: int
    """Outputs of photographs that are no longer in the source, or left out now."""
    bad: tuple[Problem, ...] = ()
    """What could not be used and is left out."""
    sheets: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences about what was read and left out, and about what differs from the source."""


def run(
    data: str,
    out: Path,
    recipe: Recipe | None = None,
    *,
    exclude: frozenset[str] = frozenset(),
    listed: Path | None = None,
    on_bad: Literal["raise", "exclude"] = "raise",
    follow_links: bool = False,
    sheet: int = 200,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> Summary:
    """Prepare a data set; on every process of `accelerate launch` the same call, and the same answer.

    Args:
        data: the folder of the data set in any layout, or a label table.
        out: a new folder, or one that this function filled before: only what is not done is done.
        recipe: of the outputs.
        exclude: paths to leave out.
        listed: as of `survey.take`.
        on_bad: what to do about what cannot be used, when all the rest is done.
        follow_links: also read what links lead to that lies outside of the folder.
        sheet: photographs on the contact sheets.
        workers: processes of this rank; None = as many as fall to it.
        on_progress: called with (done, total) of this rank's part.

    Raises:
        UserError: the source or `out` cannot be used, or with `on_bad="raise"` something in the source.
    """
    main = _Main(data, Path(out), recipe or Recipe(), exclude, listed, on_bad, follow_links, sheet)
    try:
        root, place, jobs = ranks.from_main(lambda: _written(main.begin, out))
        mine = ranks.share(jobs)

        def make() -> list[Result]:
            found: list[Result] = []
            with _results(mine, root, place, main.recipe, workers) as results:
                for result in results:
                    found.append(result)
                    if on_progress:
                        on_progress(len(found), len(mine))
            return found

        found = ranks.gather(ranks.on_all(lambda: _written(make, out)))
        return ranks.from_main(lambda: _written(lambda: main.end(found), out))
    except UserError as error:  # the names of photographs may hold anything
        raise UserError(one_line(error)) from None
    finally:
        main.close()


def _written(do: Callable[[], T], out: str | Path) -> T:
    """What `do` makes; that the disk refuses is a sentence which says that one can run it again."""
    try:
        return do()
    except OSError as error:
        raise crop.cannot_write(error.filename2 or error.filename or out, error) from None


# ------------------------------------------------------------------------------------------------ the work


def _results(
    jobs: Sequence[Job], root: str, out: str, recipe: Recipe, workers: int | None
) -> AbstractContextManager[Iterator[Result]]:
    """The results of the jobs in their order, each as soon as it is there."""
    workers = workers or min(ranks.cores(), max(1, len(jobs) // _A_WORKER))
    journal = os.path.join(out, FOLDER, f"journal-{ranks.rank()}.jsonl")
    make = partial(crop.make, root=root, out=out, recipe=recipe, journal=journal)
    # Processes: a quarter of the time is spent with the interpreter's lock held.
    return each(make, jobs, workers, lost=f"{out}: what is done stays done, but a process that made photographs")


# ------------------------------------------------------------------------------------------------ rank 0


@dataclass
class _Main:
    """What rank 0 does before and after the work of all."""

    data: str
    out: Path
    recipe: Recipe
    exclude: frozenset[str]
    listed: Path | None
    on_bad: Literal["raise", "exclude"]
    follow_links: bool
    sheet: int
    seen: Survey = field(init=False)
    output: Output = field(init=False)

    def begin(self) -> tuple[str, str, list[Job]]:
        """Root of the source, OUT, and what is to be done; OUT is then ready for it."""
        if self.sheet < 0:
            raise UserError(
                f"--sheet {self.sheet}: choose how many photographs the contact sheets show, or 0 for none."
            )
        self.seen = seen = survey.take(
            self.data, exclude=self.exclude, follow_links=self.follow_links, listed=self.listed
        )
        out = _resolved(self.out)
        _refuse_overlap(out, (seen.root, located(self.data)))
        self.output = output = Output(out, _inner(seen))
        faulty = {problem.path for problem in self._bad()}
        sources = self._sources(faulty)
        output.open(self._identity())
        if output.known and not output.known.keys() & sources.keys():
            raise UserError(
                f"{out}: it was prepared from another data set: none of its {len(output.known)} photographs is in "
                f"{seen.root}; give another folder."
            )
        todo = [path for path, source in sources.items() if source not in faulty and not self._row(path, source)]
        if self.on_bad == "raise" and not todo:
            self._refuse_bad()
        stay = {path for path, source in sources.items() if self.on_bad == "raise" or source not in faulty}
        if todo or output.known.keys() - stay:
            output.hide()
        jobs = []
        for path in todo:
            record = seen.records[sources[path]]
            jobs.append(Job(sources[path], record.size, bool(record.digest), path, output.home(path)))
        return str(seen.root), str(out), jobs

    def end(self, found: Sequence[Result]) -> Summary:
        """Tables, sheets and labels, when all photographs are there."""
        seen, output = self.seen, self.output
        made = {result.row.path: result.row for result in found if result.row}
        for path, row in made.items():
            output.known.setdefault(path, []).append(row)
        seen.learn({result.source: _learnt(seen.records[result.source], result) for result in found})
        if self.on_bad == "raise":
            self._refuse_bad()
        bad = self._bad()
        faulty = {problem.path for problem in bad}
        kept = [Kept(e, crop.name_of(e.path, self.recipe.format)) for e in seen.entries if e.path not in faulty]
        if not kept:
            raise UserError(f"{seen.root}: none of its photographs can be used; `{seen.command}` tells why.")
        rows = []
        for entry, path in kept:
            row_ = self._row(path, entry.path)
            if row_ is None:
                raise UserError(f"{output.out / path}: it was changed or removed meanwhile; run again.")
            rows.append(row_)
        rows.sort()
        # An empty table stays, since the others' splits may go by its being there. Of the official layout's text files
        # one without lines is an error, and one that is not there a set without test.
        whole = {entry.label for entry in seen.entries if entry.label and seen.layout != "official"}
        labels = relabel.labels(seen.root, kept, sorted(whole))
        now, of_draw = splits.assign(layouts.find(self.data, self.follow_links), SplitConfig())
        relabel.refuse_changed(seen.root, kept, now)
        pages = self._sheets(rows)
        removed = output.remove(output.known.keys() - {row.path for row in rows})
        output.remove_labels(keep=labels)
        facts = self._identity() | {"sheet": self.sheet, "labels": list(labels)}
        output.write_tables(rows, bad, self._absent(kept), facts)
        output.finish(labels)
        return Summary(
            root=output.out / output.inner,
            done=len(made),
            skipped=sum(row.path not in made for row in rows),
            removed=removed,
            bad=tuple(bad),
            sheets=tuple(pages),
            # The new set is split when it is read, so how this one would be is of no use here.
            notes=(*(note for note in seen.notes if note not in of_draw), *self._differences(kept)),
        )

    def close(self) -> None:
        """Let others have OUT, where it was opened."""
        if hasattr(self, "output"):
            self.output.close()

    def _sources(self, faulty: Container[str]) -> dict[str, str]:
        """The source of each output, in the survey's order.

        Raises:
            UserError: two outputs would bear the same name, or one the name of a file of ours.
        """
        found: dict[str, str] = {}
        for entry in self.seen.entries:
            path = crop.name_of(entry.path, self.recipe.format)
            other = found.get(path)
            if other is None or other in faulty:
                found[path] = entry.path
            elif entry.path not in faulty:
                raise UserError(
                    f"{self.seen.root}: {other} and {entry.path} would both become {path}; rename one of them, or "
                    "leave it out with --exclude."
                )
        # A label table may name a photograph by its name alone, and then a sheet would be one more of that name.
        by_name = any(entry.label.lower().endswith(".csv") for entry in self.seen.entries)
        for path, source in found.items():
            if f"{self.output.inner}{path}".startswith(f"{FOLDER}/") or (by_name and contact.is_page(path)):
                raise UserError(
                    f"{self.seen.root / source}: it bears a name that prepare needs for its own files; rename it."
                )
        return found

    def _row(self, path: str, source: str) -> Row | None:
        return self.output.row(path, source, self.seen.records[source].size)

    def _identity(self) -> dict[str, Any]:
        quality = crop.QUALITY if self.recipe.format == "jpeg" else None
        return {
            "prepare": self.recipe.version, "layout": self.seen.layout, "size": self.recipe.size,
            "format": self.recipe.format, "quality": quality, "crop": "disc",
        }  # fmt: skip

    def _bad(self) -> list[Problem]:
        """What cannot be used, as far as it is known."""
        return [problem for problem in errors(self.seen.problems()) if problem.kind not in LEAKS]

    def _absent(self, kept: Sequence[Kept]) -> list[Entry]:
        """What labels of the source name and the new set lacks, by the paths that it would have there."""
        there = {entry.path for entry, _ in kept}
        taken = {path for _, path in kept}
        found = []
        for entry in sorted([*self.seen.entries, *self.seen.absent], key=lambda entry: entry.path):
            if entry.path not in there:
                path = crop.name_of(entry.path, self.recipe.format)
                # Of two that would become one, each is another photograph still.
                path = entry.path if path in taken else path
                taken.add(path)
                found.append(entry._replace(path=path))
        return sorted(found, key=lambda entry: entry.path)

    def _refuse_bad(self) -> None:
        bad = self._bad()
        if bad:
            more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
            raise UserError(
                one_line(
                    f"{bad[0].sentence(self.seen.root)}{more} and run again (all the rest is done), or "
                    f"leave out what is bad with --on-bad exclude; `{lister(self.seen.command)}` lists all."
                )
            )

    def _sheets(self, rows: Sequence[Row]) -> list[Path]:
        """The contact sheets, drawn anew unless they show just this."""
        folder = self.output.folder
        pages = contact.pages(folder, min(self.sheet, len(rows)))
        old = files.listed(folder, "sheet-*.jpg")
        if not self.output.clean or old != pages or self.output.facts().get("sheet") != self.sheet:
            chosen = sorted(rows, key=lambda row: (float(row.confidence), row.path))[: self.sheet]
            for path, content in zip(pages, contact.draw(self.seen.root, chosen, ranks.cores()), strict=True):
                put(path, content)
            for path in set(old) - set(pages):
                path.unlink()
        return pages

    def _differences(self, kept: Sequence[Kept]) -> list[str]:
        """What a reader of the new set finds otherwise than in the source: what is drawn by chance may be."""
        read, _ = splits.assign(layouts.find(self.output.out), SplitConfig())
        there = {entry.path: entry for entry in read}
        if {path: (entry.grade, entry.patient) for path, entry in there.items()} != {
            path: (entry.grade, entry.patient) for entry, path in kept
        }:
            raise RuntimeError(f"{self.output.out}: its labels do not say what those of {self.seen.root} say")
        moved = sum(entry.split != there[path].split for entry, path in kept)
        if not moved:
            return []
        return [
            f"{moved} of {len(kept)} photographs fall into another split than in {self.data}: its splits are drawn, at "
            "least in part, and what draws them sees other names or fewer photographs."
        ]


def _inner(seen: Survey) -> str:
    """Where in OUT the root of the new set is, with a slash at the end; or empty."""
    if seen.layout == "official" and seen.root.name == "DR_grading":
        return "DR_grading/"
    if seen.layout == "folders" and grade_of([*seen.entries, *seen.absent][0].path.split("/")[0]) is not None:
        return _INNER
    return ""


def _resolved(path: Path) -> Path:
    return expanded(path).resolve()


def _refuse_overlap(out: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        folder = source if source.is_dir() else source.parent
        if out == folder or folder in out.parents or out in folder.parents:
            raise UserError(f"{out}: the output must lie outside of the data set {folder}; give another folder.")


def _learnt(record: Record, result: Result) -> Record:
    if result.kind:
        return record._replace(kind=result.kind, reason=result.reason)
    return record._replace(digest=result.digest) if result.digest else record
