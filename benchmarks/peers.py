"""How others load the same photographs: what `benchmarks/loader.py` measures fastddr's loaders against.

Each peer does the whole work: read the JPEG, decode it, a random window of the canvas, random flips, for the policies
with colour a random turn, scale and jitter, and normalisation, to float32 batches (b, 3, h, w) in the main process,
shuffled, epoch after epoch. Windows and turns come from the peer's own random numbers, in its own documented way. The
window is cut before it is turned, which is the least work: the corners get black, where fastddr's loaders show what is
there. Number of workers and batch are the same for all, and prefetch is what each has by default, two batches, where
no option says otherwise.

`pip install -e ".[peers]"` installs what can be had from the registry. FFCV is not here: it installs from source only,
against OpenCV's and libturbojpeg's headers, and reads a file of its own form instead of photographs. Nor is SPDL's own
decoder, which is FFmpeg's and has no jitter of colours: its pipeline runs around torchvision's.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import torch
from dali_plain import DaliPlain
from peer import Peer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastddr.loaders import Task

# ------------------------------------------------------------------------------------- torchvision, worker processes


class _Photographs(Dataset[tuple[Tensor, int]]):
    """As `torchvision.datasets.ImageFolder`, but for a list of files."""

    def __init__(
        self,
        files: Sequence[str],
        grades: Sequence[int],
        load: Callable[[str], Any],
        transform: Callable[[Any], Tensor],
    ) -> None:
        self.files, self.grades, self.load, self.transform = files, grades, load, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.load(self.files[index])), self.grades[index]


class _InWorkers(Peer):
    """torchvision's transforms in the workers of a `DataLoader`."""

    options = ("workers", "prefetch")
    ahead_each = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        grades = [int(task.grades[id_]) for id_ in task.ids]
        workers = task.threads
        self.loader: Any = DataLoader(
            _Photographs(self.files, grades, self.load, self.transform()),
            batch_size=task.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.prefetch if workers > 0 else None,
            pin_memory=task.device.type == "cuda",
        )

    @staticmethod
    @abstractmethod
    def load(file: str) -> Any:
        """The decoded photograph."""

    @abstractmethod
    def transform(self) -> Callable[[Any], Tensor]:
        """From that to a normalised window."""

    def batches(self) -> Iterator[Tensor]:
        while True:
            for images, _ in self.loader:
                yield images.to(self.task.device, non_blocking=True)

    def close(self) -> None:
        self.loader = None  # the only public way to end persistent workers


class TorchPil(_InWorkers):
    """The report's way, and that of torchvision's training references: PIL, then `torchvision.transforms`.

    `ImageFolder`'s loader, `RandomCrop`, flips, `ToTensor`, `Normalize`.
    """

    name = "torch-pil"

    @staticmethod
    def load(file: str) -> Image.Image:
        with open(file, "rb") as stream:
            return Image.open(stream).convert("RGB")

    def transform(self) -> Callable[[Any], Tensor]:
        from torchvision import transforms

        normalise = transforms.Normalize(self.task.augment.mean, self.task.augment.std)
        return transforms.Compose([*_augmented(self.task, transforms), transforms.ToTensor(), normalise])


class TorchDecodeJpeg(_InWorkers):
    """`torchvision.io.decode_jpeg` (libjpeg-turbo) and `transforms.v2` on uint8 tensors, until `Normalize`.

    What torchvision's documentation recommends for speed ("Performance considerations" of its transforms).
    """

    name = "torch-decode-jpeg"

    @staticmethod
    def load(file: str) -> Tensor:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return decode_jpeg(read_file(file), mode=ImageReadMode.RGB)

    def transform(self) -> Callable[[Any], Tensor]:
        return _tensor_transform(self.task)


class TorchCodec(TorchDecodeJpeg):
    """The same with TorchCodec's decoder, to which torchvision's documentation sends its readers since 0.29."""

    name = "torchcodec"

    @classmethod
    def missing(cls, task: Task) -> str | None:
        if find_spec("torchcodec") is None:
            return 'TorchCodec is not installed; `pip install -e ".[peers]"`'
        try:
            from torchcodec.decoders import decode_jpeg  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            return f"TorchCodec cannot be loaded ({str(error).splitlines()[0]})"
        return None

    @staticmethod
    def load(file: str) -> Tensor:
        from torchcodec.decoders import decode_jpeg

        photograph: Tensor = decode_jpeg(file)  # type: ignore[assignment]  # of one file it is one tensor
        return photograph


def _augmented(task: Task, transforms: Any) -> list[Any]:
    """From a decoded photograph to its window, by `torchvision.transforms` or `v2` of them: both resize antialiased."""
    augment = task.augment
    steps = [] if task.canvas_is_source else [transforms.Resize(task.canvas)]
    steps.append(transforms.RandomCrop(task.image_size))
    if not task.only_crops:
        bilinear = transforms.InterpolationMode.BILINEAR
        steps.append(transforms.RandomAffine(augment.rotate, scale=augment.scale, interpolation=bilinear))
    steps += [transforms.RandomHorizontalFlip()] * augment.hflip + [transforms.RandomVerticalFlip()] * augment.vflip
    if not task.only_normalises:
        steps.append(transforms.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue))
    return steps


def _tensor_transform(task: Task, *, normalises: bool = True) -> Callable[[Any], Tensor]:
    """The same for tensors, in uint8 until the end: normalised float32, or as it is."""
    from torchvision.transforms import v2

    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(task.augment.mean, task.augment.std)]
    return v2.Compose([*_augmented(task, v2), *(finish if normalises else [])])


# ------------------------------------------------------------------------------------------------------ SPDL, threads


class SpdlDecodeJpeg(Peer):
    """A `spdl.pipeline` around torchvision's decoder and transforms, which let go of the GIL.

    Its documentation's first step of a migration: any function that lets go of the GIL may be a stage. Whole batches,
    as many at once as there are workers, each in a thread. The threads stay and the source never ends, so no epoch
    waits for the next. Inside a thread PyTorch gets one core. For a GPU a batch is sent as uint8 by
    `spdl.io.transfer_tensor_h2d` in a thread of its own, as its documentation has it ("Parallelism": custom
    multi-threading), which pins it and copies it while the model computes; the GPU normalises it.
    """

    name = "spdl-decode-jpeg"
    options = ("workers", "prefetch")

    @classmethod
    def missing(cls, task: Task) -> str | None:
        if find_spec("spdl") is None:
            return 'SPDL is not installed; `pip install -e ".[peers]"`'
        return None

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from spdl.pipeline import PipelineBuilder

        workers = max(1, task.threads)
        torch.set_num_threads(1)
        self.sends = task.device.type == "cuda"
        self.transform = _tensor_transform(task, normalises=not self.sends)
        builder: Any = PipelineBuilder()
        builder = (
            builder.add_source(self._paths())
            .aggregate(task.batch_size)
            .pipe(self._batch, concurrency=workers, name=f"load_{self.name}")
        )
        self.sender = ThreadPoolExecutor(max_workers=1)
        if self.sends:
            import spdl.io

            builder = builder.pipe(spdl.io.transfer_tensor_h2d, executor=self.sender)
        self.pipeline: Any = builder.add_sink(self.prefetch).build(num_threads=workers)
        self.pipeline.start()

    def _paths(self) -> Generator[str, None, None]:
        while True:
            yield from random.sample(self.files, len(self.files))

    def _batch(self, files: list[str]) -> Tensor:
        return torch.stack([self.transform(TorchDecodeJpeg.load(file)) for file in files])

    def batches(self) -> Iterator[Tensor]:
        # (3, 1, 1)
        mean, std = (
            (255 * torch.tensor(values))[:, None, None].to(self.task.device)
            for values in (self.task.augment.mean, self.task.augment.std)
        )
        for images in self.pipeline:
            yield images.float().sub_(mean).div_(std) if self.sends else images

    def close(self) -> None:
        self.pipeline.stop()
        self.sender.shutdown()


# ---------------------------------------------------------------------------------------------- torchvision, on a GPU


class TorchvisionGpu(Peer):
    """`torchvision.io.decode_jpeg(list of bytes, device="cuda")`, that is nvJPEG, a batch at a time.

    As its documentation recommends, all files of a batch go into one call. Threads read the next batches meanwhile;
    each photograph gets its window, and the batch is normalised at once, on the GPU.
    """

    name = "torchvision-gpu"  # each worker reads one batch ahead

    @classmethod
    def missing(cls, task: Task) -> str | None:
        if task.device.type != "cuda":
            return "it decodes on a GPU, and PyTorch sees none here"
        if not (task.only_crops and task.only_normalises):
            return "its transforms would turn and colour one photograph at a time on the GPU, so it runs `report` only"
        return None

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.threads = ThreadPoolExecutor(max(1, task.threads))

    def _read(self, files: list[str]) -> list[Tensor]:
        from torchvision.io import read_file

        return [read_file(file) for file in files]

    def _batches_of_files(self) -> Generator[list[str], None, None]:
        size = self.task.batch_size
        while True:
            files = random.sample(self.files, len(self.files))
            yield from (files[start : start + size] for start in range(0, len(files) - size + 1, size))

    def batches(self) -> Iterator[Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms import v2

        task, augment = self.task, self.task.augment
        # Each worker one batch ahead.
        wanted = self._batches_of_files()
        reading = [self.threads.submit(self._read, next(wanted)) for _ in range(max(1, task.threads))]
        window = _tensor_transform(task, normalises=False)
        finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.mean, augment.std)])
        while True:
            read = reading.pop(0).result()
            reading.append(self.threads.submit(self._read, next(wanted)))
            decoded = decode_jpeg(read, mode=ImageReadMode.RGB, device=task.device)
            yield finish(torch.stack([window(photograph) for photograph in decoded]))

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (TorchPil, TorchDecodeJpeg, TorchCodec, SpdlDecodeJpeg, TorchvisionGpu, DaliPlain)
}
