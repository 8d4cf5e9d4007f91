"""Pretrained weights: what a file may be, what of it is taken, that all else is said, and that no code is run."""

from __future__ import annotations

from argparse import Namespace
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastddr import models, ranks
from fastddr.checkpoints import Checkpoint
from fastddr.config import AugmentConfig, Config, ConvMixerConfig, OptimizerConfig, ResNetConfig
from fastddr.errors import UserError
from fastddr.models import weights, zoo
from fastddr.models.convmixer import our_name

SMALL = Config(image_size=16, lr=2e-4, convmixer=ConvMixerConfig(dim=6, depth=2, kernel_size=3, patch_size=4))


def build(config: Config = SMALL, num_classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(config.model, num_classes=num_classes, image_size=config.image_size, **config.model_settings)


def no_run(path: Path) -> Any:
    raise AssertionError("no run was named")


def begin(init: str, config: Config = SMALL, load: Any = no_run) -> tuple[nn.Module, nn.Module, list[str]]:
    """A model and its average that begin at `init`, and what was said."""
    model, said = build(config, seed=1), []
    average = deepcopy(model)
    weights.begin(replace(config, init=init), model, average, load, said.append)
    return model, average, [line.strip() for line in said]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def to_paper(name: str) -> str:
    """Our name as the paper's, whose head stands behind two layers, the mean and the flattening."""
    within = {"depthwise": "0.fn.0", "depthwise_norm": "0.fn.2", "pointwise": "1", "pointwise_norm": "3"}
    parts = name.split(".")
    if parts[0] == "layers":
        return f"{3 + int(parts[1])}.{within[parts[2]]}.{parts[3]}"
    return f"{ {'patches': '0', 'patches_norm': '2', 'head': '7'}[parts[0]] }.{parts[1]}"


# -------------------------------------------------------------------------------------------------------- what is read


def test_ranks_that_read_different_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their replicas would stay apart for good where DDP has shared its weights before."""
    file, digests = tmp_path / "w.pth", []
    monkeypatch.setattr(ranks, "agree", lambda what, otherwise: digests.append(what()))
    for seed in (1, 1, 2):
        torch.save(build(seed=seed).state_dict(), file)
        begin(str(file))
    assert digests[0] == digests[1] != digests[2]
    monkeypatch.undo()
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda mine: [*mine, digests[0]])
    ranks.agree(lambda: digests[1], "no")
    with pytest.raises(UserError, match=r"^the ranks have read different weights$"):
        ranks.agree(lambda: digests[2], "the ranks have read different weights")


@pytest.mark.parametrize(
    "wrapped",
    ["plain", "state_dict", "model", "module.", "both", "half", "paper", "safetensors", "mae", "timm", "lightning"],
)
def test_every_form_of_a_file_gives_all_of_its_weights(wrapped: str, tmp_path: Path) -> None:
    state = build().state_dict()
    file = tmp_path / ("w.safetensors" if wrapped == "safetensors" else "w.pth")
    content: Any = dict(state)
    more: list[str] = []
    if wrapped in ("state_dict", "model"):
        content = {"epoch": 3, wrapped: state}
    elif wrapped == "module.":
        content = {f"module.{name}": tensor for name, tensor in state.items()}
    elif wrapped == "both":
        content = {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}}
    elif wrapped == "half":
        state = {name: tensor.half().to(tensor.dtype) for name, tensor in state.items()}
        content = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    elif wrapped == "paper":
        content = {to_paper(name): tensor for name, tensor in state.items()}
        assert "7.weight" in content
    elif wrapped == "mae":
        content = {"model": state, "epoch": 3, "args": Namespace(lr=1e-3, output_dir="out")}
    elif wrapped == "timm":
        content = {"state_dict": build(seed=3).state_dict(), "state_dict_ema": state, "args": Namespace(model="x")}
        more = ["init: of this file the averaged weights are taken, 'state_dict_ema'"]
    elif wrapped == "lightning":
        named = {f"model.{name}": tensor for name, tensor in state.items()}
        # Beside it another set of weights, by a name of the model's own.
        beside = {"criterion.weight": torch.ones(5), "layers.0.depthwise.weight": torch.ones(1)}
        content = {"state_dict": named | beside, "hyper_parameters": {"lr": 1e-3}}
        more = [
            "init: taken from what its names begin with, 'model.'; 2 begin otherwise and are left",
            "init: criterion.weight is left out: it is not in this model",
        ]
    if wrapped == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        torch.save(content, file)
    model, average, said = begin(str(file))
    assert not equal(build(seed=1).state_dict(), state)
    assert equal(model.state_dict(), state)
    assert equal(average.state_dict(), state)
    assert said == [f"init {file}: {len(state)} of {len(state)} tensors taken", *more]
    assert model.get_parameter("layers.0.depthwise.weight").dtype == torch.float32


class Code:
    """A pickle of it runs `mark`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_no_file_runs_code(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "w.pth"
    torch.save({"state_dict": build().state_dict(), "args": Code(marker)}, file)
    with pytest.raises(UserError, match=r"w\.pth: it holds .*, not tensors alone, and fastddr runs no code"):
        begin(str(file))
    assert not marker.exists()
    # What is downloaded is read by others, who may ask for more than tensors.
    with zoo.no_pickled_code(), pytest.raises(Exception, match="Weights only"):
        torch.load(file, weights_only=False)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "this file is one that can run code"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "neither"),
        (b"not weights at all", "no file of torch.save"),
        ({"a": 1}, "no named tensors"),
        ([torch.zeros(2)], "no named tensors"),
        ({"a": torch.zeros(2), "b": "text"}, "'b' among the weights is no tensor"),
        ({"a": torch.zeros(2), 7: torch.zeros(2)}, "7 among the weights is no name"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "'a' is sparse, quantised"),
        ({"a": torch.zeros(2, device="meta")}, "'a' is .* without its numbers"),
        ({name: tensor.to(torch.int8) for name, tensor in build().state_dict().items()}, "0% are there .* in floating"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_what_is_no_file_of_weights_is_one_sentence(content: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=said) as caught:
        begin(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_safetensors_a_folder_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for init, said in [
        (tmp_path / "w.safetensors", "neither"),
        (tmp_path, f"run:{tmp_path}"),
        (tmp_path / "none", "no such"),
    ]:
        with pytest.raises(UserError, match=said):
            begin(str(init))


def test_a_learning_rate_for_training_from_scratch_is_told(tmp_path: Path) -> None:
    file, told = tmp_path / "w.pth", "a rate for training from scratch"
    torch.save(build().state_dict(), file)
    high = replace(SMALL, lr=1e-3)
    for config, said in (high, True), (SMALL, False), (replace(high, optimizer=OptimizerConfig(name="sgd")), False):
        assert (told in begin(str(file), config)[2][-1]) == said
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    _, _, lines = begin(f"run:{tmp_path}", high, lambda path: build().state_dict())
    assert told not in lines[-1], "a run of one's own"


# -------------------------------------------------------------------------------------------------------- what is taken


def test_what_does_not_fit_is_said_and_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "agree", lambda what, otherwise: what())
    state = build(num_classes=7).state_dict()
    del state["patches_norm.num_batches_tracked"]
    state["layers.1.pointwise.bias"] = torch.zeros(9)
    state["extra.weight"] = torch.zeros(3)
    state["layers.0.depthwise.bias"] = torch.ones(6, dtype=torch.int8)
    state["layers.0.pointwise.bias"] = torch.ones(6, dtype=torch.complex64)
    # A slice, which as bytes has gaps, and numbers that few operations know.
    state["patches.bias"] = torch.arange(12.0)[::2]
    state["patches_norm.bias"] = torch.ones(6).to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "w.pth")
    model, _, said = begin(str(tmp_path / "w.pth"))
    assert sorted(said[1:]) == [
        "init: extra.weight is left out: it is not in this model",
        "init: head.bias begins at random: 5 here, 7 there",
        "init: head.weight begins at random: 5×6 here, 7×6 there",
        "init: layers.0.depthwise.bias begins at random: float32 here, int8 there",
        "init: layers.0.pointwise.bias begins at random: float32 here, complex64 there",
        "init: layers.1.pointwise.bias begins at random: 6 here, 9 there",
        "init: patches_norm.num_batches_tracked begins at random: it is not there",
    ]
    kept = {name.split()[1] for name in said[1:]} - {"extra.weight"}
    random, found = build(seed=1).state_dict(), model.state_dict()
    assert said[0].endswith(f"{len(found) - len(kept)} of {len(found)} tensors taken")
    for name, tensor in found.items():
        assert torch.equal(tensor, (random if name in kept else state)[name].to(tensor.dtype)), name


def test_less_than_half_of_the_body_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(build(replace(SMALL, convmixer=replace(SMALL.convmixer, dim=8))).state_dict(), file)
    model = build(seed=1)
    with pytest.raises(UserError, match=r"only 0% are there .*'patches\.weight'.*same shape"):
        weights.begin(replace(SMALL, init=str(file)), model, model, no_run, print)
    assert equal(model.state_dict(), build(seed=1).state_dict())
    # The head alone, all of it, is no half.
    torch.save({name: tensor for name, tensor in build().state_dict().items() if name.startswith("head")}, file)
    with pytest.raises(UserError, match="only 0% are there"):
        begin(str(file))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = build().state_dict()
    state["layers.0.pointwise.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"layers\.0\.pointwise\.weight is not finite"):
        begin(str(tmp_path / "w.pth"))


def test_foreign_names_are_taken_in_order_only_where_kinds_and_shapes_agree(tmp_path: Path) -> None:
    state, file = build(num_classes=9).state_dict(), tmp_path / "w.pth"
    foreign = {f"body{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(state.items())}
    torch.save(foreign, file)
    model, _, said = begin(str(file))
    assert len(said) == 4
    assert "taken in that order" in said[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) != name.startswith("head"), name
    # Scale and shift of the first norm change places: as large, but not of the same kind.
    order = list(foreign)
    at = list(state).index("patches_norm.weight")
    order[at], order[at + 1] = order[at + 1], order[at]
    swapped = {name: foreign[name] for name in order}
    torch.save(swapped, file)
    with pytest.raises(UserError, match="only 0% are there"):
        begin(str(file))


# ------------------------------------------------------------------------------------------------------------- imagenet


def test_resnet_takes_torchvisions_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import get_model, get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = get_model("resnet18", weights=None).state_dict()
    cached = tmp_path / "hub" / "checkpoints" / get_model_weights("resnet18").DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    config = replace(SMALL, model="resnet", image_size=32)
    model, _, said = begin("imagenet", config)
    assert [line.split()[1] for line in said[1:]] == ["fc.weight", "fc.bias"]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items() if not name.startswith("fc."))
    # The other stem has another first convolution, and that is all.
    _, _, said = begin("imagenet", replace(config, resnet=ResNetConfig(stem="stride1")))
    assert [line.split()[1] for line in said[1:]] == ["conv1.weight", "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SMALL, "three shapes only .*dim 768, depth 32"),
        (replace(SMALL, model="cnn"), "nobody has published"),
        (replace(SMALL, model="resnet", resnet=ResNetConfig(depth=40)), "depths 18, 34, 50, 101, 152"),
        (replace(SMALL, model="resnet", resnet=ResNetConfig(width=32)), "width 64 only"),
        (replace(SMALL, model="timm:test_vit"), "timm:test_vit: timm has no pretrained weights"),
        (replace(SMALL, model="timm:vgg5"), "no such model"),
    ],
)
def test_where_no_weights_exist_it_is_one_sentence(config: Config, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if config.model.startswith("timm:"):
        timm = pytest.importorskip("timm")
        monkeypatch.setattr(timm, "is_model_pretrained", lambda name: False)
    with pytest.raises(UserError, match=said) as caught:
        weights.source(replace(config, init="imagenet"), no_run)
    assert "\n" not in str(caught.value)


def test_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service\nnot known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    configs = [replace(SMALL, model="resnet", init="imagenet")]
    if zoo.find_spec("timm") is not None:
        monkeypatch.setattr(zoo.timm(""), "create_model", unreachable)
        configs.append(replace(SMALL, model="timm:resnet18", init="imagenet"))
    for config in configs:
        with pytest.raises(UserError, match=r"not in the cache .*cannot be downloaded .*go online once") as caught:
            weights.source(config, no_run)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["cut short", "the page of a proxy"])
def test_broken_weights_are_one_sentence(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.hub
    from torchvision.models import get_model_weights

    def page(url: str, target: str, *_: object, **__: object) -> None:
        raise RuntimeError('invalid hash value (expected "f37072fd", got "6dd5")')

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", page)
    cached = tmp_path / "hub" / "checkpoints" / get_model_weights("resnet18").DEFAULT.url.rpartition("/")[2]
    if how == "cut short":
        cached.parent.mkdir(parents=True)
        cached.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match=r"what should be the weights is not .*remove .* go online once") as caught:
        weights.source(replace(SMALL, model="resnet", init="imagenet"), no_run)
    assert str(cached) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_download_of_timms_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    import timm.models._hub

    def broken(*_: object, **__: object) -> str:
        class ReadError(Exception):
            """As HTTPX has it: no OSError."""

        raise ReadError("peer closed\nconnection")

    bad = tmp_path / "model.safetensors"
    bad.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00half")
    for download, said in (broken, "ReadError: peer closed connection"), (lambda *_, **__: str(bad), "SafetensorError"):
        monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
        with pytest.raises(UserError, match=f"timm cannot load these weights .{said}") as caught:
            zoo.pretrained("timm:resnet18.a1_in1k", 64)
        assert "\n" not in str(caught.value)


def test_published_convmixers_come_from_timm_under_our_names(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked: list[tuple[str, int]] = []
    theirs = timm.models.convmixer.ConvMixer(6, 2, kernel_size=3, patch_size=4, num_classes=1000).state_dict()
    monkeypatch.setattr(weights, "CONVMIXERS", {(6, 2, 3, 4, "gelu"): "convmixer_768_32"})
    monkeypatch.setattr(zoo, "pretrained", lambda name, size: asked.append((name, size)) or theirs)
    model, _, said = begin("imagenet")
    assert asked == [("timm:convmixer_768_32", 16)]
    assert [line.split()[1] for line in said[1:]] == ["head.weight", "head.bias"]
    found = model.state_dict()
    assert all(torch.equal(found[our_name(name)], t) for name, t in theirs.items() if not name.startswith("head"))
    _, _, said = begin("imagenet", replace(SMALL, augment=AugmentConfig(mean=(0.5, 0.5, 0.5))))
    assert "--augment.mean 0.485 0.456 0.406 --augment.std 0.229 0.224 0.225 is theirs" in said[-1]


def test_timms_weights_are_fitted_to_the_size_and_their_normalisation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    made, create = [], timm.create_model

    def trained(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        """As timm makes it, but for the download."""
        torch.manual_seed(7)
        if pretrained:
            made.append(settings)
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", trained)
    config = replace(SMALL, model="timm:test_vit", image_size=48)
    model, _, said = begin("imagenet", config)
    assert made == [{"img_size": 48}]
    assert [line.split()[1] for line in said[1:3]] == ["head.weight", "head.bias"]
    mean = zoo.normalisation(model)
    assert mean is not None
    assert (len(said) == 4) == (mean != (config.augment.mean, config.augment.std))
    assert len(said) < 4 or "--augment.mean 0.5 0.5 0.5" in said[3]


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("average", [True, False])
def test_a_run_gives_its_best_average_or_else_its_best_weights(
    average: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, mean = build().state_dict(), build(seed=5).state_dict()
    saved = Checkpoint(tmp_path, {}, plain, mean if average else None, {})
    best = Path("runs") / "early" / "checkpoints" / "best"
    best.mkdir(parents=True)
    read: list[Path] = []

    def load(path: Path) -> Any:
        read.append(path)
        return saved.weights

    for init in ("run:early", "run:./runs/early", f"run:{tmp_path}/runs/early"):
        model, _, _ = begin(init, load=load)
        assert equal(model.state_dict(), mean if average else plain)
    assert [path.resolve() for path in read] == [best.resolve()] * 3
    # Its images were normalised otherwise, or as here; a key that no longer is does not matter.
    for stored, told in ("[0.5, 0.5, 0.5]", True), ("[0.485, 0.456, 0.406]", False):
        (best.parents[1] / "config.yaml").write_text(
            f"old: 1\naugment: {{mean: {stored}, std: [0.229, 0.224, 0.225]}}\n"
        )
        _, _, said = begin("run:early", load=load)
        assert ("--augment.mean 0.5 0.5 0.5 --augment.std 0.229 0.224 0.225 is theirs" in said[-1]) == told


def test_a_run_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run in runs/none"):
        begin("run:none")
    (tmp_path / "runs" / "young").mkdir(parents=True)
    (tmp_path / "runs" / "young" / "config.yaml").touch()
    with pytest.raises(UserError, match="no best checkpoint yet in runs/young"):
        begin("run:young")
