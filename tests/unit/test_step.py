"""The training step: what a gradient that is not finite may not touch."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from tests_support import lines, settings, status
from torch import nn

from fastddr import losses, optimizers, saving
from fastddr.cli import parse
from fastddr.config import dump
from fastddr.errors import UserError
from fastddr.loaders import Batch
from fastddr.meters import out_of_memory
from fastddr.runs import RunFolder, continue_from
from fastddr.step import Tally, training_step
from fastddr.trainer import Trainer
from fastddr.watch import OVERFLOWS, Bad, Watch, listed


def batch(seed: int, value: float | None = None) -> Batch:
    torch.manual_seed(seed)
    image = torch.randn(4, 3, 8, 8)
    if value is not None:
        image[2, 1, 3, 3] = value
    ids = torch.arange(4)
    return Batch(image=image, grade=ids, id=ids, valid=torch.ones(4, dtype=torch.bool))


class Stepper:
    """A small model with BatchNorm, and an optimizer whose step is fused or not."""

    def __init__(self, name: str, fused: bool, clip_norm: float | None, scaler: Any = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
        self.optimizer = optimizers.build(self.model, name, lr=0.1)
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = fused, False if fused else None
        self.optimizer._step_supports_amp_scaling = fused  # type: ignore[attr-defined]  # as the constructor does
        self.criterion: nn.Module = losses.CrossEntropy()
        self.accelerator = Accelerator(cpu=True)
        if scaler is not None:
            # Float16 is for GPUs alone, but what follows from its scaler is the same on a CPU.
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
            self.accelerator.state._mixed_precision = "fp16"
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.clip_norm, self.tally = clip_norm, Tally.zeros(torch.device("cpu"))
        self.parts: optimizers.Parts | None = None

    def __call__(self, *given: Batch) -> bool:
        bad, self.overflowed, *self.spoilt = training_step(
            self.accelerator, self.model, given, self.criterion, self.optimizer, self.tally, self.clip_norm,
            parts=self.parts,
        ).tolist()  # fmt: skip
        return bool(bad)

    def state(self) -> dict[str, torch.Tensor]:
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{name}": torch.as_tensor(value) for i, kept in moments.items() for name, value in kept.items()}
        # Of the statistics only what is a floating-point number counts; num_batches_tracked is used by none of ours.
        weights = {name: value for name, value in self.model.state_dict().items() if value.is_floating_point()}
        return copy.deepcopy(weights | flat)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize(("name", "fused"), [("adam", False), ("adam", True), ("adamw", True), ("sgd", True)])
def test_a_bad_step_changes_nothing(name: str, fused: bool, clip_norm: float | None, value: float) -> None:
    step = Stepper(name, fused, clip_norm)
    assert not step(batch(1))
    before = step.state()
    assert step(batch(2, value))
    after = step.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "weights, moments, steps, statistics"
    assert float(step.tally.count) == 4, "and its photographs do not count"
    assert step.tally.stack()[3] == 8, "but they were seen"
    assert bool(step.tally.stack().isfinite().all())
    # Afterwards all goes on as if it had not been.
    other = Stepper(name, fused, clip_norm)
    other(batch(1))
    assert not step(batch(3))
    assert not other(batch(3))
    one, two = step.state(), other.state()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(before[key], one[key]) for key in before), "a good step changes something"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_whose_gradient_is_finite_changes_nothing(value: float, fused: bool) -> None:
    step = Stepper("adam", fused, None)
    step(batch(1))
    before, criterion = step.state(), step.criterion

    class Spoiling(nn.Module):
        def forward(self, logits: torch.Tensor, grade: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = criterion(logits, grade)
            return loss + value

    step.criterion = Spoiling()
    assert step(batch(2))
    assert step.spoilt == [True]
    assert all(torch.equal(kept, step.state()[key]) for key, kept in before.items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_one_by_hand_without_walking_the_modules(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it look for a package on the disk, as Accelerate's optimizer does before each step."""
    given = [batch(1), batch(2), batch(3, float("nan")), batch(4)]
    step, hand = Stepper("adam", fused, None), Stepper("adam", fused, None)
    ema, average = optimizers.make_ema(step.model), copy.deepcopy(hand.model)
    inner = hand.optimizer.optimizer  # type: ignore[attr-defined]  # of Accelerate's wrapper
    means = [*average.parameters(), *average.buffers()]
    for number, one in enumerate(given):
        before = copy.deepcopy(dict(hand.model.named_buffers()))
        hand.criterion(hand.model(one.image), one.grade).backward()
        if number == 2:
            for name, buffer in hand.model.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(before[name])
        else:
            inner.step()
            share = 1 - optimizers.ema_decay(number, 0.9)
            with torch.no_grad():
                for mean, now in zip(means, [*hand.model.parameters(), *hand.model.buffers()], strict=True):
                    mean.copy_(mean.lerp(now, share) if mean.is_floating_point() else now)
        inner.zero_grad()

    step.parts = optimizers.Parts.of(step.model)
    parts = (optimizers.Parts.of(ema), step.parts)
    with monkeypatch.context() as patch:
        for owner, name in ((nn.Module, "named_modules"), (accelerate.optimizer, "is_lomo_available")):
            patch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(name))
        told = []
        for number, one in enumerate(given):
            told.append(step(one))
            optimizers.update_ema(ema, step.model, number, 0.9, torch.tensor(told[-1]), parts=parts)
    assert told == [False, False, True, False]
    for ours, theirs in ((step.model, hand.model), (ema, average)):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@pytest.fixture
def half() -> Iterator[Any]:
    """A step under float16's scaler, at a scale of its own."""

    def make(scale: float, **options: Any) -> Stepper:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return Stepper("sgd", options["fused"], options["clip_norm"], scaler)

    state = Accelerator(cpu=True).state
    before = state._mixed_precision
    yield make
    state._mixed_precision = before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_that_the_scaler_leaves_out_is_told_apart_from_a_bad_one(
    half: Any, clip_norm: float | None, fused: bool
) -> None:
    step = half(1e38, fused=fused, clip_norm=clip_norm)
    before = step.state()
    # The scaled loss overflows, and not the loss.
    assert (step(batch(1)), step.overflowed, step.spoilt) == (False, True, [False])
    weights = {name: value for name, value in step.model.state_dict().items() if value.is_floating_point()}
    assert all(torch.equal(before[name], value) for name, value in weights.items()), "and BatchNorm's statistics"
    assert step.accelerator.scaler.get_scale() == pytest.approx(0.5e38, rel=1e-6)

    step = half(1024.0, fused=fused, clip_norm=clip_norm)
    assert (step(batch(1)), step.overflowed) == (False, False)
    other = Stepper("sgd", fused, clip_norm)
    other.accelerator.state._mixed_precision = "no"
    other(batch(1))
    one, two = step.state(), other.state()
    other.accelerator.state._mixed_precision = "fp16"
    torch.testing.assert_close(one, two, rtol=0.05, atol=1e-3)  # without the scale, but of half numbers
    assert (step(batch(2, float("nan"))), step.overflowed, step.spoilt) == (True, False, [True])
    scaler = step.accelerator.scaler
    assert scaler.get_scale() == 1024, "a bad photograph says nothing of the scale"
    assert scaler.state_dict()["_growth_tracker"] == 1, "nor does it keep the scale from growing again"
    assert (step(batch(3)), step.overflowed) == (False, False), "and training goes on"


def test_steps_that_the_scaler_leaves_out_are_counted_and_in_the_end_bad() -> None:
    watch, ids = Watch(torch.device("cpu"), overflowed=3), [torch.tensor([3, 1])]
    overflow, fine = torch.tensor([False, True, False]), torch.zeros(3, dtype=torch.bool)
    for step in range(1, OVERFLOWS):
        assert watch.look(overflow, step, ids) is None
    assert watch.overflowed == 3 + OVERFLOWS - 1
    assert watch.look(fine, OVERFLOWS, ids) is None
    for step in range(1, OVERFLOWS):
        assert watch.look(overflow, step, ids) is None
    assert watch.look(overflow, OVERFLOWS, ids) == Bad(OVERFLOWS, [3, 1], certain=False)
    assert watch.overflowed == 3 + 2 * (OVERFLOWS - 1), "those that are bad are counted as such"


def test_one_bad_micro_batch_makes_the_whole_step_bad() -> None:
    step = Stepper("adam", False, None)
    step.accelerator.gradient_accumulation_steps = 2
    before = step.state()
    assert step(batch(1, float("nan")), batch(2))
    assert step.spoilt == [True, False]
    assert all(torch.equal(value, step.state()[key]) for key, value in before.items())
    assert float(step.tally.count) == 4


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_first_step_leaves_no_trace(fused: bool) -> None:
    """A fused SGD would keep its momentum as the memory was found."""
    step, other = Stepper("sgd", fused, None), Stepper("sgd", fused, None)
    assert step(batch(1, float("nan")))
    for moment in step.optimizer.state_dict()["state"].values():
        assert not moment["momentum_buffer"].any()
    step(batch(2))
    other(batch(2))
    one, two = step.state(), other.state()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_bad_step_names_the_photographs_of_its_bad_micro_batches() -> None:
    watch, ids = Watch(torch.device("cpu")), [torch.tensor([3, 1]), torch.tensor([8])]
    assert watch.look(torch.tensor([True, False, False, True]), 7, ids) == Bad(7, [8], certain=True)
    assert watch.look(torch.tensor([True, False, False, False]), 7, ids) == Bad(7, [3, 1, 8], certain=False)
    assert watch.look(torch.tensor([False, False, False, False]), 7, ids) is None
    assert listed(["a", "b"]) == "photographs a, b"
    assert listed(list("abcdef")) == "photographs a, b, c, d and 2 more"


def spoilt(trainer: Trainer, at: set[int]) -> None:
    """Lets the training loader give a NaN in these micro batches, counted from the first one on."""
    assert trainer.train_loader is not None
    real, place = trainer.train_loader.epoch, 0

    def epoch(*arguments: Any, **keywords: Any) -> Iterator[Batch]:
        nonlocal place
        for given in real(*arguments, **keywords):
            if place in at:
                image = given.image.clone()
                image[0, 0, 0, 0] = float("nan")
                given = replace(given, image=image)
            place += 1
            yield given

    trainer.train_loader.epoch = epoch  # type: ignore[method-assign]


def test_a_run_stops_and_names_the_photographs(tiny: Path, tmp_path: Path) -> None:
    # Micro batches of 4 make a step of 8.
    trainer = Trainer(settings(tiny, tmp_path / "run"))

    def run() -> None:
        with trainer:
            spoilt(trainer, {3})
            trainer.fit()

    with pytest.raises(UserError) as error:
        run()
    requests = trainer.train_loader.task.requests(0)
    names = [trainer.manifest.path[id_] for id_ in requests.id[3]]
    said = f"loss or gradient of step 2 is not finite (photographs {', '.join(names)}; all in "
    assert said in str(error.value)
    [record] = [json.loads(line) for line in trainer.run.bad_steps.read_text().splitlines()]
    assert (record["step"], record["photographs"]) == (2, names)
    assert "--optimizer.on-nonfinite skip" in str(error.value)
    assert all(bool(value.isfinite().all()) for value in trainer.bare_model.state_dict().values())
    assert status(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["PyTorch", "cuBLAS"],
)
def test_a_card_that_is_too_small_is_one_sentence(
    error: RuntimeError, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fastddr.trainer.training_step", explode)
    trainer = Trainer(settings(tiny, tmp_path / "run"))

    def run() -> None:
        with trainer:
            trainer.fit()

    with pytest.raises(UserError, match=r"too small for 4 photographs of 64 px at once: .*--micro-batch-size 2, which"):
        run()


MIXED = ("--augment.mixup", "0.2", "--batch-size", "6", "--micro-batch-size", "2")


@pytest.mark.parametrize(
    ("flags", "scoring", "named", "unnamed"),
    [
        (["--batch-size", "15"], False, ["--micro-batch-size 5", "--memory.checkpointing"], []),
        (["--memory.checkpointing"], False, ["--micro-batch-size 16"], ["--memory.checkpointing"]),
        (["--compile"], False, ["--memory.activation-budget 0.5"], ["--memory.checkpointing"]),
        (MIXED, False, ["--memory.checkpointing"], ["--micro-batch-size"]),
        (["--evaluation.batch-size", "9"], True, ["--evaluation.batch-size 4"], ["--micro-batch-size"]),
        (["--batch-size", "1"], True, ["--image-size"], ["--evaluation.batch-size"]),
    ],
    ids=["plain", "checkpointing", "compile", "mixed", "scoring", "one"],
)
def test_the_ways_out_are_those_that_can_be_gone(
    flags: list[str], scoring: bool, named: list[str], unnamed: list[str], tmp_path: Path
) -> None:
    """Each flag that is told is taken, by a new run or by the one that goes on."""
    asked, cpu = parse(flags, "test"), torch.device("cpu")
    said = out_of_memory(asked, cpu, 1, store="vram", scoring=scoring)
    assert all(flag in said for flag in [*named, "--loading.store ram"]), said
    assert not any(flag in said for flag in unnamed), said
    goes_on = out_of_memory(asked, cpu, 1, store="vram", scoring=scoring, run=tmp_path)
    now, _, anew = goes_on.partition("begin a new run")
    assert f"--init run:{tmp_path} " in anew
    micro = asked.batch_size if asked.micro_batch_size == "auto" else asked.micro_batch_size
    (tmp_path / "config.yaml").write_text(dump(replace(asked, micro_batch_size=micro)))
    for text in (said, now, anew):
        for flag, value in re.findall(r"--([\w.-]*\w)(?: (ram|\d[\d.]*))?", text):
            if flag not in ("image-size", "canvas", "init", "run-dir"):
                changed = parse([*flags, f"--{flag}", *([value] if value else [])], "test")
                if text is now:
                    continue_from(replace(changed, run_dir=str(tmp_path)), RunFolder(tmp_path), 1)


def test_what_several_ranks_held_and_could_hold() -> None:
    asked, cpu = parse(["--batch-size", "32"], "test"), torch.device("cpu")
    assert "for 16 photographs" in out_of_memory(asked, cpu, 2, store="none"), "the rank's part of the batch"
    # Only where the stored micro batch does not divide the new part is it chosen anew.
    said = out_of_memory(replace(asked, micro_batch_size=16), cpu, 2, store="none", run=Path("mine"))
    assert "go on with 4 GPUs in all" in said
    assert "--init run:./mine " in said
    unnamed = out_of_memory(asked, cpu, 2, store="none", scoring=True, run=Path("runs/mine"), named=False)
    assert "give the command again with --run-dir runs/mine to go on, and score fewer photographs" in unnamed
    least = parse(["--batch-size", "1", "--memory.checkpointing"], "test")
    assert "to go on" not in out_of_memory(least, cpu, 1, store="none", run=Path("runs/mine"), named=False)


def test_a_run_leaves_bad_steps_out_and_counts_them(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trainer(settings(tiny, run, "--optimizer.on-nonfinite", "skip")) as trainer:
        weight = next(trainer._weights.parameters())
        before = weight.detach().clone()
        weight.data.fill_(float("nan"))
        with pytest.raises(UserError, match=r"and begin anew\.$"):  # nothing is saved that could hold good weights
            trainer._score(trainer.valid_loader, "current")
        weight.data.copy_(before)
        spoilt(trainer, {3, 8, 9})
        trainer.fit()
        assert str(trainer.run.checkpoints) in saving.kept(trainer.run)
        assert trainer.progress.skipped == 2
        assert all(bool(value.isfinite().all()) for value in trainer.bare_model.state_dict().values())
    logged = lines(run)
    assert [line["train/skipped_steps"] for line in logged if "train/loss" in line] == [0, 1, 1, 1, 2, 2]
    assert status(run)["state"] == "done"
    report = (run / "report" / "report.md").read_text()
    assert "2 (bad_steps.jsonl names the photographs)" in report
