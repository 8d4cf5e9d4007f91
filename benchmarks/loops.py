"""Others' training loops, as their users would set them up: the 2022 report's, torchvision's and timm's."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import networks
import torch
from recipe import Case, Recipe
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastddr import models, runtime
from fastddr.evaluation.metrics import figures
from fastddr.meters import Waited


class Loop(Recipe):
    """A loop of one's own in PyTorch."""

    model: nn.Module
    loader: Iterable[Any]
    valid: Iterable[Any]

    def __init__(self, case: Case, options: Mapping[str, str]) -> None:
        super().__init__(case, options)
        #: Of the maps: PyTorch's default, or the other, which a user has to ask for.
        self.layout = "NHWC" if "channels_last" in options else "NCHW"
        #: fp32, bf16 or fp16: `auto` is what fastddr would train in here.
        self.precision = self.chosen_precision()
        self.criterion = nn.CrossEntropyLoss()

    def chosen_precision(self) -> str:
        """What it trains in."""
        card = runtime.card_of(self.device) if self.device.type == "cuda" else (None, "")
        return runtime.choose_precision(self.config.precision, "", *card)[0]

    def about(self) -> dict[str, Any]:
        return {"runs_in": self.precision}

    def build_model(self) -> nn.Module:
        """The configuration's model, its maps in the loop's layout."""
        config = self.config
        torch.manual_seed(config.seed)
        model = models.build(
            config.model, num_classes=config.num_classes, image_size=config.image_size, **config.model_settings
        )
        return networks.lay_out(model, self.layout, self.device)

    def place(self, image: Tensor) -> Tensor:
        """A batch on the device, in the loop's layout."""
        return image.to(self.device).contiguous(memory_format=networks.LAYOUTS[self.layout])

    def folder(self, split: str, transform: Any) -> Any:
        """torchvision's ImageFolder of a split."""
        from torchvision.datasets import ImageFolder

        # A grade that a split lacks has a folder all the same.
        return ImageFolder(os.path.join(self.case.root, split), transform, allow_empty=True)

    def window_share(self) -> tuple[float, float]:
        """The `scale` of a random resized crop that cuts the windows of the configuration: their share of the area."""
        share = (self.config.image_size / self.config.canvas) ** 2
        return share, share

    def autocast(self) -> torch.amp.autocast:
        """Of the forward pass, in the loop's precision."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.amp.autocast(self.device.type, dtype=half, enabled=half is not None)

    def _train(self) -> tuple[int, float]:
        self.model.train()
        batches = Waited(_lazily(self.loader))
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
                logits.append(self.model(self.place(image)).float().cpu())
                grades.append(grade.cpu())
        return float(figures(torch.cat(logits), torch.cat(grades))["qwk"] or 0.0)

    def close(self) -> None:
        # The only public way to end persistent workers.
        self.loader = self.valid = ()


def _lazily(loader: Iterable[Any]) -> Iterator[Any]:
    """Its batches; what starts workers for them starts at the first `next`, which is waited for."""
    yield from loader


def _still(case: Case, normalize: bool) -> Any:
    """The centre window of the canvas, for validation."""
    from torchvision import transforms

    config, augment = case.config, case.config.augment
    steps: list[Any] = [transforms.Resize(config.canvas)] * case.resized
    steps += [transforms.CenterCrop(config.image_size), transforms.ToTensor()]
    return transforms.Compose(steps + [transforms.Normalize(augment.mean, augment.std)] * normalize)


class Report(Loop):
    """The report's own way."""

    options = ("workers", "channels_last")

    def chosen_precision(self) -> str:
        return "fp32"

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
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.loss = 0.0

    def step(self, image: Tensor, grade: Tensor) -> int:
        image, grade = self.place(image), grade.to(self.device)
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(image), grade)
        loss.backward()
        self.optimizer.step()
        self.loss += loss.item()
        return len(image)


class Torchvision(Loop):
    """torchvision's classification reference, with `--amp` where the configuration trains in half precision.

    Its own is float16 alone, with a scaler; here it is the one of the others, and without a scaler if that is bfloat16.
    """

    options = ("workers", "channels_last")

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
        pinned = self.device.type == "cuda"
        common = {"batch_size": config.batch_size, "num_workers": self.workers, "pin_memory": pinned}
        self.loader = DataLoader(self.folder("train", v2.Compose(steps)), shuffle=True, **common)
        self.valid = DataLoader(self.folder("valid", _still(case, True)), **common)
        self.model = self.build_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=0.9, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler("cuda") if self.precision == "fp16" else None
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.seen: list[float] = []

    def step(self, image: Tensor, grade: Tensor) -> int:
        image, grade = self.place(image), grade.to(self.device)
        with self.autocast():
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


class Timm(Loop):
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
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        common = {
            "input_size": (3, config.image_size, config.image_size), "batch_size": config.batch_size,
            "mean": augment.mean, "std": augment.std, "interpolation": "bilinear", "num_workers": self.workers,
            # On a CPU PyTorch warns that there is nothing to pin for.
            "pin_memory": self.device.type == "cuda", "device": self.device,
        }  # fmt: skip
        self.loader = create_loader(
            create_dataset("", root=case.root, split="train", is_training=True), is_training=True,
            scale=self.window_share(), ratio=(1.0, 1.0), hflip=0.5 * augment.hflip, vflip=0.5 * augment.vflip,
            color_jitter=0.0, **common,
        )  # fmt: skip
        self.valid = create_loader(
            create_dataset("", root=case.root, split="valid"), crop_pct=config.image_size / config.canvas, **common
        )
        model = self.build_model()
        self.optimizer: Any = optim.create_optimizer_v2(
            model, opt=config.optimizer.name, lr=config.lr, weight_decay=config.optimizer.weight_decay
        )
        # PyTorch types what it compiles as any callable; of a module it is a module.
        self.model = torch.compile(model) if "compile" in options else model  # type: ignore[assignment]
        self.scaler: Any = utils.NativeScaler() if self.precision == "fp16" else None
        self.losses, self.steps = utils.AverageMeter(), 0

    def build_model(self) -> nn.Module:
        config = self.config
        if config.model != "convmixer":
            return super().build_model()
        from timm.models.convmixer import ConvMixer

        wanted = config.convmixer
        torch.manual_seed(config.seed)
        model = ConvMixer(
            wanted.dim, wanted.depth, kernel_size=wanted.kernel_size, patch_size=wanted.patch_size,
            num_classes=config.num_classes, act_layer=nn.ReLU if wanted.activation == "relu" else nn.GELU,
        )  # fmt: skip
        return networks.lay_out(model, self.layout, self.device)

    def step(self, image: Tensor, grade: Tensor) -> int:
        image = self.place(image)
        with self.autocast():
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
