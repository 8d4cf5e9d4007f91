"""Layouts, progressive JPEGs and faults of the synthetic set: what `generate` makes of the same photographs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests_support import table as rows

from fastddr.data import synthetic
from fastddr.data.arrange import LAYOUTS
from fastddr.data.faults import FAULTS
from fastddr.data.synthetic import generate
from fastddr.errors import UserError

SIZE = 64
COUNTS = {"train": (3, 2, 2, 2, 2, 1), "valid": (1, 1, 1, 1, 1, 1), "test": (1, 0, 0, 0, 1, 0)}
TINY = {"train": (1, 0, 0, 0, 1, 0)}


@pytest.fixture(scope="module", autouse=True)
def _each_photograph_is_rendered_once() -> Iterator[None]:
    """In this process: the tests below want the same ones in many places. Workers of others render theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_photograph", functools.cache(synthetic._photograph))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("made") / "set", counts=COUNTS, size=SIZE, seed=7, workers=1)


def photographs(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in root.rglob("*.jpg")}


@pytest.fixture(scope="module")
def arranged(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same set in every layout."""
    folder = tmp_path_factory.mktemp("arranged")
    roots = {
        layout: generate(folder / layout, counts=COUNTS, size=SIZE, seed=7, workers=1, layout=layout)
        for layout in LAYOUTS
        if layout != "official"
    }
    return {"official": made, **roots}


def grades(made: Path) -> dict[str, tuple[str, int]]:
    """Name -> split and grade, as the official layout has them."""
    found = {}
    for split in COUNTS:
        for line in (made / "DR_grading" / f"{split}.txt").read_text().splitlines():
            name, grade = line.split()
            found[name] = (split, int(grade))
    return found


def test_every_layout_holds_the_same_photographs(arranged: dict[str, Path], made: Path) -> None:
    truth = grades(made)
    everything = photographs(made)
    held = {
        "official": set(truth),
        "folders": set(truth),
        "csv": set(truth),
        "kaggle": {n for n, (_, grade) in truth.items() if grade < 5},
        "gdrbench": {n for n, (split, grade) in truth.items() if grade < 5 and split != "test"},
    }
    assert set(arranged) == set(held) == set(LAYOUTS)
    for layout, root in arranged.items():
        assert photographs(root) == {n: everything[n] for n in held[layout]}, layout
        table = rows(root / ("DR_grading/lesions.csv" if layout == "official" else "lesions.csv"))
        assert table == [row for row in rows(made / "DR_grading/lesions.csv") if row["name"] in held[layout]], layout
        assert not (root / "faults.csv").exists()


def test_the_kaggle_layout(arranged: dict[str, Path], made: Path) -> None:
    root, truth = arranged["kaggle"], grades(made)
    table = rows(root / "DR_grading.csv")
    assert list(table[0]) == ["id_code", "diagnosis"]
    assert {r["id_code"]: int(r["diagnosis"]) for r in table} == {n: g for n, (_, g) in truth.items() if g < 5}
    assert sorted(p.name for p in (root / "DR_grading" / "DR_grading").iterdir()) == sorted(r["id_code"] for r in table)
    assert sorted(p.name for p in root.iterdir()) == ["DR_grading", "DR_grading.csv", "lesions.csv"]


def test_the_gdrbench_layout(arranged: dict[str, Path], made: Path) -> None:
    root, truth = arranged["gdrbench"], grades(made)
    names = ["nodr", "mild_npdr", "moderate_npdr", "severe_npdr", "pdr"]
    assert sorted(p.name for p in (root / "images" / "DDR").iterdir()) == sorted(names)
    assert sorted(p.name for p in (root / "splits").iterdir()) == ["DDR_crossval.txt", "DDR_train.txt"]
    for split, file in (("train", "DDR_train.txt"), ("valid", "DDR_crossval.txt")):
        lines = (root / "splits" / file).read_text().splitlines()
        wanted = [f"DDR/{names[g]}/{n} {g}" for n, (s, g) in truth.items() if s == split and g < 5]
        assert lines == wanted
        assert all((root / "images" / line.split()[0]).is_file() for line in lines)


def test_the_layout_of_class_folders(arranged: dict[str, Path], made: Path) -> None:
    found = {p.name: (p.parts[-3], int(p.parts[-2])) for p in arranged["folders"].rglob("*.jpg")}
    assert found == grades(made)
    for split in COUNTS:
        assert sorted(p.name for p in (arranged["folders"] / split).iterdir()) == list("012345")


def test_the_layout_of_one_table(arranged: dict[str, Path], made: Path) -> None:
    root = arranged["csv"]
    table = rows(root / "labels.csv")
    assert list(table[0]) == ["path", "grade", "split", "patient"]
    assert {Path(r["path"]).name: (r["split"], int(r["grade"])) for r in table} == grades(made)
    assert all((root / r["path"]).is_file() for r in table)
    eyes: dict[str, list[tuple[str, str]]] = {}
    for row in table:
        eyes.setdefault(row["patient"], []).append((row["split"], row["path"]))
    for both in eyes.values():
        assert len({split for split, _ in both}) == 1, "a patient in two splits"
    assert sorted(map(len, eyes.values())) == [2] * 10
    assert [p for both in eyes.values() for _, p in both] == [r["path"] for r in table], "not one after the other"


def test_progress_counts_the_photographs_that_the_layout_holds(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    counts = {"train": (2, 0, 0, 0, 0, 3), "test": (1, 0, 0, 0, 0, 0)}
    generate(
        tmp_path / "set",
        counts=counts,
        size=48,
        layout="gdrbench",
        workers=1,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 2), (2, 2)]


# ------------------------------------------------------------------------------- progressive and faults


def is_progressive(path: Path) -> bool:
    with Image.open(path) as photo:
        return bool(photo.info.get("progressive"))


def test_a_share_of_the_photographs_is_progressive(tmp_path: Path) -> None:
    counts = {"train": (20, 10, 0, 0, 0, 0), "valid": (10, 0, 0, 0, 0, 0)}
    found = []
    for share in (0.0, 0.25, 0.75, 1.0):
        root = generate(tmp_path / str(share), counts=counts, size=32, workers=1, progressive=share)
        found.append({p.name for p in root.rglob("*.jpg") if is_progressive(p)})
    assert [len(f) for f in found[::3]] == [0, 40]
    assert 3 <= len(found[1]) <= 17
    assert 23 <= len(found[2]) <= 37
    assert found[1] < found[2], "a larger share keeps the smaller one's"
    pixels = [
        np.asarray(Image.open(tmp_path / share / "DR_grading/train/001-0000-100.jpg")) for share in ("0.0", "1.0")
    ]
    assert np.array_equal(*pixels)


FAULTY = {"counts": {"train": (8, 1, 1, 0, 0, 0), "valid": (8, 0, 0, 1, 0, 1), "test": (8, 0, 0, 0, 0, 0)}, "size": 48}


def state(root: Path) -> dict[str, object]:
    """What lies below a folder: bytes, or where a link leads, and the rights that a file has."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
        elif path.is_file():
            mode = path.stat().st_mode
            path.chmod(0o600)
            found[str(path.relative_to(root))] = (path.read_bytes(), oct(mode))
    return found


def test_faults_are_spread_and_listed(tmp_path: Path) -> None:
    sound = generate(tmp_path / "sound", **FAULTY, seed=5, workers=1, layout="csv", progressive=0.5)
    faulty = [
        generate(tmp_path / f"{w}", **FAULTY, seed=5, workers=w, layout="csv", progressive=0.5, corrupt=20)
        for w in (1, 2)
    ]
    table = rows(faulty[0] / "faults.csv")
    listed = {row["path"]: row["fault"] for row in table}
    assert list(table[0]) == ["path", "fault"]
    assert list(listed) == sorted(listed)
    assert sorted(listed.values()) == sorted([*FAULTS, *FAULTS[:2]])
    split = {row["path"]: row["split"] for row in rows(sound / "labels.csv")}
    assert sorted([split[path] for path in listed].count(s) for s in COUNTS) == [6, 7, 7]
    before, after = state(sound), state(faulty[0])
    assert after == state(faulty[1]), "faults depend on the number of workers"
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed == set(listed)
    assert set(after) - set(before) == {"faults.csv"}
    assert after["labels.csv"] == before["labels.csv"]
    copy = next(path for path, fault in listed.items() if fault == "duplicate")
    of = [path for path in before if before[path][0] == after[copy][0]]  # type: ignore[index]
    assert [split[path] for path in of] == [split[copy]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_of_faults_tells_paths_below_the_root(layout: str, tmp_path: Path) -> None:
    counts = {"train": (4, 1, 0, 0, 0, 0), "valid": (2, 0, 0, 0, 0, 0)}
    root = generate(tmp_path / "set", counts=counts, size=32, workers=1, layout=layout, corrupt=2)
    table = {row["path"]: row["fault"] for row in rows(root / "faults.csv")}
    assert sorted(table.values()) == ["empty", "truncated"]
    assert {fault: (root / path).stat().st_size == 0 for path, fault in table.items()} == {
        "empty": True,
        "truncated": False,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "kagle"}, "did you mean 'kaggle'"),
        ({"progressive": 1.5}, "progressive 1.5: choose from 0 to 1"),
        ({"progressive": float("nan")}, "progressive nan"),
        ({"corrupt": -1}, "-1 faulty ones: choose from 0 to 1"),
        ({"corrupt": 2}, "2 photographs cannot have 2 faulty ones"),
        ({"size": 8}, "size 8"),
        ({"quality": 0}, "quality 0"),
        ({"layout": "gdrbench", "counts": {"test": (1,) * 6}}, "no place"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(tmp_path / "set", **{"counts": TINY, "size": 32, "workers": 1, **arguments})
    text = str(caught.value)
    assert text[0].isupper()
    assert text.endswith((".", "?"))
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []
