"""Sampling: pure functions of (seed, epoch, id), the same global batches on any number of ranks."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastddr import sampling
from fastddr.config import AugmentConfig
from fastddr.config.augment import MAX_SHRINK, check_augment
from fastddr.config.sections import POLICIES
from fastddr.errors import UserError
from fastddr.loaders import Loader, Task, base
from fastddr.loaders.base import Requests
from fastddr.loaders.vision import _Item, render

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10_000)
ROTATING = AugmentConfig(rotate=180, scale=(0.87, 1.15), brightness=0.2, contrast=0.3, saturation=0.4, hue=0.05)
EVERYTHING = replace(ROTATING, resized_crop=(0.3, 0.9), ratio=(0.9, 1.1), translate=0.2)


@given(seeds, epochs, st.integers(1, 300))
def test_order_is_a_permutation_and_repeats(seed: int, epoch: int, count: int) -> None:
    ids = np.arange(count) * 3
    first = sampling.order(ids, seed, epoch)
    assert sorted(first) == ids.tolist()
    assert (first == sampling.order(ids, seed, epoch)).all()


def test_order_and_numbers_change_with_seed_and_epoch() -> None:
    ids = np.arange(1000)
    orders = [sampling.order(ids, seed, epoch).tobytes() for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    rows = [sampling.numbers(1000, seed, epoch).tobytes() for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(set(rows)) == 9


def test_order_and_numbers_stay_what_they_are() -> None:
    """Figures that were published with a seed must come again in a later version."""
    assert sampling.order(np.arange(8), 0, 0).tolist() == EXPECTED_ORDER
    row = sampling.numbers(3, 7, 2)[2]
    assert row.shape == (24,)
    assert row[:2] == pytest.approx(EXPECTED_ROW, abs=1e-15)
    assert row[12:14] == pytest.approx(EXPECTED_MORE, abs=1e-15)
    # The first twelve as they were when there were no more.
    before = np.random.Generator(np.random.Philox(key=[7, 1], counter=[0, 0, 2, 0])).random((3, 12))
    assert (row[:12] == before[2]).all()


EXPECTED_ORDER = [0, 2, 1, 5, 4, 3, 6, 7]
EXPECTED_ROW = [0.25253550647221545, 0.4133877336808284]
EXPECTED_MORE = [0.7106788656256582, 0.0906762177353333]


@given(seeds, epochs, st.integers(1, 50), st.integers(1, 50))
def test_the_row_of_a_photograph_does_not_depend_on_how_many_there_are(
    seed: int, epoch: int, count: int, more: int
) -> None:
    few = sampling.numbers(count, seed, epoch)
    assert (few == sampling.numbers(count + more, seed, epoch)[:count]).all()
    assert ((few >= 0) & (few < 1)).all()


def test_the_numbers_of_a_photograph_have_nothing_to_do_with_each_other() -> None:
    correlation = np.corrcoef(sampling.numbers(20_000, 0, 0), rowvar=False)
    assert correlation.shape == (24, 24)
    assert np.abs(correlation - np.eye(24)).max() < 0.04


@given(
    count=st.integers(1, 100),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world=st.sampled_from([1, 2, 3, 4]),
    pad=st.booleans(),
)
def test_global_batches_do_not_depend_on_ranks_and_accumulation(
    count: int, micro: int, accumulation: int, world: int, pad: bool
) -> None:
    ids = np.random.default_rng(count).permutation(count)
    size = micro * accumulation * world
    one, one_valid = sampling.schedule(ids, size, pad=pad)
    parts = [
        sampling.schedule(ids, size, rank=r, world=world, accumulation=accumulation, pad=pad) for r in range(world)
    ]
    steps = len(one)
    assert steps == (-(-count // size) if pad else count // size)
    for step in range(steps):
        rows = slice(step * accumulation, (step + 1) * accumulation)
        together = np.concatenate([ids_[rows].reshape(-1) for ids_, _ in parts])
        assert (together == one[step]).all(), "a global batch is cut contiguously by rank"
        valid = np.concatenate([valid_[rows].reshape(-1) for _, valid_ in parts])
        assert (valid == one_valid[step]).all()
    if pad:
        assert sorted(one[one_valid]) == list(range(count)), "every photograph exactly once"
        assert not (np.diff(one_valid.reshape(-1).astype(int)) > 0).any(), "padding sits at the tail"
    else:
        assert one_valid.all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([64, 256, 512]))
def test_canvas_has_its_short_side(width: int, height: int, canvas: int) -> None:
    w, h = sampling.canvas_size(np.array([width]), np.array([height]), canvas)
    assert min(w[0], h[0]) == canvas
    assert abs(w[0] / h[0] - width / height) <= width / height * (0.51 / canvas) + 1e-9
    turned = sampling.canvas_size(np.array([height]), np.array([width]), canvas)
    assert (w[0], h[0]) == (turned[1][0], turned[0][0])


@given(seeds, epochs, st.integers(256, 900), st.integers(256, 900), st.booleans(), st.booleans())
def test_windows_lie_on_whole_pixels_inside_the_canvas(
    seed: int, epoch: int, width: int, height: int, hflip: bool, vflip: bool
) -> None:
    rows = sampling.numbers(20, seed, epoch)
    augment = AugmentConfig(hflip=hflip, vflip=vflip)
    assert sampling.only_crops(augment)
    maps = sampling.training_maps(rows, np.full(20, width), np.full(20, height), 256, augment)
    crops = sampling.as_crops(maps.affine, 256)
    assert ((crops.x >= 0) & (crops.x <= width - 256)).all()
    assert ((crops.y >= 0) & (crops.y <= height - 256)).all()
    assert hflip or not crops.hflip.any()
    assert vflip or not crops.vflip.any()
    # The map says the same as the window: its corners are the image's corners.
    for k in range(20):
        corners = np.array([[crops.x[k], crops.y[k], 1], [crops.x[k] + 256, crops.y[k] + 256, 1]])
        seen = corners @ maps.affine[k].T
        assert seen[0].tolist() == [256.0 * crops.hflip[k], 256.0 * crops.vflip[k]]
        assert seen[1].tolist() == [256.0 * (not crops.hflip[k]), 256.0 * (not crops.vflip[k])]


def test_windows_and_mirrors_are_uniform() -> None:
    rows = sampling.numbers(20_000, 0, 0)
    maps = sampling.training_maps(rows, np.full(20_000, 258), np.full(20_000, 256), 256, AugmentConfig())
    crops = sampling.as_crops(maps.affine, 256)
    assert np.bincount(crops.x, minlength=3) / 20_000 == pytest.approx([1 / 3] * 3, abs=0.015)
    assert crops.hflip.mean() == pytest.approx(0.5, abs=0.015)
    assert np.corrcoef(crops.hflip, crops.vflip)[0, 1] == pytest.approx(0, abs=0.03)


def test_turned_maps_keep_the_middle_and_the_scale() -> None:
    rows = sampling.numbers(50, 3, 1)
    maps = sampling.training_maps(rows, np.full(50, 512), np.full(50, 600), 256, ROTATING)
    with pytest.raises(AssertionError, match="every map is a window"):
        sampling.as_crops(maps.affine, 256)
    assert not sampling.only_crops(ROTATING)
    linear = maps.affine[:, :, :2]
    scale = np.sqrt(np.abs(np.linalg.det(linear)))
    assert ((scale >= 0.87) & (scale <= 1.15)).all()
    assert np.ptp(scale) > 0.1
    gram = linear @ linear.transpose(0, 2, 1) / scale[:, None, None] ** 2
    assert np.abs(gram - np.eye(2)).max() < 1e-12, "a rotation, mirror and scale, and no shear"
    middle = np.linalg.solve(linear, 128 - maps.affine[:, :, 2:])[:, :, 0]
    assert ((middle >= 128) & (middle <= [512 - 128, 600 - 128])).all()


def test_evaluation_takes_the_middle_and_normalises() -> None:
    augment = AugmentConfig()
    maps = sampling.evaluation_maps(np.array([512, 700]), np.array([600, 512]), 256, augment)
    crops = sampling.as_crops(maps.affine, 256)
    assert crops.x.tolist() == [128, 222]
    assert crops.y.tolist() == [172, 128]
    white = maps.colour @ np.array([255, 255, 255, 1])
    assert white[0] == pytest.approx((1 - np.array(augment.mean)) / augment.std, abs=1e-5)


def test_colour_leaves_grey_alone_where_only_saturation_and_hue_vary() -> None:
    augment = AugmentConfig(saturation=0.8, hue=0.5)
    assert not sampling.only_normalises(augment)
    maps = sampling.training_maps(sampling.numbers(30, 0, 0), np.full(30, 512), np.full(30, 512), 256, augment)
    plain = sampling.evaluation_maps(np.full(30, 512), np.full(30, 512), 256, augment)
    grey, red = np.array([90.0, 90, 90, 1]), np.array([200.0, 30, 30, 1])
    assert np.abs(maps.colour @ grey - plain.colour @ grey).max() < 1e-5
    assert np.abs(maps.colour @ red - plain.colour @ red).max() > 0.3


def test_brightness_multiplies_and_contrast_stretches_about_the_mean() -> None:
    rows = sampling.numbers(30, 0, 0)
    mean = 255 * np.array(AugmentConfig().mean)
    std = 255 * np.array(AugmentConfig().std)

    def rgb(augment: AugmentConfig, colour: np.ndarray) -> np.ndarray:
        maps = sampling.training_maps(rows, np.full(30, 512), np.full(30, 512), 256, augment)
        return (maps.colour @ np.append(colour, 1)) * std + mean

    colour = np.array([120.0, 60, 30])
    factor = rgb(AugmentConfig(brightness=0.2), colour) / colour
    assert np.ptp(factor, axis=1).max() < 1e-4
    assert (np.abs(factor - 1) <= 0.2 + 1e-5).all()
    assert np.ptp(factor[:, 0]) > 0.2
    stretched = (rgb(AugmentConfig(contrast=0.2), colour) - mean) / (colour - mean)
    assert np.ptp(stretched, axis=1).max() < 1e-4
    assert np.ptp(stretched[:, 0]) > 0.2


@pytest.mark.parametrize("augment", [ROTATING, EVERYTHING], ids=["rotating", "everything"])
@settings(max_examples=25)
@given(seeds, st.integers(40, 200), st.integers(40, 200), st.booleans())
def test_a_box_holds_all_that_the_image_is_made_of(
    augment: AugmentConfig, seed: int, width: int, height: int, far: bool
) -> None:
    """What lies outside the boxes may be anything: the warped images do not change."""
    rows = sampling.numbers(4, seed, 0)
    size = np.full(4, width), np.full(4, height)
    affine = sampling.training_maps(rows, *size, 32, augment).affine
    if far:
        affine[:, :, 2] += 500 * (rows[:, :2] - 0.5)
    boxes = sampling.boxes(affine, *size, 32)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    centres = np.stack(np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5), axis=-1).reshape(-1, 2)
    for box, back in zip(boxes, sampling.inverse(affine), strict=True):
        x, y = (centres @ back[:, :2].T + back[:, 2] - 0.5).T
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            column, row = np.floor(x).astype(int) + dx, np.floor(y).astype(int) + dy
            on_canvas = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            inside = (column >= box[0]) & (column < box[2]) & (row >= box[1]) & (row < box[3])
            assert inside[on_canvas].all()


def test_a_box_of_a_window_is_hardly_larger_than_the_window() -> None:
    rows = sampling.numbers(50, 0, 0)
    size = np.full(50, 512), np.full(50, 512)
    boxes = sampling.boxes(sampling.training_maps(rows, *size, 256, AugmentConfig()).affine, *size, 256)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert ((sides >= 256) & (sides <= 259)).all()


# ---------------------------------------------------------------------------------------------- resized windows, shifts


@st.composite
def geometries(draw: st.DrawFn) -> tuple[AugmentConfig, int, int]:
    """Settings of the affine map, about half of which shrink too much; image size and canvas."""
    image = draw(st.integers(16, 64))
    low = draw(st.floats(0.78, 1.3))
    area = draw(st.floats(0.05, 1))
    narrow = draw(st.floats(0.6, 1.2))
    resized = draw(st.booleans())
    augment = AugmentConfig(
        hflip=draw(st.booleans()),
        vflip=draw(st.booleans()),
        rotate=draw(st.sampled_from([0.0, 20.0, 180.0])),
        scale=draw(st.sampled_from([(1.0, 1.0), (low, low * draw(st.floats(1, 1.5)))])),
        resized_crop=(area * draw(st.floats(0.2, 1)), area) if resized else None,
        ratio=(narrow, narrow * draw(st.floats(1, 1.5))) if resized and draw(st.booleans()) else (1.0, 1.0),
        translate=draw(st.sampled_from([0.0, 0.3])),
    )
    return augment, image, image + draw(st.integers(0, image))


def _refusal(augment: AugmentConfig, image: int, canvas: int) -> str:
    """What the check says; empty where it has nothing to say."""
    try:
        check_augment(augment, image, canvas)
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=300)
@given(geometries(), seeds, st.integers(0, 40), st.booleans())
def test_what_passes_the_check_shrinks_by_no_more_than_the_limit_and_nothing_else_is_refused(
    geometry: tuple[AugmentConfig, int, int], seed: int, longer: int, upright: bool
) -> None:
    augment, image, canvas = geometry
    # Some rows as they are drawn, and those in which all that matters is at an end of its range.
    rows = sampling.numbers(8, seed, 0)
    ends = np.tile(rows[:1], (8, 1))
    ends[:, [sampling._SCALE, sampling._AREA, sampling._RATIO]] = list(product([0.0, 1 - 1e-12], repeat=3))
    rows = np.vstack([rows, ends])
    short, long = np.full(len(rows), canvas), np.full(len(rows), canvas + longer)
    width, height = (short, long) if upright else (long, short)
    affine = sampling.training_maps(rows, width, height, image, augment).affine
    shrink = 1 / np.linalg.svd(affine[:, :, :2], compute_uv=False).min()
    side = 1.0
    if augment.resized_crop is not None:
        side = augment.resized_crop[1] * max(augment.ratio[1], 1 / augment.ratio[0])
    if _refusal(augment, image, canvas):
        # At the limit, rounding may say either.
        assert max(shrink, 1 / augment.scale[0]) > MAX_SHRINK - 1e-6 or side > 1
        return
    assert shrink <= MAX_SHRINK + 1e-9
    assert side <= 1 + 1e-9
    if sampling.only_crops(augment):
        sampling.as_crops(affine, image)  # which refuses others
    # Nothing but the window: the image's corners lie on the canvas.
    still = replace(augment, rotate=0.0, scale=(1.0, 1.0), translate=0.0)
    back = sampling.inverse(sampling.training_maps(rows, width, height, image, still).affine)
    corners = np.array([[0, 0, 1], [image, 0, 1], [0, image, 1], [image, image, 1]])
    seen = np.einsum("nij,kj->nki", back, corners)
    assert seen.min() >= -1e-9
    assert (seen <= np.stack([width, height], axis=1)[:, None] + 1e-9).all()


@given(geometries())
def test_the_advice_of_the_check_is_good(geometry: tuple[AugmentConfig, int, int]) -> None:
    augment, image, canvas = geometry
    said = _refusal(augment, image, canvas)
    if "lower canvas to " not in said:
        return
    smaller = int(said.split("lower canvas to ")[1].split(",")[0])
    assert image <= smaller < canvas
    assert not _refusal(augment, image, smaller)
    area = float(said.split("the area to ")[1].removesuffix("."))
    assert augment.resized_crop is not None
    assert area < augment.resized_crop[1]
    assert not _refusal(replace(augment, resized_crop=(min(area, augment.resized_crop[0]), area)), image, canvas)


def test_resized_windows_have_their_area_and_ratio_and_lie_anywhere() -> None:
    n = 20_000
    augment = AugmentConfig(hflip=False, vflip=False, resized_crop=(0.2, 0.6), ratio=(0.75, 4 / 3))
    width, height = np.full(n, 500), np.full(n, 400)
    affine = sampling.training_maps(sampling.numbers(n, 0, 0), width, height, 256, augment).affine
    assert not affine[:, [0, 1], [1, 0]].any(), "nothing is turned"
    back = sampling.inverse(affine)
    # The image's corners (0, 0) and (256, 256) on the canvas.
    first, size = back[:, :, 2], 256 * back[:, [0, 1], [0, 1]]
    area, ratio = size.prod(axis=1) / 400**2, size[:, 0] / size[:, 1]
    for values, low, high in ((area, 0.2, 0.6), (np.log(ratio), -np.log(4 / 3), np.log(4 / 3))):
        drawn = (values - low) / (high - low)
        assert np.histogram(drawn, bins=4, range=(0, 1))[0] / n == pytest.approx([0.25] * 4, abs=0.015)
    for place in (first / ([500, 400] - size)).T:
        assert np.histogram(place, bins=4, range=(0, 1))[0] / n == pytest.approx([0.25] * 4, abs=0.015)
    assert not sampling.only_crops(augment)


def test_a_resized_window_is_turned_after_it_has_become_the_image() -> None:
    """So a wide window makes no sheared image: the map is the window's, then a rotation, mirror and scale."""
    rows = sampling.numbers(50, 1, 0)
    size = np.full(50, 300), np.full(50, 280)
    window = replace(EVERYTHING, hflip=False, vflip=False, rotate=0.0, scale=(1.0, 1.0), translate=0.0)
    all_, first = (sampling.training_maps(rows, *size, 256, augment).affine for augment in (EVERYTHING, window))
    second = all_[:, :, :2] @ np.linalg.inv(first[:, :, :2])
    gram = second @ second.transpose(0, 2, 1)
    scale = gram[:, 0, 0]
    assert np.abs(gram - scale[:, None, None] * np.eye(2)).max() < 1e-12
    assert np.ptp(np.sqrt(scale)) > 0.2
    # The window's middle is the middle of the turned image, but for the shift.
    middle = np.einsum("nij,nj->ni", np.linalg.inv(first[:, :, :2]), 128 - first[:, :, 2])
    moved = np.einsum("nij,nj->ni", all_[:, :, :2], middle) + all_[:, :, 2] - 128
    assert (np.abs(moved) <= 0.2 * 256 + 1e-9).all()


@pytest.mark.parametrize("below", [AugmentConfig(), ROTATING])
def test_a_shift_is_a_share_of_the_image_either_way(below: AugmentConfig) -> None:
    n = 20_000
    rows, size = sampling.numbers(n, 0, 0), (np.full(n, 512), np.full(n, 600))
    plain, moved = (
        sampling.training_maps(rows, *size, 256, augment) for augment in (below, replace(below, translate=0.1))
    )
    assert (plain.affine[:, :, :2] == moved.affine[:, :, :2]).all()
    assert (plain.colour == moved.colour).all()
    shift = (moved.affine - plain.affine)[:, :, 2] / 256
    for axis in shift.T:
        assert np.histogram(axis, bins=4, range=(-0.1, 0.1))[0] / n == pytest.approx([0.25] * 4, abs=0.015)
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.03
    assert not sampling.only_crops(replace(AugmentConfig(), translate=0.1))


def test_what_is_shifted_in_from_outside_the_canvas_is_black(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    augment = AugmentConfig(translate=0.5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rows, side = sampling.numbers(6, 0, 0), np.full(6, 64)
    maps = sampling.training_maps(rows, side, side, 64, augment)
    for affine, colour, row in zip(maps.affine, maps.colour, rows, strict=True):
        image = render(_Item(str(tmp_path / "white.png"), affine, colour, 64, 64), 64, only_crops=False)
        seen = np.prod(1 - np.abs(row[[sampling._SHIFT_X, sampling._SHIFT_Y]] - 0.5))
        assert image.mean() == pytest.approx(seen, abs=0.03)


# ---------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("name", POLICIES)
def test_a_canvas_as_small_as_the_image_shows_the_full_field(name: str) -> None:
    """The short side is seen whole, turned about its middle; a longer one is looked along."""
    augment = POLICIES[name]
    check_augment(augment, 96, 96)
    rows = sampling.numbers(200, 0, 0)
    size = np.full(200, 130), np.full(200, 96)
    maps = sampling.training_maps(rows, *size, 96, augment)
    middle = np.einsum("nij,nj->ni", np.linalg.inv(maps.affine[:, :, :2]), 48 - maps.affine[:, :, 2])
    assert middle[:, 1] == pytest.approx(48)
    assert middle[:, 0].min() < 50
    assert middle[:, 0].max() > 130 - 50
    assert sampling.only_crops(augment) == (name != "fundus")
    assert name == "fundus" or not sampling.as_crops(maps.affine, 96).y.any()


def test_a_policy_does_what_its_name_says() -> None:
    rows, side = sampling.numbers(200, 0, 0), np.full(200, 512)
    maps = {name: sampling.training_maps(rows, side, side, 256, POLICIES[name]) for name in POLICIES}
    none, report = (sampling.as_crops(maps[name].affine, 256) for name in ("none", "report"))
    with pytest.raises(AssertionError, match="every map is a window"):
        sampling.as_crops(maps["fundus"].affine, 256)
    assert not none.hflip.any()
    assert not none.vflip.any()
    assert 0.3 < report.hflip.mean() < 0.7
    assert 0.3 < report.vflip.mean() < 0.7
    for window in (none, report):
        assert np.ptp(window.x) > 200
        assert np.ptp(window.y) > 200
    assert [sampling.only_normalises(POLICIES[name]) for name in POLICIES] == [True, True, False]
    fundus = POLICIES["fundus"]
    assert (fundus.hflip, fundus.vflip, fundus.rotate, fundus.scale) == (True, True, 180, (0.87, 1.15))
    assert (fundus.brightness, fundus.contrast, fundus.saturation, fundus.hue) == (0.2, 0.2, 0.2, 0.02)


# ---------------------------------------------------------------------------------------------- ranks and starts


def _task(augment: AugmentConfig, photographs: int = 200, **changes: Any) -> Task:
    pick = np.random.default_rng(0)
    common: dict[str, Any] = {
        "files": [f"{i}.jpg" for i in range(photographs)],
        "grades": pick.integers(0, 5, photographs),
        "widths": pick.integers(60, 90, photographs),
        "heights": pick.integers(60, 90, photographs),
        "ids": np.flatnonzero(pick.random(photographs) < 0.9),
        "train": True, "image_size": 32, "canvas": 36, "augment": augment, "seed": 3, "batch_size": 24,
    }  # fmt: skip
    return Task(**(common | changes))


class Echo(Loader):
    """Gives each photograph's first numbers of its maps instead of its pixels."""

    name = "echo"

    def _images(self, requests: Requests, start: int) -> Generator[torch.Tensor, None, None]:
        for k in range(start, len(requests)):
            yield torch.from_numpy(np.hstack([requests.at(k).affine, requests.at(k).colour[:, :, 1:]]))[:, None]


def test_maps_are_worked_out_in_blocks_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal to those of the whole epoch, and the first batch waits for those of a block alone."""
    monkeypatch.setattr(base, "_TOGETHER", 50)
    plain, made = sampling.training_maps, []
    monkeypatch.setattr(sampling, "training_maps", lambda rows, *given: made.append(len(rows)) or plain(rows, *given))
    task = _task(EVERYTHING)
    requests = task.requests(2)
    assert made == []
    some = requests.id.ravel()
    canvas = sampling.canvas_size(task.widths[some], task.heights[some], task.canvas)
    whole = plain(sampling.numbers(200, task.seed, 2)[some], *canvas, task.image_size, EVERYTHING)
    for k, (affine, colour) in enumerate(
        zip(whole.affine.reshape(7, 24, 2, 3), whole.colour.reshape(7, 24, 3, 4), strict=True)
    ):
        # Two readers, one of which is a batch ahead.
        assert len(requests.at(min(k + 1, 6)).colour) == 24
        assert (requests.at(k).affine == affine).all()
        assert (requests.at(k).colour == colour).all()
        assert sum(made) == 24 * min(2 * ((k + 1) // 2 + 1), 7)
    assert (requests.at(-1).affine == requests.at(6).affine).all()
    made.clear()
    loader = Echo(replace(task, dtype=torch.float64))
    next(loader.epoch(2, start_step=5))
    assert made == [48], "nor is a resumed epoch's made of what it leaves out"
    loader.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_epoch_goes_on_from_any_step_with_the_same_maps(world: int, accumulation: int) -> None:
    task = _task(EVERYTHING, batch_size=24 * accumulation, accumulation=accumulation, world=world, rank=world - 1)
    loader = Echo(replace(task, dtype=torch.float64))
    whole = list(loader.epoch(2))
    assert len(whole) == len(loader) >= 3
    for start in range(task.steps + 1):
        rest = list(loader.epoch(2, start_step=start))
        assert len(rest) == len(whole) - start * accumulation
        for one, other in zip(rest, whole[start * accumulation :], strict=True):
            assert torch.equal(one.id, other.id)
            assert torch.equal(one.image, other.image)
    loader.close()
