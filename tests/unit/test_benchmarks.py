"""The benchmark of loaders: one run on a few small photographs, and the parts that need none."""

from __future__ import annotations

import itertools
import json
import os
import pydoc
import shutil
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import needs_dali
from tests_support import BENCHMARKS, ROOT, first_batch, task

from fastddr.config import AugmentConfig
from fastddr.data.manifest import Manifest
from fastddr.errors import UserError
from fastddr.loaders import dali_decoder


def test_the_kernel_alone_is_measured_where_photographs_are_in_the_cards_memory(
    load: Any, found: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file or RAM it would read a ring of a few batches, which a card keeps in its cache."""
    trials, loader = load("trials"), load("loader")
    monkeypatch.setattr(trials.stages, "kernel", lambda loader, seconds: [1.0, 2.0, 3.0])
    monkeypatch.setattr(trials.harness, "interleaved", lambda *_: None)  # no rounds
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(trials.loaders, "build", lambda name, task: SimpleNamespace(task=task))

    class Trial(trials.Trial):  # type: ignore[misc,name-defined]  # a module that was found by its name
        """In this process."""

        def __init__(self, store: str) -> None:
            self.spec = trials.Spec.parse("resident")
            self.source = trials._Source(self.spec, task(found, store=store, device=torch.device("cuda")))

        def ask(self, question: str, *arguments: float) -> Any:
            return getattr(self.source, question)(*arguments)

    panel = loader.Panel(task(found, device=torch.device("cuda")), {}, loader.Options())
    panel.trials = {"resident, mmap": Trial("mmap"), "resident, ram": Trial("ram")}
    panel.race()
    assert panel.rows == []
    panel.trials["resident"] = Trial("vram")
    panel.race()
    assert [row["median"] for row in panel.rows] == [2.0]


@pytest.mark.slow
def test_a_run_writes_rows_and_a_picture(tiny: Path, tmp_path: Path) -> None:
    ours = ["dali", "resident:ram"] if dali_decoder.installed() else ["torchvision:workers=0"]
    done = subprocess.run(
        [
            *(sys.executable, "-B", str(BENCHMARKS / "loader.py")),
            *("--data", str(tiny), "--out", str(tmp_path / "r.json")),
            *("--image-size", "32", "--canvas", "64", "--batch-size", "8", "--length", "0", "--threads", "1"),
            *("--rounds", "5", "--seconds", "0.05", "--policies", "report"),
            *("--loaders", *ours, "torch-pil", "torchvision-gpu"),
            *("--step", ours[-1], "--step-model", "8", "1", "3", "8", "--steps", "10"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "torchvision-gpu is left out: it decodes on a GPU" in done.stdout
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "r.json").read_text())
    assert {"benchmark", "machine", "versions", "date", "command", "rows"} <= set(record)
    assert str(tmp_path) not in record["command"]
    rows = record["rows"]
    for row in rows:
        assert {"name", "kind", "photographs", "policy", "median", "low", "high", "unit", "n"} <= set(row), row
        assert row["low"] <= row["median"] <= row["high"]
    by_name = {row["name"]: row for row in rows}
    labels = [name.replace(":", ", ") for name in ours]
    for name in ("torch-pil", *labels):
        row = by_name[name]
        assert (row["unit"], row["n"], row["threads"], row["batch_size"]) == ("images/s", 5, 1, 8)
        if sys.platform == "linux":
            assert 0 <= row["cpu_share"] < 1.5
            assert row["ram_gib"] > 0.05
    assert by_name["copying"]["kind"] == "limit"
    assert by_name["libjpeg-turbo, whole photographs, one core × 1"]["median"] > 0
    wait = next(row for row in rows if row["name"].startswith("data wait"))
    assert 0 <= wait["median"] <= 100
    shares = [row for row in rows if row["kind"] == "profile" and row["name"].startswith(labels[0])]
    assert {row["name"].partition(": ")[2] for row in shares} >= {"read", "decode", "Python"}
    assert all(0 <= row["median"] <= 100 for row in shares)
    if dali_decoder.installed():
        assert "target: dali / torch-pil ≥ 1.70:" in done.stdout
        assert by_name["DALI, reading and decoding alone"]["median"] > 0
        assert by_name["resident store alone, uint8"]["median"] > 0
        assert "first_epoch_seconds" in by_name["resident, ram"], "it was filled before its turns"


def test_names_and_options_of_loaders(load: Any, found: Manifest) -> None:
    spec, wanted = load("trials").Spec, task(found)
    assert spec.parse("dali").label == "dali"
    assert spec.parse("torchvision:workers=0").task(wanted).threads == 0
    mapped = spec.parse("resident:mmap,store_gib=0.5")
    assert mapped.label == "resident, mmap, store_gib=0.5"
    assert (mapped.task(wanted).store, mapped.task(wanted).budget) == ("mmap", 2**29)
    for wrong in ("dolly", "dali:mmap", "torchvision:workers=many", "resident:disk"):
        with pytest.raises(UserError, match=wrong.partition(":")[0]):
            spec.parse(wrong)
    # What a loader would pass over, its label must not claim.
    for wrong in ("dali:store_gib=4", "torch-pil:store_gib=1", "replay:workers=3", "resident:prefetch=4",
                  "torchvision-gpu:prefetch=4", "dali:workers=1.5", "dali:workers=²", "torch-pil:prefetch=0",
                  "torch-pil:workers=0,prefetch=4"):  # fmt: skip
        with pytest.raises(UserError, match=f"^--loaders {wrong}: "):
            spec.parse(wrong)


@pytest.mark.parametrize(("text", "ready"), [("dali:prefetch=8", 33), ("dali", 33), ("torchvision:prefetch=8", 129)])
def test_batches_that_may_be_ready_are_each_workers_of_a_dataloader_alone(
    text: str, ready: int, load: Any, found: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = load("trials")
    monkeypatch.setattr(trials.loaders, "build", lambda name, task: SimpleNamespace(task=task))
    spec = trials.Spec.parse(text)
    assert trials._Source(spec, spec.task(task(found, threads=16))).ready == ready


def test_only_sets_that_are_too_large_are_said_to_be_read_from_the_disk(load: Any) -> None:
    told, sets = load("loaders_told"), ("small", "large")
    for large, said in (
        ((), "Files lie in the page cache."),
        (sets, "The photographs are more than the free memory, so loaders also read from the disk."),
        (("large",), "The photographs `large` are more than the free memory, so loaders also read from the disk. "
                     "The others' files lie in the page cache."),
    ):  # fmt: skip
        rows = [
            {"photographs": name, "kind": "fastddr", **({"in_page_cache": False} if name in large else {})}
            for name in sets
        ]
        assert " ".join(told._conditions([(name, "report") for name in sets], SimpleNamespace(measured=rows))) == said


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_peers_work_as_far_ahead_as_they_are_told(load: Any, found: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, spec, wanted = load("peers").PEERS, load("trials").Spec, task(found, threads=1)
    for name, owner, method, setting in (
        ("torch-pil", "torch.utils.data.DataLoader", "__init__", "prefetch_factor"),
        ("spdl-decode-jpeg", "spdl.pipeline.PipelineBuilder", "add_sink", 0),
        ("dali-plain", "nvidia.dali.Pipeline", "__init__", "prefetch_queue_depth"),
    ):
        if peers[name].missing(wanted) is not None:
            continue
        given: list[int] = []
        real = getattr(pydoc.locate(owner), method)

        def seen(self: Any, *plain: Any, real: Any = real, at: Any = setting, to: Any = given, **named: Any) -> Any:
            to.append(plain[at] if isinstance(at, int) else named[at])
            return real(self, *plain, **named)

        monkeypatch.setattr(f"{owner}.{method}", seen)
        threads = torch.get_num_threads()
        for text in (name, f"{name}:prefetch=4"):
            peer = peers[name](spec.parse(text).task(wanted))
            next(peer.batches())
            peer.close()
        torch.set_num_threads(threads)
        assert given == [2, 4], name


def test_photographs_are_read_before_loaders_where_memory_holds_them(
    load: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources, read = load("sources"), []
    found = sources.read(tiny)
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(str(path)) or whole(path))
    size = int(found.size.sum())
    monkeypatch.setattr(sources.capacity, "free_ram", lambda: size)
    assert sources.warm(found)
    assert sorted(read) == sorted(found.files())
    assert f"reading {len(read)} photographs (" in capsys.readouterr().out
    read.clear()
    monkeypatch.setattr(sources.capacity, "free_ram", lambda: size - 1)
    assert not sources.warm(found)
    assert read == []
    assert "are more than the free memory" in capsys.readouterr().out


def test_a_bad_photograph_ends_a_benchmark_with_advice_that_it_can_take(load: Any, tiny: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(tiny, tmp_path / "a bad set")
    first = next(bad.rglob("*.jpg"))
    first.write_bytes(b"no JPEG")
    with pytest.raises(UserError, match=r"measure a set without what is bad: `fastddr prepare .*") as told:
        load("sources").read(bad)
    assert str(first) in str(told.value)
    assert f"fastddr prepare '{bad}' NEW-SET" in str(told.value), "it is to be typed"
    ceilings = load("ceilings")
    with pytest.raises(UserError, match="measure a set without what is bad"):
        list(ceilings._decoding_rows(ceilings.Options(data=bad), 1))
    assert len(load("sources").read(tiny)) > 0


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
@pytest.mark.parametrize("policy", ["report", "fundus"])
@pytest.mark.parametrize("name", ["torch-pil", "torch-decode-jpeg", "torchcodec", "spdl-decode-jpeg", "dali-plain"])
def test_peers_give_normalised_batches(load: Any, found: Manifest, name: str, policy: str) -> None:
    turned = {"rotate": 180.0, "scale": (0.9, 1.1), "brightness": 0.2, "hue": 0.02} if policy == "fundus" else {}
    wanted = task(found, image_size=32, canvas=64, threads=0, augment=AugmentConfig(**turned))
    images = first_batch(load("peers").PEERS[name], wanted)
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
    # From black to white, in ImageNet's normalisation.
    assert -2.2 < images.min() < 0 < images.max() < 2.7


@needs_dali
def test_a_plain_dali_pipeline_gives_windows_of_masters_each_once(load: Any, found: Manifest, tmp_path: Path) -> None:
    y, x = np.mgrid[:96, :64].astype(np.uint8)
    files = []
    for k, size in enumerate([(64, 64)] * 6 + [(96, 64)] * 2):
        pixels = np.stack([2 * x, 2 * y, np.full_like(x, 30 * k)], axis=2)[: size[0], : size[1]]
        files.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(pixels).save(files[-1])
    plain = AugmentConfig(hflip=False, vflip=False, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    wanted = task(
        found, files=files, grades=np.zeros(8, dtype=np.int64), widths=np.full(8, 64),
        heights=np.array([64] * 6 + [96] * 2), ids=np.arange(6), image_size=32, canvas=64, augment=plain,
    )  # fmt: skip
    peer = load("dali_plain").DaliPlain(wanted)
    batches = list(itertools.islice(peer.batches(), 6))
    peer.close()
    assert [len(images) for images in batches] == [4] * 6, "all that is decoded counts"
    for epoch in torch.cat(batches).split(6):
        assert sorted(epoch[:, 2, 0, 0].round().tolist()) == [30 * k for k in range(6)]
        # Each pixel as it is in the file.
        assert (epoch[:, 0].diff(dim=2) == 2).all()
        assert (epoch[:, 1].diff(dim=1) == 2).all()
    assert peer._area() == [0.25, 0.25]
    longer = replace(wanted, ids=np.arange(8), augment=replace(plain, scale=(0.8, 1.25)))
    peer = load("dali_plain").DaliPlain(longer)
    images = next(peer.batches())
    peer.close()
    assert images.shape == (4, 3, 32, 32)
    share = 0.25 * (6 + 2 * 64 / 96) / 8
    assert peer._area() == pytest.approx([share / 1.25**2, share / 0.8**2])


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_spdl_sends_bytes_to_a_gpu_which_normalises_them(
    load: Any, found: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, spdl = load("peers"), pytest.importorskip("spdl.io")
    sent: list[tuple[torch.dtype, int]] = []
    loading: set[int] = set()
    threads, whole = torch.get_num_threads(), peers.TorchDecodeJpeg.load

    def send(images: torch.Tensor) -> torch.Tensor:
        sent.append((images.dtype, threading.get_ident()))
        return images

    def loaded(file: str) -> torch.Tensor:
        loading.add(threading.get_ident())
        photograph: torch.Tensor = whole(file)
        return photograph

    def first(device: str) -> torch.Tensor:
        # One photograph, whole, so that each batch has the same.
        plain = AugmentConfig(hflip=False, vflip=False)
        wanted = task(
            found, files=found.files()[:1] * 4, ids=np.arange(4), image_size=80, augment=plain,
            device=torch.device(device),
        )  # fmt: skip
        peer = peers.PEERS["spdl-decode-jpeg"](wanted)
        try:
            images: torch.Tensor = next(peer.batches())
            return images
        finally:
            peer.close()
            torch.set_num_threads(threads)

    monkeypatch.setattr(spdl, "transfer_tensor_h2d", send)
    monkeypatch.setattr(peers.TorchDecodeJpeg, "load", loaded)
    expected = first("cpu")
    assert sent == []
    real = torch.Tensor.to
    # There is no card: what goes to it stays here.
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self if "cuda" in str(a[:1]) else real(self, *a, **k))
    torch.testing.assert_close(first("cuda"), expected)
    assert {dtype for dtype, _ in sent} == {torch.uint8}
    assert loading.isdisjoint(thread for _, thread in sent), "while one is sent, others are loaded"


def test_texts_know_the_peers_that_there_are(load: Any, found: Manifest) -> None:
    peers, told = load("peers").PEERS, load("loaders_told")
    assert set(told._PEERS) == set(peers)
    on_gpus = {name for name, peer in peers.items() if "GPU" in (peer.missing(task(found)) or "")}
    assert set(told._ON_GPUS) == on_gpus
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name, words in told._PEERS.items():
        assert f"| `{name}` | {words} |" in page


def test_waiting_for_a_step_is_no_waiting_for_data(load: Any, found: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before is waited for outside of `next`, where a loader that holds the host back would wait for it."""
    waiting, trials = load("waiting"), load("trials")
    from fastddr.meters import Waited
    from fastddr.watch import Watch

    events: list[str] = []

    class Noting(Waited[Any]):
        def __next__(self) -> Any:
            events.append("next")
            return super().__next__()

    class Looking(Watch):
        def look(self, *arguments: Any) -> Any:
            events.append("look")
            return super().look(*arguments)

    monkeypatch.setattr(waiting, "Waited", Noting)
    monkeypatch.setattr(waiting, "Watch", Looking)
    wanted = task(found, ids=found.ids("train")[:8], image_size=32)
    build, networks, left = waiting.networks.build, [], []

    def built(*arguments: Any, **settings: Any) -> Any:
        network = build(*arguments, **settings)
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(waiting.networks, "build", built)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.extend(network() for network in networks))
    row = waiting.share(trials.Spec("replay"), wanted, (8, 1, 3, 8), 10)
    assert left == [None], "a card's memory is left to the loaders that are measured next"
    assert row["n"] == 10
    while "next" in events[-1:]:
        events.pop()
    steps = "".join("n" if event == "next" else "l" for event in events).replace("nn", "n")
    assert steps == "nl" * 15


def test_targets_are_judged(load: Any) -> None:
    targets = load("targets")
    speeds = {"dali": [1400.0] * 5, "torch-pil": [400.0] * 5, "torchcodec": [1500.0] * 5}
    kinds = {"dali": "fastddr", "torch-pil": "peer", "torchcodec": "peer"}
    about = {"policy": "report", "photographs": "synthetic, quality 95, 4:2:0"}
    rows = targets.of(speeds, kinds, about, gpu=False)
    met = {row["name"]: row["met"] for row in rows if "target" in row}
    assert met == {"dali / torch-pil": True, "dali / torchcodec, the best peer": False}
    assert (
        targets.sentence(next(r for r in rows if "target" in r))
        == "target: dali / torch-pil ≥ 3.00: 3.50 (3.50-3.50), met"
    )
    rows = targets.of(speeds, kinds, about | {"photographs": "DDR-masters"}, gpu=False)
    assert [row["target"] for row in rows if row["name"] == "dali / torch-pil" and "target" in row] == [1.7]
    kernel = {"resident kernel alone": [5e5] * 5, "copying": [1e6] * 5}
    rows = targets.of(kernel, {}, about, gpu=True)
    assert [targets.sentence(row).partition("), ")[2] for row in rows] == ["NOT met (either of two is enough)", "met"]


def test_memory_and_processor_time_of_a_group(load: Any) -> None:
    harness = load("harness")
    assert harness.memory(os.getpgid(0)) > 50 * 2**20, "PyTorch alone"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, process_group=0) as alone:
        assert 0 < harness.memory(alone.pid) < harness.memory(os.getpgid(0)), "another group"
        alone.communicate(b"\n")
    assert harness.memory(alone.pid) == harness.cpu_seconds(alone.pid) == 0, "there is none any more"
    before = harness.cpu_seconds(os.getpgid(0))
    while harness.cpu_seconds(os.getpgid(0)) < before + 0.05:
        pass


def test_the_kernel_is_in_no_group(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS lists it as process 0, of which nobody may know how long it ran."""
    import psutil

    harness, process = load("harness"), psutil.Process

    def known(number: int) -> psutil.Process:
        if number == 0:
            raise psutil.AccessDenied(0)
        return process(number)

    monkeypatch.setattr(psutil, "pids", lambda: [0, os.getpid()])
    monkeypatch.setattr(psutil, "Process", known)
    assert harness.cpu_seconds(os.getpgid(0)) > 0


def test_the_picture_has_a_panel_for_each_policy(load: Any, tmp_path: Path) -> None:
    plots = load("plots")
    spread = {"median": 100.0, "low": 90.0, "high": 120.0, "unit": "images/s"}
    rows = [
        {"name": name, "kind": kind, "photographs": "some", "policy": policy, **spread}
        for policy in ("report", "fundus")
        for name, kind in (("dali", "fastddr"), ("torch-pil", "peer"), ("copying", "limit"), ("dali: read", "profile"))
    ]
    assert plots.save(plots.loaders(rows), "Loaders", tmp_path / "plots" / "p.png").stat().st_size > 10_000
