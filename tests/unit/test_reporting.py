"""A report is read back as a person or a program would: each file, each axis, each promise."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil
import sys
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastddr import files, meters, reporting
from fastddr.config import Config, TrackingConfig
from fastddr.data.grades import ICDR
from fastddr.data.manifest import Manifest
from fastddr.data.problems import Problem
from fastddr.errors import UserError
from fastddr.evaluation.metrics import SplitResult, figures
from fastddr.reporting import again, facts, final, plots, predictions, ranked, tables
from fastddr.runs import Progress, RunFolder
from fastddr.runtime import Runtime
from fastddr.tracking import Tracker, read

pytestmark = pytest.mark.pictures

#: Rows = truth. No photograph of grade 3, and not the same read the other way.
TEST = np.array([[30, 2, 5, 0, 1], [4, 1, 3, 0, 0], [9, 0, 20, 2, 1], [0, 0, 0, 0, 0], [2, 0, 3, 0, 6]])
FACTS = {
    "Model": "cnn",
    "Parameters": 1234567,
    "Images a second": 4312.6,
    "Versions": {"torch": "2", "a|b": None},
}


def split(matrix: np.ndarray, weights: str = "best (step 120, epoch 9)", prefix: str = "t") -> SplitResult:
    """Logits that give a confusion matrix; ids and rows in different orders."""
    truth, predicted = np.array([pair for pair, n in np.ndenumerate(matrix) for _ in range(n)]).T
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(truth), len(matrix))).astype(np.float32)
    logits[np.arange(len(truth)), predicted] = logits.max(1) + rng.exponential(1, len(truth)) + 0.01
    ids = rng.permutation(len(truth))
    return SplitResult(
        torch.from_numpy(logits),
        torch.from_numpy(truth),
        torch.from_numpy(ids),
        [f"{prefix}/{number:03d}.jpg" for number in ids],
        weights,
    )


SPLITS = {
    "train": split(np.diag([5, 5, 5, 5, 5]), prefix="train"),
    "valid": split(TEST.T, prefix="valid"),
    "test": split(TEST, prefix="test"),
    "valid_last": split(TEST, "last (step 130, epoch 10)", prefix="valid"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "quickstart[lr=1]-synthetic"  # the brackets are text, no markup
    run.mkdir()
    photo = run / "photos" / "test" / "000.jpg"
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (64, 48), (200, 80, 20)).save(photo)
    lines: list[dict[str, Any]] = []
    for epoch in range(1, 5):
        lines += [{"step": 8 * epoch + i, "epoch": epoch - 1 + i / 8, "train/loss": 2 / epoch} for i in range(1, 9)]
        lines.append({"step": 8 * epoch + 8, "epoch": epoch, "valid/accuracy": 0.1 * epoch, "valid/qwk": None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 99, "ep')  # killed in the middle of a line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = reporting.write(run, SPLITS, FACTS, ["7 ungradable photographs were left out."], root=run / "photos")
    assert path == run / "report" / "report.md"
    return run


def test_the_folder_holds_what_the_design_says(run: Path) -> None:
    pictures = {"curves.png", "confusion_matrix.png", "roc.png", "reliability.png", "worst.png"}
    files = {"report.md", "metrics.json", "predictions.csv"} | pictures
    beside = {"about.json", "predictions_last.csv"}
    assert {path.name for path in (run / "report").iterdir()} == files | beside
    text = (run / "report" / "report.md").read_text()
    assert all(f"({name})" in text for name in files - {"report.md"})


def test_metrics_json_is_json_and_the_figures(run: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads((run / "report" / "metrics.json").read_text(), parse_constant=refuse)
    assert list(found) == list(SPLITS)
    test = found["test"]
    assert test.pop("weights") == "best (step 120, epoch 9)"
    assert found["valid_last"]["weights"] == "last (step 130, epoch 10)"
    ci = test.pop("ci")
    temperature = found["valid"]["calibrated"]["temperature"]
    calibrated = test.pop("calibrated")
    cooled = figures(SPLITS["test"].logits / temperature, SPLITS["test"].grades)
    expected = {"temperature": temperature, "ece": cooled["ece"], "loss": cooled["loss"]}
    assert calibrated == pytest.approx(expected, abs=1e-6)
    assert found["valid_last"]["calibrated"]["temperature"] != temperature, "other weights have their own"
    usual = TEST.sum(1)
    assert test.pop("baseline") == {"grade": usual.argmax(), "accuracy": pytest.approx(usual.max() / TEST.sum())}
    order = SPLITS["test"].ids.argsort()
    assert test == figures(SPLITS["test"].logits[order], SPLITS["test"].grades[order])
    assert test["confusion_matrix"] == TEST.tolist()
    assert set(ci) == set(test) - {"n", "confusion_matrix", "ece"} | {"samples"}
    assert ci["recall"][3] is test["recall"][3] is None
    assert ci["accuracy"][0] < test["accuracy"] < ci["accuracy"][1]


def test_predictions_csv_gives_the_figures_back(run: Path) -> None:
    rows = list(csv.DictReader((run / "report" / "predictions.csv").read_text().splitlines()))
    assert list(rows[0]) == ["path", "split", "grade", "predicted", "p0", "p1", "p2", "p3", "p4"]
    assert len(rows) == 25 + 2 * TEST.sum()  # valid_last is not in it
    assert {row["split"] for row in rows} == {"train", "valid", "test"}
    mine = [row for row in rows if row["split"] == "test"]
    assert [row["path"] for row in mine] == [f"test/{number:03d}.jpg" for number in range(TEST.sum())]
    matrix = np.zeros((5, 5), int)
    for row in mine:
        matrix[int(row["grade"]), int(row["predicted"])] += 1
    assert (matrix == TEST).all()
    result = SPLITS["test"]
    expected = result.logits.double().softmax(1)[result.ids.argsort()]
    read = torch.tensor([[float(row[f"p{grade}"]) for grade in range(5)] for row in mine], dtype=torch.float64)
    assert torch.equal(read, expected)  # to the last bit


def test_report_md_has_its_axes_and_its_words(run: Path) -> None:
    text = (run / "report" / "report.md").read_text()
    assert "Research use only; not a medical device." in text
    assert "- 7 ungradable photographs were left out." in text
    assert "Rows are the truth, columns the prediction." in text
    test = text.split("### test\n")[1].split("\n#")[0]
    cells = [line.strip("| ").split(" | ") for line in test.strip().splitlines()]
    assert cells[0] == ["truth ↓ predicted →", *(f"{grade} {name}" for grade, name in enumerate(ICDR))]
    assert [[int(cell) for cell in line[1:]] for line in cells[2:]] == TEST.tolist()
    recall = text.split("## Recall of each grade\n")[1].split("\n## ")[0]
    columns = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in recall.splitlines()}
    assert columns["Grade"] == ["Grade", "train", "valid", "test", "valid (last weights)"]
    assert columns["3 Severe NPDR"][3] == "– of 0"
    assert columns["0 No DR"][3].startswith("78.9 % (")
    assert columns["0 No DR"][3].endswith("of 38")
    assert f"| Accuracy of one grade for all | 20.0 % | {tables.cell(TEST.sum(0).max() / TEST.sum())} |" in text
    assert "to give every photograph the most frequent grade of its split" in text
    assert "it has learned nothing yet" not in text
    weights = next(line for line in text.splitlines() if line.startswith("| Weights"))
    assert weights.count("best (step 120, epoch 9)") == 3
    assert weights.count("last (step 130, epoch 10)") == 1
    assert "| Parameters | 1,234,567 |" in text
    assert "| Images a second | 4,313 |" in text
    assert "| Versions | torch 2, a\\|b – |" in text


def test_names_of_others_are_no_markup_in_report_md() -> None:
    evil = "[x](https://e.org) <img src=y> `z` *b* _c_ a_b.jpg 2 * 3 \\"
    shown = "\\[x\\](https://e.org) \\<img src=y\\> \\`z\\` \\*b\\* \\_c\\_ a_b.jpg 2 * 3 \\\\"
    text = tables.markdown(evil, {}, {"Data": evil}, [evil], [], [Problem(evil, "empty", evil)])
    assert text.count(shown) == 5
    assert evil not in text


def test_the_best_epoch_of_the_curves_is_that_of_the_weights() -> None:
    """Of equal kappas the loss has decided, which the picture cannot know."""
    logged = [{"epoch": epoch, "valid/qwk": kappa} for epoch, kappa in ((1, 0.4), (2, 0.7), (3, 0.7))]
    assert plots._best(logged, 3) == ("valid/qwk", 0.7)
    assert plots._best(logged, None) is None
    assert plots.curves(logged, 3) != plots.curves(logged, 2)
    foreign = [{"step": 5, "valid/qwk": 0.9}, {"epoch": 4, "valid/qwk": "high"}, {"epoch": None, "valid/qwk": 1}]
    assert plots._points([*logged, *foreign], "valid/qwk")[0].tolist() == [1, 2, 3]
    # With ungradable as a class macro F1 decides, and where that is undefined, accuracy.
    six = [{"epoch": 1, "valid/qwk": 0.9, "valid/macro_f1": 0.4, "valid/recall_5": None, "valid/accuracy": 0.8}]
    assert plots._best(six, 1) == ("valid/macro_f1", 0.4)
    assert "Macro F1" in plots._panels(six, {})
    assert plots._best([{"epoch": 1, "valid/qwk": None, "valid/accuracy": 0.8}], 1) == ("valid/accuracy", 0.8)


def test_curves_say_of_what_each_is_and_share_no_axis_where_they_do_not_compare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "drawn", lambda figure, *_: drawn.append(figure) or b"")
    logged: list[dict[str, Any]] = [
        {"epoch": epoch, f"{split}/loss": 2 / epoch, f"{split}/accuracy": 0.76 + epoch / 100}
        for epoch in (1, 2) for split in ("train", "valid")
    ]  # fmt: skip

    def legends(**loss: Any) -> list[list[str]]:
        plots.curves(logged, 2, tables.measured({"Loss": loss}))
        shown = [axes.get_legend() for axes in drawn[-1].axes]
        return [
            [text.get_text().replace("\n", " ") for text in legend.get_texts()]
            for legend in shown
            if legend is not None
        ]

    assert legends(name="cross_entropy")[0] == ["train, cross-entropy", "valid, cross-entropy"]
    changed = {"class weights": "inverse", "label smoothing": 0.1}
    assert legends(name="cross_entropy", **changed)[0][0] == "train, weighted, smoothed cross-entropy"
    train, valid, accuracy = legends(name="mse")
    assert (train, valid) == (["train, squared error"], ["valid, cross-entropy"])
    assert accuracy == ["train, rounded values", "valid, fitted thresholds", "best: 78.0 %, epoch 2"]
    ticks = [text.get_text() for text in drawn[-1].axes[2].get_yticklabels()]
    assert len(ticks) == len(set(ticks)), "no tick is rounded to another"
    said = tables.markdown("run", {}, {"Loss": {"name": "mse"}}, [], ["curves.png"])
    assert "Loss on train: squared error, on valid: cross-entropy." in said


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("curves.png", (1800, 585)),
        ("confusion_matrix.png", (1980, 900)),
        ("roc.png", (1650, 1470)),
        ("reliability.png", (1560, 840)),
        ("worst.png", (1800, 1695)),
    ],
)
def test_a_picture_opens_has_its_size_and_is_not_blank(run: Path, name: str, size: tuple[int, int]) -> None:
    with Image.open(run / "report" / name) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        assert picture.size == size
    inked = (pixels < 250).any(2)
    assert inked.mean() > 0.02
    halves = (inked[:, : size[0] // 2], inked[:, size[0] // 2 :])
    assert min(half.mean() for half in halves) > 0.005  # every panel has something in it


def test_a_line_of_few_steps_counts_little_in_the_mean_of_its_epoch() -> None:
    """A checkpoint after 0.9 of the first epoch, and a stop after 0.2 of the second."""
    epochs, values = (0.5, 0.9, 1.0, 1.2, 2.0), (1.0, 2.0, 9.0, 4.0, 1.0)
    lines = [{"epoch": epoch, "train/loss": value} for epoch, value in zip(epochs, values, strict=True)]
    marks, means = plots._by_epoch(*plots._points(lines, "train/loss"))
    assert marks.tolist() == [1, 2]
    assert means == pytest.approx([0.5 * 1 + 0.4 * 2 + 0.1 * 9, 0.2 * 4 + 0.8 * 1])
    lines = [{"epoch": epoch, "train/loss": value} for epoch, value in ((0.5, None), (0.75, 9.0), (1.0, 1.0))]
    assert plots._by_epoch(*plots._points(lines, "train/loss"))[1] == pytest.approx([5.0]), (
        "nobody's steps are another's"
    )


def test_the_worst_mistakes_come_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four grades apart before three, and the confident before the doubtful."""
    seen: list[str] = []
    monkeypatch.setattr(plots, "small", lambda file, side: seen.append(str(file)))
    logits = torch.tensor([[0, 0, 0, 5.0, 0], [1, 0, 0, 0, 0], [3, 0, 0, 0, 0], [0, 0, 0, 0, 9], [0, 9, 0, 0, 0]])
    grades = torch.tensor([0, 4, 4, 4, 0])
    result = SplitResult(logits, grades, torch.arange(5), list("abcde"), "best")
    plots.worst("test", result)
    assert seen == ["c", "b", "a", "e"]  # d is right
    six = torch.tensor([[0, 0, 0, 0, 0, 9.0], [5, 0, 0, 0, 0, 0], [0, 5, 0, 0, 0, 0]])
    order, *_ = plots.mistakes(SplitResult(six, torch.tensor([0, 2, 5]), torch.arange(3), list("abc"), "best"))
    assert order.tolist() == [1, 0, 2], "ungradable is no grade that lies far from others"


def test_the_rings_of_the_roc_have_a_name_and_are_whole_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "drawn", lambda figure, *_: drawn.append(figure) or b"")
    result = SPLITS["test"]
    ranked.curves({"test": result}, {"test": figures(result.logits, result.grades)})
    axes = drawn[0].axes[0]
    rings = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert len(rings) == 3
    assert not any(ring.get_clip_on() for ring in rings)
    assert [text.get_text() for text in axes.get_legend().get_texts()][3:] == ["predicted grade"]


def test_a_matrix_is_drawn_with_the_truth_down(monkeypatch: pytest.MonkeyPatch) -> None:
    figure_of: list[Any] = []
    monkeypatch.setattr(plots, "drawn", lambda figure, *_: figure_of.append(figure) or b"")
    plots.confusion({"test": figures(SPLITS["test"].logits, SPLITS["test"].grades)})
    axes = figure_of[0].axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("Truth", "Predicted")
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts[(2, 0 - 0.1)] == "5"  # truth 0, predicted 2
    assert counts[(0, 2 - 0.1)] == "9"
    assert counts[(0, 2 + 0.2)] == "28.1%"
    image = np.asarray(axes.images[0].get_array())
    assert image[2, 0] == pytest.approx(9 / 32)


@pytest.mark.filterwarnings("error")
def test_little_is_enough_for_a_report(tmp_path: Path) -> None:
    """No curves, no test, no mistake, three grades without ICDR names; and all of it twice."""
    result = split(np.diag([2, 1, 1]))
    for _ in range(2):
        text = reporting.write(tmp_path, {"valid": result}, {}).read_text()
    assert "Grade 2" in text
    assert "curves.png" not in text
    assert not list((tmp_path / "report").glob(".*"))


def test_a_picture_that_fails_takes_no_figures_with_it_and_half_a_report_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bytes:
        raise ValueError("cannot be drawn")

    def noted(path: Path, content: bytes) -> None:
        put(path, content)
        # What `fastddr report`, given in this moment, would make of it.
        with suppress(UserError):
            found.append(again.stored(again.folder_of(tmp_path)))

    found: list[again.Stored] = []
    put = files.put
    monkeypatch.setattr(files, "put", noted)
    monkeypatch.setattr(plots, "confusion", fails)
    few = {name: split(np.diag([2, 1, 1]), name) for name in ("test", "valid_last")}
    bad = [Problem("t/9.jpg", "empty", "it is empty")]
    with pytest.raises(ValueError, match="cannot be drawn"):
        reporting.write(tmp_path, few, {}, left_out=bad)
    there = {path.name for path in (tmp_path / "report").iterdir()}
    rows = {"predictions.csv", "predictions_last.csv", "left_out.csv"}
    assert there == {"about.json", "metrics.json", "report.md"} | rows
    assert found
    assert all(one.splits.keys() == few.keys() and one.left_out == bad for one in found)


def test_a_report_is_of_its_run_from_within_its_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the run it finds the curves, and those of TensorBoard."""
    monkeypatch.setattr(reporting, "write", lambda run, *_, **__: run)
    monkeypatch.chdir(run / "report")
    assert again.write(run) == again.write(Path()).absolute() == run


def test_photographs_that_have_moved_are_found_below_the_folder_that_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their paths are relative to a folder in it where the set has one of its own, as DDR's DR_grading."""
    shutil.copytree(run / "photos", tmp_path / "moved" / "photos")
    monkeypatch.setattr(reporting, "write", lambda *_, root, **__: root)
    for named in (tmp_path / "moved", tmp_path / "moved" / "photos"):
        assert again.write(run, named) == tmp_path / "moved" / "photos"
    with pytest.raises(UserError, match=r"none of the report's photographs lies there; give the folder of train/000"):
        again.write(run, tmp_path)


def test_a_report_made_again_is_the_same(run: Path, tmp_path: Path) -> None:
    """From what lies in the folder, without a model: to the last figure and picture."""
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    before = {path.name: path.read_bytes() for path in (copy / "report").iterdir()}
    for name in set(before) - {"about.json", "predictions.csv", "predictions_last.csv"}:
        (copy / "report" / name).unlink()
        # Through what somebody has put there nothing is written.
        (copy / f"report/.{name}.tmp").symlink_to(copy / "config.yaml")
    (copy / "config.yaml").write_text("lr: 1")
    assert again.write(copy, vector="pdf") == copy / "report" / "report.md"
    assert (copy / "config.yaml").read_text() == "lr: 1"
    after = {path.name: path.read_bytes() for path in (copy / "report").iterdir() if not path.is_symlink()}
    print_ = {f"{name}.pdf" for name in ("curves", "confusion_matrix", "roc", "reliability")}
    assert after.keys() == before.keys() | print_
    assert all(after[name].startswith(b"%PDF") for name in print_)
    same = {"report.md", "predictions.csv", "predictions_last.csv", "about.json", "confusion_matrix.png", "worst.png"}
    for name in same - {"about.json"}:
        assert after[name] == before[name], name
    old, new = (json.loads(files["metrics.json"]) for files in (before, after))
    for split in old:
        assert new[split]["loss"] == pytest.approx(old[split]["loss"], abs=1e-12)
        assert new[split]["ci"]["qwk"] == old[split]["ci"]["qwk"]


def test_what_is_no_report_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run here"):
        again.write(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has no report yet"):
        again.write(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run / "report", copy)
    for row in ("0.5", "nan,0.5", "0.5,inf", "-0.5,1.5"):
        (copy / "predictions.csv").write_text(f"path,split,grade,predicted,p0,p1\na.jpg,test,0,0,{row}\n")
        with pytest.raises(UserError, match=r"predictions\.csv, line 2"):
            again.write(copy)
    (copy / "predictions.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="not a list of predictions"):
        again.write(copy)
    (copy / "about.json").unlink()
    with pytest.raises(UserError, match=r"about\.json"):
        again.write(copy)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("about.json", "5", "holds a int"),
        ("about.json", "null", "holds a NoneType"),
        ("about.json", "[" * 100_000, "nested too deeply"),
        ("about.json", '{"weights": []}', "'weights' is missing or of another kind"),
        ("about.json", '{"temperature": "warm"}', "'temperature' is"),
        ("about.json", '{"weights": {"test": 5}}', "no text"),
        ("left_out.csv", "path,kind,reason\na.jpg,haunted,it is\n", r"line 2: there is no kind of problem 'haunted'"),
        ("left_out.csv", "path,why\na.jpg,so\n", "its columns"),
        ("left_out.csv", f"path,kind,reason\na.jpg,empty,{'x' * 200_000}\n", "field larger"),
        ("predictions_last.csv", "path,split,grade,predicted,p0,p1\n", "it holds no row"),
        ("predictions.csv", "path,split,grade,predicted,p0,p1\n", "it holds no row"),
    ],
)
def test_a_report_of_another_version_or_with_a_broken_file_is_one_sentence(
    run: Path, tmp_path: Path, file: str, text: str, said: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "report", copy)
    if text.startswith("{"):
        text = json.dumps(json.loads((copy / file).read_text()) | json.loads(text))
    (copy / file).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        again.write(copy)
    assert file in str(caught.value)


def test_a_name_that_is_no_text_and_a_probability_of_nothing(tmp_path: Path) -> None:
    """A file's name may hold any bytes, what Matplotlib takes for a formula, and letters that its font lacks; a softmax
    may be exactly 0."""
    result = SplitResult(
        torch.tensor([[900.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]), torch.tensor([4, 2]), torch.arange(2),
        [b"a\xff,\n.jpg".decode(errors="surrogateescape"), "50$%$ \u773c.jpg"], "best",
    )  # fmt: skip
    (tmp_path / "p.csv").write_bytes(predictions.dump({"test": result}))
    read = predictions.load(tmp_path / "p.csv", {"test": "best"})["test"]
    assert list(read.paths) == list(result.paths)
    assert read.logits.isfinite().all()
    assert read.weights == "best"
    assert torch.allclose(read.logits.softmax(1), result.logits.double().softmax(1), rtol=0, atol=1e-15)
    assert reporting.write(tmp_path, {"test": result}, {}).is_file()


def test_an_ungradable_class_is_counted_with_and_without(tmp_path: Path) -> None:
    matrix = np.zeros((6, 6), int)
    matrix[:5, :5], matrix[5, 5], matrix[5, 0] = TEST, 9, 3
    text = reporting.write(tmp_path, {"test": split(matrix)}, {}).read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert tables.cell(np.trace(matrix) / matrix.sum()) in lines["Accuracy"]
    assert tables.cell(np.trace(TEST) / TEST.sum()) in lines["Accuracy without ungradable"]
    assert "of 12" in lines["5 Ungradable"]


def test_few_photographs_have_wide_intervals_and_endpoints_say_of_how_many(tmp_path: Path) -> None:
    matrix = np.diag([30, 10, 30, 4, 6])
    text = reporting.write(tmp_path, {"test": split(matrix)}, {}).read_text()
    assert "| 3 Severe NPDR | 100.0 % (51.0–100.0) of 4 |" in text
    assert "Referable (grade ≥ 2): sensitivity | 100.0 % (91.2–100.0) of 40 |" in text
    assert "Referable (grade ≥ 2): specificity | 100.0 % (91.2–100.0) of 40 |" in text


def test_other_photographs_have_the_temperature_of_the_runs_valid(tmp_path: Path) -> None:
    """Nothing is fitted on them, nor when their report is made again."""
    reporting.write(tmp_path, {"valid": SPLITS["test"]}, {}, folder=tmp_path, temperature=19.9999, fit=False)

    def temperature() -> float:
        return float(json.loads((tmp_path / "metrics.json").read_text())["valid"]["calibrated"]["temperature"])

    assert temperature() == 19.9999
    assert "valid: 20.000 (the bound of its search) for" in (tmp_path / "report.md").read_text()
    again.write(tmp_path)
    assert temperature() == 19.9999


def test_a_model_that_gives_one_grade_to_all_has_learned_nothing_however_accurate(tmp_path: Path) -> None:
    """It is said in report and terminal; and so is what the most frequent grade of the photographs gives."""
    matrix = np.zeros((5, 5), int)
    matrix[:, 2] = [3, 1, 30, 0, 4]
    text = reporting.write(tmp_path, {"valid": split(matrix)}, {}).read_text()
    reporting.summary(tmp_path, console=(console := Console(file=io.StringIO(), width=200)))
    for said in (text, console.file.getvalue()):  # type: ignore[attr-defined]  # a StringIO
        assert "gives grade 2 to every photograph of valid: it has learned nothing yet" in said
    assert f"| Accuracy of one grade for all | {tables.cell(30 / 38)} |" in text
    assert again.write(tmp_path).read_text() == text
    matrix[:, 2] = [0, 0, 30, 0, 0]
    right = split(matrix)
    assert not tables.constant({"test": figures(right.logits, right.grades)}), "all are of it"
    matrix[:, 2] = [0, 3, 30, 0, 0]
    few = split(matrix)
    of_few = figures(few.logits, few.grades)
    assert not tables.constant({"test": of_few}), "a sound model may do so with a few of two grades"
    assert tables.constant({"valid": of_few})
    matrix[:, 2] = [3, 1, 30, 0, 4]
    other = split(matrix)
    [said] = tables.constant({"all": figures(other.logits, other.grades)})
    assert said == "The model gives grade 2 to every photograph of all.", "the reason may be the photographs"


def test_the_terminal_says_the_figures_and_what_exists(run: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    reporting.summary(run, wandb_commands=("wandb leet here", "wandb sync somewhere"), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    accuracy = tables.cell(np.trace(TEST) / TEST.sum())
    assert next(line for line in text.splitlines() if "accuracy" in line).count(accuracy) == 3
    assert "train, valid, test: best (step 120, epoch 9)" in text
    assert "wandb sync somewhere" in text
    assert "wandb leet here" in text
    assert "tensorboard --logdir" in text
    assert tables.DISCLAIMER in text
    assert run.name in text
    long = f"wandb sync {'a' * 120}"
    reporting.summary(run, wandb_commands=(None, long), console=(narrow := Console(file=io.StringIO(), width=80)))
    assert long in narrow.file.getvalue(), "what is to be copied is not broken"  # type: ignore[attr-defined]
    reporting.summary(run, console=(narrow := Console(file=io.StringIO(), width=50)))
    assert "…" not in narrow.file.getvalue(), "no figure is cut short"  # type: ignore[attr-defined]
    reporting.summary(run, tensorboard=False, console=(plain := Console(file=io.StringIO(), width=100)))
    assert "tensorboard" not in plain.file.getvalue()  # type: ignore[attr-defined]
    assert "wandb" not in plain.file.getvalue()  # type: ignore[attr-defined]


def test_the_end_of_a_run_tells_that_test_was_scored_and_the_memory_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a start, also where the disk is full before there is a report."""

    def full(*_: Any, **__: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(tmp_path)
    lines = [
        {"step": 10, "memory/peak_rss_gib": 0.8, "train/images_per_second": 10, "train/data_wait": 0.9},
        {"step": 11, "memory/peak_rss_gib": 0.8, "train/images_per_second": 1000, "train/data_wait": 0},
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    none = np.zeros(0, int)
    data = Manifest(tmp_path, (), none, (), none, none, none, (), ())
    machine = Runtime.__new__(Runtime)
    vars(machine).update(device=torch.device("cpu"), world=1, threads=1)
    options = TrackingConfig(wandb=False, tensorboard=False)
    for there, write in ((1, full), (2, reporting.write)):
        tracker = Tracker.start(tmp_path, {}, options=options, resume_step=11, say=print)
        monkeypatch.setattr(reporting, "write", write)
        with nullcontext() if there == 2 else pytest.raises(OSError, match="No space left"):
            final.write_final(
                folder, {"test": SPLITS["test"]}, Config(), data, machine, tracker, parameters=1, weights="best",
                peaks={"memory/peak_rss_gib": 1.25}, progress=Progress(step=11), resumed=False,
            )  # fmt: skip
        tracker.finish()
        assert len(folder.test_scorings.read_text().splitlines()) == there
        assert (tmp_path / "report").is_dir() == (there == 2)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| 0.80 GiB in training, 1.25 GiB with the scoring at its end |" in text
    assert "| 11.0 on the whole, 10.0 in the median step |" in text
    assert "| 89.9% on the whole, 90.0% in the median step |" in text
    logged = read(folder.metrics)[-1]
    assert logged["final/peak_rss_gib"] == 1.25
    assert not [name for name in logged if name.startswith("memory/")], "W&B knows a line by its first name"


@pytest.mark.parametrize("program", ["/x/fastddr/__main__.py train", "fastddr/train.py", "/bin/fastddr train"])
def test_the_command_of_a_run_can_be_typed(program: str) -> None:
    assert facts.command([*program.split(), "--data", "my set"]) == "fastddr train --data 'my set'"


def test_what_was_started_from_python_has_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # as in a notebook
    assert facts.command(["/x/ipykernel_launcher.py", "-f", "/x/kernel-1.json"]) == "from Python"
    assert facts.command([""]) == "from Python"
    sys.modules["__main__"].__file__ = "/x/sweep.py"
    assert facts.command(["/x/sweep.py", "--seeds", "3"]) == "from Python, sweep.py --seeds 3"


def test_the_code_is_that_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout may move on while a run goes on."""
    before = meters.code_state()
    monkeypatch.setattr(meters.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="another"))
    assert meters.code_state() == before
