"""Checkpoints: written beside, synced, renamed, in a thread; the old ones go after the new one stands.

    checkpoints/step-00001234/
      model.safetensors  ema.safetensors  optimizer.safetensors   tensors
      state.json      where training stands, and everything that is not a tensor
      manifest.json   size and SHA-256 of each file: written last, so a folder without it is no checkpoint
    checkpoints/best -> step-...   checkpoints/last -> step-...

Nothing is pickled, so nothing that is loaded can run code. A kill or a full disk at any moment leaves the checkpoint
before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from torch import Tensor, nn
from torch.optim import Optimizer

from fastddr import files
from fastddr.errors import UserError
from fastddr.serializing import plain, serialized

#: What a checkpoint's folder is called; what has another name in there is the user's, but for the two below.
_NAME = re.compile(r"step-\d{8}(\.\d\d)?")
#: What is written beside, before it gets its name. One process is at a run (`runs.hold`), so what lies there is left by
#: a kill, and goes when the next is written.
_WRITING, _LINK = ".writing", ".link"
#: A file that is not there, or is none.
_NONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
_NEEDED = {"model.safetensors", "optimizer.safetensors", "state.json"}


@dataclass(frozen=True)
class Checkpoint:
    """What was saved, on the CPU."""

    path: Path
    state: dict[str, Any]
    """Where training stands: epoch, step, best so far, fingerprint of the data, versions."""
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    """As `Optimizer.load_state_dict` wants it."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is evaluated: the average, where there is one."""
        return self.model if self.ema is None else self.ema


class Damaged(UserError):
    """A checkpoint is not whole."""


def best(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint that are evaluated."""
    return load(path).weights


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, copied to the CPU: training may go on while it is written."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file, then by name."""
    state: Mapping[str, Any]
    """JSON values."""


@dataclass(frozen=True)
class Training:
    """Everything that training changes, but for where it stands."""

    model: nn.Module
    """Bare: not wrapped by DDP."""
    ema: nn.Module | None
    """The model that holds the averaged weights."""
    optimizer: Optimizer
    scaler: Any
    """Of float16; None otherwise."""

    def snapshot(self, step: int, about: Mapping[str, Any]) -> Snapshot:
        """Copy everything, with what else there is to say (JSON values); waits for a GPU's steps that are under way."""
        moments, rest = _split_optimizer(self.optimizer.state_dict())
        tensors = {"model.safetensors": plain(self.model.state_dict()), "optimizer.safetensors": moments}
        if self.ema is not None:
            tensors["ema.safetensors"] = plain(self.ema.state_dict())
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return Snapshot(step, tensors, {**about, "scaler": scaler, "optimizer": rest})

    def restore(self, saved: Checkpoint) -> None:
        """Put all of a checkpoint where it belongs. Raises `UserError` where names or shapes of weights differ."""
        load_weights(self.model, saved.model, saved.path)
        if self.ema is not None and saved.ema is not None:
            load_weights(self.ema, saved.ema, saved.path)
        load_optimizer(self.optimizer, saved.optimizer)
        if self.scaler is not None and saved.state["scaler"]:
            self.scaler.load_state_dict(saved.state["scaler"])


def write(folder: Path, snapshot: Snapshot, *, best: bool, keep: int = 1) -> Path:
    """Write a checkpoint into a run's checkpoints/, point `last` (and `best`) at it, and then delete those that are not
    kept: besides the best, `keep` stay, this one included.

    Raises:
        OSError: it could not be written, or the run's folder is gone; what stood before stands.
    """
    # Without its parents: where the run's folder is gone, a new one in its place would be no run.
    folder.mkdir(exist_ok=True)
    # A step that stands already is not written over but beside, and goes away when it is not kept any more.
    names = (f"step-{snapshot.step:08d}{suffix}" for suffix in ("", *(f".{n:02d}" for n in range(1, 100))))
    final = next(folder / name for name in names if not (folder / name).exists())
    temporary = folder / _WRITING
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        sums = {name: _write(temporary / name, serialized(part)) for name, part in snapshot.tensors.items()}
        sums["state.json"] = _write(temporary / "state.json", [json.dumps(snapshot.state, indent=1).encode()])
        _write(temporary / "manifest.json", [json.dumps(sums, indent=1, sort_keys=True).encode()])
        _sync(temporary)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    point(folder, final, best)
    _prune(folder, final.name, keep)
    return final


def point(folder: Path, checkpoint: Path, best: bool) -> None:
    """Let `last`, and `best` too if it is, name a checkpoint. A resume repeats it: a kill may have come before."""
    for name in ("last", "best") if best else ("last",):
        temporary = folder / _LINK
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.name)
        _unfollow(folder / name)
        os.replace(temporary, folder / name)
    _sync(folder)


def _unfollow(link: Path) -> None:
    """Make room for a link where a folder is: a run was copied with its links followed (`scp -r`, `cp -L`)."""
    if link.is_symlink() or not link.is_dir():
        return
    own = link / "manifest.json"
    twins = [path / "manifest.json" for path in standing(link.parent)]
    if own.is_file() and any(twin.is_file() and twin.read_bytes() == own.read_bytes() for twin in twins):
        shutil.rmtree(link)
    else:
        os.rename(link, link.with_name(f"{link.name}-copied"))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, following `best` or `last`, and verify every byte of it.

    A training that goes on meanwhile may set the link elsewhere and delete what it stood for: then that is read.

    Raises:
        Damaged: it is not whole.
        OSError: it cannot be read now, and may be whole; with the name of a file or folder.
    """
    while True:
        there = path.resolve()
        try:
            with files.naming(there):
                return _load(there)
        except (UserError, OSError):
            if path.resolve() == there:
                raise


def _load(path: Path) -> Checkpoint:
    try:
        sums = files.parse((path / "manifest.json").read_bytes())
        for name in sorted(_NEEDED | set(sums)):
            if not _is_whole(path / name, sums.get(name)):
                raise Damaged(
                    f"{path / name}: this part of the checkpoint is missing or damaged; take another checkpoint."
                )
        state = files.parse((path / "state.json").read_bytes())
        # As bytes: safetensors opens no file whose name is not UTF-8.
        tensors = {name: deserialize((path / name).read_bytes()) for name in _TENSORS if name in sums}
        optimizer = _join_optimizer(tensors["optimizer.safetensors"], state.pop("optimizer"))
    except (*_NONE, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"{path}: this is not a whole checkpoint, its manifest.json or another file is missing or damaged "
            f"({type(error).__name__}: {error}); take another checkpoint."
        ) from None
    return Checkpoint(path, state, tensors["model.safetensors"], tensors.get("ema.safetensors"), optimizer)


def load_own(path: Path) -> Checkpoint:
    """As `load`, for the run that wrote it: what it may pass over is damaged, and what cannot be read now is not.

    Raises:
        Damaged: it is not whole.
        UserError: it cannot be read now: to pass over it might throw away hours of work.
    """
    try:
        return load(path)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}, so nobody knows whether this checkpoint is whole; give the same "
            f"command again with --run-dir {path.parent.parent}, or where that does not help, move {path} elsewhere: "
            "the run then goes on without it, and begins anew where it is the only one."
        ) from error


def led_to(link: Path) -> Path:
    """The checkpoint that `best` or `last` leads to, by its path in the same folder; the link where it is none there.

    Raises OSError where nobody can tell.
    """
    end = files.end(link)
    return next((path for path in standing(link.parent) if files.end(path) == end), link)


def load_newest(folder: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The checkpoint with the most steps that is whole, by its path in this folder, or None.

    `say` hears of each that is passed over.

    Raises:
        UserError: one cannot be read now.
        OSError: the folder cannot be listed.
    """
    for path in reversed(standing(folder)):
        try:
            return replace(load_own(path), path=path)  # where links lead may be of this machine alone
        except Damaged as error:
            say(f"passed over a checkpoint: {error}")
    return None


def standing(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by step. Raises OSError where it cannot be listed."""
    return [path for path in files.listed(folder) if _NAME.fullmatch(path.name)]


def put_aside(folder: Path, after: Path, say: Callable[[str], None]) -> None:
    """Rename the checkpoints of later steps than `after`, which were passed over: what comes would delete them."""
    for path in standing(folder):
        if path.name > after.name:
            names = (f"damaged-{path.name}{again}" for again in ("", *(f"-{n}" for n in range(2, 1000))))
            # What was put aside an earlier time may be sound.
            aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
            os.rename(path, aside)
            say(f"kept as {aside}")


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put saved moments into an optimizer of the same parameters.

    A moment gets the memory layout of its weight: files keep none, and a fused step wants the two alike. How the
    step is computed (fused, foreach) is a choice of the present device and not of the saved state.
    """
    ways = ("fused", "foreach", "capturable")
    chosen = [{way: group.get(way) for way in ways if way in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    for group, kept in zip(optimizer.param_groups, chosen, strict=True):
        group.update(kept)
        on_device = group.get("fused") or group.get("capturable")
        for weight in group["params"]:
            moments = optimizer.state.get(weight, {})
            for name, moment in moments.items():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moments[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)
            # PyTorch puts it where the saved way wants it; what a CPU saved would stay on the host.
            if on_device and isinstance(moments.get("step"), Tensor):
                moments["step"] = moments["step"].to(weight.device, torch.float32)


def _split_optimizer(optimizer: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    return plain(tensors), {"param_groups": optimizer["param_groups"], "scalars": scalars}


def _join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["scalars"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _is_whole(file: Path, expected: Any) -> bool:
    """Whether a file is there and has this size and sum. Raises OSError where it cannot be read."""
    try:
        return file.stat().st_size == expected["bytes"] and _sha256(file) == expected["sha256"]
    except (*_NONE, TypeError, KeyError):  # the last two of a manifest that is none
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(file: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file to the disk, not only to the system's memory; its size and sum."""
    size, total = 0, hashlib.sha256()
    with file.open("wb") as stream:
        for piece in pieces:  # Python's lock is free while a large one is written and summed up
            stream.write(piece)
            total.update(piece)
            size += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": total.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of a network or of FUSE cannot sync a folder; what is in it is synced already.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _prune(folder: Path, newest: str, keep: int) -> None:
    ours = standing(folder)  # once: of two listings one may lack what the other has
    # By where they lead: somebody who sets a link anew may spell it otherwise than we do.
    led_to = {files.end(folder / name) for name in ("last", "best")} - {None}
    kept = {newest} | {path.name for path in ours if files.end(path) in led_to}
    kept |= set([path.name for path in ours if path.name <= newest][-keep:])
    for path in ours:
        if path.name not in kept and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Put saved weights into a model.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        module.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: these weights are of another model ({first}).") from None
