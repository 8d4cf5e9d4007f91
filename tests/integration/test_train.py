"""The whole way on a tiny set: train, evaluate, report, go on, and fail in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests_support import ROOT, TINY, lines, report, settings, table, train, weights

from fastddr import checkpoints, cli, config, runs
from fastddr import trainer as trainer_module
from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.trainer import Trainer


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with every tracker on."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return train(tiny, folder, "--tracking.wandb", "--tracking.tensorboard")


def test_a_run_folder_holds_everything(run: Path) -> None:
    there = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    report = (
        "report.md", "curves.png", "confusion_matrix.png", "roc.png", "reliability.png", "worst.png", "metrics.json",
        "about.json", "predictions_last.csv",
    )  # fmt: skip
    for name in ("config.yaml", "manifest.csv", "metrics.jsonl", "status.json", "test_scorings.jsonl",
                 "checkpoints/best", "checkpoints/last", "report/predictions.csv",
                 *(f"report/{name}" for name in report)):  # fmt: skip
        assert name in there, f"{name} is missing"
    assert any(name.startswith("wandb/offline-run-") for name in there)
    assert any(name.startswith("tensorboard/events") for name in there)
    assert json.loads((run / "status.json").read_text()) == {"state": "done", "step": 6, "reason": ""}
    for picture in (run / "report").glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200


def test_the_stored_configuration_says_what_auto_became(run: Path) -> None:
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["precision"] == "fp32"
    assert stored["loader"] == "resident"
    assert stored["threads"] == 1
    assert config.load_preset(str(run / "config.yaml")).epochs == 2


def test_figures_are_logged_by_optimizer_step(run: Path) -> None:
    logged = lines(run)
    training = [line for line in logged if "train/loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert {"train/accuracy", "train/lr", "train/images_per_second", "train/data_wait"} <= training[0].keys()
    assert [line["step"] for line in logged if "valid/qwk" in line] == [3, 6]
    assert [round(line["train/lr"], 6) for line in training[:3]] == [0.001, 0.002, 0.003], "0.4 of 6 steps warm up"


def test_trackers_are_copies_of_the_figures(run: Path, tiny: Path) -> None:
    """Read back from the offline W&B run by its own command, and from TensorBoard's files."""
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(file)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    logged, summary = lines(run), told["summary"]
    for name in ("train/loss", "train/accuracy", "valid/recall_0", "final/test_qwk", "final/valid_loss"):
        values = [line[name] for line in logged if line.get(name) is not None]
        assert summary[name] == pytest.approx(values[-1], abs=1e-12), name
    kappas = [line["valid/qwk"] for line in logged if line.get("valid/qwk") is not None]
    assert summary["valid/qwk"] == {"max": pytest.approx(max(kappas), abs=1e-12)}
    assert {"valid/confusion_matrix_table", "test/roc_table", "test/pr_table", "test/worst"} <= summary.keys()
    assert told["config"]["seed"] == 0
    assert told["config"]["fingerprint"] == manifest.read(tiny).fingerprint
    read = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [line["train/loss"] for line in logged if "train/loss" in line]
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert {"test/worst/text_summary", "config/text_summary"} <= set(read.Tags()["tensors"])
    assert {"report/confusion_matrix", "report/roc", "report/curves"} <= set(read.Tags()["images"])
    assert "report/worst" not in read.Tags()["images"], "photographs stay in the run folder"


def test_every_photograph_is_scored_once(run: Path, tiny: Path) -> None:
    found = manifest.read(tiny)
    rows = table(run / "report" / "predictions.csv")
    assert [row["path"] for row in rows] == [found.path[i] for s in manifest.SPLITS for i in found.ids(s)]
    assert [int(row["grade"]) for row in rows] == [int(found.grade[i]) for s in manifest.SPLITS for i in found.ids(s)]
    figures = report(run)
    assert {name: figures[name]["n"] for name in figures} == {"train": 27, "valid": 11, "test": 13, "valid_last": 11}
    for split in manifest.SPLITS:
        matrix = figures[split]["confusion_matrix"]
        assert [sum(row) for row in matrix] == list(TINY[split][:5]), "rows are the truth"
        chosen = [row for row in rows if row["split"] == split]
        right = sum(row["grade"] == row["predicted"] for row in chosen)
        assert figures[split]["accuracy"] == pytest.approx(right / len(chosen))
    assert len((run / "test_scorings.jsonl").read_text().splitlines()) == 1


def test_the_report_says_what_was_left_out(run: Path) -> None:
    text = (run / "report" / "report.md").read_text()
    assert "2 ungradable photographs (grade 5) are counted but left out" in text
    assert "not a medical device" in text
    for measured in ("Images per second", "Data wait", "Peak memory of the process"):
        assert re.search(rf"\| {measured}[^|]* \| \d", text), measured


def test_best_is_the_best_by_kappa_and_then_by_loss(run: Path) -> None:
    scored = {line["step"]: line for line in lines(run) if "valid/qwk" in line}
    kappas = {step: line["valid/qwk"] for step, line in scored.items()}
    best = max(kappas, key=lambda step: (round(kappas[step], 9), -scored[step]["valid/loss"]))
    assert os.readlink(run / "checkpoints" / "best") == f"step-{best:08d}"
    assert os.readlink(run / "checkpoints" / "last") == "step-00000006"
    figures = report(run)
    assert figures["valid"]["qwk"] == pytest.approx(kappas[best])
    assert figures["valid_last"]["qwk"] == pytest.approx(kappas[6])


def test_one_seed_gives_one_result_bit_for_bit(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where photographs are kept in a file, and not in RAM as those of the fixture's run."""
    again = train(tiny, tmp_path / "again", "--loading.prefetch", "3", "--loading.store", "mmap")
    assert "loader resident in mmap" in capsys.readouterr().out
    assert (again / "report" / "predictions.csv").read_text() == (run / "report" / "predictions.csv").read_text()
    one, two = weights(run), weights(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = weights(train(tiny, tmp_path / "other", "--seed", "1"))
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(tiny: Path, tmp_path: Path) -> None:
    """On the CNN, which has no BatchNorm that would see the micro batches, and where the size of a gradient matters:
    neither divided by itself, as Adam does, nor clipped."""
    common = ("--model", "cnn", "--optimizer.name", "sgd", "--lr", "0.01", "--optimizer.clip-norm", "1e6")
    ends = []
    for size in ("8", "2"):
        with Trainer(settings(tiny, tmp_path / size, *common, "--micro-batch-size", size)) as trainer:
            before = copy.deepcopy(trainer.bare_model.state_dict())
            trainer.train_epoch()
            assert trainer.runtime.accumulation == 8 // int(size)
            ends.append({name: tensor - before[name] for name, tensor in trainer.bare_model.state_dict().items()})
            trainer.stopping.settle()
    for name, moved in ends[0].items():
        assert moved.any(), name
        torch.testing.assert_close(ends[1][name], moved, rtol=1e-3, atol=1e-6)


def test_the_average_of_the_weights_follows_its_recurrence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = trainer_module.training_step, []

    def watched(accelerator: Any, model: torch.nn.Module, *more: Any) -> torch.Tensor:
        if not seen:
            seen.append([p.detach().clone() for p in model.parameters()])
        listed = [*more[-1].parameters, *more[-1].statistics, *more[-1].counters]
        assert {id(tensor) for tensor in listed} == {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        bad = step(accelerator, model, *more)
        seen.append([p.detach().clone() for p in model.parameters()])
        return bad

    monkeypatch.setattr(trainer_module, "training_step", watched)
    run = train(tiny, tmp_path / "run", "--epochs", "1", "--optimizer.ema-decay", "0.15")
    average = seen[0]
    for number, weights_ in enumerate(seen[1:]):
        decay = min(0.15, (1 + number) / (10 + number))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights_, strict=True)]
    saved = checkpoints.load(run / "checkpoints" / "last").ema
    assert saved is not None
    wanted = {tuple(a.shape): a for a in average if a.ndim > 1}
    for tensor in saved.values():
        if tensor.ndim > 1:
            assert torch.allclose(tensor, wanted[tuple(tensor.shape)], atol=1e-6)


def test_the_report_is_of_the_best_weights_and_names_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made to judge the first epoch the best, the report scores the first epoch's weights."""
    judge, calls = trainer_module.figures, []

    def falling(*arguments: Any) -> dict[str, Any]:
        calls.append(1)
        return judge(*arguments) | {"qwk": 1 / len(calls)}

    monkeypatch.setattr(trainer_module, "figures", falling)
    run = train(tiny, tmp_path / "run")
    losses = [line["valid/loss"] for line in lines(run) if "valid/loss" in line]
    found = report(run)
    assert os.readlink(run / "checkpoints" / "best") == "step-00000003"
    assert found["valid"]["loss"] == pytest.approx(losses[0])
    assert found["valid_last"]["loss"] == pytest.approx(losses[1])
    assert found["test"]["weights"] == "best (step 3, epoch 1)"


def test_two_runs_begun_in_one_second_get_two_folders(tmp_path: Path) -> None:
    assert runs.claim(tmp_path / "a", named=False) == tmp_path / "a"
    assert runs.claim(tmp_path / "a", named=False) == tmp_path / "a-2"
    assert runs.claim(tmp_path / "a", named=True) == tmp_path / "a"


def test_a_place_that_cannot_be_written_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        train(tiny, tmp_path / "file" / "run")


def test_a_saved_configuration_begins_a_new_run(run: Path) -> None:
    again = cli.parse(["--preset", str(run / "config.yaml")], "test")
    assert again.run_dir is None, "only an explicit --run-dir goes on with an earlier run"


def test_what_auto_became_is_used_again_and_an_off_is_not_on(run: Path, tiny: Path) -> None:
    folder, stored = runs.RunFolder(run), config.load_preset(str(run / "config.yaml"))
    same = runs.continue_from(settings(tiny, run), folder, world=1)
    assert (same.precision, same.loader, same.micro_batch_size) == ("fp32", stored.loader, 4)
    with pytest.raises(UserError, match=r"optimizer.clip_norm was 1.0 and is now None"):
        runs.continue_from(settings(tiny, run, "--optimizer.clip-norm", "None"), folder, world=1)


def test_auto_is_chosen_anew_where_as_many_ranks_cannot_hold_what_one_held(tiny: Path, tmp_path: Path) -> None:
    folder = runs.RunFolder(tmp_path)
    asked = settings(tiny, tmp_path, "--micro-batch-size", "auto")
    folder.write(folder.config, config.dump(dataclasses.replace(asked, micro_batch_size=8)))
    assert runs.continue_from(asked, folder, world=1).micro_batch_size == 8
    assert runs.continue_from(asked, folder, world=2).micro_batch_size == "auto"
    folder.renew(dataclasses.replace(asked, micro_batch_size=4, data="elsewhere"))
    stored = config.load_preset(str(folder.config))
    assert (stored.micro_batch_size, stored.data) == (8, "elsewhere"), "one rank may go on as it began"
    # Its own config.yaml as the preset, as the README has it.
    again = dataclasses.replace(asked, micro_batch_size=8)
    assert runs.continue_from(again, folder, world=1).micro_batch_size == 8
    assert runs.continue_from(again, folder, world=2).micro_batch_size == "auto"
    with pytest.raises(UserError, match="micro_batch_size was 8 and is now 2"):
        runs.continue_from(dataclasses.replace(asked, micro_batch_size=2), folder, world=2)


def test_a_finished_run_is_left_alone(run: Path, tiny: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    train(tiny, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_takes_its_photographs_from_anywhere_and_no_others(
    run: Path, tiny: Path, tmp_path: Path
) -> None:
    moved, gone, done = tmp_path / "moved", tmp_path / "gone", tmp_path / "run"
    shutil.copytree(tiny, moved)
    train(moved, run)
    photograph = next((moved / "DR_grading" / "test").iterdir())
    photograph.write_bytes(photograph.read_bytes() + b"\0")
    with pytest.raises(UserError, match="the data are not those"):
        train(moved, run)
    with pytest.raises(UserError, match="there is no such folder"):
        train(gone, run)
    assert json.loads((run / "status.json").read_text())["state"] == "done", "a refused start leaves the run alone"
    shutil.copytree(run, done, symlinks=True)
    (done / "config.yaml").write_text((done / "config.yaml").read_text().replace(str(tiny), str(gone)))
    train(gone, done)  # its own data: it needs them no more


def test_another_model_and_another_loader(tiny: Path, tmp_path: Path) -> None:
    run = train(tiny, tmp_path / "run", "--model", "cnn", "--loader", "torchvision", "--evaluation.field", "full")
    assert (run / "report" / "report.md").is_file()


def test_replay_trains_but_does_not_evaluate_on_one_batch(tiny: Path, tmp_path: Path) -> None:
    run = train(tiny, tmp_path / "run", "--loader", "replay", "--epochs", "1")
    rows = [row for row in table(run / "report" / "predictions.csv") if row["split"] == "valid"]
    assert len({row["p0"] for row in rows}) > len(rows) // 2


# ------------------------------------------------------------------------------------------ what a user gets wrong


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr", "0.5"], "lr was 0.003 and is now 0.5"),
        (["--seed", "9", "--convmixer.dim", "16"], "seed was 0 and is now 9"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(run: Path, tiny: Path, more: Sequence[str], said: str) -> None:
    with pytest.raises(UserError, match="cannot go on") as caught:
        train(tiny, run, *more)
    assert said in str(caught.value)
    assert json.loads((run / "status.json").read_text())["state"] == "done", "a refused start leaves the run alone"


def test_a_folder_that_is_no_run_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run"):
        train(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def fastddr_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)


SCRIPT = (sys.executable, str(ROOT / "fastddr" / "train.py"))
COMMAND = (sys.executable, "-m", "fastddr", "train")


# Each takes seconds, so each way has its two: one that is told before PyTorch is imported, and one after.
@pytest.mark.parametrize(
    ("command", "arguments", "offender"),
    [
        (SCRIPT, ["--data", "nowhere"], "nowhere"),
        (COMMAND, ["--epochz", "3"], "--epochz"),
        (SCRIPT, ["--preset", "quick"], "quick"),
        (COMMAND, ["--data", "grade7"], "train.txt, line 1: grade 7"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    command: Sequence[str], arguments: list[str], offender: str, tmp_path: Path
) -> None:
    (tmp_path / "grade7" / "train").mkdir(parents=True)
    (tmp_path / "grade7" / "train" / "a.jpg").write_bytes(b"")
    (tmp_path / "grade7" / "train.txt").write_text("a.jpg 7\n")
    done = fastddr_command(*command, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert offender in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists(), "a start that fails leaves no folder"


def test_help_and_version(tmp_path: Path) -> None:
    assert fastddr_command(*SCRIPT, "--help", cwd=tmp_path).stdout.count("--batch-size") == 1
    assert "train" in fastddr_command(sys.executable, "-m", "fastddr", "--help", cwd=tmp_path).stdout
    assert fastddr_command(sys.executable, "-m", "fastddr", "--version", cwd=tmp_path).stdout.startswith("fastddr ")
    wrong = fastddr_command(sys.executable, "-m", "fastddr", "trian", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'train'" in wrong.stderr
