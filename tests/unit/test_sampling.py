"""Sampling: pure functions of (seed, epoch, id), the same global batches on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastddr import sampling
from fastddr.config import AugmentConfig

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10_000)
ROTATING = AugmentConfig(rotate=180, scale=(0.87, 1.15), brightness=0.2, contrast=0.3, saturation=0.4, hue=0.05)


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
    assert sampling.numbers(3, 7, 2)[2, :2] == pytest.approx(EXPECTED_ROW, abs=1e-15)


EXPECTED_ORDER = [0, 2, 1, 5, 4, 3, 6, 7]
EXPECTED_ROW = [0.25253550647221545, 0.4133877336808284]


@given(seeds, epochs, st.integers(1, 50), st.integers(1, 50))
def test_the_row_of_a_photograph_does_not_depend_on_how_many_there_are(
    seed: int, epoch: int, count: int, more: int
) -> None:
    few = sampling.numbers(count, seed, epoch)
    assert (few == sampling.numbers(count + more, seed, epoch)[:count]).all()
    assert ((few >= 0) & (few < 1)).all()


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
    assert crops is not None
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
    assert crops is not None
    assert np.bincount(crops.x, minlength=3) / 20_000 == pytest.approx([1 / 3] * 3, abs=0.015)
    assert crops.hflip.mean() == pytest.approx(0.5, abs=0.015)
    assert np.corrcoef(crops.hflip, crops.vflip)[0, 1] == pytest.approx(0, abs=0.03)


def test_turned_maps_keep_the_middle_and_the_scale() -> None:
    rows = sampling.numbers(50, 3, 1)
    maps = sampling.training_maps(rows, np.full(50, 512), np.full(50, 600), 256, ROTATING)
    assert sampling.as_crops(maps.affine, 256) is None
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
    assert crops is not None
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


@given(seeds, st.integers(40, 200), st.integers(40, 200), st.booleans())
def test_a_box_holds_all_that_the_image_is_made_of(seed: int, width: int, height: int, far: bool) -> None:
    """What lies outside the boxes may be anything: the warped images do not change."""
    rows = sampling.numbers(4, seed, 0)
    size = np.full(4, width), np.full(4, height)
    affine = sampling.training_maps(rows, *size, 32, ROTATING).affine
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
