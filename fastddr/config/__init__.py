"""One frozen dataclass says a whole run. It is filled from a preset (strict YAML), then from the command line.

Daily settings are flat; the others stand in sections (`--optimizer.weight-decay 0.05`, or in YAML
`optimizer: {weight_decay: 0.05}`). An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fastddr.config import strict
from fastddr.config.augment import check_augment
from fastddr.config.sections import (
    SIZES,
    AugmentConfig,
    CNNConfig,
    ConvMixerConfig,
    EvaluationConfig,
    LoadingConfig,
    LossConfig,
    MemoryConfig,
    OptimizerConfig,
    ResNetConfig,
    SplitConfig,
    SyntheticConfig,
    TrackingConfig,
    governed,
    sized,
)  # fmt: skip
from fastddr.errors import UserError, nearest, need

#: Models of our own, each with a section of its name; `timm:` before a name is one of timm's.
MODELS = ("convmixer", "cnn", "resnet")


@dataclass(frozen=True)
class Config:
    """Train a grader of diabetic retinopathy. Without arguments: a small ConvMixer on built-in synthetic data."""

    preset: str = "quickstart"
    """Name of a preset, or a YAML file (a run's config.yaml repeats that run); from Python `load_preset` reads it."""
    data: str = "synthetic"
    """Folder of the photographs (any layout of DDR, class folders), a label table (.csv), or `synthetic`."""
    exclude: str | None = None
    """List of photographs to leave out: what `fastddr check --fix-list` writes, or a path a line."""
    on_bad: Literal["raise", "exclude"] = "raise"
    """A photograph or label that cannot be used: stop before the first step, or leave it out and list it in the
    report."""
    follow_links: bool = False
    """Also read photographs to which links lead out of the data folder."""
    check: Literal["full", "header"] = "full"
    """`full`: what was never decoded is decoded once before the first step, and remembered. `header`: only the
    headers are read, so a damaged photograph stops the run when it is met."""
    ungradable: Literal["exclude", "class"] = "exclude"
    """Photographs of grade 5: left out, or a sixth class."""
    run_dir: str | None = None
    """Folder of the run; an existing one is resumed. By default a new runs/PRESET-DATA-TIME."""
    model: str = "convmixer"
    """`convmixer`, `cnn` or `resnet`, whose settings stand in the section of that name; or `timm:NAME`, any model of
    timm's (pip install -e ".[timm]")."""
    init: str | None = None
    """Weights to begin at: `imagenet` (published for this model), a file (safetensors or a state dict), or `run:NAME`
    (the best weights of runs/NAME or of a run's folder); by default random ones."""
    epochs: int = 98
    """Passes over the training split."""
    batch_size: int = 64
    """The global batch: photographs in one optimizer step, over all ranks."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Photographs that one rank holds at once; gradients are accumulated up to the global batch. `auto`: all of the
    rank's part of the global batch, on a GPU as much of it as fits."""
    image_size: int = 256
    """Side of the window that the model sees, in pixels."""
    canvas: int = 512
    """Short side, in pixels, to which every photograph is scaled before the window is cut."""
    lr: float = 1e-3
    """Peak learning rate."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the card has it, else fp16; fp32 on a CPU and on a GTX 16."""
    loader: Literal["auto", "dali", "resident", "torchvision", "replay"] = "auto"
    """`resident` decodes once and keeps; `dali` and `torchvision` decode in every epoch. `auto`: resident where the
    photographs fit, else dali, else torchvision. `replay` repeats one batch: a benchmark's ceiling."""
    seed: int = 0
    """Of weights, order, windows and colours."""
    save_every_steps: int | None = None
    """Also save a checkpoint every so many steps."""
    save_every_minutes: float | None = None
    """Also save a checkpoint when the last one is so many minutes old."""
    save_every_epochs: int = 1
    """Save a checkpoint after every so many epochs; always after the best one so far, and after the last."""
    keep_checkpoints: int = 1
    """How many of the newest checkpoints stay, besides the best."""
    rank_timeout_minutes: float = 10.0
    """With several ranks, one that does not answer for so many minutes is taken for frozen, and the run ends."""
    max_hours: float | None = None
    """Save and end after so many hours, to go on later with the same --run-dir."""
    sync_batchnorm: bool = False
    """With several GPUs: BatchNorm takes its statistics over the photographs of all ranks, not of each by itself."""
    threads: int | None = None
    """Intra-op threads of PyTorch; by default the cores of this rank. Part of the run's identity: on a CPU the last
    bits of the weights depend on it."""
    deterministic: bool = False
    """On a GPU use only deterministic algorithms (slower). A CPU run is deterministic anyway."""
    compile: bool = False
    """Train under torch.compile: a slow start, then faster steps where it pays. Scoring stays as it is."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    convmixer: ConvMixerConfig = field(default_factory=ConvMixerConfig)
    cnn: CNNConfig = field(default_factory=CNNConfig)
    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    splitting: SplitConfig = field(default_factory=SplitConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    @property
    def num_classes(self) -> int:
        """Classes that the model tells apart: the five grades of ICDR, and ungradable where it is a class."""
        return 6 if self.ungradable == "class" else 5

    @property
    def outputs(self) -> int:
        """Numbers that the model gives for a photograph: one logit a class, or one value."""
        return 1 if self.loss.name == "mse" else self.num_classes

    @property
    def model_settings(self) -> dict[str, Any]:
        """The settings of the chosen model, as keywords; timm's have none here."""
        settings = asdict(getattr(self, self.model)) if self.model in MODELS else {}
        return {key: value for key, value in settings.items() if key != "size"}


#: Keys that may change when a run is resumed. All others are the run's identity. The data may move: what
#: holds it to the run is the manifest's fingerprint, not its path, nor how it was checked and what was left out.
#: Of a policy and of a size only the values count, which are keys of their own.
RUNTIME_KEYS = (
    "preset", "data", "exclude", "on_bad", "follow_links", "check", "run_dir", "save_every_steps", "save_every_minutes",
    "save_every_epochs", "keep_checkpoints", "rank_timeout_minutes", "max_hours", "tracking", "loading",
    "evaluation.batch_size", "augment.policy", "optimizer.on_nonfinite", "convmixer.size", "memory.checkpointing",
)  # fmt: skip


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested mappings by its dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def may_change(key: str) -> bool:
    """Whether a dotted key may be another one when a run is resumed; all others are its identity."""
    return any(key == own or key.startswith(f"{own}.") for own in RUNTIME_KEYS)


def identity_changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Identity keys in which two configurations differ: key to (old, new)."""
    before, after = flatten(asdict(old)), flatten(asdict(new))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key] and not may_change(key)}


# ---------------------------------------------------------------------------------------------- YAML


def _known_keys() -> set[str]:
    tree = asdict(Config())
    return {*tree, *flatten(tree)}


def from_mapping(tree: Mapping[str, Any], where: str, base: Config | None = None) -> Config:
    """A configuration from nested mappings laid over `base`.

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong kind.
    """
    from pydantic import ValidationError

    def plain(value: Any) -> Any:
        """What JSON does not know: a number of NumPy's as Python's own, and a path as text."""
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if getattr(value, "ndim", None) == 0:
            return value.item()
        raise UserError(f"{where}: {value!r} is no value of a setting.")

    def overlay(below: dict[str, Any], above: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        if prefix == "augment.":
            # A layer that names a policy begins at that policy; its other keys lie over it, in any order.
            below |= governed(above.get("policy"))
        if prefix == "convmixer.":
            below |= sized(above.get("size"))
        for key, value in above.items():
            dotted = f"{prefix}{key}"
            if key not in below:
                raise UserError(f"{where}: unknown key {dotted!r}; {nearest(dotted, _known_keys())}")
            if isinstance(below[key], dict):
                if not isinstance(value, Mapping):
                    raise UserError(f"{where}: {dotted!r} is a section and needs keys below it, not {value!r}.")
                below[key] = overlay(below[key], value, dotted + ".")
            else:
                if isinstance(value, str | Path):
                    check_text(str(value), f"{where}: {dotted}")
                if isinstance(value, int) and value.bit_length() > strict.BITS:
                    raise UserError(f"{where}: {dotted} is a number of too many digits.")
                below[key] = value
        return below

    if not isinstance(tree, Mapping):
        raise UserError(f"{where} must be a mapping of keys to values, not {tree!r}.")
    merged = overlay(asdict(base or Config()), tree, "")
    try:
        # Through JSON, so that a YAML list may fill a tuple while everything else stays strict.
        config: Config = _validator().validate_json(json.dumps(merged, default=plain), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        names = {part for key in _known_keys() for part in key.split(".")}
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in names)
        raise UserError(f"{where}: {key}: {first['msg']}, but it is {first['input']!r}.") from None
    return check(config, where)


@cache
def _validator() -> Any:
    """Made once: it takes longer than all that it validates."""
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("fastddr") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def checked(config: object, where: str) -> Config:
    """A configuration that was made in Python, as YAML would have made it: with plain values of the right kind.

    Raises:
        UserError: it is none, or something in it is wrong.
    """
    if not isinstance(config, Config):
        raise UserError(f"{where} is {config!r}, but must be a Config; load_preset(NAME) makes one.")
    return from_mapping(asdict(config), where)


def load_preset(name: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset of the package, or of a YAML file, with changes laid over it.

    Args:
        name: of the preset, or the file.
        changes: as a YAML file has them, `{"epochs": 3, "augment": {"policy": "fundus"}}`: there a policy, and a size
            of the ConvMixer, sets all that it governs.

    Raises:
        UserError: no such preset or file, or something in it is wrong.
    """
    base, where = _preset(str(name)), f"changes of preset {name}"
    if changes is None:
        return base
    changed = from_mapping(changes, where, base)
    _no_base(changes, where)
    return changed


def _preset(name: str) -> Config:
    if name in preset_names():
        with resources.as_file(resources.files("fastddr") / "presets" / f"{name}.yaml") as path:
            return replace(from_mapping(strict.read_yaml(path), f"preset {name}"), preset=name)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise UserError(f"--preset {name}: there is no such file.")
        # Its folder is left behind: only an explicit --run-dir goes on with an earlier run.
        tree = strict.read_yaml(Path(name))
        if "run_dir" not in tree:  # which every config.yaml has; there the preset is what the run was begun from
            _no_base(tree, name)
        return replace(from_mapping(tree, name), run_dir=None)
    raise UserError(f"--preset {name}: there is no such preset; {nearest(name, preset_names())}")


def _no_base(tree: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` where a layer names a preset, as if it began at that one's values."""
    if "preset" in tree:
        raise UserError(
            f"{where}: preset is {tree['preset']!r}, but a file or changes cannot begin at another preset; leave the "
            "key out, and write down the values."
        )


def dump(config: Config) -> str:
    """The configuration as YAML that `load_preset` reads back to an equal one."""
    return strict.write(asdict(config))


# ---------------------------------------------------------------------------------------------- checks


def check_text(value: str, what: str) -> None:
    """Raise `UserError` for a name that no config.yaml can hold: file systems have such, YAML and JSON do not."""
    if value.encode(errors="replace").decode() != value:
        raise UserError(f"{what} is {value!r}, which is no UTF-8; rename that folder or file, or give a link to it.")


def check_splitting(parts: SplitConfig) -> None:
    """Raise `UserError` unless the shares leave photographs for train and valid."""
    need(
        0 <= parts.test_share < 1 and 0 < parts.valid_share < 1 - parts.test_share,
        f"splitting.test_share is {parts.test_share} and splitting.valid_share {parts.valid_share}, but they must "
        "leave photographs for train and valid; lower one.",
    )


def _check_model(config: Config) -> None:
    """Raise `UserError` unless there may be such a model and its levers go together. What timm knows, it says later."""
    model, memory = config.model, config.memory
    family, _, size = model.partition("-")
    need(
        not (family == "convmixer" and size in SIZES),
        f"model {model} is said as model convmixer and convmixer.size {size}.",
    )
    need(
        model in MODELS or (model.startswith("timm:") and model != "timm:"),
        f"there is no model {model!r}; {nearest(model, [*MODELS, 'timm:NAME'])}",
    )
    need(config.init != "run:", f"init is {config.init!r}, but must be imagenet, a file, or run:NAME.")
    budget = memory.activation_budget
    need(0 < budget <= 1, f"memory.activation_budget is {budget}, but must be above 0 and at most 1.")
    need(
        budget == 1 or config.compile,
        "memory.activation_budget is the compiler's; set compile too, or take memory.checkpointing.",
    )
    need(
        not (memory.checkpointing and config.compile),
        "under compile the compiler chooses what is computed again; leave memory.checkpointing off and lower "
        "memory.activation_budget.",
    )


def _check_loss(config: Config) -> None:
    """Raise `UserError` unless the settings of the loss go together, and with what is graded."""
    loss = config.loss
    need(0 <= loss.label_smoothing < 1, "loss.label_smoothing must be from 0 to below 1.")
    need(0 <= loss.beta < 1, f"loss.beta is {loss.beta}, but must be from 0 to below 1.")
    if loss.name == "mse":
        need(
            config.ungradable == "exclude",
            "loss.name mse places photographs on the scale of grades, on which ungradable is no step; set ungradable "
            "to exclude, or loss.name to cross_entropy.",
        )
        need(
            config.evaluation.field != "multi",
            "loss.name mse fits its thresholds to one window of each photograph; set evaluation.field to center or "
            "full, and average windows afterwards with `fastddr evaluate --window multi`.",
        )
        need(
            loss.label_smoothing == 0 and loss.class_weights == "none",
            "loss.label_smoothing and loss.class_weights are of cross-entropy; leave them out, or set loss.name to "
            "cross_entropy.",
        )


def check(config: Config, where: str) -> Config:
    """The same configuration, if its values make sense together.

    Raises:
        UserError: a value that cannot be, naming its key and where it was given.
    """
    try:
        _check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _check(config: Config) -> None:
    flat = flatten(asdict(config))
    for key, value in flat.items():
        if isinstance(value, str):
            check_text(value, key)
    for key in ("data", "exclude", "run_dir", "init"):
        need(flat[key] != "", f"{key} is empty: leave it out, or see that the variable of the shell is set.")
    for key in (
        "epochs", "batch_size", "image_size", "canvas", "save_every_steps", "save_every_epochs", "keep_checkpoints",
        "threads", "loading.threads", "loading.prefetch", "evaluation.batch_size", "synthetic.photographs",
        "convmixer.dim", "convmixer.depth", "convmixer.kernel_size", "convmixer.patch_size", "cnn.blocks", "cnn.width",
        "resnet.depth", "resnet.width",
    ):  # fmt: skip
        value = flat[key]
        need(value is None or value >= 1, f"{key} is {value}, but must be at least 1.")
    for key in ("threads", "loading.threads"):
        need((flat[key] or 1) <= 4096, f"{key} is {flat[key]}, but no machine has so many cores.")
    micro = config.micro_batch_size
    need(micro == "auto" or micro >= 1, f"micro_batch_size is {micro}, but must be auto or at least 1.")
    need(
        config.image_size <= config.canvas,
        f"image_size {config.image_size} is larger than canvas {config.canvas}; "
        "a window must fit its canvas: raise canvas or lower image_size.",
    )
    for key in ("max_hours", "save_every_minutes", "rank_timeout_minutes"):
        value = getattr(config, key)
        need(value is None or value > 0, f"{key} is {value}, but must be above 0.")
    need(config.rank_timeout_minutes <= 1e6, f"rank_timeout_minutes is {config.rank_timeout_minutes}, above 1e6.")
    _check_model(config)
    need(0 < config.lr < math.inf, f"lr is {config.lr}, but must be above 0.")
    need(0 <= config.seed < 2**63, f"seed is {config.seed}, but must be from 0 to 2^63 - 1.")
    store = config.loading.store_gib
    need(store is None or 0 < store <= 1e9, f"loading.store_gib is {store}, but must be above 0 and at most 1e9.")
    check_splitting(config.splitting)
    need(config.tracking.log_every_steps >= 1, "tracking.log_every_steps must be at least 1.")
    check_augment(config.augment, config.image_size, config.canvas)
    if config.augment.mixup or config.augment.cutmix:
        need(
            config.batch_size > 1 and micro != 1,
            "augment.mixup and augment.cutmix mix the photographs of a micro batch, so it cannot be 1; raise "
            f"{'micro_batch_size' if config.batch_size > 1 else 'batch_size'} or set both to 0.",
        )
    _check_loss(config)
    ratio = config.optimizer.warmup_ratio
    need(0 <= ratio < 1, f"optimizer.warmup_ratio is {ratio}, but must be from 0 to below 1.")
    clip = config.optimizer.clip_norm
    need(clip is None or clip > 0, f"optimizer.clip_norm is {clip}, but must be above 0.")
    decay, betas, momentum = config.optimizer.weight_decay, config.optimizer.betas, config.optimizer.momentum
    need(0 <= decay < math.inf, f"optimizer.weight_decay is {decay}, but must be 0 or more.")
    need(all(0 <= beta < 1 for beta in betas), f"optimizer.betas are {betas}, but must be from 0 to below 1.")
    need(0 <= momentum < 1, f"optimizer.momentum is {momentum}, but must be from 0 to below 1.")
    ema = config.optimizer.ema_decay
    need(ema is None or 0 < ema < 1, f"optimizer.ema_decay is {ema}, but must be between 0 and 1.")
