"""One frozen dataclass says a whole run. It is filled from a preset (strict YAML), then from the command line.

Daily settings are flat; the others stand in sections (`--optimizer.weight-decay 0.05`, or in YAML
`optimizer: {weight_decay: 0.05}`). An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from fastddr.errors import UserError, nearest

MODELS = ("convmixer", "cnn", "resnet")
#: Means and standard deviations of ImageNet's RGB values in [0, 1], the field's habit for fundus photographs too.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ConvMixerConfig:
    """ConvMixer-dim/depth with kernel k and patch p (Trockman and Kolter, 2022)."""

    dim: int = 512
    """Channels of every layer."""
    depth: int = 12
    """How many ConvMixer layers."""
    kernel_size: int = 9
    """Side of the depthwise kernel; odd."""
    patch_size: int = 8
    """Side of a patch in pixels; a layer sees a map of image_size / patch_size a side."""


@dataclass(frozen=True)
class CNNConfig:
    """The report's plain CNN: packages of convolution, ReLU and pooling, then one fully connected layer."""

    blocks: int = 2
    """How many packages; each halves the map."""
    width: int = 32
    """Channels of the first package; each further one doubles them."""


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network (He et al., 2016) of any depth."""

    depth: int = 18
    """Weighted layers: 18, 34, 50, 101, 152, or any other that the blocks can make, 40 for one."""
    width: int = 64
    """Channels of the first stage."""
    stem: Literal["standard", "stride1"] = "standard"
    """`stride1` keeps the full resolution after the first convolution: about 13 times the memory."""


@dataclass(frozen=True)
class AugmentConfig:
    """What varies from epoch to epoch. All of it is one affine map and one colour map a photograph."""

    hflip: bool = True
    """Mirror left and right, with probability 1/2."""
    vflip: bool = True
    """Mirror top and bottom, with probability 1/2."""
    rotate: float = 0.0
    """Rotate by up to so many degrees either way."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Scale by a factor from this range."""
    brightness: float = 0.0
    """Multiply by up to 1 ± this."""
    contrast: float = 0.0
    """Stretch about the mean colour by up to 1 ± this."""
    saturation: float = 0.0
    """Stretch about the grey axis by up to 1 ± this."""
    hue: float = 0.0
    """Turn about the grey axis by up to this share of a full turn either way."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by, after that."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """`sgd` is with Nesterov momentum."""
    weight_decay: float = 0.0
    """Not applied to biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam and AdamW."""
    momentum: float = 0.9
    """Of SGD."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The course of the learning rate after the warm-up."""
    warmup_ratio: float = 0.0
    """Share of all steps over which the learning rate rises linearly."""
    clip_norm: float | None = None
    """Clip the gradient to this global L2 norm."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate that one."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: cross-entropy."""

    label_smoothing: float = 0.0
    """Share of the target spread over all grades."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How a split is scored."""

    field: Literal["center", "full"] = "center"
    """`center`: the centre window of the canvas. `full`: the same on a canvas as small as the window, so that
    its short side is seen whole."""
    batch_size: int | None = None
    """Photographs a rank holds at once; by default the training micro batch."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where the figures go besides metrics.jsonl, which is always written."""

    wandb: bool = True
    """Weights & Biases; offline when there is no login or no network."""
    tensorboard: bool = True
    """TensorBoard files in the run folder."""
    project: str = "fastddr"
    """The W&B project."""
    log_every_steps: int = 10
    """Steps between two lines of training figures; each epoch ends with one too."""


@dataclass(frozen=True)
class LoadingConfig:
    """How photographs get into the batch. Never changes what is in it."""

    threads: int | None = None
    """Decoding threads (DALI) or worker processes (torchvision); by default the cores of this rank."""
    prefetch: int = 2
    """Batches decoded ahead."""


@dataclass(frozen=True)
class SyntheticConfig:
    """The built-in data set, made once in the user's cache when `--data synthetic`."""

    photographs: int | None = None
    """How many, in DDR's own proportions of split and grade; by default a small, flatter set."""
    size: int = 512
    """Side of a photograph in pixels."""
    seed: int = 0
    """Of the photographs; the run's own seed leaves them alone."""


@dataclass(frozen=True)
class Config:
    """Train a grader of diabetic retinopathy. Without arguments: a small ConvMixer on built-in synthetic data."""

    preset: str = "quickstart"
    """Name of a preset, or a YAML file (a run's config.yaml repeats that run)."""
    data: str = "synthetic"
    """Folder of the photographs (DDR-dataset, DR_grading, or class folders), or `synthetic`."""
    run_dir: str | None = None
    """Folder of the run; an existing one is resumed. By default a new runs/PRESET-DATA-TIME."""
    model: Literal["convmixer", "cnn", "resnet"] = "convmixer"
    """Which model; its settings stand in the section of that name."""
    epochs: int = 98
    """Passes over the training split."""
    batch_size: int = 64
    """The global batch: photographs in one optimizer step, over all ranks."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Photographs that one rank holds at once; gradients are accumulated up to the global batch. `auto`: all of the
    rank's part of the global batch."""
    image_size: int = 256
    """Side of the window that the model sees, in pixels."""
    canvas: int = 512
    """Short side, in pixels, to which every photograph is scaled before the window is cut."""
    lr: float = 1e-3
    """Peak learning rate."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the card has it, else fp16, fp32 on a CPU."""
    loader: Literal["auto", "dali", "torchvision", "replay"] = "auto"
    """`auto`: dali where it is installed, else torchvision. `replay` repeats one batch: a benchmark's ceiling."""
    seed: int = 0
    """Of weights, order, windows and colours."""
    save_every_steps: int | None = None
    """Also save a checkpoint every so many steps; always one after each epoch."""
    threads: int | None = None
    """Intra-op threads of PyTorch; by default the cores of this rank. Part of the run's identity: on a CPU the last
    bits of the weights depend on it."""
    deterministic: bool = False
    """On a GPU use only deterministic algorithms (slower). A CPU run is deterministic anyway."""
    convmixer: ConvMixerConfig = field(default_factory=ConvMixerConfig)
    cnn: CNNConfig = field(default_factory=CNNConfig)
    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The settings of the chosen model, as keywords."""
        return asdict(getattr(self, self.model))


#: Keys that may change when a run is resumed. All others are the run's identity. The data may move: what
#: holds it to the run is the manifest's fingerprint, not its path.
RUNTIME_KEYS = ("preset", "data", "run_dir", "save_every_steps", "tracking", "loading", "evaluation.batch_size")


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if is_dataclass(value):
            for f in fields(value):
                walk(f"{prefix}.{f.name}" if prefix else f.name, getattr(value, f.name))
        else:
            flat[prefix] = value

    walk("", config)
    return flat


def identity_changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Identity keys in which two configurations differ: key to (old, new)."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before[key], after[key])
        for key in before
        if before[key] != after[key] and not any(key == r or key.startswith(r + ".") for r in RUNTIME_KEYS)
    }


# ---------------------------------------------------------------------------------------------- YAML


_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML, but a key that stands twice is an error and not the last one's gain."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for a string; here it is the number that everybody means.
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-.0123456789"))


def _known_keys(cls: Any, prefix: str = "") -> list[str]:
    default = cls()
    keys = []
    for f in fields(cls):
        value = getattr(default, f.name)
        keys.append(prefix + f.name)
        if is_dataclass(value):
            keys.extend(_known_keys(type(value), f"{prefix}{f.name}."))
    return keys


def from_mapping(tree: Mapping[str, Any], where: str, base: Config | None = None) -> Config:
    """A configuration from nested mappings laid over `base`.

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong kind.
    """
    from pydantic import TypeAdapter, ValidationError

    def overlay(below: dict[str, Any], above: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        for key, value in above.items():
            dotted = f"{prefix}{key}"
            if key not in below:
                raise UserError(f"{where}: unknown key {dotted!r}; {nearest(dotted, _known_keys(Config))}")
            if isinstance(below[key], dict):
                if not isinstance(value, Mapping):
                    raise UserError(f"{where}: {dotted!r} is a section and needs keys below it, not {value!r}.")
                below[key] = overlay(below[key], value, dotted + ".")
            else:
                below[key] = value
        return below

    merged = overlay(asdict(base or Config()), tree, "")
    try:
        # Through JSON, so that a YAML list may fill a tuple while everything else stays strict.
        config: Config = TypeAdapter(Config).validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _field_names())
        raise UserError(f"{where}: {key}: {first['msg']}, but it is {first['input']!r}.") from None
    return check(config, where)


def _field_names() -> set[str]:
    return {part for key in _known_keys(Config) for part in key.split(".")}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping. Raises `UserError` where it is missing or is not one."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"{path}: the configuration cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this is not YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is `key: value` lines, not a {type(tree).__name__}.")
    return tree


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("fastddr") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> Config:
    """The configuration of a preset of the package, or of a YAML file.

    Raises:
        UserError: no such preset or file, or something in it is wrong.
    """
    if name in preset_names():
        with resources.as_file(resources.files("fastddr") / "presets" / f"{name}.yaml") as path:
            return replace(from_mapping(read_yaml(path), f"preset {name}"), preset=name)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise UserError(f"--preset {name}: there is no such file.")
        # Its folder is left behind: only an explicit --run-dir goes on with an earlier run.
        return replace(from_mapping(read_yaml(Path(name)), name), run_dir=None)
    raise UserError(f"--preset {name}: there is no such preset; {nearest(name, preset_names())}")


def dump(config: Config) -> str:
    """The configuration as YAML that `load_preset` reads back to an equal one."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------- checks


def check(config: Config, where: str) -> Config:
    """The same configuration, if its values make sense together.

    Raises:
        UserError: a value that cannot be, naming its key and where it was given.
    """

    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise UserError(f"{where}: {sentence}")

    for key in ("epochs", "batch_size", "image_size", "canvas"):
        need(getattr(config, key) >= 1, f"{key} is {getattr(config, key)}, but must be at least 1.")
    for key in ("save_every_steps", "threads", "loading.threads", "evaluation.batch_size", "synthetic.photographs"):
        value = flatten(config)[key]
        need(value is None or value >= 1, f"{key} is {value}, but must be at least 1.")
    micro = config.micro_batch_size
    need(micro == "auto" or micro >= 1, f"micro_batch_size is {micro}, but must be auto or at least 1.")
    need(
        config.image_size <= config.canvas,
        f"image_size {config.image_size} is larger than canvas {config.canvas}; "
        "a window must fit its canvas: raise canvas or lower image_size.",
    )
    need(config.lr > 0, f"lr is {config.lr}, but must be above 0.")
    need(0 <= config.seed < 2**63, f"seed is {config.seed}, but must be from 0 to 2^63 - 1.")
    need(config.loading.prefetch >= 1, f"loading.prefetch is {config.loading.prefetch}, but must be at least 1.")
    need(config.tracking.log_every_steps >= 1, "tracking.log_every_steps must be at least 1.")
    low, high = config.augment.scale
    need(
        0.8 <= low <= high,
        f"augment.scale is {low} to {high}, but must rise from at least 0.8: a map that shrinks by more than "
        "1.25 would alias; for a wider view take a smaller canvas.",
    )
    for key in ("brightness", "contrast", "saturation"):
        value = getattr(config.augment, key)
        need(0 <= value <= 1, f"augment.{key} is {value}, but must be from 0 to 1.")
    need(0 <= config.augment.hue <= 0.5, f"augment.hue is {config.augment.hue}, but must be from 0 to 0.5.")
    need(0 <= config.augment.rotate <= 180, f"augment.rotate is {config.augment.rotate}, but must be 0 to 180.")
    need(min(config.augment.std) > 0, f"augment.std is {config.augment.std}, but must be above 0.")
    need(0 <= config.loss.label_smoothing < 1, "loss.label_smoothing must be from 0 to below 1.")
    ratio = config.optimizer.warmup_ratio
    need(0 <= ratio < 1, f"optimizer.warmup_ratio is {ratio}, but must be from 0 to below 1.")
    clip = config.optimizer.clip_norm
    need(clip is None or clip > 0, f"optimizer.clip_norm is {clip}, but must be above 0.")
    ema = config.optimizer.ema_decay
    need(ema is None or 0 < ema < 1, f"optimizer.ema_decay is {ema}, but must be between 0 and 1.")
    return config
