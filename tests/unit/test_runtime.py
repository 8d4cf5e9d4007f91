"""Precision, batch division and threads: chosen in code, with a reason."""

from __future__ import annotations

import inspect
import math
import os
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from tests_support import settings
from torch.nn.parallel import DistributedDataParallel

from fastddr import alone, network, ranks, runtime
from fastddr.config import Config
from fastddr.errors import UserError
from fastddr.inference import restore
from fastddr.inference.flags import Scoring
from fastddr.meters import RATE, WAIT, Window, largest, of_training
from fastddr.ranks import cores
from fastddr.runtime import card_of, choose_precision, divide_batch, share_gradients, start


@pytest.mark.parametrize(
    ("asked", "launched", "capability", "chosen"),
    [
        ("auto", "no", None, "fp32"),
        ("auto", "", None, "fp32"),
        ("auto", "no", (9, 0), "bf16"),
        ("auto", "no", (8, 0), "bf16"),
        ("auto", "no", (7, 5), "fp16"),
        ("fp32", "no", (9, 0), "fp32"),
        ("fp16", "no", (9, 0), "fp16"),
        ("auto", "fp16", (9, 0), "fp16"),
        ("fp32", "bf16", (9, 0), "bf16"),
        ("bf16", "no", None, "bf16"),
        ("bf16", "no", (7, 5), "bf16"),
    ],
)
def test_precision(asked: str, launched: str, capability: tuple[int, int] | None, chosen: str) -> None:
    got, reason = choose_precision(asked, launched, capability)
    assert got == chosen
    assert reason
    assert ("emulates" in reason) == (chosen == "bf16" and capability == (7, 5))
    assert choose_precision("fp32", "no", None, why="the run began in it")[1] == "the run began in it"


def test_the_reason_for_a_runs_precision_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Config(precision="bf16", batch_size=2)
    monkeypatch.setattr(restore, "stored", lambda _: trained)
    for asked, here, why in (
        (None, "bf16", "the run was trained in it"),
        (None, "fp32", "the run was trained in bf16, which this device is slow or wrong in"),
        ("fp32", "fp32", "--precision asked for it"),
    ):
        config = replace(trained, precision=here)
        assert restore.why_precision(Scoring(Path("run"), precision=asked), config) == why
        assert f"precision {here}: {why}" in start(config, precision_of=why).decisions


def test_half_precision_is_not_chosen_for_cards_that_get_it_wrong() -> None:
    assert choose_precision("auto", "no", (7, 5), "NVIDIA GeForce GTX 1650")[0] == "fp32"
    assert choose_precision("fp16", "no", (7, 5), "NVIDIA GeForce GTX 1650")[0] == "fp16", "asked for is asked for"
    assert choose_precision("auto", "no", (7, 5), "Tesla T4")[0] == "fp16"


def test_a_card_that_pytorch_is_not_built_for_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(capability: tuple[int, int], built_for: Sequence[str]) -> tuple[tuple[int, int], str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA TITAN V")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
        return card_of(torch.device("cuda"))

    built_for = ["sm_75", "sm_80", "sm_90", "compute_120"]
    for capability in ((7, 5), (8, 9), (9, 0), (12, 0)):
        assert look(capability, built_for) == (capability, "NVIDIA TITAN V")
    look((6, 1), [])
    with pytest.raises(UserError, match=r"^NVIDIA TITAN V .*7\.0.* is older than .*7\.5 and later.*CUDA 12"):
        look((7, 0), built_for)


@pytest.mark.parametrize(("index", "current"), [(None, []), (0, [0]), (3, [3])])
def test_the_card_of_a_process_is_the_current_one(
    index: int | None, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate gives a single process a device without an index, which PyTorch refuses to make the current one."""
    taken: list[int | None] = []

    def set_device(device: torch.device) -> None:
        assert device.index is not None
        taken.append(device.index)

    device = torch.device("cuda") if index is None else torch.device("cuda", index)

    class State(PartialState):
        def __init__(self, **_: object) -> None:
            self.device = device

    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    assert runtime.join().device == device
    assert taken == current


def test_work_of_the_cpu_needs_no_card_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(_: torch.device) -> tuple[tuple[int, int], str]:
        raise UserError("this card is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "card_of", too_old)
    config = replace(Config(), precision="fp32", batch_size=4)
    assert runtime.start(config, cpu=True).device.type == "cpu"
    with pytest.raises(UserError, match="too old"):
        runtime.start(config)


@pytest.mark.parametrize("driver", [True, False])
def test_a_driver_that_is_too_old_is_no_machine_without_a_gpu(driver: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("shutil.which", lambda name: "/bin/nvidia-smi" if driver else None)
    assert ("may be too old for CUDA 13.0" in runtime._why_device(True)) == driver
    if driver:  # of several machines, some of which may see theirs
        for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"too old for CUDA 13\.0 .* mend it on this machine"):
            runtime.join()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runtime._why_device(True) == "PyTorch sees no GPU"


@pytest.mark.parametrize(("asked", "launched"), [("fp16", "no"), ("auto", "fp16"), ("auto", "fp8")])
def test_precision_that_nothing_here_can(asked: str, launched: str) -> None:
    with pytest.raises(UserError, match=r"fp16|fp8"):
        choose_precision(asked, launched, None)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_a_batch_that_divides_is_divided(micro: int, accumulation: int, world: int) -> None:
    assert divide_batch(micro * accumulation * world, micro, world) == (micro, accumulation)
    assert divide_batch(micro * accumulation * world, "auto", world) == (micro * accumulation, 1)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_a_batch_is_divided_without_rest_or_refused(batch: int, micro: int, world: int) -> None:
    try:
        got, accumulation = divide_batch(batch, micro, world)
    except UserError as error:
        assert batch % world or (batch // world) % micro
        assert str(batch) in str(error)  # noqa: PT017
    else:
        assert got == micro
        assert got * accumulation * world == batch


def test_cores_are_shared_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddr.ranks.available_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cores() == 1


def test_cores_are_those_before_a_process_was_bound_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of eight ranks share the half of 64 cores to which Accelerate binds them."""
    monkeypatch.setattr("fastddr.ranks._cores_at_start", 64)
    monkeypatch.setattr("fastddr.ranks.available_cores", lambda: 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores() == 8
    monkeypatch.setattr("fastddr.ranks.available_cores", lambda: 4)
    assert cores() == 4, "never more than there are"


@pytest.mark.parametrize(("accumulation", "static"), [(1, True), (4, False)])
def test_gradients_are_shared_in_views_without_a_search_or_buffers(accumulation: int, static: bool) -> None:
    keywords = share_gradients(accumulation).to_kwargs()
    assert keywords.pop("gradient_as_bucket_view")
    assert keywords.pop("static_graph", False) is static
    [(name, buffers)] = keywords.items()
    assert name in inspect.signature(DistributedDataParallel).parameters
    assert name in ("forward_sync_buffers", "broadcast_buffers")
    assert buffers is False


def test_ddp_under_its_former_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older PyTorch knows no `forward_sync_buffers`."""

    def former(module: object, broadcast_buffers: bool = True) -> None:
        pass

    monkeypatch.setattr("fastddr.runtime.DistributedDataParallel", former)
    assert share_gradients(1).to_kwargs()["broadcast_buffers"] is False


def test_synchronised_statistics_need_gpus(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--sync-batchnorm shares .* on a CPU; leave it off here\.$"):
        start(settings(tiny, tmp_path / "run", "--sync-batchnorm"))


def test_a_rank_that_is_cut_off_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roll call has a timeout on rank 0 alone: without a connection to it the others' calls never return."""
    over, returned = threading.Event(), list[bool]()
    monkeypatch.setattr("torch.distributed.monitored_barrier", lambda *_, **__: returned.append(over.wait(30)))
    monkeypatch.setattr(ranks, "_PATIENCE", 0.05)
    monkeypatch.setattr(ranks, "_roll_call", object())
    assert ranks._silent() == "another rank"
    assert not returned
    over.set()


def test_the_silent_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: object, **__: object) -> None:
        raise RuntimeError("Ranks 2, 3 failed to pass monitoredBarrier in 3000 ms")

    monkeypatch.setattr("torch.distributed.monitored_barrier", call)
    assert ranks._silent() == "another rank", "before the ranks have met there is no group to call over"
    monkeypatch.setattr(ranks, "_roll_call", object())
    assert ranks._silent() == "rank 2, 3"


def test_an_error_before_the_ranks_have_met_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(dist.DistNetworkError, match="Timed out"), ranks.watched():
        raise dist.DistNetworkError("Timed out after 600 s waiting for clients")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("NCCL error in: x.cpp\nncclInvalidUsage: no.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0.",
         r"^NCCL does not work here: Duplicate GPU detected : rank 1 and rank 0; NCCL_DEBUG=INFO"),
        ("NCCL error in: x.cpp\nncclRemoteError: A call failed.\nLast error:\nsocketProgress: Connection closed",
         r"^another rank ended without a word.*socketProgress: Connection closed\)"),
    ],
)  # fmt: skip
def test_own_errors_of_nccl_are_no_lost_rank(said: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(ranks, "tell", told.append)
    monkeypatch.setattr(ranks, "_store", _Store)
    monkeypatch.setattr(ranks, "_PATIENCE", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ranks.RankLost, match=expected) as caught, ranks.watched():
        raise dist.DistBackendError(said)
    assert told == ([str(caught.value)] if "NCCL" in expected else []), "the others are told what is of this rank"


def test_all_ranks_compute_in_what_the_weakest_card_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 scales its loss, and its gradients would be averaged with those of others that do not."""
    for others, chosen in (
        ([("fp16", "its card")], "fp16"),
        ([("fp32", "no"), ("fp16", "its card")], "fp32"),
        ([], "bf16"),
    ):
        monkeypatch.setattr(ranks, "gather", lambda mine, others=others: [*mine, *others])
        assert runtime.agree_on_precision("auto", "", (9, 0), "H100")[0] == chosen


@pytest.mark.parametrize(
    ("cards", "local", "refused"), [(1, "2", True), (2, "2", False), (0, "2", False), (8, "1", False)]
)
def test_no_two_ranks_on_one_card(cards: int, local: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class State(PartialState):
        def __init__(self, **_: object) -> None:
            self.device = torch.device("cpu")

    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setattr(runtime, "on_cpu", lambda: cards == 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("WORLD_SIZE", local)
    monkeypatch.setenv("LOCAL_RANK", "0")
    if not refused:
        runtime.join()
        return
    with pytest.raises(UserError, match=r"^2 processes on a machine with 1 GPU\(s\): each needs one of its own"):
        runtime.join()


@pytest.mark.parametrize(
    ("address", "given", "local", "named"),
    [("HERE", None, "2", "net7"), ("HERE", "eth7", "2", "eth7"), ("HERE", None, "4", None),
     ("127.0.0.1", None, "2", None), ("first", None, "2", "net7"),
     ("of-ipv6.invalid", None, "2", None), ("alone", None, "2", "net7"), ("lost", None, "2", None)],
)  # fmt: skip
def test_gloo_takes_the_network_on_which_the_first_machine_is(
    address: str, given: str | None, local: str, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Probe:
        """From whose address a machine is reached: by one of the networks, or by itself."""

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...

        def connect(self, place: tuple[str, int]) -> None:
            if place[0].endswith("invalid") or (address in ("alone", "lost") and place[0] != address):
                raise OSError("unknown")
            self.to = place[0]

        def getsockname(self) -> tuple[str, int]:
            return ("127.0.1.1" if self.to in ("first", "alone", "lost") else "10.0.0.3", 1)

    addresses = {"lo": "127.0.0.1", "net7": "10.0.0.3"} | ({"net8": "10.0.1.3"} if address == "lost" else {})
    networks = {name: [SimpleNamespace(address=one, family=socket.AF_INET)] for name, one in addresses.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: networks)
    monkeypatch.setattr(network.socket, "socket", lambda *_: Probe())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for name, value in (("MASTER_ADDR", address), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", local)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.PartialState", lambda **_: os.environ.get("GLOO_SOCKET_IFNAME"))
    assert ranks.join(cpu=True) == named


@pytest.mark.parametrize(
    "said",
    [
        "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] timed out connecting",
        "[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: net7",
        "[enforce fail at gloo/transport/tcp/socket.cc:142] rv != -1. connect: Network is unreachable",
    ],
)
def test_machines_that_never_meet_are_told_to_name_their_network(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "net7")

    def never(**_: object) -> PartialState:
        raise RuntimeError(said)

    monkeypatch.setattr("accelerate.PartialState", never)
    for join in (ranks.talk, runtime.join):
        with pytest.raises(UserError, match=r"do not reach each other over gloo .* GLOO_SOCKET_IFNAME is net7"):
            join()


class _Store:
    """What ranks have told each other."""

    def __init__(self, **told: str) -> None:
        self.told = {f"fastddr/{kind}/{rank}": text for kind, text in told.items() for rank in (1,)}

    def check(self, keys: list[str]) -> bool:
        return all(key in self.told for key in keys)

    def get(self, key: str) -> bytes:
        return self.told[key].encode()

    def set(self, key: str, text: str) -> None:
        self.told[key] = text


@pytest.mark.parametrize(
    ("error", "told", "expected"),
    [
        ("Connection closed by peer", {"ended": "UserError: no", "waited": ""}, "rank 1 ended: UserError: no"),
        # Who has waited in vain for a third one closes its connections: that is no reason.
        ("Connection closed by peer", {"waited": ""}, "rank 2 did not answer in time"),
        ("Timed out waiting 15000ms for recv operation to complete", {}, "rank 2 did not answer in time"),
        # Rank 1 still writes down why it ends.
        ("Timed out waiting 15000ms for recv operation to complete", {"ended": "UserError: no"}, "rank 1 ended: UserE"),
        ("Connection closed by peer", {}, "another rank ended without a word"),
    ],
)
def test_the_reason_of_a_broken_job(
    error: str, told: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _Store(**told)
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks, "_silent", lambda: "rank 2")
    monkeypatch.setattr(ranks, "_met", lambda: True)
    monkeypatch.setattr(ranks, "_PATIENCE", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ranks.RankLost, match=f"^{expected}"), ranks.watched():
        raise RuntimeError(error)
    assert ("fastddr/waited/0" in store.told) == error.startswith("Timed out")


@pytest.mark.parametrize("error", ["Timed out waiting", "Connection closed by peer"])
def test_what_the_network_no_longer_answers_is_not_waited_for(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cable that is cut closes no connection."""
    over, before = threading.Event(), set(threading.enumerate())
    store = SimpleNamespace(check=lambda keys: over.wait(), get=lambda key: b"", set=lambda key, text: None)
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks, "_silent", lambda: "rank 2")
    monkeypatch.setattr(ranks, "_met", lambda: True)
    monkeypatch.setattr(ranks, "_PATIENCE", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    try:
        with pytest.raises(ranks.RankLost, match=r"did not answer|without a word"), ranks.watched():
            raise RuntimeError(error)
    finally:
        over.set()
        for asking in set(threading.enumerate()) - before:
            asking.join()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_accelerate_would_do_otherwise_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=r"accelerate launch asked for .*, which fastddr does not do"):
        runtime.join()


def test_a_compiler_of_accelerates_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    found = start(Config(batch_size=2))
    assert "accelerate launch asked for the compiler inductor, which is left out" in " ".join(found.decisions)
    model = torch.nn.Linear(2, 2)
    assert found.accelerator.prepare(model) is model


def test_one_trainer_at_a_time_in_a_process() -> None:
    class Some:
        pass

    first, second = Some(), Some()
    alone.take(first)
    for again in (first, second):
        with pytest.raises(UserError, match="a Trainer is open in this process"):
            alone.take(again)
    alone.let_go(second)
    with pytest.raises(UserError, match="a Trainer is open in this process"):
        start(Config(batch_size=2))  # as `fastddr evaluate` does
    alone.let_go(first)
    alone.take(second)
    del second, again  # nobody can close it any more
    alone.check()


def test_a_worker_that_imports_a_script_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    class Some:
        pass

    script, trainer = ModuleType("__mp_main__"), Some()
    monkeypatch.setitem(sys.modules, "__mp_main__", script)
    with pytest.raises(UserError, match='write `if __name__ == "__main__":` before'):
        alone.take(trainer)
    monkeypatch.setitem(sys.modules, "__main__", script)  # as `multiprocessing` leaves it: what was asked for begins
    alone.take(trainer)


def test_a_second_run_of_a_process_has_a_precision_of_its_own() -> None:
    whole, half = Config(batch_size=2, precision="fp32"), Config(batch_size=2, precision="bf16", micro_batch_size=1)
    state = PartialState()
    for config, mixed, accumulation in ((whole, "no", 1), (half, "bf16", 2), (whole, "no", 1)):
        found = start(config).accelerator
        assert (found.mixed_precision, found.gradient_accumulation_steps) == (mixed, accumulation)
        assert found.device == state.device


def test_a_window_tells_of_the_rank_that_waited_longest() -> None:
    window, seen = Window(), []

    def gather(rows: torch.Tensor) -> torch.Tensor:
        """With a second rank that has twice of everything."""
        seen.append(rows.shape)
        return torch.cat([rows, 2 * rows])

    sums = torch.tensor([3.0, 1.0, 4.0, 7.0], dtype=torch.float64)
    window._began -= 100
    found = window.close(gather, sums, 5.0, {"memory": 1.5})
    assert seen == [(1, 6)]
    assert (found["train/loss"], found["train/accuracy"], found["memory"]) == (0.75, 0.25, 3.0)
    assert found["train/images_per_second"] == pytest.approx(21 / 100, rel=0.01), "of all that were seen"
    assert found["train/data_wait"] == window.wait_share == pytest.approx(10 / 100, rel=0.01)
    window._began -= 100
    found = window.close(gather, sums, 6.0, {"memory": 1.5})
    assert found["train/data_wait"] == pytest.approx(2 / 100, rel=0.01)
    assert math.isnan(found["train/loss"])


def test_a_line_counts_by_its_steps_and_by_its_seconds() -> None:
    """Ten slow steps that waited, and one quick one, as at the end of an epoch."""
    slow = {"step": 10, RATE: 10.0, WAIT: 0.9}
    logged = [slow, {"step": 10, "valid/loss": 1.0}, {"step": 11, RATE: 1000.0, WAIT: 0.0}, {"step": 12}]
    rate, wait = (of_training(logged, name) for name in (RATE, WAIT))
    assert rate == pytest.approx((11 / 1.001, 10.0))
    assert wait == pytest.approx((0.9 / 1.001, 0.9))
    assert of_training(logged[1:2], RATE) is None


def test_the_fullest_card_of_all_ranks_is_told() -> None:
    found = largest(lambda rows: torch.cat([rows, 2 * rows]), {"a": 1.5, "b": 2.0}, torch.device("cpu"))
    assert found == {"a": 3.0, "b": 4.0}


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_that_have_left_each_other_do_not_train_again(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Some:
        pass

    monkeypatch.setattr(PartialState, "_shared_state", {"num_processes": processes})
    trainer = Some()
    if processes == 1:
        alone.take(trainer)
        return
    with pytest.raises(UserError, match="start the command again for the next one"):
        alone.take(trainer)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    alone.take(trainer)


@pytest.mark.parametrize(("most", "least"), [(2**30, 2**30), (2**25, 2**25), (0, None)])
def test_memory_is_kept_as_far_as_glibc_lets_it(most: int, least: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the larger threshold older versions want nothing; alone, the other would only keep theirs from growing."""
    done = {}

    def mallopt(what: int, value: int) -> int:
        if what == runtime._M_MMAP_THRESHOLD and value > most:
            return 0
        done[what] = value
        return 1

    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    runtime.keep_memory()
    both = {runtime._M_MMAP_THRESHOLD: least, runtime._M_TRIM_THRESHOLD: 2**31 - 1}
    assert done == (both if least else {})
