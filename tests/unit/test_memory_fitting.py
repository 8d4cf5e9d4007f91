"""The micro batch that fits: chosen by prediction, checked by a real step, on the card that is here."""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import NOTHING, SMALL, config

from fastddr import __main__ as command
from fastddr import models, verbs
from fastddr.errors import UserError
from fastddr.memory import cards, fitting, predicting, questions
from fastddr.memory.allowances import DECLARED, GIB, MIB
from fastddr.memory.planning import choose_micro_batch
from fastddr.memory.predicting import Case, predict
from fastddr.meters import enough_memory


def test_the_micro_batch_is_the_largest_divisor_that_fits() -> None:
    plenty, why = choose_micro_batch(config(), 1, 4 * GIB, NOTHING)
    assert plenty == 24
    assert "predicted of 4.0 GiB" in why
    case = Case(config(), 8)
    room = predict(case, NOTHING).total
    micro, why = choose_micro_batch(config(), 1, room, NOTHING)
    assert micro == 8
    assert "; 24 would take" in why


def test_ranks_share_the_global_batch() -> None:
    assert choose_micro_batch(config(), 2, 4 * GIB, NOTHING)[0] == 12
    with pytest.raises(UserError, match="cannot be divided by 5 ranks"):
        choose_micro_batch(config(), 5, 4 * GIB, NOTHING)


def test_a_quarter_is_left_to_the_store() -> None:
    room = predict(Case(config(), 8), NOTHING).total
    assert choose_micro_batch(config(loading={"store": "auto"}), 1, room, NOTHING)[0] < 8
    assert choose_micro_batch(config(loading={"store": "auto"}), 1, room * 4 // 3 + MIB, NOTHING)[0] == 8


def test_what_does_not_fit_at_all_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"even 1 photograph\(s\) of 64 px at once would take .*lower --image-size"):
        choose_micro_batch(config(), 1, MIB, NOTHING)


def test_a_real_step_that_runs_out_of_memory_takes_the_next_smaller_divisor() -> None:
    tried = []
    # Libraries have words of their own.
    raised = [torch.OutOfMemoryError("CUDA out of memory"),
              RuntimeError("GET was unable to find an engine to execute this computation")]  # fmt: skip

    def step(micro: int) -> None:
        tried.append(micro)
        if micro > 8:
            raise raised[len(tried) - 1]

    micro, said = fitting.checked(config(), 1, 4 * GIB, step, NOTHING)
    assert (micro, tried) == (8, [24, 12, 8])
    assert len(said) == 3
    assert said[0].startswith("micro batch 24: a real step ran out of memory")
    assert said[-1].endswith("a real step went through")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "GET was unable to find an"),
        (RuntimeError("CUDA out of memory, in DALI: Failed to decode sample #3"), "CUDA out of memory, in DALI"),
        # Of the machine and not of the card.
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "[enforce] DefaultCPUAllocator",
        ),
        (MemoryError(), "MemoryError"),
        *((RuntimeError(words), words) for words in (
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
            "Triton Error [CUDA]: out of memory",
            "CUDA driver error: out of memory",
        )),
    ],
)  # fmt: skip
def test_what_may_be_no_lack_of_memory_is_said(error: BaseException, told: str | None) -> None:
    with pytest.raises(UserError) as caught, enough_memory(lambda: "too small."):
        raise error
    assert str(caught.value).startswith("too small." if told is None else f"too small. What was said: {told}")
    assert ("What was said" in str(caught.value)) == (told is not None)


def test_where_no_micro_batch_goes_through_it_is_said_why() -> None:
    def step(micro: int) -> None:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    said = r"micro batch 1: a real step .*unable to find an engine.*; no smaller one is left, so lower --image-size"
    with pytest.raises(UserError, match=said):
        fitting.checked(config(), 1, 4 * GIB, step, NOTHING)


def test_what_was_measured_here_says_nothing_of_another_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(questions, "_here", lambda: ("NVIDIA X", 8.1))

    def load(card: str | None) -> Any:
        asked.append(card)
        raise UserError("enough")

    monkeypatch.setattr(questions.allowances, "load", load)
    for vram in ("8", "16"):
        assert command.main(["plan", "--vram", vram]) == 2
    # Of a card that is named its own figures alone: others may be as large.
    monkeypatch.setattr(questions, "_here", lambda: ("NVIDIA GeForce RTX 3090", 23.7))
    for card in ("RTX 3090", "RTX 4090"):
        assert command.main(["plan", "--card", card]) == 2
    assert asked == ["NVIDIA X", None, "NVIDIA GeForce RTX 3090", None]


def test_without_a_card_that_is_named_plan_is_of_the_one_that_is_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(questions, "_table", lambda _, flags, card, vram, *more: asked.append((card, vram)) or 0)
    for device in ("NVIDIA GeForce RTX 3090", "NVIDIA X"):
        monkeypatch.setattr(questions, "_here", lambda device=device: (device, 23.68751))
        assert command.main(["plan"]) == 0
    assert asked == [(cards.CARDS["RTX 3090"], 23.68751), (None, 23.68751)]
    assert command.main(["plan", *SMALL]) == 0
    assert "that may be used of 23.69 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("problem", "found"),
    [("Cannot re-initialize CUDA in forked subprocess.", ("NVIDIA X", 8.0)), ("CUDA error: out of memory", None)],
)
def test_a_process_that_has_counted_its_cards_asks_for_them_itself(
    problem: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch then refuses CUDA to its forks. A card that cannot be asked is none."""

    class Refused(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            raise RuntimeError(problem)

    monkeypatch.setattr(questions.ProcessPoolExecutor, "submit", lambda *_: Refused())
    monkeypatch.setattr(questions, "_first_card", lambda: ("NVIDIA X", 8.0))
    assert questions._here() == found


@pytest.mark.parametrize("seen", ["2", None])
def test_the_card_is_hidden_only_while_plan_answers(seen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[str | None] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setattr(questions, "_here", lambda: None)
    monkeypatch.setattr(questions, "_table", lambda *_: hidden.append(os.environ.get("CUDA_VISIBLE_DEVICES")) or 0)
    assert verbs.main("plan", ["--vram", "8"]) == 0
    assert hidden == [""]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_a_real_step_that_fails_otherwise_is_an_error() -> None:
    def step(micro: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="assert"):
        fitting.checked(config(), 1, 4 * GIB, step, NOTHING)


def test_the_real_step_trains_on_the_cpu_and_leaves_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fitting.one_step(config(optimizer={"ema_decay": 0.9, "clip_norm": 1.0}), 12, 1, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_real_step_of_a_compiled_training_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[nn.Module] = []

    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> Any:
            stepped.append(self)
            return self.model(image)

    monkeypatch.setattr(models.levers, "compiled", lambda model, config: Compiled(model))
    fitting.one_step(config(compile=True), 24, 1, torch.device("cpu"))
    assert len(stepped) == 2


@pytest.mark.parametrize("card", cards.CARDS.values(), ids=cards.CARDS)
def test_a_card_gives_less_than_its_name_says(card: cards.Card) -> None:
    named = {"Tesla T4": 16, "NVIDIA L4": 24, "NVIDIA L40S": 48, "NVIDIA H200": 141}
    most = named.get(card.device, 80 if "80GB" in card.device else 24)
    assert 0.9 * most < card.memory < most


@pytest.mark.parametrize("others", [4, 12])
def test_that_another_rank_holds_less_is_said(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X 9")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * GIB, 24 * GIB))
    monkeypatch.setattr(fitting, "numerics", lambda deterministic, cpu: None)
    monkeypatch.setattr(fitting, "one_step", lambda *_: None)
    monkeypatch.setattr(fitting.ranks, "gather", lambda found: [12, others] if found == [12] else found)
    found = fitting.settle(config(), torch.device("cuda", 0), 2)
    assert found.config.micro_batch_size == others
    assert ("micro batch 4: more does not fit on the card of another rank" in found.said) == (others == 4)


def test_a_cpu_run_stays_as_it_is() -> None:
    given_ = config()
    assert fitting.settle(given_, torch.device("cpu"), 1) == fitting.Settled(given_, None, 0, ())


def test_what_a_run_takes_is_known_before_photographs_are_kept_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X 9")
    monkeypatch.setattr(fitting, "numerics", lambda deterministic, cpu: None)
    card = torch.device("cuda", 0)
    kept = {"store": "vram"}
    free, calls = [24 * GIB], list[str]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("free"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("forget"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: calls.append("ask") or (free[0], 24 * GIB))
    found = fitting.settle(config(micro_batch_size=12, loader="resident", loading=kept), card, 1)
    assert calls == ["free", "forget", "ask"], "what an earlier run in this process left is not taken"
    whole = predict(Case(config(loader="resident"), 12), DECLARED)
    assert found.taken == whole.total - whole.kinds["context"]
    assert found.own == pytest.approx((found.taken - whole.kinds["loader"]) / GIB)
    assert found.config.loading.store == "vram"
    assert not any("may run out" in line for line in found.said)
    free[0] = found.taken - 1
    again = fitting.settle(config(micro_batch_size=12, loader="resident", loading=kept), card, 1)
    assert any("may run out" in line for line in again.said), "a micro batch that is stored may be of a larger card"


def test_batches_on_their_way_are_float32_by_dali_and_of_the_training_by_others() -> None:
    """And while DALI warps one batch it decodes the next."""
    asked = config(precision="bf16")
    image, canvas = 24 * 3 * 64 * 64, 24 * 3 * 64 * 64
    sizes = {
        name: predicting.loader_bytes(replace(asked, loader=name), 24, NOTHING)  # type: ignore[arg-type]
        for name in ("dali", "auto", "resident", "torchvision")
    }
    assert sizes["dali"] == sizes["auto"] == 4 * predicting.rounded(4 * image) + 2 * canvas
    assert sizes["resident"] == sizes["torchvision"] == 4 * predicting.rounded(2 * image)
