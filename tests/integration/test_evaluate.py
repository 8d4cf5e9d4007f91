"""`fastddr evaluate`: a run's weights on a split, or on other data."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from photographs import draw, write_csv
from tests_support import evaluated, report, table, train
from torch import nn

import fastddr
from fastddr import checkpoints, ranks, saving
from fastddr.__main__ import main
from fastddr.config import SplitConfig
from fastddr.config.sections import LoadingConfig
from fastddr.data import manifest, source
from fastddr.errors import EXIT_USER_ERROR, UserError
from fastddr.evaluation.grading import Graded, Grading
from fastddr.evaluation.views import Averaged
from fastddr.inference import evaluate, flags, restore
from fastddr.progress import terminal
from fastddr.runs import RunFolder


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("runs") / "run", "--epochs", "3", "--lr", "0.01")


def reported(run: Path, split: str) -> list[dict[str, str]]:
    return [row for row in table(run / "report" / "predictions.csv") if row["split"] == split]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_gets_the_figures_of_the_report(run: Path, split: str) -> None:
    figures, rows, folder = evaluated(run, "--split", split)
    wanted = report(run)[split]
    assert figures[split] == wanted
    assert rows == reported(run, split)
    assert (folder / "report.md").is_file()
    assert (folder / "confusion_matrix.png").is_file()


def test_a_runs_model_is_loaded_in_python(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fastddr.ranks.agree", lambda *_: pytest.fail("one rank alone may load a model"))
        model = fastddr.load(run)
    best = checkpoints.load(run / "checkpoints" / "best")
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in (best.ema or best.model).items())
    config = restore.stored(run)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, config.image_size, config.image_size)).shape == (2, 5)
    assert not any(module.training for module in model.modules())
    for wrong, said in ({"run": tmp_path}, "no run here"), ({"device": "gpu"}, "the device 'gpu' cannot be used"):
        with pytest.raises(UserError, match=said):
            fastddr.load(**({"run": run} | wrong))


def test_every_scoring_of_test_is_noted(run: Path) -> None:
    def scorings() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "test_scorings.jsonl").read_text().splitlines()]

    before = scorings()
    evaluated(run, "--split", "valid")
    assert scorings() == before
    figures, _, _ = evaluated(run, "--split", "test", "--weights", "last")
    [new] = scorings()[len(before) :]
    assert (new["by"], new["n"], new["qwk"]) == ("evaluate", figures["test"]["n"], figures["test"]["qwk"])
    assert new["weights"].startswith("last")
    alike = ("split", "n", "fingerprint")
    assert [new[key] for key in alike] == [before[0][key] for key in alike], "as training has noted it"
    assert new.keys() == before[0].keys()


def test_all_photographs_and_other_data(run: Path, tiny: Path, tmp_path: Path) -> None:
    figures, rows, folder = evaluated(run, "--split", "all", "--batch-size", "5")
    assert figures["all"]["n"] == len(rows) == 27 + 11 + 13
    text = (folder / "report.md").read_text()
    assert "27 of these 51 photographs were trained on" in text
    assert re.search(r"\| Training \| epochs 3, batch 8,", text), "the run's, whatever was scored at once"
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    photographs = sorted((other / "DR_grading" / "test").glob("*.jpg"))
    photographs[0].write_bytes(photographs[1].read_bytes())
    # A leak between splits of theirs: nothing is trained on them.
    min((other / "DR_grading" / "train").glob("*.jpg")).write_bytes(photographs[2].read_bytes())
    own = report(run)["valid"]["calibrated"]["temperature"]
    figures, _, folder = evaluated(run, "--data", str(other), "--split", "all")
    assert figures["all"]["n"] == 51
    assert figures["all"]["calibrated"]["temperature"] == own, "nothing is fitted on other photographs"
    trained = manifest.fingerprint_in(run / "manifest.csv")
    said = f"not the photographs that the run was trained on ({tiny.name}, fingerprint {trained})"
    assert said not in text
    text = (folder / "report.md").read_text()
    assert said in text
    assert "photographs were trained on" not in text
    assert "27 of these 51 photographs bear names and grades of those that the run was trained on: if" in text


def test_most_names_and_grades_tell_the_runs_photographs_in_another_form(run: Path, tiny: Path) -> None:
    found = manifest.read(tiny)
    masters = replace(found, path=tuple(f"masters/{Path(path).stem}.png" for path in found.path))
    others = replace(masters, grade=(masters.grade + 1) % 5)
    for split, regression, said in (
        ("all", True, "38 of these 51 photographs bear names and grades of those that the run was trained on or "),
        ("valid", True, "11 of these 11 "),
        ("valid", False, None),
        ("test", True, None),
    ):
        ids = evaluate._ids(found, split)
        notes = evaluate._alike(evaluate._known(RunFolder(run), masters, ids), ids, regression)
        assert notes == [] if said is None else notes[0].startswith(said)
        assert evaluate._alike(evaluate._known(RunFolder(run), others, ids), ids, regression) == []


def test_the_runs_own_photographs_are_known_in_another_place(run: Path, tiny: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny, tmp_path / "moved")
    _, _, folder = evaluated(run, "--data", str(moved), "--split", "all")
    assert "27 of these 51 photographs were trained on" in (folder / "report.md").read_text()


def test_a_temperature_that_cannot_be_read_is_told_before_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (copy / "report" / "about.json").write_text("{")
    before, there = (copy / "test_scorings.jsonl").read_text(), set((copy / "evaluations").glob("*"))
    assert main(["evaluate", str(copy)]) == EXIT_USER_ERROR
    assert "has the temperature that was fitted on valid; put it back, or remove it" in capsys.readouterr().err
    assert (copy / "test_scorings.jsonl").read_text() == before
    assert set((copy / "evaluations").glob("*")) == there


def test_an_evaluation_needs_no_links(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a run that was copied to a disk that has none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert evaluated(run, "--split", "valid")[0]["valid"]["n"] == 11


@pytest.mark.slow
def test_the_precision_is_that_of_the_launcher_and_its_reason_is_printed(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    command = [sys.executable, "-m", "fastddr", "evaluate", str(copy), "--split", "valid", "--precision", "fp32"]
    launched = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    done = subprocess.run(command, env=launched, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "precision bf16: accelerate launch asked for it" in done.stdout
    report = max(Path(copy, "evaluations").glob("*/report.md"), key=os.path.getmtime)
    assert "| Precision | bf16 |" in report.read_text()


def test_other_photographs_may_be_of_one_split_alone(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = tiny / "DR_grading"
    for line in (official / "test.txt").read_text().splitlines():
        name, grade = line.split()
        (tmp_path / "others" / "test" / grade).mkdir(parents=True, exist_ok=True)
        shutil.copy(official / "test" / name, tmp_path / "others" / "test" / grade)
    figures, _, _ = evaluated(run, "--data", str(tmp_path / "others"))
    assert figures["test"]["n"] == 13
    assert main(["evaluate", str(run), "--data", str(tmp_path / "others"), "--split", "valid"]) == EXIT_USER_ERROR
    said = "has no gradable photograph in it, its gradable photographs are in test alone; give --split all"
    assert said in capsys.readouterr().err


def test_other_data_without_a_test_split_are_scored_whole(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of them, drawn by chance, would be a weaker external validation; and nothing of it was trained on."""
    for number in range(15):
        draw(tmp_path / "other" / str(number % 5) / f"{number}.png", number)
    before = (run / "test_scorings.jsonl").read_text()
    figures, _, folder = evaluated(run, "--data", str(tmp_path / "other"))
    said = "The set has no test split of its own, so all of its photographs are scored."
    assert said in capsys.readouterr().out
    assert said in (folder / "report.md").read_text()
    assert figures["all"]["n"] == 15
    assert (run / "test_scorings.jsonl").read_text() == before, "none of the run's own test"
    figures, _, folder = evaluated(run, "--data", str(tmp_path / "other"), "--split", "test")
    assert figures["test"]["n"] == 5, "what was drawn, where it is asked for"
    assert said not in (folder / "report.md").read_text()
    assert (run / "test_scorings.jsonl").read_text().count("\n") == before.count("\n") + 1
    # The run's own photographs in a form without splits: most of all would flatter, and all holds those of test.
    for row in table(run / "report" / "predictions.csv"):
        (tmp_path / "own" / row["grade"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny / "DR_grading" / row["path"], tmp_path / "own" / row["grade"])
    figures, _, _ = evaluated(run, "--data", str(tmp_path / "own"))
    assert list(figures) == ["test"]
    before = (run / "test_scorings.jsonl").read_text()
    evaluated(run, "--data", str(tmp_path / "own"), "--split", "all")
    assert (run / "test_scorings.jsonl").read_text().count("\n") == before.count("\n") + 1


def test_other_photographs_need_no_splits_as_the_run_had_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(restore.stored(run), splitting=SplitConfig(test="official", seed=3))
    monkeypatch.setattr(restore, "stored", lambda place: config)
    for number in range(5):
        draw(tmp_path / f"{number}.png", number)

    def read(*grades: int, split: str = "") -> manifest.Manifest:
        rows = [[f"{number}.png", grade, split] for number, grade in enumerate(grades)]
        write_csv(tmp_path / "labels.csv", ["path", "grade", "split"], rows)
        asked = evaluate.settings(flags.Evaluate(run, data=str(tmp_path)))
        return source.open_data(asked, terminal(), trained_on="of other photographs")

    found = read(0, 1, 2, 3, 4)
    assert len(evaluate._ids(found, "all")) == 5
    assert any("drawn by chance (seed 3)" in note for note in found.notes), "as of the run's own, where they have moved"
    assert not any("--splitting" in note for note in read(0, 1, 2, 3, 4, split="test").notes), "nobody has given it"
    capsys.readouterr()
    found = read(5, 5, 5, 5, 5)
    assert ": no gradable photographs\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"it has no gradable photograph in any split, so nothing can be scored\.$"):
        evaluate._ids(found, "all")


def test_threads_are_no_more_than_the_cores_of_the_machine_that_scores(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(restore.stored(run), threads=16, loading=LoadingConfig(threads=16))
    monkeypatch.setattr(restore, "stored", lambda place: config)
    monkeypatch.setattr("fastddr.ranks.cores", lambda: 4)
    found = restore.settings(flags.Evaluate(run))
    assert (found.threads, found.loading.threads) == (4, None)


def test_a_run_finds_its_photographs_from_any_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.parent)
    bad = sorted((tiny / "DR_grading" / "train").glob("*.jpg"))[0]
    (tmp_path / "bad.csv").write_text(f"path,reason\ntrain/{bad.name},blurred\n")
    left_out = ("--exclude", os.path.relpath(tmp_path / "bad.csv"))
    train(Path(tiny.name), tmp_path / "run", "--epochs", "1", *left_out)
    monkeypatch.chdir(tmp_path)
    figures, _, _ = evaluated(Path("run"), "--split", "all")
    assert figures["all"]["n"] == 26 + 11 + 13
    stored = restore.stored(Path("run"))
    monkeypatch.setattr(restore, "stored", lambda place: replace(stored, data="/gone"))
    assert main(["evaluate", "run"]) == EXIT_USER_ERROR
    assert "run/config.yaml: it has the photographs in /gone" in capsys.readouterr().err


def test_probabilities_are_averaged_over_the_views(run: Path) -> None:
    plain = {row["path"]: row for row in reported(run, "test")}
    _, rows, folder = evaluated(run, "--tta", "dihedral")
    assert "dihedral" in folder.name
    assert any(abs(float(row["p0"]) - float(plain[row["path"]]["p0"])) > 1e-4 for row in rows)
    assert all(sum(float(row[f"p{grade}"]) for grade in range(5)) == pytest.approx(1) for row in rows)


def test_what_is_put_around_a_model_has_its_mode() -> None:
    """Scoring sets it back to that: a heat map that is made next must not be of the statistics of its batch."""
    model = nn.Linear(2, 1)
    for training in (False, True):
        model.train(training)
        around = (Averaged(model, "dihedral"), Graded(model, Grading()), Averaged(Graded(model, Grading()), "flips"))
        assert all(module.training == training for outer in around for module in outer.modules())


def test_a_card_that_is_too_small_is_one_sentence(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("fastddr.inference.evaluate.score", full)
    monkeypatch.setattr("fastddr.inference.predict.score", full)
    photographs = str(tiny / "DR_grading" / "test")
    for verb in (["evaluate", str(run)], ["predict", str(run), photographs, "--out", str(tmp_path / "g.csv")]):
        assert main([*verb, "--batch-size", "6"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastddr: the memory here is too small for 6 photographs at once; give a smaller")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("trained", "capability", "card", "precision"),
    [
        ("bf16", (8, 6), "A40", "bf16"),
        ("bf16", (7, 5), "Tesla T4", "fp32"),
        ("fp16", (7, 5), "Tesla T4", "fp16"),
        ("fp16", (8, 6), "A40", "fp16"),
        ("fp16", (7, 5), "GTX 1660", "fp32"),
        ("fp32", (8, 6), "A40", "fp32"),
        ("bf16", None, "", "fp32"),
    ],
)
def test_a_run_is_scored_in_what_the_card_can(
    trained: Any, capability: Any, card: str, precision: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore.runtime, "on_cpu", lambda: capability is None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert restore._precision(replace(restore.stored(run), precision=trained)) == precision


def test_an_output_that_is_not_finite_is_no_grade(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest of such logits would be grade 0."""
    for verb in ("evaluate", "predict"):
        module = importlib.import_module(f"fastddr.inference.{verb}")
        score = module.score

        def spoilt(*arguments: Any, score: Any = score, **more: Any) -> Any:
            found = score(*arguments, **more)
            logits = found.logits.clone()
            logits[2:4] = float("nan")
            return replace(found, logits=logits)

        monkeypatch.setattr(module, "score", spoilt)
    table = tmp_path / "g.csv"
    for asked in (
        ["evaluate", str(run)],
        ["predict", str(run), str(tiny / "DR_grading" / "test"), "--out", str(table)],
    ):
        assert main(asked) == 2
        error = capsys.readouterr().err
        assert "the model's output is not finite for 2 of 1" in error
        assert "in fp32" in error
    assert not table.exists()


def test_scoring_computes_nothing_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may have: for its backward passes."""
    config = restore.stored(run)
    sparing = replace(config, memory=replace(config.memory, checkpointing=True))
    monkeypatch.setattr(restore, "stored", lambda _: sparing)
    assert not restore.settings(flags.Evaluate(run)).memory.checkpointing


@pytest.mark.parametrize("views", ["flips", "dihedral"])
def test_a_view_of_the_photograph_has_the_same_answer(views: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    image = torch.randn(2, 3, 8, 8)
    averaged = Averaged(model, views).eval()  # type: ignore[arg-type]
    turned = torch.rot90(image, 2, (-2, -1)).flip(-1) if views == "flips" else torch.rot90(image, 1, (-2, -1)).flip(-1)
    torch.testing.assert_close(averaged(turned), averaged(image))
    mean = torch.stack([model(v).softmax(1) for v in (image, image.flip(-1))]).mean(0)
    assert not torch.allclose(mean, averaged(image).softmax(1)), "there are more views than two"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no run here"),
        (["RUN", "--batch-size", "0"], "--batch-size 0"),
        (["RUN", "--data", "nowhere"], "there is no such folder"),
    ],
)
def test_what_a_user_gets_wrong(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["evaluate", *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastddr: ")
    assert said in error
    assert error.count("\n") == 1


def test_other_photographs_are_not_taken_for_the_runs_own(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(tiny, tmp_path / "data"))
    names = [line.split()[0] for line in (data / "DR_grading" / "test.txt").read_text().splitlines() if line[-1] != "5"]
    photograph = data / "DR_grading" / "test" / names[0]
    whole, choose = photograph.read_bytes(), saving.best

    def best(*given: Any) -> Any:
        photograph.write_bytes(whole + b"\0")
        return choose(*given)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "best", best)
        run = train(data, tmp_path / "run", "--epochs", "1")
    said = f"1 photographs were changed or removed since this start looked at them, like test/{names[0]}: "
    assert said in (run / "report" / "report.md").read_text()
    photograph.write_bytes(whole)
    verb = importlib.import_module("fastddr.inference.evaluate")
    score, moved = verb.score, tmp_path / "moved"

    def meanwhile(do: Callable[[], object]) -> int:
        monkeypatch.setattr(verb, "score", lambda *given, **more: (score(*given, **more), do())[0])
        return main(["evaluate", str(run)])

    assert meanwhile(lambda: run.rename(moved)) == 2
    assert "run: this run was moved or deleted while it was scored" in capsys.readouterr().err
    assert not run.exists()
    moved.rename(run)
    assert meanwhile(lambda: photograph.write_bytes(photograph.read_bytes() + b"\0")) == 2
    said = f"{photograph}: this photograph (1 in all) was changed or removed while it was scored"
    assert said in capsys.readouterr().err
    assert list((run / "evaluations").iterdir()) == []
    assert main(["evaluate", str(run)]) == 2
    assert "these are not the photographs" in capsys.readouterr().err


def test_ranks_that_read_two_checkpoints_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on may name another one the best between their looks."""
    config = restore.stored(run)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda mine: [*mine, *mine])
    restore.restore(run, config, "best", torch.device("cpu"))
    monkeypatch.setattr(ranks, "gather", lambda mine: [*mine, '{"step": 0}'])
    with pytest.raises(UserError, match="another checkpoint became the best one while it was read"):
        restore.restore(run, config, "best", torch.device("cpu"))


def leaves(value: Any) -> Iterator[Any]:
    """What lies in dictionaries and lists, with its keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def test_a_report_is_made_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    report = copy / "report"
    before = {file.name: file.read_bytes() for file in report.iterdir()}
    pictures = sorted(name for name in before if name.endswith(".png"))
    assert {"confusion_matrix.png", "curves.png", "reliability.png", "roc.png"} <= set(pictures)
    for name in ("report.md", "metrics.json", *pictures):
        (report / name).unlink()
    (copy / "tensorboard").mkdir(exist_ok=True)
    assert main(["report", str(report)]) == 0
    assert f"tensorboard --logdir {copy.parent}\n" in capsys.readouterr().out, "it is of the run"
    assert {file.name for file in report.iterdir()} == set(before)
    for name in ("report.md", "predictions.csv", "predictions_last.csv"):
        assert (report / name).read_bytes() == before[name], name
    figures, wanted = (json.loads(text) for text in ((report / "metrics.json").read_bytes(), before["metrics.json"]))
    # The table has the logits to nine digits.
    for kinds in ((int, float), (str, type(None))):
        now, then = ([leaf for leaf in leaves(found) if isinstance(leaf, kinds)] for found in (figures, wanted))
        assert now == (pytest.approx(then, rel=1e-5) if float in kinds else then)
    # An evaluation's, and a run without TensorBoard's files that has another name by now.
    shutil.rmtree(copy / "tensorboard")
    _, _, folder = evaluated(copy, "--split", "valid")
    (folder / "report.md").unlink()
    capsys.readouterr()
    renamed = copy.rename(tmp_path / "renamed")
    for place, title in ((renamed / folder.relative_to(copy), "run: valid-best"), (renamed / "report", "renamed")):
        assert main(["report", str(place)]) == 0
        said = capsys.readouterr().out
        assert "tensorboard" not in said
        assert title in said.splitlines()[0]
        assert (place / "report.md").read_text().startswith(f"# {title}\n")
