"""DALI's decoder: where photographs are decoded, how much of each, and whole canvases for a store."""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from fastddr import sampling
from fastddr.errors import UserError
from fastddr.loaders.base import Task, first_unusable
from fastddr.meters import IN_DALI, dali_builds, is_out_of_memory, packages

# The numbers of this file that are of a card's memory are not measured on one.

#: Bytes of a card that the threads of one pipeline have for decoding, before a photograph needs more.
SCRATCH = 128 * 2**20
#: Below so many free bytes of a card a failure to decode is one of memory.
_SCARCE = 256 * 2**20
#: Bytes of the photographs that are decoded at once for a store, about; and how many these are at least.
_AT_ONCE, _FEWEST = 256 * 2**20, 4
#: What DALI says where the operator of `read` fails.
_READER = "`nvidia.dali.fn.io.file.read`"


def installed() -> bool:
    """Whether DALI can be imported.

    Raises:
        UserError: two builds are installed over each other.
    """
    builds = dali_builds()
    if len(builds) > 1:
        raise UserError(
            f"{' and '.join(builds)} are both installed and overwrite each other's files in nvidia/dali; "
            f"run `pip uninstall -y {' '.join(builds)}`, then install the one for your CUDA."
        )
    return bool(builds)


def check_driver(task: Task) -> None:
    """Raise `UserError` where the build of DALI that is installed is for a later CUDA than the GPU's driver can do.

    PyTorch may be of an earlier one, and train there; DALI would end in an error of its own at its first batch.
    """
    can = _driver() if task.device.type == "cuda" else None
    if can is None:
        return
    for build in dali_builds():
        needs = re.search(r"cuda(\d+)\d$", build)  # cuda130 is 13.0
        if needs is not None and can // 1000 < int(needs[1]):
            raise UserError(
                f"{build} needs CUDA {needs[1]}, and this GPU's driver can do {can // 1000}.{can % 1000 // 10}; run "
                f"`pip uninstall -y {build}`, then `pip install nvidia-dali-cuda{can // 1000}0`, or for a new run take "
                "--loader torchvision."
            )


def _driver() -> int | None:
    """The latest CUDA that the GPU's driver can do, as NVIDIA numbers it (12080 is 12.8); None where it is not told."""
    found = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")  # which PyTorch has loaded by now, where it sees a GPU
    except OSError:
        return None
    return found.value if library.cuDriverGetVersion(ctypes.byref(found)) == 0 else None


def version() -> str:
    """Version of the DALI that is installed."""
    from nvidia.dali import __version__

    return str(__version__)


def paths_of(task: Task) -> UInt8[np.ndarray, "n length"]:
    """The absolute path of each file as bytes, all of one length by slashes in front, which change nothing."""
    here = os.fsencode(os.getcwd())
    paths = [os.path.join(here, os.fsencode(file)) for file in task.files]
    length = max(map(len, paths), default=0)
    joined = b"".join(path.rjust(length, b"/") for path in paths)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(paths), length)


def read(path: Any) -> Any:
    """The bytes of a file. Not mapped: photographs are small, and to map and unmap each costs more than to copy it."""
    from nvidia.dali import fn

    return fn.io.file.read(path, dont_use_mmap=True)


def by_region(task: Task) -> bool:
    """Whether only the part of a photograph is decoded that its image needs; else all of it, and the part is cut out.

    On a GPU nvImageCodec 0.9 may crash at a region, without a word (its issue 55), and 0.8 did not; of later ones it is
    not known.
    """
    if task.regions != "auto":
        return task.regions == "always"
    return task.device.type != "cuda" or all(_numbers(version) < (0, 9) for version in codecs())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def codecs() -> tuple[str, ...]:
    """Versions of nvImageCodec that are installed."""
    return _versions("nvidia-nvimgcodec")


def _versions(name: str) -> tuple[str, ...]:
    """Of the packages whose names begin so."""
    return tuple(sorted(version for package, version in packages() if package.startswith(name)))


def device_id(task: Task) -> int | None:
    """DALI's number of the task's GPU, None for the CPU."""
    if task.device.type != "cuda":
        return None
    return torch.cuda.current_device() if task.device.index is None else task.device.index


def decoding(task: Task) -> dict[str, Any]:
    """Where and how photographs are decoded."""
    if task.device.type != "cuda":
        return {"device": "cpu"}
    return {
        "device": "mixed",
        # libjpeg smooths the upsampled chroma; without this the GPU would give other pixels. nvJPEG before 13.2 cannot
        # do it at the edge of a region; nvImageCodec then decodes regions on the host: slower, with the same pixels.
        "jpeg_fancy_upsampling": True,
        # All that the JPEG engines of the card can take, or nothing, and not DALI's 65 % of a batch: which photographs
        # the engines get would depend on their places in the batch, and so might their last levels.
        "hw_decoder_load": 1.0 if task.jpeg_engines else 0.0,
        # Each thread has such scratch from the beginning, and on the host two pieces; by DALI's default (16 and 8 MiB)
        # many threads would take more than `memory` allows for. It grows where a photograph needs more.
        "device_memory_padding": min(16 * 2**20, SCRATCH // (max(1, task.threads) + 1)),
        "host_memory_padding": min(8 * 2**20, SCRATCH // (max(1, task.threads) + 1) // 2),
    }


def named(task: Task) -> str:
    """What decodes this task's photographs, with all that may change a level of them."""
    parts = ["dali", version(), "nvimgcodec", *codecs()]
    if task.device.type == "cuda":
        parts += ["on JPEG engines" if task.jpeg_engines else "on CUDA", "nvjpeg", *_versions("nvidia-nvjpeg")]
    return " ".join(parts)


def explained(error: RuntimeError, ids: Sequence[int], task: Task) -> Exception:
    """What to raise for an error of a pipeline that read these photographs: it does not always say which it was."""
    if is_out_of_memory(error):
        return error
    bad = first_unusable([task.files[id_] for id_ in ids])
    if bad is not None:
        return bad
    passed = _passed(str(error))
    # A decoder that gets no memory says only that it failed.
    if passed is None and task.device.type == "cuda" and torch.cuda.mem_get_info(task.device)[0] < _SCARCE:
        return torch.OutOfMemoryError(f"{IN_DALI}: {' '.join(str(error).split())}")
    refused = name_refused(ids, task)
    if refused is None:
        return passed or error
    return UserError(f"{refused}; save it anew as an RGB JPEG or take --loader torchvision (to train, in a new run).")


def _passed(said: str) -> UserError | None:
    """What to raise where DALI could not read a photograph that can be read by now; None of its other errors."""
    if _READER not in said:
        return None
    why = re.search(r"failed: (.+)", said)
    return UserError(
        f"a photograph could not be read for a moment ({why[1].strip(' .') if why else 'DALI does not say why'}); give "
        "the same command again, and mend the disk if it comes again."
    )


def name_refused(ids: Sequence[int], task: Task) -> str | None:
    """The first of these photographs that DALI, given it alone, does not decode, or not to the size that its header
    says; None where there is none."""
    from nvidia.dali import fn, types

    alone = pipeline(replace(task, threads=1), 1, depth=1)
    with alone:
        path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
        alone.set_outputs(fn.decoders.image(read(path), output_type=types.RGB, **decoding(task)))
    built(alone)
    paths = paths_of(task)
    for id_ in ids:
        alone.feed_input("path", paths[id_ : id_ + 1])
        try:
            (output,) = alone.run()
        except RuntimeError as error:
            if is_out_of_memory(error):
                return None
            return f"{task.files[id_]}: DALI cannot decode this photograph"
        height, width, _ = output.shape()[0]
        if (width, height) != (task.widths[id_], task.heights[id_]):
            return _of_another_size(task, id_, width, height)
    return None


def _of_another_size(task: Task, id_: int, width: int, height: int) -> str:
    expected = f"{task.widths[id_]} × {task.heights[id_]} were expected"
    return f"{task.files[id_]}: DALI decodes it to {width} × {height} pixels, and {expected}"


def pipeline(task: Task, batch: int, depth: int) -> Any:
    """A pipeline for batches of so many photographs, `depth` of them on their way; its graph is still to be made."""
    from nvidia.dali import Pipeline

    return Pipeline(
        batch_size=batch,
        num_threads=max(1, task.threads),
        device_id=device_id(task),
        prefetch_queue_depth=depth,
        exec_dynamic=True,
        seed=0,  # no graph here has anything random
    )


def built(pipeline: Any) -> Any:
    """The pipeline, ready to run.

    On a GPU DALI warns where NVIDIA's NPP or cuFFT is not installed, which PyPI's DALI does not bring and no operator
    here needs, under the name of another package.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nvidia-dali-cuda120 is no longer shipped with CUDA runtime")
        pipeline.build()
    return pipeline


def give_back(task: Task) -> None:
    """After the end of a pipeline on a GPU: DALI's pool would keep what its largest photographs took from the model."""
    if task.device.type == "cuda":
        from nvidia.dali import backend

        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # of its C part, which has no stub


class Canvases:
    """Whole canvases of photographs as uint8, for a store; decoded ahead, in the order asked for."""

    def __init__(self, task: Task, together: int) -> None:
        """`together`: how many photographs are decoded at once, if they are not very large."""
        check_driver(task)
        self._task = task
        if task.device.type == "cuda":
            # Photographs as cameras make them would take gigabytes of a card.
            most = int(_AT_ONCE / (3 * np.mean(task.widths[task.ids] * task.heights[task.ids])))
            together = min(together, max(_FEWEST, most))
        self._together = together
        self._paths = paths_of(task)
        self._width, self._height = sampling.canvas_size(task.widths, task.heights, task.canvas)

    def walk(self, ids: Int[np.ndarray, " n"]) -> Generator[list[tuple[int, Tensor]], None, None]:
        """Yields (id, canvas (height, width, 3)) of some photographs at a time, on the device.

        Raises:
            UserError: a photograph that cannot be decoded, or has another size than it had, by name.
        """
        from nvidia.dali import fn, types

        task, gpu = self._task, self._task.device.type == "cuda"
        chunks = [ids[start : start + self._together] for start in range(0, len(ids), self._together)]

        # DALI warns of an input that its graph does not use.
        scaled = not task.canvas_is_source

        def inputs() -> Any:
            for chunk in chunks:
                size = np.stack([self._height[chunk], self._width[chunk]], axis=1).astype(np.float32)
                paths = self._paths[chunk]
                yield (paths, size) if scaled else (paths,)

        decoder = pipeline(task, self._together, depth=2)
        with decoder:
            path, *size = fn.external_source(
                source=inputs(),
                num_outputs=1 + scaled,
                dtype=[types.UINT8, types.FLOAT][: 1 + scaled],
                ndim=[1, 1][: 1 + scaled],
            )
            canvas = fn.decoders.image(read(path), output_type=types.RGB, **decoding(task))
            if scaled:
                canvas = fn.resize(canvas, size=size[0], interp_type=types.INTERP_LINEAR, antialias=True)
            decoder.set_outputs(canvas)
        built(decoder)
        try:
            for number, chunk in enumerate(chunks):
                try:
                    (output,) = decoder.run(torch.cuda.current_stream(task.device) if gpu else None)
                except RuntimeError as error:
                    # It may be of those after this one, which are already on their way.
                    near = np.concatenate(chunks[number : number + 3])
                    found = explained(error, near.tolist(), task)
                    if found is error:
                        raise
                    raise found from error
                made = [(int(id_), torch.from_dlpack(output[k])) for k, id_ in enumerate(chunk)]
                for id_, pixels in made:
                    self._check(id_, pixels)
                yield made
        finally:
            output = None  # whose memory could else not be given back
            del decoder
            give_back(task)

    def _check(self, id_: int, canvas: Tensor) -> None:
        # A store has no room for another size: its neighbours would be written over.
        height, width, _ = canvas.shape
        if (width, height) != (self._width[id_], self._height[id_]):
            raise UserError(
                f"{_of_another_size(self._task, id_, width, height)}; put back the photograph that was there, or give "
                "the command again (to train, in a new run)."
            )
