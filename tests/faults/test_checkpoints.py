"""A kill, or a disk that is full, at any moment of a save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import ROOT, settings, train, weights

from fastddr import checkpoints, cli
from fastddr.checkpoints import Training
from fastddr.errors import UserError
from fastddr.runs import Progress, RunFolder
from fastddr.saving import Saver
from fastddr.stopping import StopRequested
from fastddr.tracking import Tracker
from fastddr.trainer import Trainer

# In a process of its own, which forks before a thread of PyTorch's has begun.
SCRIPT = """
import copy, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import hazards, torch
from fastddr import checkpoints, cli
from fastddr.checkpoints import Training

folder, then = Path(sys.argv[1]), {"kill": hazards.die, "full": hazards.full}[sys.argv[2]]
torch.manual_seed(0)
model = torch.nn.Linear(50, 50)


def snapshot(step):
    moved = copy.deepcopy(model)
    moved.load_state_dict({name: tensor + step for name, tensor in model.state_dict().items()})
    return Training(moved, moved, torch.optim.SGD(moved.parameters()), None).snapshot(step, {"step": step})


found = []


def check(number):
    litter = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    said = []
    newest = checkpoints.load_newest(folder, said.append)
    last, best = (checkpoints.load(folder / name).state["step"] for name in ("last", "best"))
    whole = all(torch.equal(v, model.state_dict()[k] + newest.state["step"]) for k, v in newest.model.items())
    found.append([number, newest.state["step"], last, best, whole, said, litter])
    # The next save finds things as the hazard left them, and mends them.
    checkpoints.write(folder, snapshot(number), best=True, keep=2)


checkpoints.write(folder, snapshot(0), best=True)
calls = hazards.each(lambda: checkpoints.write(folder, snapshot(999), best=False, keep=2), then, check=check)
left = sorted(path.name for path in folder.iterdir())
print(json.dumps({"calls": calls, "found": found, "left": left}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("then", ["kill", "full"])
def test_after_a_hazard_at_any_call_a_whole_checkpoint_is_there(tmp_path: Path, then: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), then, str(ROOT / "benchmarks")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["calls"] > 12, "makes a folder, writes five files, syncs, renames, points twice"
    for number, newest, last, best, whole, said, litter in told["found"]:
        before = number - 1  # what the check of the one before wrote
        assert whole
        assert newest in (before, 999)
        assert last in (before, 999)
        assert best == before
        assert said == [], "nothing that is half written bears the name of a checkpoint"
        assert then == "kill" or not any(name == ".writing" for name in litter), "an error leaves no litter"
    outcomes = [newest for _, newest, *_ in told["found"]]
    assert outcomes.count(999) >= 2, "from the renaming on the new one stands"
    end = len(told["found"])
    assert told["left"] == ["best", "last", f"step-{end - 1:08d}", f"step-{end:08d}"], "two are kept, and no litter"


def full(file: object = None, *_: object, **__: object) -> None:
    """What the system answers where a disk is full."""
    raise OSError(28, "No space left on device", None if file is None else str(file))


def test_a_full_disk_ends_the_run_cleanly_and_the_next_start_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = ("--augment.mixup", "0.5", "--augment.cutmix", "0.5")
    undisturbed, run = train(tiny, tmp_path / "undisturbed", *mixed), tmp_path / "run"
    save = Saver.save

    with monkeypatch.context() as patch:

        def save_and_fill(self: Saver, progress: Progress, *, best: bool) -> None:
            save(self, progress, best=best)
            if progress.step == 2:
                self.flush()
                patch.setattr(checkpoints, "_write", full)

        patch.setattr(Saver, "save", save_and_fill)
        said = r"No space left on device; the run ends at step .*the last checkpoint is step-00000002: "
        with pytest.raises(UserError, match=said):
            train(tiny, run, "--save-every-steps", "1", *mixed)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left" in status["reason"]
    train(tiny, run, *mixed)
    one, other = weights(undisturbed), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)


def damage(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"half")


def test_where_no_checkpoint_is_whole_nothing_is_thrown_away(tiny: Path, tmp_path: Path) -> None:
    """To begin anew by itself would delete what a reader may still save."""
    run = tmp_path / "run"
    with Trainer(settings(tiny, run, "--max-hours", "1e-9")) as trainer:
        trainer.fit()
    damage(run / "checkpoints" / "step-00000001")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; mend the disk or bring one back"):
        train(tiny, run)
    for path, content in before.items():
        assert path.name == ".lock" or path.read_bytes() == content, path
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def best_of_three(tiny: Path, run: Path) -> Trainer:
    """A run of four epochs, of which three are done, the first being the best; it keeps the newest two besides."""
    with Trainer(settings(tiny, run, "--epochs", "4", "--keep-checkpoints", "2")) as trainer:
        validate = trainer.validate

        def scored() -> dict[str, Any]:
            if trainer.progress.epoch == 1:
                found = validate()
                trainer.progress.best_qwk = 2.0  # which nothing beats
                return found
            if trainer.progress.epoch == 4:
                trainer.progress.epoch -= 1
                raise StopRequested("a test")
            return validate()

        trainer.validate = scored  # type: ignore[method-assign]
        trainer.fit()
        assert (trainer.progress.best_step, trainer.progress.step) == (3, 12)
    return trainer


def test_a_lost_best_checkpoint_does_not_keep_a_run_from_its_end(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next epoch that is scored is the best one then; nothing could beat what is not there."""
    run = tmp_path / "run"
    best_of_three(tiny, run)
    damage(run / "checkpoints" / "step-00000003")
    capsys.readouterr()
    train(tiny, run, "--epochs", "4", "--keep-checkpoints", "2")
    assert "the best checkpoint, of step 3, is lost, and the next epoch counts as the best" in capsys.readouterr().out
    assert checkpoints.load(run / "checkpoints" / "best").state["progress"]["step"] == 12
    assert "best (step 12, epoch 4)" in (run / "report" / "report.md").read_text()


def test_a_best_checkpoint_that_is_lost_at_the_end_is_replaced_by_the_last(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with Trainer(settings(tiny, run)) as trainer:
        flush = trainer.saver.flush  # type: ignore[union-attr]

        def flushed() -> None:
            flush()
            if trainer.progress.epoch == 2:
                (run / "checkpoints" / "best").unlink()
                trainer.progress.best_step, trainer.progress.best_epoch = 3, 1

        trainer.saver.flush = flushed  # type: ignore[union-attr,method-assign]
        trainer.fit()
    assert "the best checkpoint is lost" in " ".join(capsys.readouterr().out.split())
    assert "last (step 6, epoch 2), for the best ones are lost" in (run / "report" / "report.md").read_text()


def test_half_a_line_of_a_killed_process_neither_ends_the_run_nor_takes_the_next_along(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_bad_step({"step": 1})
    with run.bad_steps.open("a") as lines:
        lines.write('{"time": 1.5, "st')
    run.append_bad_step({"step": 2})
    first, _, second = run.bad_steps.read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, second)] == [1, 2]


def test_a_disk_that_is_full_at_the_very_beginning_is_one_sentence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an error names no file."""
    monkeypatch.setattr(RunFolder, "write", lambda *_: full())
    with pytest.raises(UserError, match=r"run: No space left on device; make room, or give a place that can be used"):
        train(tiny, tmp_path / "run")


def test_figures_that_cannot_be_written_end_the_run_cleanly(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, logged = Tracker.log, 0

    def fill(self: Tracker, *arguments: Any, **more: Any) -> None:
        nonlocal logged
        logged += 1
        if logged == 5:  # three steps, one validation
            full()
        log(self, *arguments, **more)

    monkeypatch.setattr(Tracker, "log", fill)
    with pytest.raises(UserError, match=r"run: No space left on device; the run ends at step 4.*step-00000003"):
        train(tiny, tmp_path / "run")


def test_a_status_that_cannot_be_written_does_not_hide_the_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(self: Trainer) -> None:
        monkeypatch.setattr(RunFolder, "write", full)
        raise UserError("the reason")

    monkeypatch.setattr(Trainer, "validate", fill)
    with pytest.raises(UserError, match=r"^the reason$"):
        train(tiny, tmp_path / "run")
    assert "status.json could not be written" in capsys.readouterr().out


def counting(tmp_path: Path, *flags: str) -> Saver:
    """When a run of four epochs saves; nothing is written."""
    config = cli.parse(["--epochs", "4", *flags], "test")
    model = torch.nn.Linear(1, 1)
    training = Training(model, None, torch.optim.SGD(model.parameters()), None)
    about: dict[str, Any] = {"fingerprint": "", "step": 0, "before": lambda: None}
    return Saver(RunFolder(tmp_path), training, config, main=False, **about)


def saved(saver: Saver, *, best: tuple[int, ...] = (), asked: tuple[int, ...] = ()) -> list[int]:
    """Steps at which it saves, of epochs of three steps; `best` are epochs, `asked` steps at which the clock asks."""
    steps = []
    for epoch in range(1, 5):
        for step in range(3 * epoch - 2, 3 * epoch + 1):
            if saver.due(step, step in asked, last=step == 3 * epoch):
                steps.append(step)
        if saver.due_after(epoch, epoch in best):
            steps.append(3 * epoch)
    return steps


@pytest.mark.parametrize(
    ("flags", "best", "asked", "steps"),
    [
        ([], (), (), [3, 6, 9, 12]),
        (["--save-every-steps", "2"], (), (), [2, 3, 4, 6, 8, 9, 10, 12]),
        ([], (), (1, 5, 6), [1, 3, 5, 6, 9, 12]),
        (["--save-every-epochs", "3"], (1,), (), [3, 9, 12]),
        # One that is due at the end of an epoch is taken when that was validated.
        (["--save-every-epochs", "9", "--save-every-steps", "6"], (), (9,), [6, 9, 12]),
    ],
)
def test_when_a_checkpoint_is_due(
    tmp_path: Path, flags: list[str], best: tuple[int, ...], asked: tuple[int, ...], steps: list[int]
) -> None:
    assert saved(counting(tmp_path, *flags), best=best, asked=asked) == steps


def test_minutes_and_how_many_are_kept(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trainer(settings(tiny, run, "--save-every-minutes", "1e-9", "--keep-checkpoints", "3")) as trainer:
        trainer.fit()
        best = trainer.progress.best_step
    stand = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert stand == {f"step-{step:08d}" for step in (4, 5, 6, best)}, "every step was saved, and the newest are kept"
