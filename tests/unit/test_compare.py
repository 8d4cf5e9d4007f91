"""Runs side by side: the same photographs, paired differences, and a sentence where they cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddr.__main__ import main
from fastddr.config import strict
from fastddr.evaluation import bootstrap
from fastddr.evaluation.metrics import SplitResult, figures
from fastddr.inference import compare
from fastddr.inference.flags import Compare
from fastddr.reporting import ABOUT, predictions

GRADES = torch.multinomial(
    torch.tensor([0.5, 0.1, 0.3, 0.05, 0.05]), 200, replacement=True, generator=torch.Generator().manual_seed(0)
)


def result(
    noise: int, skill: float = 1.5, names: list[str] | None = None, grades: torch.Tensor = GRADES
) -> SplitResult:
    """A grader of some skill, its photographs in an order of its own."""
    generator = torch.Generator().manual_seed(noise)
    logits = torch.randn(len(grades), 5, generator=generator) + skill * torch.nn.functional.one_hot(grades, 5)
    order = torch.randperm(len(grades), generator=generator)
    names = names or [f"valid/{number:03d}.jpg" for number in range(len(grades))]
    return SplitResult(
        logits[order], grades[order], torch.arange(len(grades)), [names[row] for row in order.tolist()], "best"
    )


def folder(path: Path, **splits: SplitResult) -> Path:
    """What a comparison reads of a run."""
    report = path / "report"
    report.mkdir(parents=True)
    (report / predictions.FILE).write_bytes(predictions.dump(splits))
    about = {
        "run": path.name, "facts": {}, "notes": [], "weights": dict.fromkeys(splits, "best"), "root": None,
        "temperature": None, "fit": True, "commonest": None,  # an earlier fastddr wrote the last
    }  # fmt: skip
    (report / ABOUT).write_text(json.dumps(about))
    return path


def test_runs_are_compared_photograph_by_photograph(tmp_path: Path) -> None:
    """The order of a file does not count, and the difference is that of the figures."""
    weak, strong = result(1, 1.0), result(2, 3.0)
    runs = (folder(tmp_path / "a", valid=weak), folder(tmp_path / "b", valid=strong))
    first, second = compare.compare(Compare(runs))
    assert (first.name, second.name, first.differences) == ("a", "b", None)
    for one, split in ((first, weak), (second, strong)):
        expected = figures(split.logits, split.grades)
        for key in ("accuracy", "qwk", "auc", "loss"):
            assert one.found[key] == pytest.approx(expected[key], abs=1e-9)
    head, *body = compare.table([first, second])
    assert [row[0] for row in body] == ["a", "b", "b − a"]
    gain = second.found["accuracy"] - first.found["accuracy"]
    cell = body[2][head.index("accuracy")]
    assert cell.startswith(f"{100 * gain:+.1f} (")
    assert cell.endswith("*"), "so large a difference is no chance"
    same = compare.compare(Compare((runs[0], runs[0])))
    assert compare.table(same)[3][1] == "+0.0 (+0.0 to +0.0)"


def test_runs_that_differ_in_their_seed_alone_have_a_mean(tmp_path: Path) -> None:
    settings = {"seed": 1, "lr": 0.1, "threads": 2, "tracking": {"project": "a"}, "augment": {"hue": 0.1}}
    changes: dict[str, dict[str, Any]] = {
        "a": {}, "b": {"seed": 2, "threads": 4, "tracking": {"project": "b"}},
        "c": {"seed": 3, "augment": {"hue": 0.2}}, "d": {"seed": 4, "lr": 0.2}, "e": {"seed": 2},
    }  # fmt: skip
    runs = []
    for noise, (name, change) in enumerate(changes.items()):
        runs.append(folder(tmp_path / name, valid=result(noise)))
        (runs[-1] / "config.yaml").write_text(strict.write(settings | change))
        (runs[-1] / "manifest.csv").write_text("path,grade,split")
    runs.append(folder(tmp_path / "f", valid=result(9)))  # whose settings are not known
    # Evaluations of another seed, alike in all but how they scored.
    for place, scored in enumerate(({"Window": "center"}, {"Precision": "bf16"}, {"Fingerprint of the data": "0"})):
        (tmp_path / f"g{place}").mkdir()
        (tmp_path / f"g{place}" / "config.yaml").write_text(strict.write(settings | {"seed": 9}))
        (tmp_path / f"g{place}" / "manifest.csv").write_text("path,grade,split")
        runs.append(folder(tmp_path / f"g{place}" / "evaluations" / "valid", valid=result(place)))
        about = runs[-1] / "report" / ABOUT
        about.write_text(json.dumps(json.loads(about.read_text()) | {"facts": scored}))
    compared = compare.compare(Compare(tuple(runs)))
    head, *body = compare.table(compared)
    mean = {row[0]: row for row in body}["mean ± SD of a, b"]
    assert [row[0] for row in body if "±" in row[0]] == [mean[0]], "of a seed that comes again the first run"
    first, second = (one.found["qwk"] for one in compared[:2])
    sd = abs(first - second) / 2**0.5
    assert mean[head.index("kappa (QWK)")] == f"{(first + second) / 2:.3f} ± {sd:.3f}"
    assert mean[head.index("accuracy")].endswith(" %")
    assert "standard deviation over training seeds" in compare.legend(compared, "valid")
    assert "standard deviation" not in compare.legend(compared[2:4], "valid")
    # Only the last evaluation tells of which data it is; beside one of others, as of the same set prepared:
    prepared = replace(compared[-1], name="p", fingerprint="1")
    assert "The data of p have another fingerprint than those of " in compare.legend([compared[-1], prepared], "valid")
    assert "fingerprint" not in compare.legend(compared, "valid")
    (over,) = compare.as_json(compared, "valid")["seeds"]
    assert (over["runs"], over["seeds"]) == (["a", "b"], [1, 2])
    assert over["mean_and_sd"]["qwk"] == pytest.approx(((first + second) / 2, sd))
    (runs[1] / "manifest.csv").write_text("other photographs")
    assert compare.recipe(runs[0], "best (step 1)", {}) != compare.recipe(runs[1], "best (step 1)", {})
    assert compare.recipe(runs[0] / "evaluations" / "x", "best (step 1)", {}) == compare.recipe(
        runs[0], "best (step 2)", {}
    )
    assert compare.recipe(runs[0], "best (step 1)", {}) != compare.recipe(runs[0], "last (step 1)", {})


def test_runs_of_one_name_have_as_many_parents_as_tell_them_apart() -> None:
    places = ["x/seed0", "y/seed0", "x/other", "x/seed0", "x/run/evaluations/test", "y/run/evaluations/test", "z/test"]
    wanted = ["x/seed0", "y/seed0", "other", "x/seed0", "x/run/test", "y/run/test", "z/test"]
    assert compare._names([Path(place) for place in places]) == wanted


def test_in_a_narrow_terminal_names_are_broken_and_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = tuple(folder(tmp_path / f"{letter * 20}-{letter * 15}", valid=result(1)) for letter in "abc")
    compared = compare.compare(Compare(runs))
    body = compare.table(compared)
    compare.show(compared, body, "valid")
    lines = capsys.readouterr().out.splitlines()
    for column, label in enumerate(body[0][1:], 1):
        [line] = [line for line in lines if line.startswith(f"{label}  ")]
        assert all(row[column] in line for row in body[1:])
    assert not any(compared[0].name in line for line in lines[: lines.index("")]), "names are folded"


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [folder(tmp_path / name, valid=result(seed), test=result(seed + 9)) for seed, name in enumerate("abc")]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c.md")]) == 0
    said = capsys.readouterr().out
    assert "200 photographs of valid" in said
    assert "b − a" in (tmp_path / "c.md").read_text()
    assert "Research use only" in (tmp_path / "c.md").read_text()
    assert main(["compare", *map(str, runs), "--split", "test", "--out", str(tmp_path / "c.json")]) == 0
    (tmp_path / "link.md").symlink_to("new.md")
    assert main(["compare", *map(str, runs), "--split", "test", "--out", str(tmp_path / "link.md")]) == 0
    assert (tmp_path / "link.md").is_symlink()
    assert "of test; " in (tmp_path / "new.md").read_text()
    (tmp_path / "loop.md").symlink_to("loop.md")
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "loop.md")]) == 2
    assert "leads to itself" in capsys.readouterr().err
    found = json.loads((tmp_path / "c.json").read_text())
    assert [run["run"] for run in found["runs"]] == ["a", "b", "c"]
    assert found["runs"][0]["difference_ci"] is None
    low, high = found["runs"][2]["difference_ci"]["referable.auc"]
    assert low < found["runs"][2]["referable"]["auc"] - found["runs"][0]["referable"]["auc"] < high


def test_each_run_is_drawn_once_whatever_it_is_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its intervals are those that it has alone."""
    runs = tuple(folder(tmp_path / str(seed), valid=result(seed)) for seed in range(4))
    drawn: list[int] = []

    class Counted(bootstrap._Weighed):
        def __init__(self, logits: torch.Tensor, grades: torch.Tensor) -> None:
            drawn.append(len(logits))
            super().__init__(logits, grades)

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "_Weighed", Counted)
        compared = compare.compare(Compare(runs))
    assert drawn == [200] * 4
    # Rows by path, as the comparison has them.
    one = result(2)
    order = torch.tensor(sorted(range(200), key=one.paths.__getitem__))
    logits, grades = one.logits[order], one.grades[order]
    alone = bootstrap.intervals(logits, grades, figures(logits, grades))
    # Up to last bits: some CPUs add up otherwise where a tensor lies at another address.
    torch.testing.assert_close(compared[2].ci, alone, rtol=1e-9, atol=1e-12)


def test_patients_are_drawn_whole_where_a_run_knows_them(tmp_path: Path) -> None:
    patients = [f"p{number // 4}" for number in range(200)]
    one = folder(tmp_path / "one", valid=result(1))
    other = folder(tmp_path / "other", valid=replace(result(2), patients=patients))
    first, second = compare.compare(Compare((one, other)))
    assert first.ci["patients"] == second.ci["patients"] == 50
    assert "200 photographs of 50 patients of valid; " in compare.legend([first, second], "valid")
    assert "patients" not in compare.compare(Compare((one, one)))[0].ci
    nameless = folder(tmp_path / "nameless", valid=replace(result(1), patients=[""] * 200))
    assert compare.compare(Compare((nameless, other)))[0].ci["patients"] == 50, "by the first run that names any"


def test_a_set_as_it_came_and_its_masters_are_the_same_photographs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fastddr prepare` makes a JPEG of a PNG."""
    raw = folder(tmp_path / "raw", all=result(1, names=[f"a/{number:03d}.png" for number in range(200)]))
    made = folder(tmp_path / "made", all=result(2, names=[f"a/{number:03d}.jpg" for number in range(200)]))
    assert [one.found["n"] for one in compare.compare(Compare((raw, made), split="all"))] == [200, 200]
    # Where an extension tells two photographs of a set apart, nobody knows which one is meant.
    names = [f"a/{number // 2:03d}.{'png' if number % 2 else 'jpg'}" for number in range(200)]
    twins = folder(tmp_path / "twins", all=result(1, names=names))
    assert [one.found["n"] for one in compare.compare(Compare((twins, twins), split="all"))] == [200, 200]
    assert main(["compare", str(made), str(twins), "--split", "all"]) == 2
    assert "100 of its 200 photographs were not scored by all of the runs" in capsys.readouterr().err


def test_thresholds_were_fitted_on_the_runs_own_photographs_alone(tmp_path: Path) -> None:
    runs = [folder(tmp_path / name, all=result(1)) for name in ("one", "other")]
    said = "On valid a regression has the advantage"
    assert said in compare.legend(compare.compare(Compare(tuple(runs), split="all")), "all")
    for place in runs:  # evaluations of other data
        about = place / "report" / ABOUT
        about.write_text(json.dumps(json.loads(about.read_text()) | {"fit": False}))
    assert said not in compare.legend(compare.compare(Compare(tuple(runs), split="all")), "all")


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = folder(tmp_path / "one", valid=result(1))
    names = [f"valid/{number:03d}.jpg" for number in range(10, 210)]
    shifted = folder(tmp_path / "shifted", valid=result(2, names=names, grades=torch.roll(GRADES, -10)))
    relabelled = GRADES.clone()
    relabelled[7] = (relabelled[7] + 1) % 5
    other = folder(tmp_path / "other", valid=result(2, grades=relabelled))
    stranger = folder(tmp_path / "stranger", valid=result(2, names=[f"x{number}" for number in range(200)]))
    for arguments, words in (
        ([one], "at least two runs"),
        ([one, tmp_path / "nothing"], "there is no run here"),
        ([one, one, "--split", "test"], "it has no predictions of test, only of valid"),
        ([one, shifted], "10 of its 200 photographs were not scored by all of the runs"),
        ([one, stranger, "--common"], "no photograph in common"),
        ([one, other], "the grade of valid/007.jpg is another than in one (1 such photographs)"),
        ([one, one, "--out", tmp_path / "c.txt"], "write to a .md or a .json"),
        ([one, one, "--out", one / "report" / ABOUT], "about.json: it is there already; give another name"),
        ([one, one, "--out", one / "gone" / "c.md"], "its folder is not there; make it first"),
    ):
        assert main(["compare", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.startswith("fastddr: ")
        assert said.count("\n") == 1
    shared = compare.compare(Compare((one, shifted), common=True))
    assert [run.found["n"] for run in shared] == [190, 190]
