"""Whole training loops on the same photographs: fastddr's own, and those of others as their users would set them up.

All train the same model (same layers, same sizes) on windows of the same size of the same class folders, and leave the
epoch's last, partial batch to their own habit; images are counted as trained.

`fastddr` is the `Trainer` itself, its log lines and progress bar included; validation and checkpoints are between the
epochs and not timed. `report` is the way of the 2022 report that fastddr comes from: `ImageFolder`, Pillow,
`RandomCrop`, flips, `ToTensor`, a `DataLoader`, eager float32 in PyTorch's default layout, Adam. `torchvision` is the
loop of torchvision's classification reference (`RandomResizedCrop` of PIL images, SGD, `--amp`), and
`timm` that of timm's training script (its loader with prefetcher, autocast, its optimizer and model), both made of the
installed package, since the scripts are not in it. Their random resized crop is held to one size, so that they cut the
same windows. `channels_last` lays out a peer's network and its batches in that order, which their users do not have to
do but would, where it is faster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import script
from loops import Report, Timm, Torchvision
from recipe import Case, Recipe

from fastddr.errors import UserError


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
            follow_links=True,  # of `class_folders`, where the file system has no other
            loader=options.get("loader", "auto"),  # type: ignore[arg-type]  # `loaders.build` refuses others
            run_dir=os.path.join(self.folder, "run"),
            # Every run has checked its photographs once; that is not what is measured.
            check="header",
            epochs=1_000_000 if case.endless else case.config.epochs,
            tracking=replace(case.config.tracking, wandb=False),
            loading=replace(
                case.config.loading,
                threads=self.workers if "workers" in options else None,
                store=options.get("store", "auto"),  # type: ignore[arg-type]  # as above
            ),
        )
        # What it prints is for the reader of a run.
        self.silence = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until close()
        with contextlib.redirect_stdout(self.silence):
            self.trainer = Trainer(config).__enter__()

    def about(self) -> dict[str, Any]:
        assert self.trainer.loaders is not None
        choice = self.trainer.loaders.choice
        kept = {"store": choice.store} if choice.loader == "resident" else {}
        chosen = {"runs_in": self.trainer.runtime.precision, "micro_batch_size": self.trainer.runtime.micro_batch_size}
        return {"loader": choice.loader, **kept, **chosen}

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


RECIPES: dict[str, type[Recipe]] = {
    "fastddr": Fastddr, "report": Report, "torchvision": Torchvision, "timm": Timm,
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A recipe and its options."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From `NAME[:OPTION[,OPTION]]`: `fastddr:loader=dali`, `report:workers=0`, `timm:channels_last,compile`.

        Raises:
            UserError: there is no such recipe or option.
        """
        name, options = script.named("--recipes", text, RECIPES)
        known = RECIPES[name].options
        if not options.keys() <= set(known) or not options.get("workers", "0").isdigit():
            raise UserError(f"--recipes {text}: options of {name} are {', '.join(known)}; workers is a number.")
        return cls(name, options)

    @property
    def label(self) -> str:
        """How it is called in tables."""
        return ", ".join([self.name, *(value if key in ("loader", "store") else "=".join(filter(None, (key, value)))
                                       for key, value in self.options.items())])  # fmt: skip

    @property
    def kind(self) -> str:
        """Of its rows: `fastddr`, `ceiling` (one batch again and again), or `peer`."""
        if self.name != "fastddr":
            return "peer"
        return "ceiling" if self.options.get("loader") == "replay" else "fastddr"


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
    return recipe(case, spec.options)
