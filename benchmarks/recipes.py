"""Whole training loops on the same photographs: fastddr's own, and those of others as their users would set them up.

All train the same model (same layers, same sizes) on windows of the same size of the same class folders, and leave the
epoch's last, partial batch to their own habit; images are counted as trained.

`fastddr` is the `Trainer` itself, its log lines and progress bar included; validation and checkpoints are between the
epochs and not timed. `report` is the way of the 2022 report that fastddr comes from: `ImageFolder`, Pillow,
`RandomCrop`, flips, `ToTensor`, a `DataLoader`, eager float32 in PyTorch's default layout, Adam. `torchvision` is the
loop of torchvision's classification reference (`RandomResizedCrop` by tensors, SGD, float16 autocast with `--amp`), and
`timm` that of timm's training script (its loader with prefetcher, autocast, its optimizer and model), both made of the
installed package, since the scripts are not in it. Their random resized crop is held to one size, so that they cut the
same windows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastddr import models
from fastddr.config import Config
from fastddr.data import manifest
from fastddr.data.grades import UNGRADABLE
from fastddr.errors import UserError
from fastddr.evaluation.metrics import figures
from fastddr.meters import Waited
from fastddr.ranks import available_cores


@dataclass(frozen=True)
class Case:
    """What is trained, on what."""

    root: str
    """Class folders: {train,valid,test}/{0..4}/*.jpg."""
    config: Config
    resized: bool
    """Whether the photographs are not as large as the canvas, and must be scaled."""
    endless: bool = True
    """Train for as many epochs as are asked for; else the learning rate ends with the configuration's epochs."""


class Epoch(NamedTuple):
    """What one epoch came to."""

    images: int
    seconds: float
    waited: float
    """Of these, seconds for which the host waited for data."""


class Recipe(ABC):
    """A training loop, epoch by epoch."""

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, case: Case, options: Mapping[str, str]) -> None:
        self.case, self.config = case, case.config
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.free = self._free()
        self.workers = int(options.get("workers", available_cores()))

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here; None if it can."""
        return None

    @abstractmethod
    def _train(self) -> tuple[int, float]:
        """One epoch: (images, seconds waited)."""

    @abstractmethod
    def score(self) -> float:
        """Quadratic-weighted kappa on valid."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything."""

    def about(self) -> dict[str, Any]:
        """What was chosen for it, for its row."""
        return {}

    def epoch(self) -> Epoch:
        """Train for one epoch, and wait for the device at its end."""
        began = time.perf_counter()
        images, waited = self._train()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return Epoch(images, time.perf_counter() - began, waited)

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def vram(self) -> dict[str, int]:
        """Bytes of the GPU: the allocator's peaks, and all that it has taken since the process began; {} on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
            "taken": self.free - self._free(),
        }


class Fastddr(Recipe):
    """The trainer, with a loader of its own or by `auto`."""

    options = ("loader", "workers", "store")

    def __init__(self, case: Case, options: Mapping[str, str]) -> None:
        super().__init__(case, options)
        from fastddr.trainer import Trainer

        self.folder = tempfile.mkdtemp()
        config = replace(
            case.config,
            data=case.root,
            loader=options.get("loader", "auto"),  # type: ignore[arg-type]
            run_dir=os.path.join(self.folder, "run"),
            # Every run has checked its photographs once; that is not what is measured.
            check="header",
            epochs=1_000_000 if case.endless else case.config.epochs,
            tracking=replace(case.config.tracking, wandb=False),
            loading=replace(
                case.config.loading,
                threads=self.workers if "workers" in options else None,
                store=options.get("store", "auto"),  # type: ignore[arg-type]
            ),
        )
        # What it prints is for the reader of a run.
        self.silence = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until close()
        with contextlib.redirect_stdout(self.silence):
            self.trainer = Trainer(config).__enter__()

    def about(self) -> dict[str, Any]:
        choice = self.trainer.loaders.choice  # type: ignore[union-attr]
        kept = {"store": choice.store} if choice.loader == "resident" else {}
        return {"loader": choice.loader, **kept, "runs_in": self.trainer.runtime.precision}

    def _train(self) -> tuple[int, float]:
        with contextlib.redirect_stdout(self.silence):
            waited = self.trainer.train_epoch()
        return self.trainer.steps_per_epoch * self.config.batch_size, waited

    def score(self) -> float:
        with contextlib.redirect_stdout(self.silence):
            return float(self.trainer.validate()["qwk"] or 0.0)

    def close(self) -> None:
        with contextlib.redirect_stdout(self.silence):
            self.trainer.close()
        self.silence.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Loop(Recipe):
    """A loop of one's own in PyTorch."""

    model: nn.Module
    loader: Iterable[Any]
    valid: Iterable[Any]

    def build_model(self) -> nn.Module:
        """The configuration's model, in PyTorch's default layout."""
        config = self.config
        torch.manual_seed(config.seed)
        model = models.build(
            config.model, num_classes=config.num_classes, image_size=config.image_size, **config.model_settings
        )
        return model.to(self.device, memory_format=torch.contiguous_format)

    def folder(self, split: str, transform: Any) -> Any:
        """torchvision's ImageFolder of a split."""
        from torchvision.datasets import ImageFolder

        return ImageFolder(os.path.join(self.case.root, split), transform)

    def window_share(self) -> tuple[float, float]:
        """The `scale` of a random resized crop that cuts the windows of the configuration: their share of the area."""
        share = (self.config.image_size / self.config.canvas) ** 2
        return share, share

    @property
    def half(self) -> bool:
        """Whether the configuration trains in half precision."""
        return self.config.precision in ("bf16", "fp16") or (
            self.config.precision == "auto" and self.device.type == "cuda"
        )

    def _train(self) -> tuple[int, float]:
        self.model.train()
        batches = Waited(iter(self.loader))
        images = sum(self.step(image, grade) for image, grade in batches)
        return images, batches.waited

    @abstractmethod
    def step(self, image: Tensor, grade: Tensor) -> int:
        """Train on a batch as the loader gave it; the number of its images."""

    def score(self) -> float:
        self.model.eval()
        logits, grades = [], []
        with torch.inference_mode():
            for image, grade in self.valid:
                logits.append(self.model(image.to(self.device)).float().cpu())
                grades.append(grade.cpu())
        return float(figures(torch.cat(logits), torch.cat(grades))["qwk"] or 0.0)

    def close(self) -> None:
        # The only public way to end persistent workers.
        self.loader = self.valid = ()


def _still(case: Case, normalize: bool) -> Any:
    """The centre window of the canvas, for validation."""
    from torchvision import transforms

    config, augment = case.config, case.config.augment
    steps: list[Any] = [transforms.Resize(config.canvas)] * case.resized
    steps += [transforms.CenterCrop(config.image_size), transforms.ToTensor()]
    return transforms.Compose(steps + [transforms.Normalize(augment.mean, augment.std)] * normalize)


class Report(_Loop):
    """The report's own way."""

    options = ("workers",)

    def __init__(self, case: Case, options: Mapping[str, str]) -> None:
        super().__init__(case, options)
        from torchvision import transforms

        config = case.config
        steps: list[Any] = [transforms.Resize(config.canvas)] * case.resized
        steps += [transforms.RandomCrop(config.image_size)]
        steps += [transforms.RandomHorizontalFlip()] * config.augment.hflip
        steps += [transforms.RandomVerticalFlip()] * config.augment.vflip
        train = self.folder("train", transforms.Compose([*steps, transforms.ToTensor()]))
        size, workers = config.batch_size, self.workers
        self.loader = DataLoader(train, batch_size=size, shuffle=True, num_workers=workers)
        self.valid = DataLoader(self.folder("valid", _still(case, False)), batch_size=size, num_workers=workers)
        self.model = self.build_model()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.loss = 0.0

    def step(self, image: Tensor, grade: Tensor) -> int:
        image, grade = image.to(self.device), grade.to(self.device)
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(image), grade)
        loss.backward()
        self.optimizer.step()
        self.loss += loss.item()
        return len(image)


class Torchvision(_Loop):
    """torchvision's classification reference, with `--amp` where the configuration trains in half precision."""

    options = ("workers",)

    def __init__(self, case: Case, options: Mapping[str, str]) -> None:
        super().__init__(case, options)
        from torchvision.transforms import InterpolationMode, v2

        config, augment = case.config, case.config.augment
        steps: list[Any] = [
            v2.RandomResizedCrop(
                config.image_size, scale=self.window_share(), ratio=(1.0, 1.0),
                interpolation=InterpolationMode.BILINEAR, antialias=True,
            )
        ]  # fmt: skip
        steps += [v2.RandomHorizontalFlip()] * augment.hflip + [v2.RandomVerticalFlip()] * augment.vflip
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.Normalize(augment.mean, augment.std)]
        common = {
            "batch_size": config.batch_size,
            "num_workers": self.workers,
            "pin_memory": self.device.type == "cuda",
        }
        self.loader = DataLoader(self.folder("train", v2.Compose(steps)), shuffle=True, **common)  # type: ignore[arg-type]
        self.valid = DataLoader(self.folder("valid", _still(case, True)), **common)  # type: ignore[arg-type]
        self.model = self.build_model()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=0.9, weight_decay=1e-4)
        amp = self.half and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda") if amp else None
        self.seen: list[float] = []

    def step(self, image: Tensor, grade: Tensor) -> int:
        image, grade = image.to(self.device), grade.to(self.device)
        with torch.amp.autocast("cuda", enabled=self.scaler is not None):
            output = self.model(image)
            loss = self.criterion(output, grade)
        self.optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        # Its logger reads loss and accuracy after each step.
        with torch.inference_mode():
            accuracy = (output.argmax(1) == grade).float().mean()
        self.seen = [loss.item(), accuracy.item()]
        return len(image)


class Timm(_Loop):
    """timm's training script, `--amp` where the configuration trains in half precision."""

    options = ("workers", "channels_last", "compile")
    #: Steps between two looks at the loss, of its script.
    log_interval = 50

    @classmethod
    def missing(cls) -> str | None:
        if find_spec("timm") is None:
            return 'timm is not installed; `pip install -e ".[peers]"`'
        return None

    def __init__(self, case: Case, options: Mapping[str, str]) -> None:
        super().__init__(case, options)
        from timm import optim, utils
        from timm.data import create_dataset, create_loader

        config, augment = case.config, case.config.augment
        self.dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
        common = {
            "input_size": (3, config.image_size, config.image_size), "batch_size": config.batch_size,
            "mean": augment.mean, "std": augment.std, "interpolation": "bilinear", "num_workers": self.workers,
            "pin_memory": True, "device": self.device,
        }  # fmt: skip
        if self.device.type == "cpu":
            common["pin_memory"] = False  # PyTorch warns that there is nothing to pin for
        self.loader = create_loader(
            create_dataset("", root=case.root, split="train", is_training=True), is_training=True,
            scale=self.window_share(), ratio=(1.0, 1.0), hflip=0.5 * augment.hflip, vflip=0.5 * augment.vflip,
            color_jitter=0.0, **common,
        )  # fmt: skip
        self.valid = create_loader(
            create_dataset("", root=case.root, split="valid"), crop_pct=config.image_size / config.canvas, **common
        )
        model = self.build_model()
        self.layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
        model = model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer: Any = optim.create_optimizer_v2(
            model, opt=config.optimizer.name if config.optimizer.name != "sgd" else "sgd", lr=config.lr,
            weight_decay=config.optimizer.weight_decay,
        )  # fmt: skip
        self.model = torch.compile(model) if "compile" in options else model  # type: ignore[assignment]
        self.criterion = nn.CrossEntropyLoss()
        self.scaler: Any = utils.NativeScaler() if self.half and self.dtype == torch.float16 else None
        self.losses, self.steps = utils.AverageMeter(), 0

    def build_model(self) -> nn.Module:
        config = self.config
        if config.model != "convmixer":
            return super().build_model()
        from timm.models.convmixer import ConvMixer

        wanted = config.convmixer
        torch.manual_seed(config.seed)
        return ConvMixer(
            wanted.dim, wanted.depth, kernel_size=wanted.kernel_size, patch_size=wanted.patch_size,
            num_classes=config.num_classes,
        ).to(self.device)  # fmt: skip

    def step(self, image: Tensor, grade: Tensor) -> int:
        image = image.contiguous(memory_format=self.layout)
        with torch.amp.autocast(self.device.type, dtype=self.dtype, enabled=self.half):
            loss = self.criterion(self.model(image), grade)
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, parameters=self.model.parameters())
        else:
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.steps % self.log_interval == 0:
            self.losses.update(loss.item(), len(image))
        return len(image)


RECIPES: dict[str, type[Recipe]] = {
    "fastddr": Fastddr, "report": Report, "torchvision": Torchvision, "timm": Timm,
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A recipe and its options."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From `NAME[:OPTION[,OPTION]]`: `fastddr:loader=dali`, `report:workers=0`, `timm:channels_last,compile`.

        Raises:
            UserError: there is no such recipe or option.
        """
        name, _, rest = text.partition(":")
        if name not in RECIPES:
            raise UserError(f"--recipes {text}: known are {', '.join(RECIPES)}.")
        found = []
        for option in filter(None, rest.split(",")):
            key, _, value = option.partition("=")
            known = RECIPES[name].options
            if key not in known or (key == "workers" and not value.isdigit()):
                raise UserError(f"--recipes {text}: options of {name} are {', '.join(known)}; workers is a number.")
            found.append((key, value))
        return cls(name, tuple(found))

    @property
    def label(self) -> str:
        """How it is called in tables."""
        return ", ".join([self.name, *(value if key in ("loader", "store") else "=".join(filter(None, (key, value)))
                                       for key, value in self.options)])  # fmt: skip

    @property
    def kind(self) -> str:
        """Of its rows: `fastddr`, `ceiling` (one batch again and again), or `peer`."""
        if self.name != "fastddr":
            return "peer"
        return "ceiling" if dict(self.options).get("loader") == "replay" else "fastddr"


def make(spec: Spec, case: Case) -> Recipe:
    """The recipe, in the process that trains it.

    Raises:
        UserError: it cannot run here.
    """
    recipe = RECIPES[spec.name]
    missing = recipe.missing()
    if missing is not None:
        raise UserError(missing)
    # A peer's progress bars and loggers are nothing to read here; its errors are.
    sys.stdout.flush()
    return recipe(case, dict(spec.options))


def class_folders(root: Path, target: Path, length: int) -> int:
    """Link the graded photographs of a data set into {split}/{grade}/, which every loader reads; the size of train.

    `length` is the least number of training photographs: the list is repeated, each link a photograph of its own.
    0 = as it is.
    """
    found = manifest.read(root)
    files = found.files()
    sizes = {}
    for split in ("train", "valid", "test"):
        ids = [int(id_) for id_ in found.ids(split)]
        times = max(1, -(-length // len(ids))) if split == "train" and ids else 1
        for grade in range(UNGRADABLE):
            (target / split / str(grade)).mkdir(parents=True)
        for turn in range(times):
            for id_ in ids:
                file = Path(files[id_]).resolve()
                link = target / split / str(found.grade[id_]) / f"{turn:03d}-{id_:06d}{file.suffix.lower()}"
                try:
                    os.link(file, link)
                except OSError:  # another file system
                    link.symlink_to(file)
        sizes[split] = times * len(ids)
    return sizes["train"]
