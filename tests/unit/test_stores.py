"""Where decoded photographs are kept: right after a crash, a bad disk, a full one, and between runs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import ROOT, task

from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.loaders import canvases, dali_decoder, stores
from fastddr.loaders.base import Task


@pytest.fixture
def wanted(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "cache"))
    return task(manifest.read(tiny), store="mmap")


def canvas(id_: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(id_).integers(0, 256, (80, 80, 3), dtype=np.uint8))


def test_every_canvas_has_its_place_and_no_two_overlap(wanted: Task) -> None:
    where = stores.place(replace(wanted, widths=wanted.widths + np.arange(len(wanted.files)) % 7))
    ids = np.unique(wanted.ids)
    ends = where.offset[ids] + where.width[ids] * where.height[ids] * 3
    assert where.offset[ids][0] == 0
    assert (where.offset[ids][1:] == ends[:-1]).all()
    assert ends[-1] == where.total
    others = np.setdiff1d(np.arange(len(wanted.files)), ids)
    assert (where.offset[others] == -1).all()


@pytest.mark.parametrize("name", ["ram", "mmap", "none"])
def test_what_was_put_is_got(name: Any, wanted: Task) -> None:
    store = stores.build(replace(wanted, store=name), "test 1")
    ids = wanted.ids[:5]
    assert store.missing(ids).all()
    for id_ in ids.tolist():
        store.put(id_, canvas(id_))
    assert not store.missing(ids).any()
    assert store.missing(wanted.ids[5:]).all()
    assert all(torch.equal(store.get(id_), canvas(id_)) for id_ in ids.tolist())
    assert store.damaged(ids) == []
    store.release(ids, wanted=ids[3:].tolist())
    assert store.missing(ids).tolist() == [name == "none"] * 3 + [False] * 2, "what the next batch wants stays"
    store.release(ids)
    assert store.missing(ids).all() == (name == "none"), "only the transient store lets go of what was used"
    store.close()
    store.close()


@pytest.mark.parametrize("name", ["ram", "vram", "none"])
def test_no_photograph_on_its_way_to_the_card_waits_for_training(
    name: Any, wanted: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without DALI. Copies from pageable memory would wait, and copies into it have to."""
    store = stores.build(replace(wanted, store=name), "test 1")
    if name != "ram":
        store.device = torch.device("cuda")
    given = replace(wanted, store=name, device=torch.device("cuda"))
    seen: list[object] = []
    # PyTorch pins nothing where there is no card.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)

    def copied(self: torch.Tensor, *arguments: object, non_blocking: bool = False) -> torch.Tensor:
        seen.append(non_blocking)
        return self

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    [[(id_, made)]] = canvases.PillowCanvases(given, 1).walk(wanted.ids[:1])
    store.put(id_, made)
    assert seen == ([False] if name == "ram" else ["pinned", True])


def opened(wanted: Task, decoder: str = "test 1") -> stores.Mapped:
    return stores.Mapped(wanted, decoder)


def test_a_file_is_there_for_the_next_run_and_shared(wanted: Task) -> None:
    one, other = opened(wanted), opened(wanted)
    one.put(3, canvas(3))
    assert not other.missing(np.array([3])).any(), "another process sees it at once"
    assert torch.equal(other.get(3), canvas(3))
    one.close()
    other.close()
    again = opened(wanted)
    assert not again.missing(np.array([3])).any()
    assert again.damaged(np.array([3])) == []
    assert torch.equal(again.get(3), canvas(3))


def test_only_what_is_filled_takes_room_on_the_disk(wanted: Task) -> None:
    many = replace(wanted, widths=wanted.widths * 20, heights=wanted.heights * 20, canvas=1600)
    store = opened(many)
    assert store.path.stat().st_size > 300e6
    assert store.path.stat().st_blocks * 512 < 1e6


def test_pixels_that_changed_on_the_disk_are_found_once(wanted: Task) -> None:
    store = opened(wanted)
    for id_ in (3, 4):
        store.put(id_, canvas(id_))
    store.close()
    again = opened(wanted)
    with again.path.open("r+b") as file:
        file.seek(-again.place.total + int(again.place.offset[4]) + 100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert again.damaged(np.array([3, 4])) == [4]
    again.put(4, canvas(4))
    assert again.damaged(np.array([3, 4])) == []


def test_a_state_without_its_pixels_is_damage(wanted: Task) -> None:
    """After a power cut the states may be on the disk and the pixels not."""
    store = opened(wanted)
    store.put(3, canvas(3))
    store._write(store._states_at + 5, b"\x01")
    store.close()
    again = opened(wanted)
    assert not again.missing(np.array([5])).any()
    assert again.damaged(np.array([3, 5])) == [5]


def test_a_kill_between_pixels_and_state_leaves_it_missing(wanted: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(wanted)

    class Killed(BaseException):
        pass

    for fatal in (1, 2):
        calls = []

        def write(where: int, data: Any, calls: list[int] = calls, fatal: int = fatal) -> None:
            calls.append(where)
            if len(calls) > fatal:
                raise Killed

        monkeypatch.setattr(store, "_write", write)
        with pytest.raises(Killed):
            store.put(3, canvas(3))
        assert opened(wanted).missing(np.array([3])).all()


@pytest.mark.parametrize("damage", ["cut", "longer", "version", "junk", "empty"])
def test_a_file_that_is_not_ours_is_made_anew(damage: str, wanted: Task) -> None:
    store = opened(wanted)
    store.put(3, canvas(3))
    store.close()
    content = bytearray(store.path.read_bytes())
    match damage:
        case "cut":
            content = content[:-1000]
        case "longer":
            content += b"x"
        case "version":
            now = f'"version": {stores.VERSION}'.encode()
            at = content.index(now)
            content[at : at + len(now)] = now[:-1] + b"0"
        case "junk":
            content[:4096] = b"\xff" * 4096
        case "empty":
            content = bytearray()
    store.path.write_bytes(content)
    again = opened(wanted)
    assert again.missing(np.array([3])).all()
    again.put(3, canvas(3))
    assert torch.equal(again.get(3), canvas(3))


def test_changed_photographs_another_decoder_and_another_canvas_have_another_file(wanted: Task, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(os.path.commonpath(wanted.files), root)
    moved = replace(
        wanted, files=[str(root / os.path.relpath(f, os.path.commonpath(wanted.files))) for f in wanted.files]
    )
    first = opened(moved)
    assert opened(moved).path == first.path
    assert opened(replace(moved, canvas=64)).path != first.path
    assert first.path.exists(), "another canvas is another file, and both stay"
    newer = opened(moved, "test 2")
    assert newer.path != first.path
    assert not first.path.exists(), "what nobody can use any more is removed"
    file = Path(moved.files[2])
    os.utime(file, ns=(1, 1))
    assert opened(moved, "test 2").path != newer.path
    first.put(3, canvas(3))
    assert torch.equal(first.get(3), canvas(3)), "who has an old file open goes on with it"


def test_what_a_gpu_decodes_is_not_taken_for_what_a_cpu_does(wanted: Task) -> None:
    """Nor one of its decoders for the other; and neither removes the other's file."""
    on_card = replace(wanted, device=torch.device("cuda", 0))
    tasks = (wanted, on_card, replace(on_card, jpeg_engines=True))
    assert len({canvases.decoder(one) for one in tasks}) == (3 if dali_decoder.installed() else 1)
    here, there = (opened(one, canvases.decoder(one)) for one in (wanted, on_card))
    assert here.path != there.path
    assert here.path.exists()
    here.put(int(wanted.ids[0]), canvas(0))
    here.close()
    there.close()
    again = opened(wanted, canvases.decoder(wanted))
    assert not again.missing(wanted.ids[:1]).any()
    again.close()


def test_a_full_disk_is_one_sentence_and_leaves_the_photograph_missing(
    wanted: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(wanted)

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\).*--loading.store"):
            store.put(3, canvas(3))
    assert store.missing(np.array([3])).all()
    store.put(3, canvas(3))
    assert torch.equal(store.get(3), canvas(3))


def test_what_is_read_before_it_is_filled_is_no_hole(wanted: Task) -> None:
    """To read a hole of a full tmpfs through the map is a SIGBUS."""
    store = opened(wanted)
    with store.path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) >= store._begin
    store.close()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_will_do(code: int, wanted: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    store = opened(wanted)
    store.put(3, canvas(3))
    assert not opened(wanted).missing(np.array([3])).any()
    assert [file.name for file in store.path.parent.iterdir()] == [store.path.name]


@pytest.mark.parametrize(("photograph", "expected"), [(0o600, 0o600), (0o644, 0o644), (0o664, 0o664), (0o440, 0o640)])
def test_a_file_is_for_those_who_may_read_the_photographs(
    photograph: int, expected: int, wanted: Task, tmp_path: Path
) -> None:
    file = tmp_path / "first.jpg"
    file.write_bytes(Path(wanted.files[0]).read_bytes())
    file.chmod(photograph)
    store = opened(replace(wanted, files=[str(file), *wanted.files[1:]]))
    assert store.path.stat().st_mode & 0o777 == expected


def test_the_file_of_another_user_stays_and_ours_stands_beside_it(
    wanted: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, real = opened(wanted), os.open

    def locked(path: Any, *arguments: Any, **settings: Any) -> int:
        if path == theirs.path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", locked)
    ours = opened(wanted)
    assert ours.path != theirs.path
    assert theirs.path.exists()
    ours.put(3, canvas(3))
    assert not opened(wanted).missing(np.array([3])).any()


def test_a_cache_that_cannot_be_used_is_one_sentence(
    wanted: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be used.*FASTDDR_CACHE"):
        opened(wanted)


def test_memory_that_cannot_be_had_is_one_sentence(wanted: Task) -> None:
    huge = replace(wanted, widths=wanted.widths * 100_000, heights=wanted.heights * 100_000, canvas=8_000_000)
    with pytest.raises(UserError, match=r"no room for .* GiB of decoded photographs in cpu memory"):
        stores.build(replace(huge, store="ram"), "test 1")


WRITER = """
import sys, numpy as np, torch
from pathlib import Path
from fastddr.data import manifest
from fastddr.loaders import stores
from tests_support import task
wanted = task(manifest.read(sys.argv[1]), store="mmap")
for round in range(8):
    store = stores.Mapped(wanted, f"test {round}")
    for id_ in range(20):
        pixels = np.random.default_rng(id_).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        store.put(id_, torch.from_numpy(pixels))
        assert np.array_equal(store.get(id_).numpy(), pixels)
    assert store.damaged(np.arange(20)) == []
    store.close()
"""


def test_processes_that_make_and_fill_one_file_at_once_do_not_disturb_each_other(wanted: Task, tiny: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tiny)], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    assert not list((Path(os.environ["FASTDDR_CACHE"]) / "resident").glob("*.partial"))
