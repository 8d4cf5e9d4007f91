"""Loaders: one contract, the same pixels."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import ODD, picture
from PIL import Image
from reference import EXACT, POLICIES, REAL, SCALED, compared, needs_dali
from tests_support import batches, same, task

from fastddr import loaders
from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders.base import first_unusable
from fastddr.loaders.canvases import PillowCanvases

ALL = [*REAL, "replay"]
#: Grey levels by which a warp of a loader may be off where nothing is scaled. PIL's cuts fractions off.
WARPED = {"torchvision": 1.01}


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_what_the_design_says(name: str, found: manifest.Manifest) -> None:
    wanted = task(found)
    got = batches(name, wanted)
    assert len(got) == wanted.steps == 27 // 4
    for batch in got:
        assert batch.image.shape == (4, 3, 64, 64)
        assert batch.image.dtype == torch.float32
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        assert batch.valid.all()
        assert (batch.grade.numpy() == found.grade[batch.id.numpy()]).all()
        assert batch.image.isfinite().all()
    ids = torch.cat([batch.id for batch in got]).tolist()
    assert len(set(ids)) == len(ids) == 24, "no photograph twice, and the partial batch is dropped"
    if name != "replay":
        assert not torch.equal(got[0].image, got[1].image)


# ------------------------------------------------------------------------------------------ the pixels


def off_by(name: str, wanted: loaders.Task, epoch: int = 0) -> dict[str, float]:
    """Largest differences from the reference in grey levels: within the canvas, at its edge, and outside.

    `bias` is the mean of them, with their signs, within: what rounds down everywhere is darker.

    A pixel that lies up to 1.5 within is made of the outermost pixels of the canvas, among others.
    """
    if name == "torchvision":  # workers, whose start takes longer than all the rest, are in test_loader_life.py
        wanted = replace(wanted, threads=0)
    worst = {"within": 0.0, "edge": 0.0, "outside": 0.0, "bias": 0.0}
    biases = []
    requests = wanted.requests(epoch)
    for k, batch in enumerate(batches(name, wanted, epoch)):
        for image in compared(batch, wanted, requests, k):
            levels = np.abs(image.levels).max(axis=-1)
            for where, there in (
                ("within", image.inside > 1.5),
                ("edge", np.abs(image.inside) <= 1.5),
                ("outside", image.inside < -1.5),
            ):
                worst[where] = max(worst[where], float(levels[there].max(initial=0)))
            biases.append(image.levels[image.inside > 1.5])
    worst["bias"] = abs(float(np.concatenate(biases).mean()))
    return worst


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_where_nothing_is_scaled_the_pixels_are_those_of_the_reference(
    name: str, policy: str, odd: manifest.Manifest
) -> None:
    """Turned photographs, grey ones, palettes and so on among them."""
    wanted = task(odd, batch_size=len(ODD), augment=POLICIES[policy])
    assert wanted.canvas_is_source
    most = EXACT if policy != "fundus" else WARPED.get(name, EXACT)
    for epoch in (0, 3):
        off = off_by(name, wanted, epoch)
        assert off["within"] <= most
        assert off["edge"] <= most
        assert off["outside"] <= EXACT
        assert off["bias"] <= 0.15


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_scaled_photographs_are_those_of_the_reference(name: str, policy: str, mixed: manifest.Manifest) -> None:
    wanted = task(mixed, batch_size=7, augment=POLICIES[policy])
    assert not wanted.canvas_is_source
    most = SCALED + (WARPED.get(name, EXACT) if policy == "fundus" else 0)
    for epoch in (0, 3):
        off = off_by(name, wanted, epoch)
        assert off["within"] <= most
        assert off["edge"] <= most
        assert off["outside"] <= EXACT
        assert off["bias"] <= 0.15


@pytest.mark.parametrize("image_size", [64, 80])
@pytest.mark.parametrize("name", REAL)
def test_evaluation_windows_are_those_of_the_reference(name: str, image_size: int, mixed: manifest.Manifest) -> None:
    off = off_by(name, task(mixed, "test", batch_size=7, image_size=image_size))
    assert max(off.values()) <= SCALED


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_strongly_reduced_photographs_are_those_of_the_reference(
    name: str, policy: str, reduced: manifest.Manifest
) -> None:
    """At the very edge of a canvas DALI repeats the last pixel for its filter, and PIL cuts the filter off."""
    most = SCALED + (WARPED.get(name, EXACT) if policy == "fundus" else 0)
    off = off_by(name, task(reduced, batch_size=4, augment=POLICIES[policy]))
    assert off["within"] <= most
    assert off["edge"] <= 12


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REAL)
def test_the_step_to_the_canvas_is_antialiased(name: str, policy: str, tmp_path: Path) -> None:
    """A checkerboard of single pixels, reduced 5 times, is grey.

    Without antialiasing each pixel of the canvas would be one of the photograph's, as black or white as that.
    """
    rows, columns = np.indices((400, 400))
    board = np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    for split, grade in itertools.product(("train", "valid", "test"), range(2)):
        picture(tmp_path / split / str(grade) / f"{grade}.jpg", board)
    threads = 0 if name == "torchvision" else 1
    wanted = task(manifest.read(tmp_path), batch_size=2, augment=POLICIES[policy], threads=threads)
    requests = wanted.requests(0)
    (batch,) = batches(name, wanted)
    for image, seen in zip(batch.image, compared(batch, wanted, requests, 0), strict=True):
        colour = requests.at(0).colour[0 if policy != "fundus" else batch.id.tolist().index(seen.id)]
        values = image.permute(1, 2, 0).double().numpy() - colour[:, 3]
        grey = values @ np.linalg.inv(colour[:, :3].astype(np.float64)).T
        assert np.abs(grey - 127.5)[seen.inside > 1.5].max() < 2.5


@pytest.mark.parametrize("name", REAL)
def test_names_of_any_kind_and_relative_paths(
    name: str, tmp_path: Path, found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(name, task(found, "test", batch_size=13))
    files = found.files()
    for number, id_ in enumerate(found.ids("test").tolist()):
        new = tmp_path / "folder with spaces" / ("ä" * number) / os.fsdecode(b"\xff%d.jpg" % id_)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(Path(files[id_]).read_bytes())
        files[id_] = os.path.relpath(new, tmp_path)
    monkeypatch.chdir(tmp_path)
    got = batches(name, task(found, "test", batch_size=13, files=files))
    assert all(same(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", REAL)
def test_batches_stay_as_they_were(name: str, found: manifest.Manifest) -> None:
    """A batch that is kept is not written over by a later one."""
    loader = loaders.build(name, task(found))
    kept = []
    for batch in loader.epoch(0):
        kept.append((batch.image, batch.image.clone()))
    list(loader.epoch(1))
    loader.close()
    assert all(torch.equal(image, copy) for image, copy in kept)


@pytest.mark.parametrize("name", ALL)
def test_what_accelerate_reads(name: str, found: manifest.Manifest) -> None:
    loader = loaders.build(name, task(found, "test", batch_size=4))
    active, ids = [], []
    for batch in loader.epoch(0):
        active.append((loader.end_of_dataloader, loader.gradient_state.active_dataloader is loader))
        ids += batch.id[batch.valid].tolist()
    assert active == [(False, True)] * 3 + [(True, True)]
    assert ids == found.ids("test").tolist()
    assert loader.gradient_state.active_dataloader is None
    assert loader.remainder == 13 % 4
    for _ in loader.epoch(0):
        break
    loader.close()
    assert loader.gradient_state.active_dataloader is None


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("damage", ["truncated", "junk"])
def test_a_photograph_that_cannot_be_decoded_is_named(
    name: str, threads: int, damage: str, tmp_path: Path, found: manifest.Manifest
) -> None:
    content = Path(found.files()[3]).read_bytes()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:2] + b"junk" * 100)
    files = found.files()
    files[3] = str(bad)
    wanted = task(found, files=files, ids=np.arange(8), batch_size=8, threads=threads)
    loader = loaders.build(name, wanted)
    with pytest.raises(UserError, match=r"bad\.jpg") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    loader.close()


def test_a_photograph_that_cannot_be_read_now_is_not_called_damaged(
    found: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(file: object, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), file)

    loader = loaders.build("torchvision", task(found, threads=0))
    monkeypatch.setattr(Image, "open", away)
    with pytest.raises(UserError, match=r"\.jpg: this photograph cannot be read now \(Input/output error\)"):
        list(loader.epoch(0))
    loader.close()
    canvases = PillowCanvases(task(found, threads=1), 2)
    with pytest.raises(UserError, match="cannot be read now"):
        next(canvases.walk(np.arange(2)))
    assert "cannot be read now" in str(first_unusable(found.files()))


@needs_dali
def test_workers_do_not_inherit_a_pipeline(found: manifest.Manifest) -> None:
    """A forked worker that collects a pipeline of its parent would wait for ever for threads that it has not got."""
    pipelines = loaders.build("dali", task(found))
    list(pipelines.epoch(0))
    loader = loaders.build("torchvision", task(found))
    assert loader._loader.multiprocessing_context.get_start_method() in ("forkserver", "spawn")  # type: ignore[attr-defined]
    assert len(list(loader.epoch(0))) == len(loader)
    loader.close()
    pipelines.close()


def test_a_batch_larger_than_the_split_is_refused(found: manifest.Manifest) -> None:
    with pytest.raises(UserError, match="batch_size 64 is larger than the 27"):
        task(found, batch_size=64)
    with pytest.raises(UserError, match="no photograph at all"):
        task(found, ids=np.arange(0), train=False)


def test_unknown_loader(found: manifest.Manifest) -> None:
    with pytest.raises(UserError, match="no such loader"):
        loaders.build("ffcv", task(found))
