"""`report.py`, `ablation.py` and `seeds.py`: what is trained, what stands beside what, how tables say it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastddr import cli
from fastddr.config import dump
from fastddr.data.grades import DDR
from fastddr.data.manifest import Manifest
from fastddr.errors import UserError


def run_of(folder: Path, counts: dict[str, tuple[int, ...]]) -> Path:
    """A run's folder with a manifest of so many photographs by split and grade."""
    folder.mkdir(parents=True)
    rows = [(split, grade) for split, of in counts.items() for grade, n in enumerate(of) for _ in range(n)]
    splits, grades = zip(*rows, strict=True)
    ones, names = np.ones(len(rows), dtype=np.int64), tuple(f"{row}.jpg" for row in range(len(rows)))
    found = Manifest(folder, names, np.array(grades), splits, ones, ones, ones, ("",) * len(rows), ())
    (folder / "manifest.csv").write_text(found.to_csv())
    return folder


def test_only_ddr_whole_may_stand_beside_the_reports_figures(load: Callable[[str], Any], tmp_path: Path) -> None:
    story = load("story")
    data = tmp_path / "DDR-dataset"
    (data / "DR_grading").mkdir(parents=True)
    whole = run_of(tmp_path / "whole", DDR)
    assert story.is_whole_ddr(whole, str(data))
    without_grade_5 = run_of(tmp_path / "kaggle", {split: counts[:5] for split, counts in DDR.items()})
    assert story.is_whole_ddr(without_grade_5, str(data))
    fewer = DDR | {"valid": (1252, *DDR["valid"][1:])}
    assert not story.is_whole_ddr(run_of(tmp_path / "part", fewer), str(data))
    # The synthetic set can have the same numbers.
    assert not story.is_whole_ddr(whole, "synthetic")
    (data / "DR_grading" / "lesions.csv").write_text("split,name\n")
    assert not story.is_whole_ddr(whole, str(data))
    assert not story.is_whole_ddr(whole, str(data / "DR_grading"))


def test_the_story_is_the_reports_and_every_command_line_can_be(load: Callable[[str], Any], tmp_path: Path) -> None:
    report, story = load("report"), load("story")
    assert [arm.key for arm in story.ARMS] == [
        "cnn-2", "cnn-4", "cnn-6", "resnet-shallow", "resnet-40", "convmixer", "convmixer-augmented",
        "convmixer-pretrained", "convmixer-tuned",
    ]  # fmt: skip
    by_key = {arm.key: arm for arm in story.ARMS}
    options, quick = report.Options(data="DDR-dataset"), report.Options(quick=True, flags="--lr 0.5")

    def parsed(key: str, options: Any) -> Any:
        return cli.parse(report.flags(by_key[key], options, tmp_path), "test")

    deep, plain, tuned = (parsed(key, options) for key in ("cnn-6", "convmixer", "convmixer-tuned"))
    assert (deep.model, deep.cnn.blocks, deep.augment.policy, deep.epochs) == ("cnn", 6, "none", 98)
    assert (plain.model, plain.convmixer.dim, plain.augment.policy, plain.init) == ("convmixer", 512, "none", None)
    # The paper's weights are of its own shape, so the model is that one.
    assert (tuned.init, tuned.convmixer.dim, tuned.augment.policy, tuned.lr) == ("imagenet", 768, "report", 0.0005)
    small = parsed("convmixer-pretrained", quick)
    assert (small.data, small.epochs, small.lr, small.image_size) == ("synthetic", 2, 0.5, 64)
    assert small.init == f"run:{tmp_path / 'pretraining'}"
    assert parsed("cnn-6", quick).init is None
    with pytest.raises(UserError, match="--arms vgg: known are cnn-2"):
        report.main(report.Options(arms=("vgg",)))
    with pytest.raises(UserError, match="--quick is on the synthetic set"):
        report.main(report.Options(quick=True, data="DDR-dataset"))
    with pytest.raises(UserError, match="leave --tuned or --quick out"):
        report.main(report.Options(quick=True, tuned="--lr 0.001"))


def test_what_has_no_test_is_refused_before_hours_of_training(
    load: Callable[[str], Any], tiny: Path, tmp_path: Path
) -> None:
    report, folder = load("report"), tmp_path / "runs"
    for split in ("train", "valid"):
        shutil.copytree(tiny / "DR_grading" / split, tmp_path / "part" / "DR_grading" / split)
        shutil.copy(tiny / "DR_grading" / f"{split}.txt", tmp_path / "part" / "DR_grading")
    with pytest.raises(UserError, match=r"part.*no photograph there is"):
        report.main(report.Options(data=str(tmp_path / "part"), folder=folder))
    with pytest.raises(UserError, match=r"leave --evaluation\.no-test out"):
        report.main(report.Options(data=str(tiny), folder=folder, flags="--evaluation.no-test"))
    assert not folder.exists()
    report.need_test(report.Options(data=str(tiny)), folder)


def test_the_reports_figures_stand_beside_those_of_ddr_whole(load: Callable[[str], Any]) -> None:
    """A stored result of other data, whose texts are compared with the page, has the rest of both."""
    accounts, counts = load("accounts"), {"train": 100, "valid": 40, "test": 50}
    arm = {split: {"accuracy": 0.5} for split in counts}
    rows: list[dict[str, Any]] = [
        {"name": "CNN", **arm, "published": {"train": 98.0, "test": 52.0}}, {"name": "CNN, 4", **arm, "published": {}},
    ]  # fmt: skip
    assert accounts.accuracies(rows).splitlines() == [
        "| | train | valid | test | the report's train | the report's valid | the report's test |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
        "| CNN | 50.0 % | 50.0 % | 50.0 % | 98 % | | 52 % |",
        "| CNN, 4 | 50.0 % | 50.0 % | 50.0 % | | | |",
    ]
    [about, said] = accounts.sentences([{"whole_ddr": True, "counts": counts, "seed": 0}])
    assert about.startswith("Trained on DDR whole: 100 photographs of train")
    assert said.startswith("The report's figures are of its last epoch")


def test_curves_go_by_epoch(load: Callable[[str], Any]) -> None:
    accounts = load("accounts")
    lines = [{"epoch": e, "train/loss": v} for e, v in ((0.5, 2.0), (1.0, 1.0), (1.5, 0.5), (2.0, 0.3))]
    assert accounts._by_epoch(lines, "train/loss") == [(1.0, 1.5), (2.0, 0.4)]
    picture = accounts.curves({"CNN": {"CNN, 2": lines, "CNN, 4": []}, "ResNet": {"ResNet": lines}})
    assert picture.startswith(b"\x89PNG")


def test_the_changes_of_an_ablation(load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    ablation = load("ablation")
    options = ablation.Options(preset="quickstart", also=("wide: --convmixer.dim 96",))
    base = cli.parse(ablation.baseline(options), "test")
    assert (base.synthetic.photographs, base.data) == (2400, "synthetic")
    assert not base.evaluation.test
    found = ablation.chosen(options, base)
    assert next(iter(found)) == "baseline"
    assert found["wide"] == ["--convmixer.dim", "96"]
    assert {"batch-up", "crop-smaller", "lr-down", "mse", "effective", "cutmix"} <= found.keys()
    configs = {name: cli.parse([*ablation.baseline(options), *flags], name) for name, flags in found.items()}
    assert configs["batch-down"].batch_size == 16
    assert configs["crop-smaller"].image_size == 160
    assert configs["crop-whole"].canvas == base.image_size
    assert configs["lr-up"].lr == pytest.approx(0.009)
    # What the baseline has is no change.
    again = ablation.Options(preset="quickstart", flags="--loss.name mse", changes=("mse", "lr-up"))
    assert list(ablation.chosen(again, cli.parse(ablation.baseline(again), "test"))) == ["baseline", "lr-up"]
    assert "mse: the baseline has it already" in capsys.readouterr().out
    for wrong in (ablation.Options(changes=("magic",)), ablation.Options(also=("no colon",))):
        with pytest.raises(UserError, match=r"known are batch-up|give NAME: FLAGS"):
            ablation.chosen(wrong, base)
    with pytest.raises(UserError, match="give at least 3"):
        ablation.main(ablation.Options(seeds=(0, 1)))


def test_differences_go_seed_by_seed_and_few_photographs_are_said(load: Callable[[str], Any]) -> None:
    accounts, ablation, harness = load("accounts"), load("ablation"), load("harness")

    def change(name: str, kappas: list[float]) -> dict[str, Any]:
        return {"name": name, "flags": "--x 1" * (name != "baseline"), "baseline": name == "baseline", "valid": 142,
                "kappas": kappas, "accuracy": harness.spread([0.5, 0.6, 0.7]), "data": "mine", "unit": "QWK",
                **harness.spread(kappas)}  # fmt: skip

    base = change("baseline", [0.1, 0.5, 0.9])
    found = ablation.compared(change("mse", [0.2, 0.6, 1.0]), base)
    assert found["difference"]["low"] == pytest.approx(found["difference"]["high"]) == pytest.approx(0.1)
    failed = ablation.compared({"name": "huge", "flags": "--y", "failed": "too large"}, base)
    table = accounts.changes([ablation.compared(base, base), found, failed])
    assert "| mse | `--x 1` | 0.600 (0.200-1.000) | +0.100 (+0.100 to +0.100) | 60.0 % | – |" in table
    assert "| huge | `--y` | failed |" in table
    assert "they decide nothing" in accounts.caution(142)
    assert "±8.2 points" in accounts.caution(142)
    assert "they decide nothing" not in accounts.caution(2503)


def test_the_picture_of_an_ablation_has_the_baseline_behind_each_change(
    load: Callable[[str], Any], tmp_path: Path
) -> None:
    plots = load("plots")

    def change(name: str, *kappas: list[float | None]) -> dict[str, Any]:
        curves = [{"epoch": [1, 2], "qwk": kappa, "loss": [1.0, 0.5]} for kappa in kappas]
        return {"name": name, "baseline": name == "baseline", "n": len(curves), "curves": curves}

    base, mse = change("baseline", [0.0, 0.1], [0.2, 0.3], [None, 0.8]), change("mse", [0.5, 0.5], [0.5, 0.75])
    figure = plots.changes([base, {"name": "huge", "failed": "too large"}, mse])
    assert plots.save(figure, "Changes", tmp_path / "x" / "c.png").stat().st_size > 10_000
    kappa, loss = figure.axes
    assert (kappa.get_title("left"), loss.get_title("left")) == ("mse: kappa on valid", "mse: loss on valid")
    lines = [([*line.get_xdata()], [*line.get_ydata()]) for line in kappa.lines if len(line.get_xdata())]
    # Three seeds and their median, where kappa is defined; then the change's two.
    assert lines[3] == ([1, 2], [0.1, 0.3])
    assert lines[6] == ([1, 2], [0.5, 0.625])
    assert len(lines) == 7
    assert plots.changes([base]).axes[0].get_title("left") == "baseline: kappa on valid"


def test_valid_is_read_epoch_by_epoch(load: Callable[[str], Any], tmp_path: Path) -> None:
    lines = [{"step": 1, "epoch": 0.5, "train/loss": 2.0}, {"epoch": 1, "valid/qwk": None, "valid/loss": 1.5},
             {"epoch": 2, "valid/qwk": 0.25, "valid/loss": 1.25}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load("whole").scored(tmp_path) == {"epoch": [1, 2], "qwk": [None, 0.25], "loss": [1.5, 1.25]}


def test_ranks_stand_beside_seeds(load: Callable[[str], Any]) -> None:
    seeds, accounts = load("seeds"), load("accounts")

    def row(ranks: int, losses: list[float], kappas: list[float]) -> dict[str, Any]:
        valid = [{"loss": loss, "qwk": kappa, "n": 200} for loss, kappa in zip(losses, kappas, strict=True)]
        found: dict[str, Any] = seeds.row(ranks, range(len(losses)), valid)
        return {**found, "preset": "quickstart", "flags": ""}

    one = row(1, [1.0, 1.2, 1.1, 1.3, 1.0], [0.5, 0.6, 0.5, 0.7, 0.6])
    near, far = row(2, [0.99, 1.22, 1.1, 1.29, 1.01], [0.5] * 5), row(4, [2.0, 2.2, 2.1, 2.3, 2.0], [0.5] * 5)
    rows = [one, seeds.compared(near, one), seeds.compared(far, one)]
    # All pairs of one rank's losses: 0.0, 0.1 (four times), 0.2 (three times), 0.3 (twice).
    assert rows[1]["seeds_apart"]["loss"]["median"] == pytest.approx(0.15)
    assert rows[2]["difference"]["loss"]["low"] == pytest.approx(1.0)
    table = accounts.ranks(rows)
    assert "| 1 rank, another seed | | | 0.150 (" in table
    assert "| 4 ranks | 2.100 (2.000 to 2.300) | +1.000 (+1.000 to +1.000) | 1.000 (1.000 to 1.000) |" in table
    said = accounts.between_ranks(rows)
    ends = "from that of 1 rank than another seed's, as far as the intervals can tell, and higher in"
    assert f"The loss of 2 ranks is no further {ends} 2 of 5 seeds." in said
    assert f"The loss of 4 ranks is further {ends} 5 of 5 seeds." in said
    assert not cli.parse(seeds.common(seeds.Options(flags="--lr 0.5")), "test").evaluation.test
    with pytest.raises(UserError, match="two numbers of ranks"):
        seeds.numbers(seeds.Options(ranks=(1,)))
    with pytest.raises(UserError, match="this machine runs 1 to"):
        seeds.numbers(seeds.Options(ranks=(1, 100_000)))
    with pytest.raises(UserError, match="at least 5"):
        seeds.numbers(seeds.Options(ranks=(1, 2), seeds=(0, 1)))


def test_a_run_that_is_done_is_not_made_again_and_a_failure_is_a_sentence(
    load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, done, flags = load("whole"), tmp_path / "done", ["--preset", "quickstart", "--cnn.width", "8"]
    done.mkdir()
    (done / "status.json").write_text(json.dumps({"state": "done", "step": 1, "reason": ""}))
    (done / "config.yaml").write_text(dump(cli.parse([*flags, "--epochs", "3", "--run-dir", str(done)], "test")))
    capsys.readouterr()
    assert whole.train(done, [*flags, "--epochs", "3"]) is None
    said = whole.train(done, [*flags, "--epochs", "4"])
    assert said.endswith("with other settings: epochs was 3 and is now 4; give another --folder.")
    other = whole.train(done, [*flags, "--epochs", "3", "--data", str(tmp_path)])
    assert other == f"{done} is done, and its photographs lay in synthetic; give that, or another --folder."
    assert not (tmp_path / "done.log").exists()
    assert capsys.readouterr() == ("", ""), "that the width is of no use stands in the log of the training"
    for folder in (done, tmp_path / "new"):
        assert "unknown argument '--no-such-flag'" in whole.train(folder, ["--no-such-flag"])


def test_what_is_kept_of_a_run_goes_with_its_folder(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run, accuracies = load("whole"), tmp_path / "cnn-2", iter([0.25, 0.5])

    def trained(*_: Any, **__: Any) -> Any:
        run.mkdir()
        (run / "status.json").write_text(json.dumps({"state": "done", "step": 1, "reason": ""}))
        (run / "metrics.jsonl").touch()
        return SimpleNamespace(wait=lambda: 0, poll=lambda: 0)

    def evaluate(arguments: list[str]) -> int:
        folder = run / "evaluations" / "train-last"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"train": {"accuracy": next(accuracies)}}))
        return 0

    monkeypatch.setattr(whole.subprocess, "Popen", trained)
    monkeypatch.setattr(whole, "verb", evaluate)
    assert whole.train(run, []) is None
    assert [whole.evaluated(run, "train", "last") for _ in range(2)] == [{"accuracy": 0.25}] * 2
    assert whole.costs(run).keys() == {"minutes"}
    shutil.rmtree(run)
    trained()
    assert whole.evaluated(run, "train", "last") == {"accuracy": 0.5}
    assert whole.costs(run) == {}, "how long this one took is not known"
