"""`fastddr export RUN --format onnx`: a run's model as a file for elsewhere, checked before it is kept.

    OUT/model.onnx       or model.pt2, model.safetensors
    OUT/model_card.md    data, figures with intervals, intended use, limits
    OUT/export.json      what it takes and gives, how it was checked, and the run's settings

All of it is written beside OUT and renamed when the file, read back, gives the run's own answers on real photographs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console

from fastddr import files, loaders, models, runtime
from fastddr.config import Config
from fastddr.data import masters, output, photos, source
from fastddr.data.crop import Recipe
from fastddr.data.manifest import Manifest
from fastddr.errors import UserError
from fastddr.evaluation import grading
from fastddr.evaluation.evaluate import score
from fastddr.inference import card, flags, formats, restore
from fastddr.inference.flags import Export
from fastddr.inference.formats import Deployed, Run
from fastddr.inference.restore import Restored
from fastddr.loaders import canvases
from fastddr.loaders.run import task
from fastddr.meters import versions
from fastddr.progress import terminal
from fastddr.runs import data_name

#: Most that a probability may differ from the run's own on any photograph of the check.
ALLOWED = 1e-4
#: Canvases that are run together in the check, where they are of one size; some are run alone as well.
_TOGETHER = 8


def export(asked: Export) -> Path:
    """Export, check and keep; the folder.

    Raises:
        UserError: the run cannot be used, the format needs what is not installed or cannot hold this model, there are
            no photographs to check it on, or the file gives other answers.
    """
    console = terminal()
    out = output.followed(asked.out or asked.run / "exports" / asked.format)
    config = _settings(asked)
    formats.check(asked.format)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if launched not in ("", "no"):
        raise UserError(
            f"accelerate launch --mixed_precision {launched}: an export is checked in float32, by one process; give "
            "`fastddr export` without the launcher, or --mixed_precision no."
        )
    _check_place(out, asked.overwrite)
    if asked.count < 0:
        raise UserError(f"--count {asked.count}: give a number of photographs, or 0 for all.")
    # All of it is work of the CPU, which no card has to be usable for.
    began = runtime.start(config, cpu=True)
    restored = restore.restore(asked.run, config, asked.weights, torch.device("cpu"), console.print)
    recipe: Recipe | str | None
    prepared: dict[str, Any] | str | None
    try:
        recipe = masters.of_run(restored.run.manifest)
        prepared = None if recipe is None else asdict(recipe)
    except UserError:  # the file can be checked on any photographs; the card says what is not known
        prepared, recipe = "unknown", "as the run's were, which is not known any more"
    known = card.read(restored)
    seen, ids, said = _photographs(asked, restored, console)
    deployed = Deployed(restored.model, config).eval()

    def rebuild() -> torch.nn.Module:
        bare = models.from_config(config, lambda line: None)
        return grading.wrap(bare, config, grading.unwrap(restored.model)[1]).eval()

    out.parent.mkdir(parents=True, exist_ok=True)
    # Its name is cut, since with more behind it a long one may be too long.
    part = out.with_name(f".{out.name[:40]}.{uuid4().hex[:8]}")
    part.mkdir()  # not by `tempfile`, whose folders are closed to the group
    with files.naming(out), ExitStack() as stack:
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        file = part / formats.FILES[asked.format]
        about = _about(asked, restored, deployed) | {
            "prepared": prepared, "photographs": len(ids), "checked_on": said, "allowed": ALLOWED,
        }  # fmt: skip
        try:
            formats.write(asked.format, deployed, file, about)
            run = formats.read(asked.format, file, rebuild, deployed)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--format {asked.format}: {config.model} cannot be exported so ({reason}); take another --format."
            ) from error
        about["difference"] = difference(run, restored, began, seen, ids)
        if not about["difference"] <= ALLOWED:
            raise UserError(
                f"--format {asked.format}: on {len(ids)} photographs the file's probabilities differ from the run's by "
                f"up to {about['difference']:.1e}, more than {ALLOWED:.0e}, so it is not kept; take another --format."
            )
        about |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        trained = replace(restore.stored(asked.run), run_dir=None)
        about |= {
            "versions": versions(),
            "config": asdict(trained) | {"data": data_name(Path(config.data)), "exclude": None},
        }
        (part / "model_card.md").write_text(card.markdown(restored, known, deployed, recipe, about), encoding="utf-8")
        (part / "export.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _keep(part, out, asked.overwrite)
    console.print(
        f"{out / file.name}: its probabilities on {len(ids)} photographs ({said}) are the run's to "
        f"{about['difference']:.1e}; read {out / 'model_card.md'} before you use it"
    )
    return out


def difference(run: Run, restored: Restored, began: runtime.Runtime, seen: Manifest, ids: np.ndarray) -> float:
    """The most that a probability of the file differs from that of the run's evaluation, on these photographs.

    The run's answer is that of `fastddr evaluate` in float32 on the CPU, by the loader that cuts its windows from whole
    canvases. The file gets the canvases, several at a time where they have one size, and now and then one alone.
    """
    wanted = task(restored.config, seen, began, ids, train=False)
    wanted = replace(wanted, device=torch.device("cpu"), dtype=torch.float32, store="none")
    with closing(loaders.build("resident", wanted)) as loader:
        result = score(began.accelerator, restored.model, loader, paths=seen.path, weights=restored.weights)
    expected = dict(zip(result.ids.tolist(), result.logits.double().softmax(1).numpy(), strict=True))
    found = []
    for k, (group, canvas) in enumerate(_canvases(wanted)):
        found += [np.abs(answer - expected[id_]).max() for id_, answer in zip(group, run(canvas), strict=True)]
        if k % _TOGETHER == 0:
            found.append(np.abs(run(canvas[:1])[0] - expected[group[0]]).max())
    return float(np.max(found))  # NaN where one is


def _canvases(wanted: loaders.Task) -> Iterator[tuple[list[int], UInt8[np.ndarray, "b h w 3"]]]:
    """Ids and canvases, as many together as come one after the other in one size."""
    held: list[tuple[int, Any]] = []

    def stacked() -> tuple[list[int], UInt8[np.ndarray, "b h w 3"]]:
        return [id_ for id_, _ in held], np.stack([canvas.cpu().numpy() for _, canvas in held])

    for made in canvases.build(wanted, _TOGETHER).walk(wanted.ids):
        for id_, canvas in made:
            if held and (len(held) == _TOGETHER or held[0][1].shape != canvas.shape):
                yield stacked()
                held = []
            # The decoder's buffers are its own.
            held.append((id_, canvas.clone()))
    if held:
        yield stacked()


def _settings(asked: Export) -> Config:
    # In float32: what is written is checked on the CPU.
    wanted = flags.Scoring(run=asked.run, weights=asked.weights, window=asked.window, precision="fp32")
    return restore.settings(wanted)


def _photographs(asked: Export, restored: Restored, console: Console) -> tuple[Manifest, np.ndarray, str]:
    """Photographs, the ids to check the file on, and what they are."""
    if asked.photographs is not None:
        listed, _ = photos.ready(photos.find([str(asked.photographs)]).paths, None, lambda what, done, total: None)
        usable = [photo for photo in listed if not photo.kind]
        if not usable:
            raise UserError(f"--photographs {asked.photographs}: none of them can be used; give others.")
        found, ids, said = photos.as_manifest(usable), np.arange(len(usable)), "a folder that was given"
    else:
        try:
            found = source.open_data(restored.config, console)
        except UserError as error:
            raise UserError(
                f"{str(error).rstrip('.')}; or check the export on other photographs, with --photographs FOLDER."
            ) from None
        own = found.fingerprint == restored.fingerprint
        data = "its data" if own else "what lies in its data folder now, and is not what it was trained on"
        ids, said = found.ids("valid"), f"of the valid split of {data}"
    if asked.count and asked.count < len(ids):
        ids = ids[np.linspace(0, len(ids) - 1, asked.count).round().astype(int)]
    return found, ids, said


def _about(asked: Export, restored: Restored, deployed: Deployed) -> dict[str, Any]:
    """What is kept in the file and in export.json."""
    config = restored.config
    return {
        "format": asked.format,
        "file": formats.FILES[asked.format],
        "model": config.model,
        "weights": restored.weights,
        "fingerprint": restored.fingerprint,
        "grading": grading.unwrap(restored.model)[1],
        "input": {"name": formats.INPUT, "dtype": "uint8", "shape": ["b", "h", "w", 3], "canvas": deployed.canvas},
        "output": {"name": formats.OUTPUT, "dtype": "float32", "shape": ["b", config.num_classes]},
        "window": config.evaluation.field,
        "reported": restore.stored(asked.run).evaluation.field,
        "image_size": config.image_size,
        "mean": list(config.augment.mean),
        "std": list(config.augment.std),
        "use": "research use only; not a medical device",
    }


def _check_place(out: Path, overwrite: bool) -> None:
    """Raise `UserError` where the folder cannot be put: only an export is replaced, which holds nothing else."""
    if out.exists() and not (overwrite and (out / "export.json").is_file()):
        what = "it is there already" if (out / "export.json").is_file() else "it is there and no export"
        raise UserError(f"--out {out}: {what}; give another folder, or --overwrite in the place of an export.")
    ours = {*formats.FILES.values(), "model_card.md", "export.json"}
    others = sorted(entry.name for entry in out.iterdir() if entry.name not in ours) if out.is_dir() else []
    if others:
        raise UserError(f"--out {out}: {others[0]} is no file of an export; move it, or give another folder.")


def _keep(part: Path, out: Path, overwrite: bool) -> None:
    """Put the finished folder in its place; an earlier export is removed after that.

    Raises:
        UserError: something came there since the work began, perhaps another export; it stays.
    """
    _check_place(out, overwrite)
    old = part.with_name(f"{part.name}.old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(part, out)  # replaces nothing but an empty folder
    except OSError:
        with suppress(OSError):  # where the place is taken, or nothing was there
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def main(asked: Export) -> int:
    """Run the verb; its exit code."""
    export(asked)
    return 0
