"""Predicting and planning: kinds, what fits, the cheapest change, and the command."""

from __future__ import annotations

import json
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
from trainings import NOTHING, SMALL, config

from fastddr import __main__ as command
from fastddr import models, verbs
from fastddr.config import OptimizerConfig, ResNetConfig
from fastddr.errors import UserError
from fastddr.memory import allowances, cards, planning, predicting, questions, tracing
from fastddr.memory.allowances import DECLARED, GIB, MIB, Allowance
from fastddr.memory.planning import largest, line, ways
from fastddr.memory.predicting import Case, fits, needed, predict, tape_of


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
