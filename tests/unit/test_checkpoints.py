"""Checkpoints: what is saved comes back, whole or not at all."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as by_the_library
from tests_support import unlistable
from torch import nn

from fastddr import checkpoints, reporting, runs, saving, serializing
from fastddr.checkpoints import Training
from fastddr.config import Config
from fastddr.data.manifest import Manifest
from fastddr.errors import PASSING, UserError
from fastddr.reporting import final
from fastddr.runs import Progress, RunFolder
from fastddr.runtime import Runtime
from fastddr.tracking import Tracker


def trained(kind: str = "adam") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    model = model.to(memory_format=torch.channels_last)
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters()) if kind == "adam" else torch.optim.SGD(model.parameters(), 0.1, 0.9)
    )
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def write(folder: Path, number: int, best: bool = False, keep: int = 1, **state: Any) -> Path:
    model, optimizer = trained()
    snapshot = Training(model, None, optimizer, None).snapshot(number, {"progress": {"step": number}} | state)
    return checkpoints.write(folder, snapshot, best=best, keep=keep)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("averaged", [False, True])
def test_training_goes_on_exactly_where_it_stood(tmp_path: Path, kind: str, averaged: bool) -> None:
    model, optimizer = trained(kind)
    ema = copy.deepcopy(model) if averaged else None
    if ema is not None:
        ema.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
    training = Training(model, ema, optimizer, None)
    path = checkpoints.write(tmp_path, training.snapshot(7, {"epoch": 3}), best=True)
    saved = checkpoints.load(tmp_path / "best")
    assert saved.path == path.resolve()
    assert saved.state == {"epoch": 3, "scaler": None}
    assert (saved.ema is not None) == averaged
    other, other_optimizer = trained(kind)
    step(other, other_optimizer)  # somewhere else
    other_ema = copy.deepcopy(other) if averaged else None
    Training(other, other_ema, other_optimizer, None).restore(saved)
    if ema is not None and other_ema is not None:
        found = other_ema.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in ema.state_dict().items())
    step(model, optimizer)
    step(other, other_optimizer)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_best_and_last_are_kept_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1, best=True)
    for number in (2, 3):
        write(tmp_path, number)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step-00000001", "step-00000003"]
    assert os.readlink(tmp_path / "best") == "step-00000001"
    assert os.readlink(tmp_path / "last") == "step-00000003"
    write(tmp_path, 4, best=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step-00000004"]


@pytest.mark.parametrize("spelt", ["step-00000001/", "./step-00000001", "{}/step-00000001"])
def test_the_best_is_kept_however_its_link_is_spelt(tmp_path: Path, spelt: str) -> None:
    write(tmp_path, 1, best=True)
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to(spelt.format(tmp_path))
    write(tmp_path, 2)
    assert checkpoints.load(tmp_path / "best").state["progress"]["step"] == 1


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 3, best=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step-00000003.01"]
    assert checkpoints.load(tmp_path / "best").state["progress"]["step"] == 3


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, file: str, damage: str) -> None:
    part = write(tmp_path, 1) / file
    content = bytearray(part.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    part.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "gone":
        part.unlink()
    with pytest.raises(UserError, match=file):
        checkpoints.load(tmp_path / "last")


def test_the_newest_whole_one_is_taken_and_what_is_passed_over_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoints.load_newest(tmp_path, said.append) is None
    write(tmp_path, 1, best=True)
    write(tmp_path, 2)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"half")
    found = checkpoints.load_newest(tmp_path, said.append)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert ["step-00000009" in said[0], "step-00000002" in said[1]] == [True, True]


def test_what_was_passed_over_is_kept_and_the_users_folders_too(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, best=True, keep=3)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "keep")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-mine")
    (tmp_path / ".writing").mkdir()
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000002", "and not step-mine"
    said: list[str] = []
    checkpoints.put_aside(tmp_path, found.path, said.append)
    assert said == [f"kept as {tmp_path / 'damaged-step-00000003'}"]
    (tmp_path / "step-00000003").mkdir()
    checkpoints.put_aside(tmp_path, found.path, said.append)
    assert (tmp_path / "damaged-step-00000003" / "state.json").is_file(), "which may be sound"
    (tmp_path / "damaged-step-00000003-2").rmdir()
    for step in (3, 4, 5):
        write(tmp_path, step, best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best", "damaged-step-00000003", "keep", "last", "step-00000005", "step-mine",
    ]  # fmt: skip


def test_the_tensors_are_written_as_the_library_would_and_are_not_copied_for_it(tmp_path: Path) -> None:
    """Its own way keeps Python's lock, and with it training, for as long as it takes to copy all."""
    tensors = {f"{kind}/{n}": torch.arange(5 * n).to(kind) for n in (2, 1) for kind in reversed(serializing._TYPES)}
    tensors |= {"α\n": torch.ones(2, 3), "number": torch.tensor(7), "none": torch.empty(0, 3)}
    for given in (tensors, {}):
        pieces = list(serializing.serialized(given))
        assert b"".join(pieces) == by_the_library(given)
        told = checkpoints._write(tmp_path / "file", pieces)
        assert (tmp_path / "file").read_bytes() == b"".join(pieces)
        assert checkpoints._is_whole(tmp_path / "file", told)
    pieces = list(serializing.serialized(tensors))
    before = b"".join(pieces)
    tensors["α\n"].zero_()
    assert b"".join(pieces) != before, "a piece is the tensor itself"
    if Path("/dev/full").is_char_device():
        with pytest.raises(OSError, match="No space"):
            checkpoints._write(Path("/dev/full"), pieces)


@pytest.mark.parametrize("content", ["{}", '{"model.safetensors": 3}', "[]", '{"model.safetensors": {"bytes": 1}}'])
def test_a_manifest_that_is_none_is_no_checkpoint(tmp_path: Path, content: str) -> None:
    (write(tmp_path, 1) / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="missing or damaged"):
        checkpoints.load(tmp_path / "last")


@pytest.mark.parametrize("state", ['{"progress": {}}', '{"optimizer": {"scalars": []}}', "[" * 100_000, "5"])
def test_a_state_that_is_none_is_no_checkpoint(tmp_path: Path, state: str) -> None:
    path = write(tmp_path, 1)
    sums = json.loads((path / "manifest.json").read_text())
    sums["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    (path / "state.json").write_text(state)
    (path / "manifest.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match=r"not a whole checkpoint, .* \((KeyError|AttributeError|ValueError): "):
        checkpoints.load(path)


def test_progress_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    run, (model, optimizer) = RunFolder(tmp_path), trained()
    write(run.checkpoints, 1, progress={"step": 1, "mood": "good"}, fingerprint="f", versions={"fastddr": "9"})
    with pytest.raises(UserError, match=r"unexpected keyword argument 'mood'\); go on with the version .*'9'"):
        saving.resume(run, Training(model, None, optimizer, None), "f", print)


@pytest.mark.parametrize("code", [*sorted(PASSING), errno.EACCES, errno.ENXIO, errno.ENOSPC, errno.ENOENT])
def test_what_the_disk_says_ends_a_run_in_one_sentence(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (model, optimizer) = tmp_path / "run", trained()
    path.mkdir()
    with runs.hold(path, print) as lock:
        run, asked = RunFolder(path, lock), os.stat
        saver = saving.Saver(
            run, Training(model, None, optimizer, None), Config(), main=False, fingerprint="", step=0,
            before=lambda: None,
        )  # fmt: skip
        if code == errno.ENOENT:
            shutil.rmtree(path)
        else:
            write(run.checkpoints, 1)
        if code == errno.EMFILE:
            unlistable(monkeypatch, run.checkpoints, code)

        def answered(place: Any, *arguments: Any, **more: Any) -> os.stat_result:
            if place == path / ".lock":
                raise OSError(code, os.strerror(code))
            return asked(place, *arguments, **more)

        monkeypatch.setattr(os, "stat", answered)
        with pytest.raises(UserError) as told, saver.readable(Progress(step=2)):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(os, "stat", asked)
    said, again = str(told.value), f"give the same command with --run-dir {run.path}."
    assert said.startswith(f"{run.path}: {os.strerror(code)}; the run ends at step 2, ")
    if code == errno.ENOENT:
        assert said.endswith(f"and its folder {run.path} was moved or deleted: bring it back, and {again}")
    else:
        assert said.endswith(f": {again}" if code in PASSING else f": make room or mend the folder, and {again}")
        left = f"in {run.checkpoints}:" if code == errno.EMFILE else "step-00000001:"
        assert f"and the last checkpoint is {left}" in said


def test_a_run_that_was_moved_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone" / "checkpoints", 1)
    with pytest.raises(FileNotFoundError):
        reporting.write(tmp_path / "gone", {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["run", "empty"])
def test_what_is_in_the_place_of_a_run_that_was_moved_is_left_as_it_is(place: str, tmp_path: Path) -> None:
    path, (model, optimizer) = tmp_path / "run", trained()
    (path / "checkpoints").mkdir(parents=True)
    with runs.hold(path, print) as lock:
        run = RunFolder(path, lock)
        run.write(run.config, "")
        (path / ".lock").unlink()
        run.set_status("running", 1)  # a hand took the lock for left over
        saver = saving.Saver(
            run, Training(model, None, optimizer, None), Config(), main=True, fingerprint="", step=1,
            before=lambda: None,
        )  # fmt: skip
        saver.flush()
        path.rename(tmp_path / "moved")
        path.mkdir()
        if place == "run":
            for name in (".lock", "config.yaml", "status.json"):
                (path / name).touch()
        before = sorted(path.iterdir())
        ends: list[Callable[[], None]] = [
            saver.flush,
            lambda: run.set_status("failed", 2, "bad luck"),
            lambda: run.append_bad_step({"step": 2}),
            lambda: run.append_test_scoring("train", "best", "test", {}, ""),
            lambda: final.write_final(
                run,
                {},
                Config(),
                Manifest.__new__(Manifest),
                Runtime.__new__(Runtime),
                Tracker.silent(),
                parameters=0,
                weights="",
                peaks={},
                progress=Progress(),
                resumed=False,
            ),
        ]
        for end in ends:
            said = "another folder is in its place; the run ends at step 2, and its folder .* was moved or deleted: "
            with pytest.raises(UserError, match=said), saver.readable(Progress(step=2)):
                end()
        saver.close()
    assert sorted(path.iterdir()) == before
    assert all(not file.read_bytes() for file in before)


def test_a_reader_follows_a_training_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sets the link to a newer checkpoint and deletes what was being read."""
    write(tmp_path, 1)
    whole = checkpoints._sha256

    def go_on(file: Path) -> str:
        if file.parent.name == "step-00000001":
            monkeypatch.setattr(checkpoints, "_sha256", whole)
            write(tmp_path, 2)
            assert not file.exists()
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return whole(file)

    monkeypatch.setattr(checkpoints, "_sha256", go_on)
    assert checkpoints.load(tmp_path / "last").path.name == "step-00000002"


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_part_that_cannot_be_read_now_is_not_passed_over(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be away for a moment; on a disk with a bad sector the folder is moved away by hand."""
    write(tmp_path, 1)
    newest, whole = write(tmp_path, 2, keep=2), checkpoints._sha256

    def bad_sector(file: Path) -> str:
        if file.parent == newest:
            raise OSError(code, os.strerror(code))
        return whole(file)

    monkeypatch.setattr(checkpoints, "_sha256", bad_sector)
    with pytest.raises(UserError, match=r"step-00000002: .*, so nobody .* move .*step-00000002 elsewhere"):
        checkpoints.load_newest(tmp_path)
    newest.rename(tmp_path / "elsewhere")
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found.state["progress"]["step"] == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_for_a_moment_loses_no_checkpoint(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, best=True)
    write(tmp_path, 2)
    with monkeypatch.context() as patch:
        refused = unlistable(patch, tmp_path, code, once=True)
        with pytest.raises(OSError, match=tmp_path.name):
            write(tmp_path, 3)
        assert len(refused) == 1
    steps = [checkpoints.load(tmp_path / name).state["progress"]["step"] for name in ("best", "last")]
    assert steps == [1, 3]
    unlistable(monkeypatch, tmp_path, code)
    with pytest.raises(OSError, match=tmp_path.name):  # and not None, as before the first one
        checkpoints.load_newest(tmp_path)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_best_one_that_cannot_be_read_now_is_lost_where_it_is_moved_away(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read, said = RunFolder(tmp_path), Path.read_bytes, list[str]()
    best = write(run.checkpoints, 1, best=True)
    write(run.checkpoints, 2, progress={"step": 2, "epoch": 1})

    def away(file: Path) -> bytes:
        if file == best / "manifest.json":
            raise OSError(code, os.strerror(code))
        return read(file)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", away)
        for asked in (saving._is_best, saving.best):
            told = rf"^{best}: .*, so nobody .* --run-dir {tmp_path}, .* move {best} elsewhere: "
            with pytest.raises(UserError, match=told):
                asked(run, Progress(step=2, best_step=1), said.append)
    assert said == []
    assert saving._is_best(run, Progress(step=2, best_step=1), said.append)
    best.rename(tmp_path / "elsewhere")
    found, label = saving.best(run, Progress(step=2, best_step=1), said.append)
    assert (found.state["progress"]["step"], label) == (2, "last (step 2, epoch 1), for the best ones are lost")
    assert not saving._is_best(run, Progress(step=2, best_step=1), said.append)


def test_all_ranks_score_the_best_one_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine a link may lead for a while to where it led before."""
    run = RunFolder(tmp_path)
    for number in (1, 2):
        write(run.checkpoints, number, best=True, keep=2, progress={"step": number, "epoch": number})

    def elsewhere(choose: Callable[[], Any]) -> Any:
        made = choose()
        checkpoints.point(run.checkpoints, run.checkpoints / "step-00000001", best=True)
        return made

    monkeypatch.setattr(saving.ranks, "from_main", elsewhere)
    found, label = saving.best(run, Progress(step=2, best_step=2), print)
    assert (found.state["progress"]["step"], label) == (2, "best (step 2, epoch 2)")


def test_what_a_kill_left_is_no_obstacle_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, (model, optimizer) = RunFolder(tmp_path), trained()
    saver = saving.Saver(
        run, Training(model, None, optimizer, None), Config(), main=False, fingerprint="", step=0, before=lambda: None
    )
    left = run.checkpoints / ".writing"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        said = rf"^{left}: File exists; the run ends at step 1, .* make room or mend the folder, and give the same"
        with pytest.raises(UserError, match=said), saver.readable(Progress(step=1)):
            write(run.checkpoints, 1)
    write(run.checkpoints, 1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["last", "step-00000001"]


def test_moments_come_back_in_the_layout_of_their_weights(tmp_path: Path) -> None:
    """A fused step wants the two alike; with another layout it is wrong on a CPU and fails on a GPU."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)

    def fused() -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), fused=True)

    def go(optimizer: torch.optim.Optimizer) -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = fused()
    go(optimizer)
    path = checkpoints.write(tmp_path, Training(model, None, optimizer, None).snapshot(1, {}), best=True)
    go(optimizer)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = checkpoints.load(path)
    checkpoints.load_weights(model, saved.model, path)
    again = fused()
    saved.optimizer["param_groups"][0]["fused"] = None
    checkpoints.load_optimizer(again, saved.optimizer)
    assert again.param_groups[0]["fused"] is True, "how the step is computed is the present device's choice"
    assert again.state[model.weight]["exp_avg"].stride() == model.weight.stride()
    go(again)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_moments_of_a_cpu_go_to_the_device_of_a_fused_step() -> None:
    """Its kernel reads the count of steps there. The device `meta` stands in for a GPU."""
    weight = nn.Parameter(torch.ones(2))
    before = torch.optim.AdamW([weight], fused=False)
    weight.sum().backward()
    before.step()
    there = nn.Parameter(torch.ones(2, device="meta"))
    again = torch.optim.AdamW([there])
    again.param_groups[0]["fused"] = True
    checkpoints.load_optimizer(again, before.state_dict())
    assert {name: moment.device.type for name, moment in again.state[there].items()} == {
        "step": "meta", "exp_avg": "meta", "exp_avg_sq": "meta",
    }  # fmt: skip
    again = torch.optim.AdamW([weight], fused=False)
    checkpoints.load_optimizer(again, before.state_dict())
    assert again.state[weight]["step"].device.type == "cpu"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    saved = checkpoints.load(write(tmp_path, 1))
    with pytest.raises(UserError, match="another model"):
        checkpoints.load_weights(nn.Linear(2, 2), saved.model, saved.path)
