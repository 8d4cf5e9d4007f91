"""The synthetic DDR: its files, its promises of sameness and wholeness, its signs in the places it names."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests_support import table

from fastddr.data import synthetic, workers
from fastddr.data.eye.anatomy import draw_eye
from fastddr.data.eye.camera import draw_camera, stream
from fastddr.data.eye.canvas import Canvas
from fastddr.data.eye.lesions import KINDS, draw_signs
from fastddr.data.grades import DDR
from fastddr.data.synthetic import ddr_counts, default_root, ensure, generate, render
from fastddr.errors import UserError

SIZE = 96
#: Twenty photographs: enough for two workers to share.
COUNTS = {"train": (3, 2, 2, 2, 2, 1), "valid": (1, 1, 1, 1, 1, 1), "test": (1, 0, 0, 0, 1, 0)}
TINY = {"train": (1, 0, 0, 0, 1, 0)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("made") / "set", counts=COUNTS, size=SIZE, seed=7, workers=1)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def labels(root: Path, split: str) -> dict[str, int]:
    rows = (line.split() for line in (root / "DR_grading" / f"{split}.txt").read_text().splitlines())
    return {name: int(grade) for name, grade in rows}


def test_a_process_that_ends_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or one that could not begin because the user's script has no guard."""

    class Pool:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def map(self, *_: object, **__: object) -> Iterator[object]:
            raise BrokenProcessPool
            yield

        def shutdown(self, **_: object) -> None:
            pass

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match=r'set: a process that drew .* memory runs out.*`if __name__ == "__main__":`'):
        generate(tmp_path / "set", counts=COUNTS, size=SIZE, workers=2)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ sameness


def test_files_do_not_depend_on_the_number_of_workers(made: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    again = generate(
        tmp_path / "set",
        counts=COUNTS,
        size=SIZE,
        seed=7,
        workers=2,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert contents(again) == contents(made)
    assert calls == [(i + 1, 20) for i in range(20)]


def test_a_photograph_does_not_depend_on_the_others(made: Path) -> None:
    name, grade = list(labels(made, "train").items())[5]
    photo, found = render(7, "train", 5, grade, SIZE)
    assert name == synthetic.photo_name("train", 5)
    file = made / "DR_grading" / "train" / name
    # What JPEG at quality 95 leaves of it: far nearer than another photograph.
    assert np.abs(np.asarray(Image.open(file), float) - photo).mean() < 4
    assert sum(row["name"] == name for row in table(made / "DR_grading" / "lesions.csv")) == len(found)


def test_seed_split_and_index_each_make_another_photograph() -> None:
    photos = [
        render(s, split, i, 0, SIZE)[0]
        for s, split, i in [(0, "train", 0), (1, "train", 0), (0, "valid", 0), (0, "train", 1)]
    ]
    assert all(not np.array_equal(photos[0], p) for p in photos[1:])
    assert np.array_equal(photos[0], render(0, "train", 0, 0, SIZE)[0])


# --------------------------------------------------------------------------------------- what is there


def test_counts_labels_and_photographs_agree(made: Path) -> None:
    for split, numbers in COUNTS.items():
        rows = labels(made, split)
        assert tuple(sorted(rows.values()).count(g) for g in range(6)) == numbers
        assert sorted(rows) == sorted(p.name for p in (made / "DR_grading" / split).iterdir())
    names = [n for split in COUNTS for n in labels(made, split)]
    assert len(set(names)) == len(names) == 20
    assert list(labels(made, "train").values()) != sorted(labels(made, "train").values()), "order tells the grade"


def test_photographs_are_jpegs_of_the_size_asked_for(made: Path) -> None:
    for path in (made / "DR_grading" / "train").iterdir():
        with Image.open(path) as photo:
            assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", (SIZE, SIZE))
            assert [c[1:3] for c in photo.layer] == [(2, 2), (1, 1), (1, 1)], "chroma is not 4:2:0"


def test_lesions_lie_in_the_photographs_that_they_name(made: Path) -> None:
    rows = table(made / "DR_grading" / "lesions.csv")
    grades = {(s, n): g for s in COUNTS for n, g in labels(made, s).items()}
    assert {grades[r["split"], r["name"]] for r in rows} == {1, 2, 3, 4}
    for row in rows:
        assert row["kind"] in KINDS
        assert 0 <= float(row["x"]) <= SIZE
        assert 0 <= float(row["y"]) <= SIZE
        assert float(row["radius"]) > 0


def kinds(grade: int, index: int) -> list[str]:
    canvas = Canvas(draw_eye(stream(3, "train", index, "eye")), draw_camera(stream(3, "train", index, "camera")), 64)
    return [m.kind for m in draw_signs(canvas, stream(3, "train", index, "signs"), grade)]


def test_healthy_and_ungradable_eyes_have_no_lesions() -> None:
    assert [kinds(0, i) for i in range(4)] == [[]] * 4
    assert render(3, "train", 0, 5, 48)[1] == []


def test_each_grade_has_its_signs() -> None:
    advanced = {"neovascularisation", "preretinal_haemorrhage", "laser_scar"}
    seen: set[str] = set()
    for i in range(12):
        one, two, three, four = (kinds(g, i) for g in (1, 2, 3, 4))
        seen.update(two, three, four)
        assert set(one) == {"microaneurysm"}
        assert set(two) <= {"microaneurysm", "haemorrhage", "exudate", "cotton_wool"}
        assert 0 < two.count("haemorrhage") <= 20 < three.count("haemorrhage")
        assert not advanced & set(three)
        assert {"neovascularisation", "preretinal_haemorrhage"} & set(four)
    assert seen == set(KINDS)


def test_severe_haemorrhages_fill_four_quadrants() -> None:
    for i in range(4):
        found = [m for m in render(3, "train", i, 3, 128)[1] if m.kind == "haemorrhage"]
        eye = draw_eye(stream(3, "train", i, "eye"))
        canvas = Canvas(eye, draw_camera(stream(3, "train", i, "camera")), 128)
        x, y = np.add(canvas.point_px(*eye.disc), canvas.point_px(*eye.fovea)) / 2
        quadrant = [2 * (m.y > y) + (m.x > x) for m in found]
        assert min(quadrant.count(q) for q in range(4)) >= 3


# ------------------------------------------------------------------------------------ how it looks


@pytest.mark.parametrize("index", range(4))
def test_the_border_is_nearly_black_and_the_retina_is_not(index: int) -> None:
    photo = render(0, "train", index, 0, SIZE)[0].astype(float)
    corners = np.concatenate([photo[:4, :4], photo[:4, -4:], photo[-4:, :4], photo[-4:, -4:]])
    assert 0 < corners.mean() < 16
    middle = photo[SIZE // 3 : -SIZE // 3, SIZE // 3 : -SIZE // 3]
    assert middle.mean() > 4 * corners.mean()
    assert middle.std() > 4
    assert (middle[..., 0] > middle[..., 2]).mean() > 0.95, "a retina is red"


@pytest.mark.parametrize("index", range(4))
def test_the_grade_changes_nothing_but_the_lesions(index: int) -> None:
    # The same eye under the same camera whatever the grade: no shortcut from camera, side or light.
    size = 192
    healthy = render(1, "train", index, 0, size)[0].astype(float)
    ill, found = render(1, "train", index, 2, size)
    change = np.abs(ill - healthy).max(-1)
    y, x = np.mgrid[:size, :size] + 0.5
    near = np.zeros((size, size), bool)
    for m in found:
        near |= np.hypot(x - m.x, y - m.y) <= 1.4 * m.radius + 3
    assert change[near].max() > 20, "the lesions cannot be seen"
    assert np.quantile(change[~near], 0.999) < 12, "something else has changed"


@pytest.mark.parametrize("grade", [1, 2, 3, 4])
def test_every_kind_of_lesion_shows_where_the_list_says(grade: int) -> None:
    size, shown = 256, dict[str, list[bool]]()
    y, x = np.mgrid[:size, :size] + 0.5
    for index in range(3):
        healthy = render(4, "train", index, 0, size)[0].astype(float)
        ill, found = render(4, "train", index, grade, size)
        change = np.abs(ill - healthy).max(-1)
        for m in found:
            seen = change[np.hypot(x - m.x, y - m.y) <= m.radius + 1].max() > 15
            shown.setdefault(m.kind, []).append(bool(seen))
    # Not all: a microaneurysm may lie on a vessel.
    assert {kind: np.mean(seen) > 0.8 for kind, seen in shown.items()} == dict.fromkeys(shown, True)


def test_lesions_have_the_same_places_at_every_size() -> None:
    small, large = render(2, "test", 0, 3, 64)[1], render(2, "test", 0, 3, 128)[1]
    assert [m.kind for m in small] == [m.kind for m in large]
    assert np.allclose([(2 * m.x, 2 * m.y) for m in small], [(m.x, m.y) for m in large], atol=0.01)


def test_a_grade_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="grade 6"):
        render(0, "train", 0, 6, 64)


# ----------------------------------------------------------------------------------------- wholeness


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_generation_leaves_nothing(tmp_path: Path, workers: int) -> None:
    def stop(done: int, total: int) -> None:
        assert not (tmp_path / "set").exists(), "the set shows before it is whole"
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(
            tmp_path / "set",
            counts={"train": (16, 0, 0, 0, 0, 0)},
            size=48,
            workers=workers,
            on_progress=stop,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        generate(tmp_path, counts=TINY, size=48)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("counts", [{"training": (1,) * 6}, {"train": (1,) * 5}, {"train": (1, 1, 1, 1, 1, -1)}])
def test_wrong_counts_are_refused(tmp_path: Path, counts: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UserError):
        generate(tmp_path / "set", counts=counts, size=48)
    assert list(tmp_path.iterdir()) == []


def test_of_two_generations_at_once_both_find_the_set_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    others: list[Path] = []

    def other_process(done: int, total: int) -> None:
        if done == 1:  # in the middle of ours, another one starts and finishes
            others.append(generate(default_root(TINY, 48, 0), counts=TINY, size=48, workers=1))
            others.append(tmp_path / "copy")
            others[0].joinpath("made by the other").touch()

    root = ensure(TINY, 48, 0, on_progress=other_process)
    assert root == others[0]
    assert (root / "made by the other").exists(), "a whole set was overwritten"
    assert [p.name for p in tmp_path.iterdir()] == [root.name]


def test_ensure_generates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    calls: list[int] = []
    first = ensure(TINY, 48, 0, on_progress=lambda done, total: calls.append(done))
    assert calls == [1, 2]
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert ensure(TINY, 48, 0, on_progress=lambda done, total: calls.append(done)) == first
    assert calls == [1, 2]
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before


def test_ensure_clears_away_what_a_killed_process_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    name = default_root(TINY, 48, 0).name
    dead, alive = tmp_path / f".{name}.dead.part", tmp_path / f".{name}.alive.part"
    dead.mkdir(), alive.mkdir()
    os.utime(dead, (0, 0))
    ensure(TINY, 48, 0)
    assert (dead.exists(), alive.exists()) == (False, True)


def test_ensure_does_not_mind_a_folder_that_is_finished_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    name = default_root(TINY, 48, 0).name
    glob = Path.glob
    gone = [tmp_path / f".{name}.gone.part"]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*glob(self, pattern), *gone])
    assert ensure(TINY, 48, 0).is_dir()


def test_a_folder_passes_its_group_on(tmp_path: Path) -> None:
    tmp_path.chmod(0o2755)
    root = generate(tmp_path / "root", counts=TINY, size=16, workers=1)
    assert root.stat().st_mode & stat.S_ISGID


def test_the_cache_folder_tells_everything_that_the_files_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    roots = [
        default_root(),
        default_root(TINY),
        default_root(size=256),
        default_root(seed=1),
    ]
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    roots.append(default_root())
    assert len(set(roots)) == len(roots)
    assert roots[0].name.endswith("-2b3ccf7e7bee"), "else every cache would draw its sets again"
    assert {r.parent for r in roots} == {tmp_path}


def test_rendering_does_not_import_torch() -> None:
    code = "import sys, fastddr.data.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -------------------------------------------------------------------------------------------- counts


@given(st.integers(36, 20_000))
def test_ddr_counts_add_up_and_keep_ddrs_order(total: int) -> None:
    counts = ddr_counts(total)
    cells = [(n, counts[split][g]) for split in DDR for g, n in enumerate(DDR[split])]
    assert sum(got for _, got in cells) == total
    assert min(got for _, got in cells) >= 2
    assert [got for _, got in sorted(cells)] == sorted(got for _, got in cells), "a rarer grade got more"


@given(st.integers(2000, 20_000))
def test_ddr_counts_are_within_one_of_the_exact_share(total: int) -> None:
    counts = ddr_counts(total)
    whole = sum(map(sum, DDR.values()))
    if min(min(n) for n in DDR.values()) * total >= 2 * whole:  # no cell had to be raised to the least
        for split, numbers in DDR.items():
            for n, got in zip(numbers, counts[split], strict=True):
                assert abs(got - n * total / whole) < 1


def test_ddr_counts_of_ddrs_own_size_are_ddr() -> None:
    assert ddr_counts(sum(map(sum, DDR.values()))) == DDR


def test_too_few_photographs_for_every_grade_are_refused() -> None:
    with pytest.raises(UserError, match="too few"):
        ddr_counts(35)
