"""Regression and class weights from the first step to the last report, and the preset that uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import evaluated, lines, report, settings, train, weights

from fastddr import checkpoints, cli, losses
from fastddr.errors import UserError
from fastddr.evaluation.grading import Grading
from fastddr.trainer import Trainer

REGRESSION = ["--loss.name", "mse", "--lr", "0.02", "--epochs", "3"]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regression with averaged weights, done."""
    return train(tiny, tmp_path_factory.mktemp("runs") / "first", *REGRESSION)


def graded(run: Path, which: str) -> tuple[int, Grading]:
    progress = checkpoints.load(run / "checkpoints" / which).state["progress"]
    return progress["step"], Grading(tuple(progress["grading"]["thresholds"]), progress["grading"]["sigma"])


def test_each_checkpoint_has_the_grading_of_its_weights(run: Path) -> None:
    logged = {line["step"]: line for line in lines(run) if "valid/qwk" in line}
    assert list(logged) == [3, 6, 9]
    for which, name in (("best", "valid"), ("last", "valid_last")):
        step, kept = graded(run, which)
        line = logged[step]
        assert [line[f"valid/threshold_{k}"] for k in range(4)] == list(kept.thresholds)
        assert line["valid/sigma"] == kept.sigma
        # What the report scores is what was fitted after that epoch, and nothing is fitted again.
        assert report(run)[name]["qwk"] == pytest.approx(line["valid/qwk"], abs=1e-12)
        assert report(run)[name]["loss"] == pytest.approx(line["valid/loss"], abs=1e-6)
    told = ", ".join(f"{cut:.4g}" for cut in graded(run, "best")[1].thresholds)
    assert f"fitted on valid | {told} |" in (run / "report" / "report.md").read_text()
    assert len({tuple(line[f"valid/threshold_{k}"] for k in range(4)) for line in logged.values()}) == 3


@pytest.mark.parametrize(("which", "split"), [("best", "test"), ("last", "valid")])
def test_evaluate_uses_the_grading_of_those_weights(run: Path, which: str, split: str) -> None:
    figures, _, folder = evaluated(run, "--split", split, "--weights", which)
    wanted = report(run)["valid_last" if which == "last" else split]
    assert {**figures[split], "weights": ""} == {**wanted, "weights": ""}
    told = ", ".join(f"{cut:.4g}" for cut in graded(run, which)[1].thresholds)
    assert f"fitted on valid | {told} |" in (folder / "report.md").read_text()


def test_a_regression_goes_on_as_if_it_had_never_stopped(run: Path, tiny: Path, tmp_path: Path) -> None:
    # Within the second epoch, so that the first one's grading is what the checkpoint holds.
    config = settings(tiny, tmp_path / "run", *REGRESSION, "--save-every-steps", "4")
    with Trainer(config) as trainer:
        trainer.train_epoch()
        trainer.validate()
        trainer.train_epoch()
    step, kept = graded(tmp_path / "run", "last")
    first = next(line for line in lines(run) if "valid/qwk" in line)
    assert step == 4
    assert kept.sigma == first["valid/sigma"]
    again = train(tiny, tmp_path / "run", *REGRESSION, "--save-every-steps", "4")
    whole = weights(run)
    assert [name for name, tensor in weights(again).items() if not torch.equal(tensor, whole[name])] == []
    assert graded(again, "last") == graded(run, "last")
    assert report(again) == report(run)


def test_a_regression_begins_at_the_weights_of_a_classifier(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = train(tiny, tmp_path / "classes", "--epochs", "1", "--init", f"run:{run}")
    assert "head.weight begins at random: 5×8 here, 1×8 there" in capsys.readouterr().out
    with Trainer(settings(tiny, tmp_path / "values", *REGRESSION, "--init", f"run:{classifier}")) as trainer:
        assert trainer.bare_model.head.weight.shape == (1, 8)
    assert "head.weight begins at random: 1×8 here, 5×8 there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--evaluation.field", "multi"], "one window of each photograph"),
        (["--loss.class-weights", "inverse"], "are of cross-entropy"),
        (["--ungradable", "class"], "ungradable is no step"),
    ],
)
def test_what_does_not_go_with_a_regression_is_one_sentence(tiny: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cli.parse(["--data", str(tiny), "--loss.name", "mse", *flags], "test")


def test_class_weights_come_from_train_and_change_the_run_as_mixing_does(tiny: Path, tmp_path: Path) -> None:
    mixed = ["--loss.label-smoothing", "0.1", "--augment.mixup", "0.4", "--augment.cutmix", "1"]
    config = settings(tiny, tmp_path / "run", "--loss.class-weights", "inverse", "--epochs", "1", *mixed)
    with Trainer(config) as trainer:
        expected = losses.class_weights("inverse", trainer.manifest.grade[trainer.manifest.ids("train")], 5)
        assert torch.equal(trainer.criterion.weight, expected)
        assert expected[1] > expected[0]
        trainer.fit()
    plain = train(tiny, tmp_path / "plain", "--epochs", "1", *mixed)
    unmixed = train(tiny, tmp_path / "unmixed", "--epochs", "1", *mixed[:2])
    for other in (tmp_path / "run", unmixed):
        assert not torch.equal(weights(other)["head.weight"], weights(plain)["head.weight"])


def test_the_report_averages_the_views_that_were_asked_for(run: Path, tiny: Path, tmp_path: Path) -> None:
    views = train(tiny, tmp_path / "run", *REGRESSION, "--evaluation.tta", "flips")
    assert report(views)["test"]["weights"].endswith(", flips averaged")
    assert report(views)["test"]["loss"] != report(run)["test"]["loss"]
    # Validation, and with it what is best, has one view.
    assert [line.get("valid/qwk") for line in lines(views)] == [line.get("valid/qwk") for line in lines(run)]


def test_the_preset_best_trains_scaled_down(tiny: Path, tmp_path: Path) -> None:
    from fastddr import config
    from fastddr.config.sections import POLICIES

    best = config.load_preset("best")
    assert (best.loss.name, best.optimizer.schedule, best.evaluation.tta) == ("mse", "cosine", "dihedral")
    assert best.optimizer.ema_decay is not None
    assert best.epochs >= 25
    assert best.augment.rotate == 180
    assert best.augment.scale == POLICIES["fundus"].scale
    small = ["--image-size", "64", "--canvas", "80", "--batch-size", "8", "--epochs", "1", "--threads", "1",
             "--convmixer.dim", "8", "--convmixer.depth", "1", "--tracking.no-wandb", "--tracking.no-tensorboard",
             "--loading.threads", "1", "--model", "convmixer", "--init", "None"]  # fmt: skip
    scaled = ["--preset", "best", "--data", str(tiny), "--run-dir", str(tmp_path / "run"), *small]
    with Trainer(cli.parse(scaled, "test")) as trainer:
        trainer.fit()
    assert report(tmp_path / "run")["test"]["n"] == 13
