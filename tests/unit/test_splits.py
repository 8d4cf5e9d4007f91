"""Which photographs are for train, valid and test where a set does not say it, or not of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from photographs import SET, folders, kaggle, write_csv

from fastddr.config import SplitConfig
from fastddr.data import layouts, splits
from fastddr.data.grades import DDR
from fastddr.data.layouts import Entry, Listing
from fastddr.errors import UserError


def whole_ddr(spare: int = 0) -> Listing:
    """The Kaggle copy of all of DDR, by label alone: names of each grade interleaved with those of the others."""
    totals = [sum(DDR[split][grade] for split in DDR) for grade in range(5)]
    entries = [
        Entry(f"DR_grading/DR_grading/{number:05d}-{grade}.jpg", grade)
        for grade, total in enumerate(totals)
        for number in range(total - (spare if grade == 0 else 0))
    ]
    return Listing("kaggle", Path("/nowhere"), entries[::-1])


def by_split(entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    counts = Counter((entry.split, entry.grade) for entry in entries)
    return {split: tuple(counts[split, grade] for grade in range(5)) for split in DDR}


def test_the_official_test_split_is_restored_by_name() -> None:
    found, notes = splits.assign(whole_ddr(), SplitConfig())
    assert by_split(found)["test"] == DDR["test"][:5]
    for grade in range(5):
        names = sorted(entry.path for entry in found if entry.grade == grade)
        test = sorted(entry.path for entry in found if entry.grade == grade and entry.split == "test")
        assert test == names[-len(test) :], "the last block by name"
    for grade in range(5):
        assert abs(by_split(found)["valid"][grade] - DDR["valid"][grade]) <= 1, "as many as DDR's own valid split has"
    assert any("restored by file name" in note for note in notes)
    assert any("valid were drawn by chance (seed 0), stratified by grade" in note for note in notes)
    again, _ = splits.assign(whole_ddr(), SplitConfig(seed=1))
    assert by_split(again) == by_split(found)
    assert {e.path for e in again if e.split == "test"} == {e.path for e in found if e.split == "test"}
    assert {e.path for e in again if e.split == "valid"} != {e.path for e in found if e.split == "valid"}


def test_a_copy_that_is_not_whole_is_split_by_chance_or_refused() -> None:
    found, notes = splits.assign(whole_ddr(spare=1), SplitConfig())
    assert any("30% for test were drawn" in note for note in notes)
    assert {e.path for e in found if e.split == "test"} != {e.path for e in whole_ddr(1).entries[:3759]}
    with pytest.raises(UserError, match=r"cannot be restored: .*6266/630/4477/236/913, but are 6265/"):
        splits.assign(whole_ddr(spare=1), SplitConfig(test="official"))
    assert splits.draws_test(whole_ddr(spare=1), SplitConfig())
    assert splits.draws_test(whole_ddr(), SplitConfig(test="random"))
    assert not splits.draws_test(whole_ddr(), SplitConfig()), "the official one is restored"
    random, _ = splits.assign(whole_ddr(), SplitConfig(test="random"))
    official_, _ = splits.assign(whole_ddr(), SplitConfig())
    assert {e.path for e in random if e.split == "test"} != {e.path for e in official_ if e.split == "test"}


def test_valid_is_cut_from_train_where_it_is_missing(tmp_path: Path) -> None:
    found, notes = splits.assign(layouts.find(folders(tmp_path, [p for p in SET if p.split != "valid"])), SplitConfig())
    assert {entry.split for entry in found} == {"train", "valid", "test"}
    assert {e.path for e in found if e.split == "valid"} <= {f"train/{p.grade}/{p.name}" for p in SET}
    assert any("no valid split" in note for note in notes)


def test_a_table_without_test_and_settings_that_split_nothing_are_told(tmp_path: Path) -> None:
    rows = [[f"{p.split}/{p.grade}/{p.name}", p.grade, p.split] for p in SET if p.split != "test" and p.grade < 5]
    folders(tmp_path / "photographs")
    write_csv(tmp_path / "photographs" / "labels.csv", ["path", "grade", "split"], rows)
    listing = layouts.find(tmp_path / "photographs" / "labels.csv")
    assert splits.assign(listing, SplitConfig())[1] == ["There is no test split, so nothing is scored on it."]
    notes = splits.assign(listing, SplitConfig(seed=3))[1]
    assert notes[0] == "The set has splits of its own, so --splitting draws none."
    for photographs in (SET, [p for p in SET if p.split != "test"]):
        own = layouts.find(folders(tmp_path / str(len(photographs)), photographs))
        drawn = splits.assign(own, SplitConfig())[1]
        assert sum("no test split" in note for note in (*own.notes, *drawn)) == (photographs is not SET)


@given(
    patients=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=8, max_size=60),
    seed=st.integers(0, 2**32),
    order=st.randoms(use_true_random=False),
)
def test_a_drawn_split_keeps_patients_whole_and_does_not_depend_on_the_order_of_rows(
    patients: list[tuple[int, int]], seed: int, order: Any
) -> None:
    entries = [
        Entry(f"{number}-{eye}.jpg", grade, None, f"p{number}")
        for number, (grade, eyes) in enumerate(patients)
        for eye in range(eyes)
    ]
    config = SplitConfig(test="random", seed=seed)
    found, _ = splits.assign(Listing("csv", Path("/nowhere"), entries), config)
    where = {entry.path: entry.split for entry in found}
    assert len({(entry.patient, entry.split) for entry in found}) == len(patients)
    for grade in range(5):
        of_grade = [number for number, (own, _) in enumerate(patients) if own == grade]
        in_test = [number for number in of_grade if where[f"{number}-0.jpg"] == "test"]
        assert abs(len(in_test) - 0.3 * len(of_grade)) <= 1, "stratified"
    order.shuffle(entries)
    shuffled, _ = splits.assign(Listing("csv", Path("/nowhere"), entries), config)
    assert {entry.path: entry.split for entry in shuffled} == where


def test_what_a_prepared_set_lacks_takes_part_in_the_draw() -> None:
    whole = whole_ddr()
    absent, there = whole.entries[:7], whole.entries[7:]
    found, notes = splits.assign(Listing("kaggle", Path("/nowhere"), there, absent=absent), SplitConfig())
    before = {entry.path: entry.split for entry in splits.assign(whole, SplitConfig())[0]}
    assert {entry.path: entry.split for entry in found} == {entry.path: before[entry.path] for entry in there}
    assert any("restored by file name" in note for note in notes)


def test_kaggle_of_a_small_set_has_three_splits(tmp_path: Path) -> None:
    found, _ = splits.assign(layouts.find(kaggle(tmp_path)), SplitConfig())
    assert {entry.split for entry in found} == {"train", "valid", "test"}


def test_a_prepared_copy_is_drawn_into_the_same_splits() -> None:
    """Other folders and another extension move no photograph."""
    raw = [Entry(f"all/{number}.tif", number % 5) for number in range(100)]
    made = [Entry(f"photographs/all/{number}.jpg", number % 5) for number in range(100)]
    one, other = (splits.assign(Listing("csv", Path("/nowhere"), e), SplitConfig())[0] for e in (raw, made))
    assert [entry.split for entry in one] == [entry.split for entry in other]


def test_names_that_repeat_in_folders_are_drawn_by_chance_all_the_same() -> None:
    """`007/fundus.jpg`: by names alone the hash would be one, and the order of folders would draw."""

    def drawn(below: str, seed: int, ending: str = ".tif") -> set[int]:
        alike = [Entry(f"{below}{number:03d}/fundus{ending}", 0) for number in range(100)]
        unlike = [Entry(f"{below}{number % 7}/x{number}{ending}", 1) for number in range(60)]
        found, _ = splits.assign(Listing("csv", Path("/nowhere"), alike + unlike), SplitConfig(seed=seed))
        return {place for place, entry in enumerate(found) if entry.split == "test"}

    test = drawn("", 0)
    of_alike = sorted(test & set(range(100)))
    assert len(of_alike) == 30
    assert of_alike[-1] > 80, "not the first in alphabetical order"
    assert of_alike[0] < 20
    assert drawn("", 1) & set(range(100)) != set(of_alike)
    assert drawn("photographs/all/", 0, ".jpg") == test, "a prepared copy falls into the same split"
    assert sorted(test - set(of_alike))[:5] == [102, 103, 105, 106, 108], "names that do not repeat keep their places"


def test_of_how_many_photographs_the_patient_is_known() -> None:
    entries = [Entry(f"x{number}.jpg", number % 5) for number in range(50)]
    listing = Listing("csv", Path("/nowhere"), [*entries, Entry("10_left.jpg", 0, None, "10")])
    notes = splits.assign(listing, SplitConfig())[1]
    assert "patient by patient (known of 1 of 51 photographs; the others one by one)" in notes[0]
