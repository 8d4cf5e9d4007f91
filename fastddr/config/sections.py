"""The sections of a configuration: a frozen dataclass each, with a sentence under each field."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

#: Means and standard deviations of ImageNet's RGB values in [0, 1], the field's habit for fundus photographs too.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Which window of a canvas is scored, and of which views the mean is taken (`EvaluationConfig`).
Field = Literal["center", "full", "multi"]
Views = Literal["none", "flips", "dihedral"]


@dataclass(frozen=True)
class ConvMixerConfig:
    """ConvMixer-dim/depth with kernel k and patch p (Trockman and Kolter, 2022)."""

    size: Literal["xs", "s", "m", "l"] | None = None
    """Sets all below at once (in Python through `load_preset` alone); what else is given lies over it. `xs` 128/8,
    `s` 256/8 and `m` 512/12 have kernel 7 and patch 8; `l` is the paper's 768/32 with kernel 7, patch 7 and ReLU, of
    which there are ImageNet weights."""
    dim: int = 512
    """Channels of every layer."""
    depth: int = 12
    """How many ConvMixer layers."""
    kernel_size: int = 9
    """Side of the depthwise kernel; odd."""
    patch_size: int = 8
    """Side of a patch in pixels; a layer sees a map of image_size / patch_size a side."""
    activation: Literal["gelu", "relu"] = "gelu"
    """The paper's is GELU, but for its 768/32."""


#: What each `convmixer.size` stands for.
SIZES = {
    "xs": ConvMixerConfig("xs", 128, 8, 7, 8),
    "s": ConvMixerConfig("s", 256, 8, 7, 8),
    "m": ConvMixerConfig("m", 512, 12, 7, 8),
    "l": ConvMixerConfig("l", 768, 32, 7, 7, "relu"),
}


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
    """`stride1` keeps the full resolution after the first convolution: maps of 16 times the pixels, and about as many
    times the memory (`fastddr plan` says how much)."""


@dataclass(frozen=True)
class MemoryConfig:
    """What a training step keeps on the card, and how it lies there."""

    checkpointing: bool = False
    """Keep only the input of each block, and compute the rest again in the backward pass: less memory, a third more
    work. On a CPU it changes no number."""
    activation_budget: float = 1.0
    """With --compile: share of the activations that the compiler may keep; below 1 it computes the others again."""
    layout: Literal["auto", "NHWC", "NCHW"] = "auto"
    """Order of maps: channels innermost (NHWC, PyTorch's channels_last), which most convolutions are fast with, or
    PyTorch's default. `auto` is NCHW on a GPU for a ConvMixer whose kernel is above 7, and else NHWC."""


@dataclass(frozen=True)
class AugmentConfig:
    """What varies from epoch to epoch: one affine map and one colour map a photograph, and mixing within a batch."""

    policy: Literal["none", "report", "fundus"] = "report"
    """Sets all maps below at once (in Python through `load_preset` alone); what else is given lies over it. `none`: the
    random window alone. `report`: with flips. `fundus`: also any rotation, scale 0.87 to 1.15 and mild colour."""
    hflip: bool = True
    """Mirror left and right, with probability 1/2."""
    vflip: bool = True
    """Mirror top and bottom, with probability 1/2."""
    rotate: float = 0.0
    """Rotate by up to so many degrees either way."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Scale by a factor from this range."""
    resized_crop: tuple[float, float] | None = None
    """Range of the window's area, as a share of the square of the canvas's short side; the window is resized to
    image_size. By default it has image_size itself, and nothing is resized."""
    ratio: tuple[float, float] = (1.0, 1.0)
    """Range of width to height of such a resized window."""
    translate: float = 0.0
    """Shift by up to this share of image_size either way, in both axes."""
    brightness: float = 0.0
    """Multiply by up to 1 ± this."""
    contrast: float = 0.0
    """Stretch about the mean colour by up to 1 ± this."""
    saturation: float = 0.0
    """Stretch about the grey axis by up to 1 ± this."""
    hue: float = 0.0
    """Turn about the grey axis by up to this share of a full turn either way."""
    mixup: float = 0.0
    """Blend pairs of photographs and of grades; the alpha of the Beta distribution of their shares. 0 = off."""
    cutmix: float = 0.0
    """Paste a box of one photograph into another, and mix their grades by area; alpha as in mixup. 0 = off. With both
    on, a fair coin decides for each micro batch."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by, after that."""


#: The settings of AugmentConfig that its `policy` sets: all that maps are drawn from. Mixing and normalisation are not.
GOVERNED = (
    "policy", "hflip", "vflip", "rotate", "scale", "resized_crop", "ratio", "translate", "brightness", "contrast",
    "saturation", "hue",
)  # fmt: skip

#: What each `augment.policy` stands for.
POLICIES = {
    "none": AugmentConfig(policy="none", hflip=False, vflip=False),
    "report": AugmentConfig(),
    # Flips, ±180°, 0.87-1.15 and mild colour: what lifted published graders of fundus photographs.
    "fundus": AugmentConfig(
        policy="fundus", rotate=180.0, scale=(0.87, 1.15), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02
    ),
}


def governed(policy: object) -> dict[str, Any]:
    """The settings that a policy of this name stands for; none where there is no such policy."""
    found = POLICIES.get(policy) if isinstance(policy, str) else None
    return {} if found is None else {key: getattr(found, key) for key in GOVERNED}


def sized(size: object) -> dict[str, Any]:
    """The settings of the ConvMixer that a size of this name stands for; none where there is no such size."""
    found = SIZES.get(size) if isinstance(size, str) else None
    return {} if found is None else asdict(found)


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
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite never changes the weights. `stop`: it ends the run, and its
    photographs are named; `skip`: it is counted, and training goes on."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    name: Literal["cross_entropy", "mse"] = "cross_entropy"
    """`mse`: the model gives one value for each photograph, and its squared distance to the grade is made small;
    thresholds that are fitted on valid make grades of it."""
    label_smoothing: float = 0.0
    """Of cross-entropy: share of the target spread over all grades."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Of cross-entropy: how much a photograph counts, by its grade's number in train. `inverse`: 1 / number.
    `effective`: 1 / effective number (Cui et al., 2019). The mean over train is 1."""
    beta: float = 0.999
    """Of `effective`: 0 weighs all grades alike, nearly 1 is `inverse`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How a split is scored."""

    field: Field = "full"
    """`full`: the centre window of a canvas that is as small as the window, so that its short side is seen whole.
    `center`: the centre window of the canvas that is trained on, as in the presets of the 2022 report. `multi`: the
    mean of the probabilities over nine windows, in three rows and columns from edge to edge of that canvas."""
    batch_size: int | None = None
    """Photographs a rank holds at once; by default the training micro batch."""
    tta: Views = "none"
    """Test-time augmentation at the end of the run: its report has the mean over 4 (`flips`) or 8 views (`dihedral`)
    of each photograph. Validation after an epoch has one view."""
    test: bool = True
    """Score test once, at the end of the run. Without it the run's report has train and valid alone, as in a search for
    settings; `fastddr evaluate` scores test of the run that was chosen."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where the figures go besides metrics.jsonl, which is always written."""

    wandb: bool = True
    """Weights & Biases; offline when there is no login or no network."""
    tensorboard: bool = True
    """TensorBoard files in the run folder."""
    project: str | None = None
    """The W&B project; by default that of WANDB_PROJECT, else fastddr."""
    group: str | None = None
    """The W&B group, for runs that belong together: the seeds of one setting, a sweep."""
    log_images: bool = False
    """Also show the photographs of the worst mistakes in W&B and TensorBoard, which may be public."""
    log_code: bool = True
    """Keep fastddr's own source files with the W&B run."""
    checkpoints: Literal["reference", "upload", "none"] = "reference"
    """The best and the last checkpoint in W&B: where they lie with their checksums, their bytes, or nothing."""
    log_every_steps: int = 10
    """Steps between two lines of training figures; each epoch ends with one too."""


@dataclass(frozen=True)
class LoadingConfig:
    """How photographs get into the batch. Never changes what is in it."""

    threads: int | None = None
    """Decoding threads (DALI) or worker processes (torchvision); by default the cores of this rank."""
    prefetch: int | None = None
    """Batches decoded ahead; by default what is best on this machine."""
    jpeg_engines: bool = False
    """Decode on the JPEG engines of a GPU that has them (A100, H100 and later). Off, because on H100s nvJPEG was seen
    to write there over memory that was still in use (torchcodec's pull request 1634); they also round otherwise."""
    regions: Literal["auto", "always", "never"] = "auto"
    """Whether `dali` decodes only the part of a photograph that its window needs. `auto`: always on a CPU, and on a GPU
    unless nvImageCodec is of version 0.9 or later: 0.9 may crash at parts there (its issue 55). The pixels are the
    same."""
    store: Literal["auto", "vram", "ram", "mmap", "none"] = "auto"
    """Where `resident` keeps decoded photographs: the GPU's memory, this process's memory, or a file that ranks share
    and that is kept between runs. `none` keeps nothing. `auto`: the first of vram, ram, mmap that they fit into."""
    store_gib: float | None = None
    """Most memory (or disk) that they may take, a rank, in GiB; by default a part of what is free."""


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
class SplitConfig:
    """How photographs are split where the data set does not say it. What was done stands in every report."""

    test: Literal["auto", "official", "random"] = "auto"
    """`official`: DDR's own test split, restored by file name from a copy without splits. `random`: drawn by seed.
    `auto`: official where the counts of each grade are those of DDR, else random."""
    test_share: float = 0.3
    """Share of the set for test, where it is drawn; DDR's own is 0.3."""
    valid_share: float = 0.2
    """Share of the set for valid, where it is drawn; DDR's own is 0.2."""
    seed: int = 0
    """Of the draw; the run's own seed leaves the splits alone."""
