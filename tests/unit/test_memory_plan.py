"""Predicting and planning: kinds, what fits, the cheapest change, the micro batch of a run, and the command."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastddr import __main__ as command
from fastddr import models, verbs
from fastddr.config import Config, OptimizerConfig, ResNetConfig, from_mapping
from fastddr.errors import UserError
from fastddr.memory import allowances, cards, fitting, planning, predicting, questions, tracing
from fastddr.memory.allowances import DECLARED, GIB, MIB, Allowance
from fastddr.memory.planning import choose_micro_batch, largest, line, ways
from fastddr.memory.predicting import Case, fits, needed, predict, tape_of
from fastddr.meters import enough_memory

#: Nothing but the step itself.
NOTHING = Allowance(context=0, workspaces=0, decoder=0, share=0.0, source="none")


def config(**changes: Any) -> Config:
    """A small ResNet in float32 on a global batch of 24, its photographs in RAM."""
    tree = {"model": "resnet", "resnet": {"depth": 10, "width": 16}, "batch_size": 24, "image_size": 64, "canvas": 64,
            "precision": "fp32", "loading": {"store": "ram"}}  # fmt: skip
    return from_mapping(tree | changes, "test")


def test_the_kinds_are_what_the_allocator_needs_and_what_no_trace_sees() -> None:
    case = Case(config(), 24)
    found = predict(case, DECLARED)
    tape = tape_of(case)
    # Each block is of one kind, and none of two.
    unseen = found.kinds["loader"] + DECLARED.workspaces + DECLARED.context
    assert found.total == needed(tape, 24) + unseen
    assert found.kinds["fragmentation"] >= 0
    assert found.kinds["context"] == DECLARED.context
    assert not found.estimated


def test_precision_average_recomputation_and_compilation_change_what_they_should() -> None:
    plain = Case(config(), 24)
    activations = predict(plain, NOTHING).kinds["activations"]
    half = predict(replace(plain, config=config(precision="bf16")), NOTHING)
    # ReLU and BatchNorm keep half as many bytes; the indices of the pooling stay 8 bytes each.
    assert 0.5 < half.kinds["activations"] / activations < 0.7
    assert half.kinds["weight copies"] > 0
    averaged = predict(replace(plain, config=config(optimizer={"ema_decay": 0.9})), NOTHING)
    assert averaged.kinds["averaged weights"] > 0
    # What is kept is one map a block; so many blocks, that the stem, which is no block, does not outweigh them.
    mixer = {"dim": 16, "depth": 8, "kernel_size": 3, "patch_size": 4}
    kept, all_ = (
        predict(Case(config(model="convmixer", convmixer=mixer, memory={"checkpointing": on}), 24), NOTHING)
        for on in (True, False)
    )
    assert kept.kinds["activations"] < 0.5 * all_.kinds["activations"]
    compiled = predict(replace(plain, config=config(compile=True)), NOTHING)
    assert compiled.estimated
    assert compiled.kinds["activations"] < activations


def test_a_store_in_vram_counts() -> None:
    ram, vram = (predict(Case(config(loading={"store": store}), 24), NOTHING, 100) for store in ("ram", "vram"))
    assert vram.total - ram.total == 100 * 3 * 64**2


@given(limit=st.integers(8, 400), micro=st.sampled_from([24, 12, 8, 6, 4, 3, 2, 1]))
@settings(max_examples=25)
def test_plan_never_says_fits_above_the_limit(limit: int, micro: int) -> None:
    case = Case(config(), micro)
    assert fits(case, limit * MIB, NOTHING) == (predict(case, NOTHING).total <= limit * MIB)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    case, limit = Case(config(), 1), 64 * MIB
    most = largest(case, limit, NOTHING)
    assert most > 1
    assert fits(replace(case, micro=most), limit, NOTHING)
    assert not fits(replace(case, micro=most + 1), limit, NOTHING)
    assert largest(case, MIB, NOTHING) == 0


@pytest.mark.parametrize("share", [0.95, 0.6, 0.35, 0.2])
def test_each_change_that_is_named_fits_by_its_own_prediction(share: float) -> None:
    case = Case(config(resnet={"depth": 10, "width": 16, "stem": "stride1"}), 24)
    limit = int(share * predict(case, NOTHING).total)
    found = list(ways(case, limit, NOTHING))
    assert found
    for way in found:
        assert way.total == predict(way.case, NOTHING).total <= limit, way.flags
        assert way.case.config.batch_size == 24


#: Small ones of each of our models; the sizes of their maps are odd in places.
MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"blocks": 3, "width": 8},
    "convmixer": {"dim": 24, "depth": 2, "kernel_size": 3, "patch_size": 11},
    "resnet": {"depth": 10, "width": 16, "stem": "stride1"},
}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_left_out_untraced_could_not_fit(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The changes that are found are those that tracing every one of them finds."""
    case = Case(config(model=model, **{model: MODELS[model]}), 24)
    for size in (60, 50, 43):
        smaller = replace(case, config=replace(case.config, image_size=size))
        # So many that the weights, which do not shrink, hide nothing.
        share = tape_of(smaller).peak(2000).held / tape_of(case).peak(2000).held
        assert 0.5 * share < planning._share(case.config, size) < share
    total = predict(case, NOTHING).total
    limits = [int(total * part) for part in (0.62, 0.3)]
    found = [list(ways(case, limit, NOTHING)) for limit in limits]
    monkeypatch.setattr(planning, "HALF", 0)
    monkeypatch.setattr(planning, "_share", lambda *_: 0)
    assert found == [list(ways(case, limit, NOTHING)) for limit in limits]
    assert any(found)


def test_a_change_that_is_clearly_too_large_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    case, asked = Case(config(image_size=128, canvas=128), 24), list[Any]()
    traced = predicting._traced
    monkeypatch.setattr(predicting, "_traced", lambda *args: asked.append(args[2]) or traced(*args))
    assert not list(ways(case, predict(case, NOTHING).total // 50, NOTHING))
    assert {one.precision for one in asked} == {"fp32"}
    assert {one.image_size for one in asked} == {128}


def test_the_cheapest_change_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(config(loading={"store": "vram"}), 24)
    limit = predict(case, NOTHING).total - MIB
    assert next(ways(case, limit, NOTHING)).flags == "--loading.store ram"
    plain = Case(config(), 24)
    limit = predict(replace(plain, micro=12), NOTHING).total
    first = next(ways(plain, limit, NOTHING))
    assert (first.flags, first.costs[:14]) == ("--micro-batch-size 12", "BatchNorm sees")
    assert any("with --canvas 32 too the whole of it" in change.costs for change in planning._changes(plain))
    assert predicting.batch_normed(plain.config)
    # Of a model without BatchNorm a small micro batch costs nothing.
    limit = predict(replace(plain, micro=4), NOTHING).total
    assert next(ways(plain, limit, NOTHING)).flags != "--micro-batch-size 4"
    monkeypatch.setattr(planning, "batch_normed", lambda config: False)
    first = next(ways(plain, limit, NOTHING))
    assert (first.flags, first.costs) == ("--micro-batch-size 4", "the global batch stays")


def test_a_line_of_the_table() -> None:
    case = Case(config(), 1)
    whole = line(case, GIB, NOTHING, None, None)
    assert (whole.micro, whole.accumulation, whole.rate) == (24, 1, None)
    tight = line(case, predict(replace(case, micro=6), NOTHING).total, NOTHING, 1e12, 1e14)
    assert tight.micro * tight.accumulation == 24
    assert tight.micro < 24
    assert tight.rate is not None
    none = line(case, MIB, NOTHING, None, None)
    assert (none.largest, none.micro) == (0, 0)
    assert none.total > MIB


def test_images_a_second_are_the_slower_of_both_limits() -> None:
    tape = tape_of(Case(config(), 24))
    flop, moved = tape.cost(24)
    assert cards.images_per_second(tape, 24, 1, 1e30, 1e12) == pytest.approx(24 * 1e12 / flop)
    assert cards.images_per_second(tape, 24, 1, 1e12, 1e30) == pytest.approx(24 * 1e12 / moved)
    with pytest.raises(UserError, match="did you mean 'H100 SXM'"):
        cards.known("H100 SX")


# ------------------------------------------------------------------------------------------------------ the micro batch


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


# ------------------------------------------------------------------------------------------------- allowances and cache


def test_allowances_of_a_card_are_kept_and_never_another_cards() -> None:
    found = replace(NOTHING, context=5, source="calibrated on X")
    path = allowances.store("NVIDIA X 1", found)
    assert allowances.load("NVIDIA X 1") == found
    assert allowances.load("NVIDIA X 2") == allowances.load(None) == DECLARED
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read; remove it"):
        allowances.load("NVIDIA X 1")


def test_allowances_that_may_not_be_read_are_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    path = allowances.store("NVIDIA X 3", replace(NOTHING, context=5))
    assert [file.name for file in path.parent.glob("*x-3*")] == [path.name], "nothing is left beside it"

    def locked(self: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", locked)
    assert allowances.load("NVIDIA X 3") == DECLARED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_calibrating_without_a_gpu_is_one_sentence() -> None:
    with pytest.raises(UserError, match="--calibrate measures a GPU, and PyTorch sees none here"):
        allowances.calibrate()


class Stranger(nn.Module):
    """A model that nothing is known of; with `one_more`, a block of it is partly of the batch."""

    def __init__(self, one_more: bool) -> None:
        super().__init__()
        self.head, self.one_more = nn.Linear(3, 5), one_more

    def forward(self, image: Tensor) -> Tensor:
        found = self.head(image.mean((2, 3)))
        return torch.cat([found, found.new_zeros(1, 5)])[:-1].relu() if self.one_more else found.relu()


@pytest.mark.parametrize("one_more", [False, True])
def test_a_stranger_is_traced_twice_until_its_blocks_are_known(one_more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    trace = predicting.trace
    monkeypatch.setattr(predicting, "trace", lambda *args: traced.extend(args[2]) or trace(*args))
    monkeypatch.setattr(predicting.models, "build", lambda *_, **__: Stranger(one_more))
    for precision in ("fp32", "bf16"):
        tape = tape_of(Case(config(model=f"timm:stranger-{one_more}", precision=precision), 24))
        witness = tracing.trace(lambda: Stranger(one_more), Case(config(precision=precision), 24).steps, (24, 25))
        assert tape.sizes(24) == witness.sizes(24)
    assert traced[:2] == [2, 3]
    assert len(traced[2:]) == (2 if one_more else 1)


@pytest.mark.parametrize("model", ["cnn", "convmixer", "resnet"])
def test_a_model_to_copy_has_the_form_of_a_model_and_was_never_filled(model: str) -> None:
    filled: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            filled.extend(
                [func.name()] if any(word in func.name() for word in ("uniform_", "normal_", "fill_")) else []
            )
            return func(*args, **(kwargs or {}))

    chosen = tuple(MODELS[model].items())
    with Watch():
        hollow = predicting._built.__wrapped__(model, chosen, 5, 66)
    assert filled == []
    with torch.device("meta"):
        whole = models.build(model, num_classes=5, image_size=66, **MODELS[model])
    form = [
        [(name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in found]
        for one in (hollow, whole) for found in (one.named_parameters(), one.named_buffers())
    ]  # fmt: skip
    assert form[:2] == form[2:]


def test_a_tape_is_kept_and_a_broken_one_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    tape = tape_of(Case(config(), 24))
    made = []

    def make() -> Any:
        made.append(1)
        return tape

    assert predicting.kept("k", make) == tape == predicting.kept("k", make)
    assert len(made) == 1
    (tmp_path / "memory" / "k.json").write_text('{"kinds": 1}')
    assert predicting.kept("k", make) == tape
    assert len(made) == 2


# ---------------------------------------------------------------------------------------------------------- the command

SMALL = ("--preset", "quickstart", "--image-size", "64")


def test_plan_answers_one_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "course.png"
    flags = ["--vram", "8", "--plot", str(picture), *SMALL, "--model", "resnet", "--depth", "12"]
    assert verbs.main("plan", flags) == 0
    said = capsys.readouterr().out
    assert said.startswith("resnet (depth 12, width 16, stem standard), 64 px of a canvas of 240, bf16, 32 photographs")
    assert "fits: " in said
    assert "declared, not measured on this card" in said
    assert picture.stat().st_size > 5000
    assert questions._ours(picture), "the next may take its place"
    Image.new("RGB", (8, 8)).save(picture)
    assert command.main(["plan", *flags]) == 2, "another's"


def test_plan_says_what_does_not_fit_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--vram", "1.42", "--json", *SMALL, "--model", "cnn", "--precision", "fp32", "--batch-size", "512"]
    assert verbs.main("plan", flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["total"] == sum(found["kinds"].values()) > found["limit"]
    assert found["ways"][0]["flags"].startswith("--micro-batch-size ")
    assert all(way["total"] <= found["limit"] for way in found["ways"])
    flags.remove("--json")
    assert verbs.main("plan", flags) == 0
    assert "--micro-batch-size auto, the default, takes by itself" in capsys.readouterr().out


def test_plan_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--convmixer.dim", "16", "--convmixer.depth", "2", "--cnn.width", "8", "--resnet.depth", "10",
             "--resnet.width", "16")  # fmt: skip
    assert verbs.main("plan", ["--vram", "8", "--tbps", "1", "--tflops", "100", "--image-size", "64", *small]) == 0
    said, notes = capsys.readouterr()
    assert [name in said for name in ("convmixer", "cnn", "resnet", "64 of 512")] == [True] * 4
    assert notes == "", "each of these flags is of one of the models"


@pytest.mark.parametrize(("canvas", "sides"), [(288, [256, 288]), (96, [96])])
def test_the_table_has_no_image_larger_than_the_canvas(
    canvas: int, sides: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "line", lambda case, *_: planning.Line("", case.config.image_size, canvas, 0))
    assert verbs.main("plan", ["--vram", "8", "--canvas", str(canvas), "--json"]) == 0
    assert [line["image_size"] for line in json.loads(capsys.readouterr().out)] == 3 * sides


def test_a_flag_without_effect_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    questions.configured(["--model", "resnet", "--cnn.width", "8"], 40)
    assert capsys.readouterr().err.count("--cnn.width is not used") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "needs the card's memory: --vram 8"),
        (["--vram", "0"], "must be above 0"),
        (["--vram", "nan"], "--vram nan: it must be above 0"),
        (["--vram", "inf"], "--vram inf: it must be above 0"),
        (["--card", "T4", "--tbps", "-1", "--tflops", "-3"], "--tbps -1: it must be above 0"),
        (["--vram", "8", "--gpus", "0"], "--gpus 0: it must be above 0"),
        (["--vram", "8", "--plot", "x.png"], "--plot is of one training: name it with --model or --preset"),
        (["--vram", "8", "--depth", "40"], "--depth is of one training"),
        (["--vram", "8", "--image-size", "wide"], "--image-size"),
        (["--vram", "8", "--model", "cnn", "--plot", __file__], "no picture of `fastddr plan`; give a new name"),
        (["--vram", "8", "--model", "resnet", "--depht", "3"], "unknown argument"),
        (["--vram", "8", "--model", "timm:test_vit", "--depth", "3"], "--depth is of convmixer, cnn, resnet, and the"),
        (["--calibrate", "--wrogn", "3"], "--calibrate measures this machine's GPU and asks of no training; leave out"),
        (["--card", "H9000"], "known are"),
        (["--card", "RTX 4060", "--tbps", "0.27", "--tflops", "60"], "Or leave it out and give --vram (GiB), and"),
        (["--vram", "8GB"], "--vram 8GB: give a number alone, like 8 or 0.5."),
        (
            ["--vram", "8", *SMALL, "--model", "cnn", "--micro-batch-size", "5"],
            "32 photographs a rank, which micro_batch_size 5 does not divide",
        ),
    ],
)
def test_a_wrong_plan_is_one_sentence(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_training_without_a_preset_begins_at_the_reports() -> None:
    found = questions.configured(["--model", "resnet", "--image-size", "600"], 40)
    assert (found.preset, found.canvas, found.precision) == ("report-resnet", 600, "bf16")
    assert found.resnet == ResNetConfig(depth=40, width=64)
    assert found.optimizer == OptimizerConfig()
    assert planning.divisors(12) == [12, 6, 4, 3, 2, 1]


def test_the_canvas_is_the_trainings_unless_the_image_is_larger(tmp_path: Path) -> None:
    preset = tmp_path / "my.yaml"
    for canvas, size, expected in ((768, 512, 768), (288, 256, 288), (288, 512, 512)):
        preset.write_text(f"image_size: 256\ncanvas: {canvas}\n")
        for flag in ("--image-size", "--image_size"):
            assert questions.configured(["--preset", str(preset), flag, str(size)]).canvas == expected


def test_an_image_that_does_not_suit_the_model_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Case(config(), 24)
    smaller = planning._Change("--image-size 32", "", replace(asked, config=config(image_size=32)))
    monkeypatch.setattr(planning, "_least", lambda change, case, micro: 0)  # which would trace
    monkeypatch.setattr(planning, "_changes", lambda case: [smaller])

    def refused(case: Case, limit: int, allowance: Allowance) -> bool:
        raise UserError("--model timm:x cannot take images of 32×32")

    monkeypatch.setattr(planning, "fits", refused)
    assert not list(ways(asked, GIB, NOTHING))
    # What else is wrong with a model is told.
    monkeypatch.setattr(planning, "_changes", lambda case: [replace(smaller, case=asked)])
    with pytest.raises(UserError, match="cannot take"):
        list(ways(asked, GIB, NOTHING))


def test_a_tape_of_a_model_of_timms_is_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for number in ("1.0", "1.1"):
        monkeypatch.setattr(predicting, "version", lambda name, number=number: number)
        keys.add(predicting._key("timm:resnet18", (), tracing.Steps(64)))
    assert len(keys) == 2
    assert predicting._timm("resnet") is None


def test_a_transformer_has_no_batchnorm_and_no_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    asked = Case(config(model="timm:test_vit"), 24)
    assert not predicting.batch_normed(asked.config)
    enough = predicting.Prediction({"activations": GIB}, False)
    monkeypatch.setattr(questions, "predict", lambda case, allowance: enough)
    assert verbs.main("plan", ["--vram", "8", "--model", "timm:test_vit"]) == 0
    assert capsys.readouterr().out.startswith("timm:test_vit, 224 px")
