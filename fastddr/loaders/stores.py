"""Where the resident loader keeps decoded photographs: uint8 canvases, one behind the other, in one piece of memory.

A store knows the size of every canvas beforehand, so each has its place from the beginning and is written once.
`Memory` is a process's own, on the host or the GPU. `Mapped` is a file that the ranks of a machine share and that is
kept between runs. `Transient` keeps a canvas until its batch is made.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import mmap
import os
import sys
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from fastddr import sampling
from fastddr.data.cache import folder, share
from fastddr.errors import UserError
from fastddr.loaders.base import Task

#: Of the file. Raise it whenever the form of the file, or what a canvas is, changes: older files are then not used.
VERSION = 2
_MAGIC = "fastddr store"
#: What a file system without hard links says.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
#: Bytes of the header; a page, so that what follows is aligned.
_HEADER = mmap.PAGESIZE


class Place(NamedTuple):
    """Where each canvas lies in a store: id to its first byte, its width and its height."""

    offset: Int[np.ndarray, " n"]
    width: Int[np.ndarray, " n"]
    height: Int[np.ndarray, " n"]
    total: int
    """Bytes of them all."""


def place(task: Task, ids: Int[np.ndarray, " k"] | None = None) -> Place:
    """The place of every canvas of these photographs (by default the task's); others have offset -1."""
    width, height = sampling.canvas_size(task.widths, task.heights, task.canvas)
    wanted = np.unique(task.ids if ids is None else ids)
    lengths = width[wanted] * height[wanted] * 3
    offset = np.full(len(width), -1, dtype=np.int64)
    offset[wanted] = np.cumsum(lengths) - lengths
    return Place(offset, width, height, int(lengths.sum()))


def on_disk(tasks: Sequence[Task]) -> int:
    """Bytes that files of these tasks' photographs take on the disk: a run uses them again, or makes room of them.

    Those of another user, who does not share them, do not count.
    """
    taken = 0
    patterns = {f"{glob.escape(_stem(task, _root(task)))}-*.store" for task in tasks}
    try:
        for file in (file for pattern in patterns for file in (folder() / "resident").glob(pattern)):
            if os.access(file, os.R_OK | os.W_OK):
                taken += file.stat().st_blocks * 512
    except OSError:  # a folder that may not be entered, or another run removes a file
        return 0
    return taken


def build(task: Task, decoder: str) -> Store:
    """The store of `task.store`, which is not `auto` any more; `decoder`: name and version of what fills it.

    Raises:
        UserError: there is no room, or the file cannot be used.
    """
    match task.store:
        case "vram":
            return Memory(place(task), task.device)
        case "ram":
            return Memory(place(task), torch.device("cpu"))
        case "mmap":
            return Mapped(task, decoder)
        case "none":
            return Transient(place(task), task.device)
    raise ValueError(f"{task.store} is no place")


class Store(ABC):
    """Canvases by id. Every id of the task has its place; `missing` says which are not filled yet."""

    def __init__(self, where: Place, device: torch.device) -> None:
        self.place = where
        self.device = device
        """Where its pixels are."""
        self._pixels: Tensor | None = None

    @property
    def pixels(self) -> UInt8[Tensor, " bytes"]:
        """All canvases, one behind the other."""
        assert self._pixels is not None, "the store is closed, or keeps nothing"
        return self._pixels

    @abstractmethod
    def missing(self, ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of these photographs must be decoded, as far as is known without reading pixels."""

    @abstractmethod
    def put(self, id_: int, canvas: UInt8[Tensor, "h w 3"]) -> None:
        """Keep a canvas. Raises `UserError` where there is no room for it."""

    def damaged(self, ids: Int[np.ndarray, " n"]) -> list[int]:
        """Those that are there but not as they were written. Looks at each photograph's pixels once."""
        return []

    def release(self, ids: Int[np.ndarray, " n"], wanted: Sequence[int] = ()) -> None:  # noqa: B027, most do nothing
        """Told when a batch of these photographs has been made; `wanted`: those that the next one is made of."""

    def get(self, id_: int) -> UInt8[Tensor, "h w 3"]:
        """The canvas of a photograph that is there; a view, not to be written to."""
        begin, width, height = (int(part[id_]) for part in self.place[:3])
        return self.pixels[begin : begin + width * height * 3].view(height, width, 3)

    def close(self) -> None:
        """Let go of the memory. Safe to call again."""
        self._pixels = None


class Memory(Store):
    """In this process's memory, or in its GPU's. Host memory is taken up as it is filled."""

    def __init__(self, where: Place, device: torch.device) -> None:
        super().__init__(where, device)
        try:
            self._pixels = torch.empty(where.total, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # PyTorch's OutOfMemoryError is one too
            raise UserError(
                f"there is no room for {where.total / 2**30:.1f} GiB of decoded photographs in {device.type} memory "
                "(--loading.store); take another place, none, or for a new run --loader dali."
            ) from error
        self._there = np.zeros(len(where.offset), dtype=bool)

    def missing(self, ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return ~self._there[ids]

    def put(self, id_: int, canvas: UInt8[Tensor, "h w 3"]) -> None:
        # To a GPU: the host would wait for all that is queued there. Into its own memory it has to, or batches would be
        # gathered from what has not arrived.
        self.get(id_).copy_(canvas, non_blocking=self.device.type == "cuda")
        self._there[id_] = True


class Transient(Store):
    """Keeps a canvas until its batch is made: for a split that is seen once."""

    def __init__(self, where: Place, device: torch.device) -> None:
        super().__init__(where, device)
        self._canvases: dict[int, Tensor] = {}

    def missing(self, ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return np.array([int(id_) not in self._canvases for id_ in ids], dtype=bool)

    def put(self, id_: int, canvas: UInt8[Tensor, "h w 3"]) -> None:
        self._canvases[id_] = canvas.to(self.device, non_blocking=self.device.type == "cuda")

    def release(self, ids: Int[np.ndarray, " n"], wanted: Sequence[int] = ()) -> None:
        for id_ in set(ids.tolist()).difference(wanted):
            self._canvases.pop(id_, None)

    def get(self, id_: int) -> UInt8[Tensor, "h w 3"]:
        return self._canvases[id_]

    def close(self) -> None:
        self._canvases.clear()


class Mapped(Store):
    """In a file of the user's cache, which all ranks of a machine and all later runs on the same files share.

    The file holds a header (JSON), a CRC-32 and a state of every photograph, and the canvases of all photographs of
    the data set; what is not filled takes no room on the disk. Pixels are written before their CRC, and the CRC before
    the state. A process verifies each photograph when it first uses it, so what a crash or a bad disk left behind is
    decoded again, and never trained on. Two writers of one photograph write the same bytes.
    """

    def __init__(self, task: Task, decoder: str) -> None:
        """Open the file of all of the task's files, or make it; another `decoder` may give other pixels.

        Raises:
            UserError: the file cannot be made or read.
        """
        super().__init__(place(task, np.arange(len(task.files))), torch.device("cpu"))
        count = len(task.files)
        root = _root(task)
        key, self._stem = _key(task, decoder, root), _stem(task, root)
        self.path = folder() / "resident" / f"{self._stem}-{key[:16]}.store"
        header = {"what": _MAGIC, "version": VERSION, "key": key, "count": count, "bytes": self.place.total}
        self._states_at = _HEADER + 4 * count
        begin = -(-(self._states_at + count) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._begin, self._size = begin, begin + self.place.total
        self._like = os.stat(task.files[0])
        try:
            self._open(header, key)
        except OSError as error:
            raise UserError(
                f"{self.path}: the store of decoded photographs cannot be used ({error.strerror}); take another place "
                "(--loading.store ram or none, or the environment variable FASTDDR_CACHE)."
            ) from None
        self._verified = np.zeros(count, dtype=bool)

    def _open(self, header: dict[str, object], key: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = json.dumps(header).encode().ljust(_HEADER)
        # Of another user who does not share it: ours stands beside it.
        own = self.path.with_name(f"{self.path.stem}-{os.getuid()}.store")
        # Other processes make and remove files meanwhile, so each try may find another one.
        for _ in range(10):
            try:
                self._file = os.open(self.path, os.O_RDWR)
            except FileNotFoundError:
                self._make(written, key)
                continue
            except PermissionError:
                if self.path == own:
                    raise
                self.path = own
                continue
            if os.fstat(self._file).st_size == self._size and os.pread(self._file, _HEADER, 0) == written:
                break
            # Of another version, or cut off: nothing in it can be used. Who has it open keeps it.
            os.close(self._file)
            with suppress(FileNotFoundError):
                self.path.unlink()
        else:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self.path))
        # Read through the map and written through the file: a full disk is then an error and not a SIGBUS.
        self._map: mmap.mmap | None = mmap.mmap(self._file, self._size, access=mmap.ACCESS_WRITE)
        view = np.frombuffer(self._map, dtype=np.uint8)
        self._sums = view[_HEADER : self._states_at].view(np.uint32)
        self._states = view[self._states_at : self._states_at + len(self.place.offset)]
        self._pixels = torch.from_numpy(view[self._begin :])

    def _make(self, header: bytes, key: str) -> None:
        """Make the file beside and link it to its name, unless another process was faster."""
        # Of the same photographs as they were before a change; who has such a file open keeps it.
        for older in self.path.parent.glob(f"{glob.escape(self._stem)}-*.store"):
            if not older.name.startswith(f"{self._stem}-{key[:16]}"):
                with suppress(FileNotFoundError, PermissionError):
                    older.unlink()
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".partial")
        try:
            # Sums and states too: they are read through the map, and to read a hole of a full tmpfs is a SIGBUS.
            self._write(0, header.ljust(self._begin, b"\0"), handle)
            os.truncate(handle, self._size)
            share(handle, self._like)
            os.fsync(handle)
            with suppress(FileExistsError):
                self._name(temporary)
        finally:
            os.close(handle)
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def _name(self, temporary: str) -> None:
        """Give the file its name, which nobody else may have yet."""
        try:
            os.link(temporary, self.path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A process that is faster in between loses its name, and goes on with the file that it has open.
            if not self.path.exists():
                os.rename(temporary, self.path)

    def missing(self, ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return self._states[ids] != 1

    def damaged(self, ids: Int[np.ndarray, " n"]) -> list[int]:
        found = []
        for id_ in np.unique(ids).tolist():
            if not self._verified[id_] and self._states[id_] == 1:
                self._verified[id_] = zlib.crc32(_bytes(self.get(id_))) == self._sums[id_]
                if not self._verified[id_]:
                    found.append(id_)
        return found

    def put(self, id_: int, canvas: UInt8[Tensor, "h w 3"]) -> None:
        data = _bytes(canvas.cpu().contiguous())
        try:
            self._write(self._begin + int(self.place.offset[id_]), data)
            self._write(_HEADER + 4 * id_, zlib.crc32(data).to_bytes(4, sys.byteorder))
            self._write(self._states_at + id_, b"\x01")
        except OSError as error:
            raise UserError(
                f"{self.path}: a decoded photograph cannot be written ({error.strerror}); make room, or take another "
                "place (--loading.store ram or none, or the environment variable FASTDDR_CACHE)."
            ) from None
        self._verified[id_] = True

    def _write(self, where: int, data: bytes | memoryview, file: int | None = None) -> None:
        written = 0
        while written < len(data):
            written += os.pwrite(self._file if file is None else file, data[written:], where + written)

    def close(self) -> None:
        if self._map is None:
            return
        super().close()
        del self._sums, self._states
        # Who still holds a view keeps the map alive.
        self._map = None
        os.close(self._file)


def _bytes(canvas: Tensor) -> memoryview:
    array: Any = canvas.numpy().reshape(-1)
    return memoryview(array)


def _root(task: Task) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in task.files])


def _stem(task: Task, root: str) -> str:
    """How the names of all files of this data set and canvas begin, whatever became of the photographs."""
    place_hash = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    # A GPU and a CPU decode otherwise: each has a file, so that none makes the other's anew.
    kind = "gpu" if task.device.type == "cuda" else ""
    return f"{os.path.basename(root) or 'photographs'}-{place_hash}-{task.canvas}{kind}"


def _key(task: Task, decoder: str, root: str) -> str:
    """What the canvases are made from: every file's relative path, size and time of change, its canvas, the decoder."""
    digest = hashlib.sha256(f"{VERSION} {decoder} {task.canvas}\n".encode())
    for file, width, height in zip(task.files, task.widths.tolist(), task.heights.tolist(), strict=True):
        known = os.stat(file)
        digest.update(os.fsencode(os.path.relpath(file, root)))
        digest.update(f"\0{known.st_size} {known.st_mtime_ns} {width} {height}\n".encode())
    return digest.hexdigest()
