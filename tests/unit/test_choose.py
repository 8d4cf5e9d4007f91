"""Which loader `auto` becomes, and where photographs are kept: by what is free, with the reason."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import task

from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders import capacity, choose, dali_decoder, stores
from fastddr.loaders.base import Task
from fastddr.loaders.capacity import Free

#: Of the tiny set: 27 and 11 canvases of 80 × 80.
NEED = (27 + 11) * 80 * 80 * 3
PLENTY = Free(vram=100 * NEED, ram=100 * NEED, mmap=100 * NEED)


@pytest.fixture(autouse=True)
def _with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_decoder, "installed", lambda: True)
    monkeypatch.setattr("fastddr.loaders.choosing.fails", lambda device: None)


@pytest.fixture
def tasks(tiny: Path) -> list[Task]:
    found = manifest.read(tiny)
    return [task(found), task(found, "valid")]


def on_gpu(tasks: list[Task]) -> list[Task]:
    return [replace(one, device=torch.device("cuda", 0)) for one in tasks]


@pytest.mark.parametrize(
    ("free", "loader", "store"),
    [
        (Free(4 * NEED, 0, 0), "resident", "vram"),
        (Free(4 * NEED - 4, 2 * NEED, 0), "resident", "ram"),
        (Free(0, 2 * NEED - 2, 2 * NEED), "resident", "mmap"),
        (Free(4 * NEED - 4, 2 * NEED - 2, 2 * NEED - 2), "dali", "none"),
    ],
    ids=["vram", "ram", "mmap", "streaming"],
)
def test_auto_takes_the_first_place_with_room(free: Free, loader: str, store: str, tasks: list[Task]) -> None:
    chosen = choose("auto", on_gpu(tasks), 10, free)
    assert (chosen.loader, chosen.store) == (loader, store)
    assert "MiB of decoded photographs" in chosen.reason


def test_without_a_gpu_there_is_no_vram(tasks: list[Task]) -> None:
    assert choose("auto", tasks, 10, PLENTY).store == "ram"
    with pytest.raises(UserError, match="there is no GPU"):
        choose("resident", [replace(one, store="vram") for one in tasks], 10, PLENTY)


def test_a_budget_is_the_most_that_is_taken(tasks: list[Task]) -> None:
    exact = [replace(one, budget=NEED) for one in tasks]
    assert choose("auto", exact, 10, PLENTY).loader == "resident"
    # It only lowers the limit: half of what is free stays for others.
    assert choose("auto", exact, 10, Free(0, 2 * NEED - 2, 2 * NEED - 2)).loader == "dali"
    small = choose("resident", [replace(one, budget=NEED + 2**20) for one in tasks], 10, PLENTY)
    assert f"{NEED / 2**20:.1f} MiB" in small.reason
    assert f"{NEED / 2**20 + 1:.1f} MiB allowed" in small.reason
    less = [replace(one, budget=NEED - 1) for one in tasks]
    assert choose("auto", less, 10, PLENTY).loader == "dali"
    words = r"are more than is allowed \(ram .* MiB, mmap .* MiB\); take --loading.store none .* new run --loader dali"
    with pytest.raises(UserError, match=words):
        choose("resident", less, 10, PLENTY)


def test_a_place_that_was_asked_for_is_the_only_one(tasks: list[Task]) -> None:
    asked: Any
    for asked in ("ram", "mmap", "none"):
        assert choose("resident", [replace(one, store=asked) for one in tasks], 10, PLENTY).store == asked
    with pytest.raises(UserError, match=r"allowed \(mmap"):
        choose("resident", [replace(one, store="mmap") for one in tasks], 10, PLENTY._replace(mmap=0))


def test_one_epoch_decodes_nothing_twice(tasks: list[Task]) -> None:
    chosen = choose("auto", tasks, 1, PLENTY)
    assert (chosen.loader, chosen.store) == ("dali", "none")
    assert "one epoch" in chosen.reason
    assert choose("resident", tasks, 1, PLENTY).loader == "resident", "asked for is asked for"


def test_the_reason_says_what_decoding_costs(tasks: list[Task]) -> None:
    assert "ms a photograph" in choose("auto", tasks, 2, PLENTY).reason
    assert capacity.decoding_ms(tasks[0]) > 0


def test_without_dali_and_without_triton(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddr.loaders.choosing.fails", lambda device: "this machine lacks a C compiler")
    chosen = choose("auto", on_gpu(tasks), 10, PLENTY)
    assert chosen.loader == "dali"
    assert "a C compiler" in chosen.reason
    monkeypatch.setattr(dali_decoder, "installed", lambda: False)
    chosen = choose("auto", on_gpu(tasks), 10, PLENTY)
    assert chosen.loader == "torchvision"
    assert "not installed" in chosen.reason
    assert choose("auto", tasks, 10, PLENTY).loader == "resident", "a CPU needs neither"


def test_a_kernel_that_does_not_run_is_no_end(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddr.loaders.choosing.fails", lambda device: "Triton cannot run here (no libcuda.so)")
    chosen = choose("auto", on_gpu(tasks), 10, PLENTY)
    assert (chosen.loader, chosen.store) == ("dali", "none")
    assert "no libcuda.so" in chosen.reason
    assert choose("auto", tasks, 10, PLENTY).loader == "resident", "a CPU does not need it"


def test_other_loaders_are_taken_at_their_word(tasks: list[Task]) -> None:
    for name in ("dali", "torchvision", "replay"):
        assert choose(name, tasks, 10, PLENTY) == choose(name, tasks, 10, Free(0, 0, 0))
        assert choose(name, tasks, 10, PLENTY).store == "none"


# ------------------------------------------------------------------------------------------ what is free


def test_all_ranks_go_by_the_least() -> None:
    assert capacity.least([Free(3, 20, 9, 1), Free(5, 10, 30, 2)]) == Free(3, 10, 9, 2)


def test_what_training_takes_of_a_card_is_no_room_for_photographs(tasks: list[Task]) -> None:
    need = sum(stores.place(task).total for task in tasks)
    free = Free(vram=8 * need, ram=8 * need, mmap=0)
    assert choose("auto", on_gpu(tasks), 10, free).store == "vram"
    assert choose("auto", on_gpu(tasks), 10, free._replace(taken=6 * need)).store == "vram"
    assert choose("auto", on_gpu(tasks), 10, free._replace(taken=7 * need)).store == "ram", "some stays free"
    assert free._replace(taken=9 * need).allowed("vram", None) == 0


def test_ranks_of_a_machine_share_its_memory_but_not_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_ram", lambda: 8000)
    one, four = (capacity.measure(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert (one.ram, four.ram) == (8000, 2000)
    assert one.mmap == four.mmap == 8000
    assert one.vram == 0


@pytest.mark.parametrize("how", ["locked", "read-only", "a file"])
def test_a_cache_that_cannot_be_written_to_has_no_room(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` streams then. The system's answers are made up: to root all is open."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("FASTDDR_CACHE", str(cache))
    assert capacity.measure(torch.device("cpu"), 1).mmap > 0
    exists, access = Path.exists, os.access

    def locked(path: Path, **settings: bool) -> bool:
        if cache in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return exists(path, **settings)

    match how:
        case "locked":
            monkeypatch.setattr(Path, "exists", locked)
        case "read-only":
            cache.mkdir()
            monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cache and access(path, mode))
        case "a file":
            cache.write_text("")
            cache.chmod(0o777)
    assert capacity.measure(torch.device("cpu"), 1).mmap == 0


def test_what_lies_in_the_file_already_needs_no_room_again(
    tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that the first start has filled would else end the resume."""
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(capacity, "free_ram", lambda: 100 * NEED)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: SimpleNamespace(free=NEED))

    def chosen() -> str:
        free = capacity.measure(torch.device("cpu"), 100, kept=stores.on_disk(tasks))
        return choose("auto", tasks, 10, free).store

    assert (stores.on_disk(tasks), chosen()) == (0, "none")
    file = stores.build(replace(tasks[0], store="mmap"), "test 1")
    for one in tasks:
        for id_ in one.ids.tolist():
            file.put(id_, torch.full((80, 80, 3), 7, dtype=torch.uint8))
    file.close()
    assert NEED < stores.on_disk(tasks) < 1.5 * NEED, "both splits lie in one file"
    assert chosen() == "mmap"
    assert stores.on_disk([replace(one, canvas=64) for one in tasks]) == 0


@pytest.mark.parametrize(("kind", "allowed"), [("ext4", 100), ("tmpfs", 150)])
def test_a_file_in_memory_is_room_for_itself_too(
    kind: str, allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file on a disk takes of memory is page cache, which counts as free."""
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(capacity, "free_ram", lambda: 100)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    mounts = [("/", "tmpfs"), (str(tmp_path), kind), (str(tmp_path / "other"), "tmpfs")]
    found = [SimpleNamespace(mountpoint=place, fstype=of) for place, of in mounts]
    monkeypatch.setattr(capacity.psutil, "disk_partitions", lambda all: found)
    free = capacity.measure(torch.device("cpu"), 2, kept=50)
    assert (free.ram, free.mmap) == (50, allowed)


def test_free_memory_is_measured() -> None:
    assert capacity.free_ram() > 10e6


GROUPS = {
    "version 2": (
        "0::/job\n",
        "job",
        {
            "memory.max": "1000",
            "memory.current": "700",
            "memory.stat": "anon 5\ninactive_file 30\nactive_file 40\nfile_dirty 15\nfile_writeback 5\n",
        },
    ),
    "version 1": (
        "3:cpu:/x\n2:memory:/job\n",
        "memory/job",
        {
            "memory.limit_in_bytes": "1000",
            "memory.usage_in_bytes": "700",
            # Those without `total_` are of the group without the groups below it.
            "memory.stat": "active_file 9\ntotal_inactive_file 30\ntotal_active_file 40\ntotal_dirty 20\n",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", GROUPS)
def test_the_limit_of_a_job_or_a_container_counts(version: str, tmp_path: Path) -> None:
    own, place, files = GROUPS[version]
    (tmp_path / "self").write_text(own)
    group = tmp_path / "groups" / place
    (group / "step").mkdir(parents=True)
    for name, content in files.items():
        (group / name).write_text(content)
    assert capacity._in_groups(tmp_path / "groups", tmp_path / "self") == [350]
    # A limit above the process's own group counts as well; a group without one does not.
    (tmp_path / "self").write_text(own.replace("/job", "/job/step"))
    assert capacity._in_groups(tmp_path / "groups", tmp_path / "self") == [350]
    if version == "version 2":
        (group / "memory.max").write_text("max\n")
        assert capacity._in_groups(tmp_path / "groups", tmp_path / "self") == []
    assert capacity._in_groups(tmp_path / "groups", tmp_path / "nothing") == []
