"""The loaders of a run: chosen together, the same on all ranks, and what is read once is not kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from reference import needs_dali
from tests_support import settings

from fastddr import loaders
from fastddr.config import Config
from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders import dali_decoder, stores
from fastddr.loaders import run as run_module
from fastddr.loaders.capacity import Free
from fastddr.loaders.choosing import Choice
from fastddr.loaders.run import RunLoaders
from fastddr.runtime import Runtime


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "cache"))


def opened(config: Config, data: Path, said: list[str], rank: int = 0) -> RunLoaders:
    runtime = Runtime(
        accelerator=Accelerator(cpu=True),
        device=torch.device("cpu"),
        precision="fp32",
        threads=1,
        rank=rank,
        world=rank + 1,
        micro_batch_size=4,
        accumulation=2,
        decisions=(),
    )
    return RunLoaders(config, manifest.read(data), runtime, said.append)


def names(loaders: RunLoaders) -> list[tuple[str, str]]:
    return [(loader.name, loader.task.store) for loader in (loaders.train, loaders.valid, loaders.once("test"))]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--loader", "resident", "--loading.store", "ram"], [*[("resident", "ram")] * 2, ("resident", "none")]),
        (["--loader", "resident", "--loading.store", "mmap"], [("resident", "mmap")] * 3),
        (["--loader", "resident", "--loading.store", "none"], [("resident", "none")] * 3),
        (["--loader", "torchvision"], [("torchvision", "none")] * 3),
    ],
)
def test_which_loaders_a_run_has(flags: list[str], expected: list[tuple[str, str]], tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    loaders = opened(settings(tiny, tmp_path / "run", *flags), tiny, said)
    assert names(loaders) == expected
    assert len(said) == 1
    assert said[0].startswith(f"loader {expected[0][0]}")
    loaders.close()
    loaders.close()


def test_replay_never_scores_a_split(tiny: Path, tmp_path: Path) -> None:
    loaders = opened(settings(tiny, tmp_path / "run", "--loader", "replay"), tiny, [])
    streaming = "dali" if dali_decoder.installed() else "torchvision"
    assert [name for name, _ in names(loaders)] == ["replay", streaming, streaming]
    loaders.close()


def test_training_and_validation_share_the_budget(tiny: Path, tmp_path: Path) -> None:
    """27 and 11 photographs: what holds either, but not both, is too little."""
    need = (27 * 80 * 80 + 11 * 64 * 64) * 3 / 2**30
    flags = ["--loader", "resident", "--loading.store-gib"]
    opened(settings(tiny, tmp_path / "run", *flags, str(need * 1.01)), tiny, []).close()
    with pytest.raises(UserError, match="more than is allowed"):
        opened(settings(tiny, tmp_path / "run", *flags, str(need * 0.99)), tiny, [])


@pytest.mark.parametrize(("spare", "store"), [(1.01, "mmap"), (0.99, "none")])
def test_test_is_kept_in_a_file_only_where_it_has_room(spare: float, store: str, tiny: Path, tmp_path: Path) -> None:
    """A disk that is full after the last epoch would end the run at its scoring."""
    need = spare * (27 * 80 * 80 + (11 + 13) * 64 * 64) * 3 / 2**30
    flags = ["--loader", "resident", "--loading.store", "mmap", "--loading.store-gib", str(need)]
    loaders = opened(settings(tiny, tmp_path / "run", *flags), tiny, [])
    assert names(loaders)[2] == ("resident", store)
    loaders.close()


@pytest.mark.parametrize(("field", "side", "store"), [("center", 80, "mmap"), ("full", 64, "none")])
def test_train_is_scored_from_its_file_and_written_into_no_other(
    field: str, side: int, store: str, tiny: Path, tmp_path: Path
) -> None:
    """Of another canvas it is not there, and nobody has asked whether there is room."""
    need = 1.01 * (27 * 80 * 80 + (11 + 13) * side * side) * 3 / 2**30
    flags = ["--loader", "resident", "--loading.store", "mmap", "--loading.store-gib", str(need)]
    loaders = opened(settings(tiny, tmp_path / "run", *flags, "--evaluation.field", field), tiny, [])
    for epoch in range(3):
        list(loaders.train.epoch(epoch))
    list(loaders.valid.epoch())
    tasks = [loaders.train.task, loaders.valid.task]
    before = stores.on_disk(tasks)
    scored = loaders.once("train")
    assert (scored.task.canvas, scored.task.store) == (side, store)
    list(scored.epoch())
    assert stores.on_disk(tasks) == before
    loaders.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_bad_disk_changed_is_said_by_the_rank_that_met_it(
    rank: int, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tiny, tmp_path / "run", "--loader", "resident", "--loading.store", "mmap")
    first = opened(config, tiny, [])
    list(first.train.epoch())
    first.close()
    said: list[str] = []
    again = opened(config, tiny, said, rank)
    store: Any = again.train._store  # type: ignore[attr-defined]  # of a resident loader, which this is
    id_ = int(again.train.task.requests(0).id[0, 0])
    store._write(store._begin + int(store.place.offset[id_]) + 5, b"\x00\xff\x00\xff")
    list(again.train.epoch())
    again.close()
    words = "1 photographs were not as they had been written"
    assert [words in line for line in said] == [False, True][: 2 - rank]
    aloud = capsys.readouterr().err
    assert (f"fastddr, rank 1: {store.path}: {words}" in aloud) == (rank == 1)


def test_ctrl_c_while_the_second_opens_closes_the_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []

    def build(*arguments: Any) -> Any:
        if built:
            raise KeyboardInterrupt
        built.append(loaders.build(*arguments))
        return built[0]

    monkeypatch.setattr(run_module, "build", build)
    with pytest.raises(KeyboardInterrupt):
        opened(settings(tiny, tmp_path / "run", "--loader", "torchvision"), tiny, [])
    with pytest.raises(RuntimeError, match="closed"):
        built[0].epoch()


def test_the_rank_with_the_least_memory_decides(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "measure", lambda device, ranks, taken, kept: Free(0, 10**9, 10**9))
    # The other rank has little memory, and finds what this one finds with so little.
    monkeypatch.setattr(
        run_module.ranks,
        "gather",
        lambda items: [*items, Free(0, 1000, 1000) if isinstance(items[0], Free) else items[0]],
    )
    loaders = opened(settings(tiny, tmp_path / "run"), tiny, [])
    assert loaders.choice.loader in ("dali", "torchvision")
    loaders.close()


def test_an_evaluation_of_the_full_field_has_its_own_canvas(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    loaders = opened(settings(tiny, tmp_path / "run"), tiny, said)
    assert (loaders.train.task.canvas, loaders.valid.task.canvas) == (80, 64)
    assert next(iter(loaders.valid.epoch())).image.shape[-2:] == (64, 64)
    loaders.close()
    assert not [line for line in said if "than in training" in line]
    center = opened(settings(tiny, tmp_path / "center", "--evaluation.field", "center"), tiny, [])
    assert center.valid.task.canvas == 80
    center.close()


def test_it_is_said_where_evaluation_shows_things_much_smaller(tiny: Path, tmp_path: Path) -> None:
    for field, times in (("full", [True]), ("center", []), ("multi", [])):
        said: list[str] = []
        opened(settings(tiny, tmp_path / field, "--canvas", "96", "--evaluation.field", field), tiny, said).close()
        assert ["1.5 times smaller" in line for line in said if "than in training" in line] == times


@pytest.mark.parametrize("lacks", ["DALI", pytest.param("Triton", marks=needs_dali), "nothing"])
def test_all_ranks_load_as_the_least_of_them_can(
    lacks: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks on several machines: another one lacks what this one has."""
    other = {"DALI": "torchvision", "Triton": "dali", "nothing": "resident"}[lacks]

    def gather(items: list[Any]) -> list[Any]:
        if isinstance(items[0], Choice):
            store = "ram" if other == "resident" else "none"
            return [*items, Choice(other, store, f"the other machine lacks {lacks}")]
        return items * 2

    monkeypatch.setattr("fastddr.ranks.gather", gather)
    said: list[str] = []
    loaders = opened(settings(tiny, tmp_path / "run", "--loader", "auto", "--epochs", "3"), tiny, said)
    assert loaders.choice.loader == other
    assert loaders.train.name == other
    assert (f"lacks {lacks}" in said[0]) == (lacks != "nothing")
