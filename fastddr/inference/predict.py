"""`fastddr predict RUN PHOTOS...`: grades of photographs without labels, as a table.

    grades.csv   path,grade,name,referable,p0,...,confidence,status,reason

A photograph that cannot be used has a row with its reason, and ends nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from torch import Tensor

from fastddr import files, ranks, runtime
from fastddr.config import Config
from fastddr.data import masters, output, photos
from fastddr.data.crop import Recipe
from fastddr.data.grades import ICDR, REFERABLE
from fastddr.data.photos import Photo
from fastddr.data.problems import one_line
from fastddr.errors import UserError
from fastddr.evaluation import explain
from fastddr.evaluation.evaluate import score
from fastddr.inference import restore
from fastddr.inference.flags import Predict
from fastddr.inference.restore import Restored
from fastddr.loaders.run import scoring
from fastddr.progress import EpochBar
from fastddr.runtime import Runtime

#: Exit code where some photographs could not be graded; the table says which.
EXIT_SOME_BAD = 1
_NAMES = (*ICDR, "Ungradable")
#: How a table of ours begins, also from a spreadsheet; a label table begins otherwise.
_HEADINGS = (b"path,grade,name,referable,", b'"path","grade","name","referable"')


@dataclass(frozen=True)
class Answer:
    """What a run says of photographs."""

    photos: tuple[Photo, ...]
    """All, in the order in which they were named."""
    logits: Float[Tensor, "n C"] | None
    """Of those that can be used, in this order; None where none can."""

    @property
    def bad(self) -> int:
        """How many have no grade."""
        return sum(bool(photo.kind) for photo in self.photos)


def predict(asked: Predict) -> Answer:
    """Grade, write, and say what was done; the answer is the same on every rank.

    Raises:
        UserError: the run, its weights or the place of the table cannot be used, or there are no photographs.
    """
    config = restore.settings(asked)
    runtime.join()
    ranks.from_main(lambda: _free(asked, config.evaluation.field))
    found = ranks.from_main(lambda: photos.find(asked.photographs))
    began, restored, console = restore.begin(asked, config)
    with EpochBar(console, "looking at photographs") as bar:
        recipe = ranks.from_main(lambda: _recipe(asked, restored))
        listed, said = photos.ready(
            found.paths, recipe, lambda _, done, total: bar.update(done, total=total),
            given=asked.preparation != "auto",
        )  # fmt: skip
    for line in (*found.notes, *said):
        console.print(f"  {one_line(line)}")
    usable = [photo for photo in listed if not photo.kind]
    answer = Answer(tuple(listed), None)
    if usable:
        logits = _logits(asked, config, restored, began, usable, console)
        answer = _of_unchanged(ranks.from_main(lambda: photos.again(listed)), usable, logits)
    ranks.from_main(lambda: _write(asked, answer, config.num_classes))
    if asked.explain is not None and answer.logits is not None:
        _explain(asked, asked.explain, config, restored, began, answer, answer.logits, console)
    if began.is_main:
        _sum_up(asked, answer, restored, console)
    return answer


def _of_unchanged(now: Sequence[Photo], graded: Sequence[Photo], logits: Float[Tensor, "n C"]) -> Answer:
    """The answer with the logits of those of the graded photographs that can still be used."""
    whole = {photo.path for photo in now if not photo.kind}
    rows = [row for row, photo in enumerate(graded) if photo.path in whole]
    return Answer(tuple(now), logits[rows] if rows else None)


def _free(asked: Predict, window: str) -> None:
    """Raise `UserError` where the table cannot be put."""
    if not asked.photographs:
        raise UserError("name photographs: files, folders, globs, or a CSV with a column path.")
    if asked.out.is_dir():
        raise UserError(f"--out {asked.out}: this is a folder; give a file.")
    if asked.explain is not None:
        explain.check()
        if window == "multi":
            raise UserError(
                "--explain shows one window of a photograph; leave it out, or give --window center or full."
            )
        _check_folder(asked, asked.explain)
    _check_table(asked)
    output.check_place(asked.out)


def _check_folder(asked: Predict, folder: Path) -> None:
    """Raise `UserError` where a folder is no place for heat maps."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not asked.overwrite):
        raise UserError(f"--explain {folder}: it is not an empty folder; give another, or --overwrite.")


def _check_table(asked: Predict) -> None:
    """Raise `UserError` where something is there that the table may not replace."""
    if asked.out.exists() and not asked.overwrite:
        raise UserError(f"--out {asked.out}: it is there already; give another name, or --overwrite.")
    if asked.out.is_file() and not asked.out.read_bytes().startswith(_HEADINGS):
        raise UserError(f"--out {asked.out}: this file is no table of grades, which alone --overwrite replaces.")


def _recipe(asked: Predict, restored: Restored) -> Recipe | None:
    if asked.preparation == "none":
        return None
    if asked.preparation == "auto":
        return masters.of_run(restored.run.manifest)
    if not asked.preparation.isdecimal():
        raise UserError(f"--preparation {asked.preparation}: give auto, none, or a side in pixels such as 512.")
    return Recipe(int(asked.preparation))


def _logits(
    asked: Predict, config: Config, restored: Restored, began: Runtime, usable: Sequence[Photo], console: Console
) -> Float[Tensor, "n C"]:
    listed = photos.as_manifest(usable)
    done = 0

    def count() -> None:
        nonlocal done
        done += began.micro_batch_size * began.world
        bar.update(min(done // loader.task.views, len(usable)))

    loading = scoring(config, listed, began, np.arange(len(usable)), lambda line: console.print(f"  {line}"))
    with closing(loading) as loader, EpochBar(console, "grading", len(usable)) as bar:
        result = score(
            began.accelerator, restored.averaged, loader, paths=listed.path, weights=restored.weights, on_batch=count
        )
    restore.check_finite(result, began.precision)
    return result.logits


def _explain(
    asked: Predict,
    folder: Path,
    config: Config,
    restored: Restored,
    began: Runtime,
    answer: Answer,
    logits: Float[Tensor, "n C"],
    console: Console,
) -> None:
    """An overlay of each photograph, of the grade in the table. Under the model without test-time augmentation: the
    window is what it shows.
    """
    usable = [photo for photo in answer.photos if not photo.kind]
    listed = photos.as_manifest(usable)
    places = overlays(folder, answer.photos)

    def make() -> None:
        _check_folder(asked, folder)  # it may have been filled while photographs were graded
        folder.mkdir(parents=True, exist_ok=True)

    ranks.from_main(make)
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        bar.update(done * began.world)

    probabilities, grades = logits.double().softmax(1).max(1)

    def title(id_: int) -> str:
        grade = int(grades[id_])
        return f"{grade} {_NAMES[grade]}, probability {probabilities[id_]:.2f}; right: what speaks for it"

    def keep(id_: int, sheet: Image.Image) -> None:
        content = io.BytesIO()
        sheet.save(content, "png")
        files.put(places[id_], content.getvalue())

    loading = scoring(config, listed, began, np.arange(len(usable)), lambda line: None)
    with closing(loading) as loader, EpochBar(console, "explaining", len(usable)) as bar:
        explain.write(restored.model, loader, config.augment, grades, title, keep, count)
    ranks.wait()
    console.print(f"heat maps: {folder}")


def overlays(folder: Path, listed: Sequence[Photo]) -> list[Path]:
    """The file of the overlay of each photograph that can be used: its number in the table, and its name.

    None is named as a photograph is: the folder may be one of photographs, where `photos.find` passes them over.
    """
    # Cut, since with more around it a long name may be too long.
    names = [f"{row:05}-{Path(photo.path).stem[:40]}{photos.HEAT}" for row, photo in enumerate(listed, 1)]
    return [folder / name for name, photo in zip(names, listed, strict=True) if not photo.kind]


def rows(answer: Answer, classes: int) -> list[list[str]]:
    """The table with its heading; probabilities in full precision, no figures where there is no grade."""
    head = ["path", "grade", "name", "referable", *(f"p{grade}" for grade in range(classes)), "confidence"]
    found = [[*head, "status", "reason"]]
    logits = torch.empty(0, classes) if answer.logits is None else answer.logits
    known = zip(logits.argmax(1).tolist(), logits.double().softmax(1).tolist(), strict=True)
    for photo in answer.photos:
        if photo.kind:
            found.append([photo.path, *[""] * (len(head) - 1), photo.kind, photo.reason])
            continue
        grade, probabilities = next(known)
        # A photograph that is called ungradable is referred too, as in the metrics.
        cells = [str(grade), _NAMES[grade], str(int(grade >= REFERABLE)), *map(repr, probabilities)]
        found.append([photo.path, *cells, repr(max(probabilities)), "ok", ""])
    return found


def _write(asked: Predict, answer: Answer, classes: int) -> None:
    """The table as a whole or not at all; not over one that another command has written meanwhile."""
    out = asked.out.resolve()  # a link stays one
    content = files.table(rows(answer, classes)).encode("utf-8", "surrogateescape")
    _check_table(asked)
    files.put(out, content, sync=True)


def _sum_up(asked: Predict, answer: Answer, restored: Restored, console: Console) -> None:
    graded = len(answer.photos) - answer.bad
    referable = 0 if answer.logits is None else int((answer.logits.argmax(1) >= REFERABLE).sum())
    bad = f", {answer.bad:,} cannot be used (column reason)" if answer.bad else ""
    console.print(
        f"{graded:,} photographs graded under {restored.weights}, {referable:,} of them referable{bad}: {asked.out}"
    )
    console.print("Research use only; not a medical device.")


def main(asked: Predict) -> int:
    """Run the verb; its exit code."""
    with restore.together(asked):
        answer = predict(asked)
    # The launcher ends all ranks when one ends with an error; rank 0 alone tells.
    return EXIT_SOME_BAD if answer.bad and ranks.rank() == 0 else 0
