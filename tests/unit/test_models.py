"""The models against closed formulas and torchvision's start; and what cannot be built."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastddr import models
from fastddr.errors import UserError
from fastddr.models.convmixer import PatchEmbedding
from fastddr.models.resnet import BasicBlock, Bottleneck, stages

SMALL = {
    "convmixer": {"dim": 8, "depth": 2, "kernel_size": 5, "patch_size": 4},
    "cnn": {"blocks": 2, "width": 4},
    "resnet": {"depth": 18, "width": 16},
}


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small(name: str, image_size: int = 32, **others: object) -> nn.Module:
    return models.build(name, num_classes=5, image_size=image_size, **(SMALL[name] | others))


def stir(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic its own value, so that no two can be mistaken for each other."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) - 0.4 if tensor.ndim != 1 else torch.rand_like(tensor) + 0.5)
    return model


def one_sentence(error: pytest.ExceptionInfo[UserError], *offenders: str) -> None:
    text = str(error.value)
    assert text[-1] in ".?"
    assert ". " not in text
    assert "\n" not in text
    for offender in offenders:
        assert offender in text


# --- the registry


def test_names_are_the_reports_three_models() -> None:
    assert models.names() == ["cnn", "convmixer", "resnet"]
    assert set(SMALL) == set(models.names())


@pytest.mark.parametrize("name", models.names())
def test_built_weights_are_channels_last_float32(name: str) -> None:
    for key, parameter in small(name).named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), key


@pytest.mark.parametrize("name", models.names())
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        np.random.seed(seed + 1)  # noqa: NPY002 - a generator that must not matter
        return small(name).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "wrong", "offenders"),
    [
        ("convmixr", {}, ("'convmixr'", "'convmixer'")),
        ("convmixer", {"patchsize": 4}, ("'patchsize'", "'patch_size'")),
        ("convmixer", {"patch_size": 33}, ("patch_size=33", "32×32")),
        ("convmixer", {"kernel_size": 4}, ("kernel_size=4", "5")),
        ("cnn", {"blocks": 6}, ("blocks=6", "32×32", "5")),
        ("resnet", {"depth": 41}, ("depth=41", "40 or 42")),
        ("resnet", {"depth": 51}, ("depth=51", "50 or 53")),
        ("resnet", {"depth": 8}, ("depth=8", "to 10")),
        ("resnet", {"width": -1}, ("width=-1",)),
        ("resnet", {"width": 15}, ("width=15", "16")),
        ("resnet", {"stem": "stride2"}, ("'stride2'", "stride1")),
    ],
)
def test_what_cannot_be_built_is_one_sentence(name: str, wrong: dict[str, object], offenders: tuple[str]) -> None:
    with pytest.raises(UserError) as error:
        models.build(name, num_classes=5, image_size=32, **(SMALL.get(name, {}) | wrong))
    one_sentence(error, *offenders)


def test_one_patch_is_an_image() -> None:
    assert small("convmixer", 4)(torch.randn(2, 3, 4, 4)).shape == (2, 5)


def test_image_size_is_checked() -> None:
    with pytest.raises(UserError) as error:
        models.build("cnn", num_classes=5, image_size=1)
    one_sentence(error, "1×1", "image_size")


# --- every model


@pytest.mark.parametrize("name", models.names())
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = stir(small(name))
    logits = model(torch.randn(3, 3, 32, 32))
    F.cross_entropy(logits, torch.tensor([0, 1, 4])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", models.names())
def test_channels_last_is_kept_to_the_end(name: str) -> None:
    model = small(name)
    kept: dict[str, bool] = {}

    def look(key: str) -> None:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            if output.ndim == 4:
                kept[key] = output.is_contiguous(memory_format=torch.channels_last)

        model.get_submodule(key).register_forward_hook(hook)

    for key, _ in model.named_modules():
        if key:
            look(key)
    model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert len(kept) > 5
    assert all(kept.values()), [key for key, is_kept in kept.items() if not is_kept]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("training", [False, True])
def test_memory_format_changes_no_number(name: str, training: bool) -> None:
    model = stir(small(name)).double().train(training)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        last = model(image.to(memory_format=torch.channels_last))
        first = model.to(memory_format=torch.contiguous_format)(image)
    torch.testing.assert_close(last, first, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", models.names())
def test_in_evaluation_a_photograph_is_graded_alone(name: str) -> None:
    model = stir(small(name)).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", models.names())
def test_bf16_autocast_runs_without_a_warning(name: str) -> None:
    model = small(name)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    assert logits.dtype == torch.float32, "in bfloat16 the two largest may be equal"


@pytest.mark.parametrize("name", models.names())
def test_a_head_in_float32_is_no_other_head(name: str) -> None:
    model = small(name).eval()
    image = torch.randn(2, 3, 32, 32)
    [head] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    found, copied = model(image), copy.deepcopy(model)
    head.__class__ = nn.Linear
    assert torch.equal(found, model(image))
    with torch.no_grad():
        head.bias.add_(1)
    assert torch.equal(found, copied(image)), "a copy has a head of its own"


# --- ConvMixer; against the paper's code and timm's: test_zoo.py


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_patches_are_a_strided_convolution(patch_size: int, more: int, wider: int, channels_last: bool) -> None:
    patches = PatchEmbedding(dim=3, patch_size=patch_size).double()
    image = torch.randn(2, 3, 2 * patch_size + more, patch_size + wider, dtype=torch.float64)
    if channels_last:
        patches, image = (thing.to(memory_format=torch.channels_last) for thing in (patches, image))
    with torch.no_grad():
        actual = patches(image)
        expected = F.conv2d(image, patches.weight, patches.bias, stride=patch_size)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=15)
@given(
    dim=st.integers(1, 9),
    depth=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 5, 9]),
    patch_size=st.integers(1, 8),
    num_classes=st.integers(1, 6),
    image=st.tuples(st.integers(8, 20), st.integers(8, 20)),
)
def test_convmixer_shapes_and_parameters(
    dim: int, depth: int, kernel_size: int, patch_size: int, num_classes: int, image: tuple[int, int]
) -> None:
    model = models.build(
        "convmixer",
        num_classes=num_classes,
        image_size=max(image),
        dim=dim,
        depth=depth,
        kernel_size=kernel_size,
        patch_size=patch_size,
    )
    with torch.no_grad():
        assert model(torch.randn(2, 3, *image)).shape == (2, num_classes)
    stem = dim * 3 * patch_size**2 + dim + 2 * dim
    layer = dim * kernel_size**2 + dim + 2 * dim + dim**2 + dim + 2 * dim
    head = dim * num_classes + num_classes
    assert sum(p.numel() for p in model.parameters()) == stem + depth * layer + head


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(UserError) as error:
        small("convmixer")(torch.randn(2, 3, 8, 3))
    one_sentence(error, "8×3", "4×4")


# --- CNN


@settings(deadline=None, max_examples=15)
@given(
    blocks=st.integers(1, 4),
    width=st.integers(1, 4),
    num_classes=st.integers(1, 6),
    image_size=st.integers(16, 40),
)
def test_cnn_shapes_and_parameters(blocks: int, width: int, num_classes: int, image_size: int) -> None:
    model = models.build("cnn", num_classes=num_classes, image_size=image_size, blocks=blocks, width=width)
    with torch.no_grad():
        assert model(torch.randn(2, 3, image_size, image_size)).shape == (2, num_classes)
    channels = [3] + [width * 2**block for block in range(blocks)]
    count = sum(9 * channels[i] * channels[i + 1] + channels[i + 1] for i in range(blocks))
    count += channels[-1] * (image_size // 2**blocks) ** 2 * num_classes + num_classes
    assert sum(p.numel() for p in model.parameters()) == count


def test_cnn_is_convolution_relu_pool_and_one_linear_layer() -> None:
    model = stir(small("cnn", 8)).double()
    state = model.state_dict()
    x = image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for block in range(2):
        weight, bias = state[f"packages.{block}.0.weight"], state[f"packages.{block}.0.bias"]
        x = F.conv2d(x, weight, bias, padding=1).clamp(min=0)
        x = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
    expected = x.contiguous().flatten(1) @ state["fc.weight"].T + state["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)


def test_cnn_refuses_another_image_size() -> None:
    with pytest.raises(UserError) as error:
        small("cnn")(torch.randn(2, 3, 32, 40))
    one_sentence(error, "32×32", "32×40")


# --- ResNet; against torchvision's function: test_zoo.py


def test_resnet_starts_as_torchvisions_does() -> None:
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    ours = models.build("resnet", num_classes=1000, image_size=64, depth=18).state_dict()
    for key, tensor in theirs.items():
        if key.endswith("weight") and tensor.ndim == 4:
            assert ours[key].std().item() == pytest.approx(tensor.std().item(), rel=0.05), key


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (18, (2, 2, 2, 2)),
        (34, (3, 4, 6, 3)),
        (50, (3, 4, 6, 3)),
        (101, (3, 4, 23, 3)),
        (152, (3, 8, 36, 3)),
        (10, (1, 1, 1, 1)),
        (40, (4, 5, 7, 3)),
    ],
)
def test_resnet_stages(depth: int, expected: tuple[int, ...]) -> None:
    assert stages(depth) == expected


@given(st.integers(4, 80))
def test_every_possible_depth_is_kept_and_dealt_evenly(blocks: int) -> None:
    depth = 2 + 2 * blocks if 2 + 2 * blocks < 50 else 2 + 3 * blocks
    counts = stages(depth)
    assert sum(counts) == blocks
    assert min(counts) >= 1
    if depth not in (18, 50, 101, 152):
        shares = [1 + Fraction((blocks - 4) * weight, 12) for weight in (2, 3, 5, 2)]
        assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize("depth", [10, 40, 53])
def test_resnet_has_as_many_weighted_layers_as_its_depth(depth: int) -> None:
    model = small("resnet", depth=depth)
    layers = [
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in key
    ]
    assert len(layers) == depth
    kinds = {type(module) for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)}
    assert kinds == {BasicBlock if depth < 50 else Bottleneck}


@pytest.mark.parametrize(("stem", "side"), [("standard", 16), ("stride1", 64)])
def test_the_stride1_stem_keeps_the_whole_map(stem: str, side: int) -> None:
    model = small("resnet", stem=stem)
    sides = []
    model.layer1.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert sides == [side]
