"""`fastddr predict`: photographs without labels, graded as `evaluate` grades their masters."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from reference import needs_dali
from tests_support import ROOT, evaluated, table, train
from torch import nn

from fastddr.__main__ import main
from fastddr.data import crop, prepare
from fastddr.errors import UserError
from fastddr.evaluation import explain
from fastddr.inference import evaluate, flags, restore


@pytest.fixture(scope="module")
def masters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "masters"
    prepare.run(str(tiny), out, crop.Recipe(96), sheet=3, workers=1)
    return out


@pytest.fixture(scope="module")
def run(masters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(masters, tmp_path_factory.mktemp("runs") / "run", "--epochs", "1", "--lr", "0.01")


def graded(run: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """Rows of predictions.csv of a new evaluation of test, by file name."""
    _, rows, _ = evaluated(run, *arguments)
    return {Path(row["path"]).name: row for row in rows}


def raw(tiny: Path, tmp_path: Path) -> Path:
    """The photographs of test that are graded 0-4, without labels."""
    out = tmp_path / "raw"
    out.mkdir()
    for line in (tiny / "DR_grading" / "test.txt").read_text().splitlines():
        name, grade = line.split()
        if grade != "5":
            shutil.copy(tiny / "DR_grading" / "test" / name, out / name)
    return out


@pytest.mark.parametrize("flags", [(), ("--window", "center", "--tta", "flips"), ("--window", "multi")])
def test_raw_photographs_get_the_answer_of_their_masters(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    out = tmp_path / "grades.csv"
    assert main(["predict", str(run), str(raw(tiny, tmp_path)), "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert "13 photographs cropped to the retina (96 px, jpeg), as the run's were" in said
    assert "13 photographs graded under best" in said
    wanted = graded(run, *flags)
    rows = table(out)
    assert len(rows) == len(wanted) == 13
    for row in rows:
        other = wanted[Path(row["path"]).name]
        figures = [row[f"p{grade}"] for grade in range(5)]
        assert figures == [other[f"p{grade}"] for grade in range(5)], "to the last digit"
        assert row["grade"] == other["predicted"]
        assert row["referable"] == str(int(int(row["grade"]) >= 2))
        assert row["confidence"] == figures[int(row["grade"])] == max(figures, key=float)
        assert (row["status"], row["reason"]) == ("ok", "")
    names = {"0": "No DR", "1": "Mild NPDR", "2": "Moderate NPDR", "3": "Severe NPDR", "4": "Proliferative DR"}
    assert all(row["name"] == names[row["grade"]] for row in rows)


def test_the_command_that_prepares_other_photographs_can_be_typed(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of `evaluate --data`, where the run's were prepared: here a folder of links, with a blank in its name."""
    data, out = tmp_path / "my set", tmp_path / "out"
    shutil.copytree(tiny, data, copy_function=lambda source, target: os.symlink(source, target))
    for label in (data / "DR_grading").glob("*.txt"):
        label.unlink()
        shutil.copy(tiny / "DR_grading" / label.name, label)
    assert main(["evaluate", str(run), "--data", str(data), "--follow-links"]) == 0
    [command] = re.findall(r"`(fastddr prepare .*?)` prepares them", capsys.readouterr().out)
    assert main(shlex.split(command.replace("FOLDER", shlex.quote(str(out))))[1:]) == 0
    made = list((out / "DR_grading").rglob("*.jpg"))
    assert len(made) >= 13
    with Image.open(made[0]) as image:
        assert image.size == (96, 96), "as the run's are"
    (tmp_path / "bad list.csv").write_text("x.jpg")
    config = replace(restore.stored(run), data="set", exclude=str(tmp_path / "bad list.csv"))
    command = evaluate._preparing(crop.Recipe(512, "png"), config)
    assert shlex.split(command) == [
        "fastddr",
        "prepare",
        "set",
        "FOLDER",
        "--format",
        "png",
        "--exclude",
        config.exclude,
    ]


def test_the_runs_own_masters_are_prepared_wherever_they_lie(
    run: Path, masters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also copied without what `fastddr prepare` noted beside them: paths, bytes and grades are the run's."""
    shutil.copytree(masters / "DR_grading", tmp_path / "DR_grading")
    _, _, folder = evaluated(run, "--data", str(tmp_path / "DR_grading"), "--split", "valid")
    assert "prepare" not in capsys.readouterr().out
    assert "not prepared" not in (folder / "report.md").read_text()


@pytest.mark.parametrize("window", ["full", "center"])
def test_the_benchmark_compares_with_a_loop_that_sees_the_same(
    run: Path, masters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: Literal["full", "center"]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plain, out = importlib.import_module("predict"), tmp_path / "grades.csv"
    [folder] = masters.glob("**/test")
    more = ["--preparation", "none", "--window", window, "--out", str(out)]
    assert main(["predict", str(run), str(folder), *more]) == 0
    config = restore.settings(flags.Scoring(run=run, window=window))
    found = restore.restore(run, config, "best", torch.device("cpu"))
    rows = table(out)
    files = [folder / row["path"] for row in rows]
    wanted = torch.tensor([[float(row[f"p{grade}"]) for grade in range(5)] for row in rows])
    # Pillow's decoder and reduction differ from the loader's by single levels, another window by far more.
    apart = (plain.graded(found.averaged, config, [str(file) for file in files], 4) - wanted).abs().max()
    other = replace(config, evaluation=replace(config.evaluation, field="center" if window == "full" else "full"))
    moved = (plain.graded(found.averaged, other, [str(file) for file in files], 4) - wanted).abs().max()
    assert apart < 0.005
    assert moved > 10 * apart
    if window == "center":
        return  # the rest has nothing to do with the window
    # An upright photograph and one that its EXIF turns upright are the same, and so is the precision.
    turned = tmp_path / "turned.png"
    with Image.open(files[0]) as image:
        exif = image.getexif()
        exif[0x0112] = 3
        image.transpose(Image.Transpose.ROTATE_180).save(turned, exif=exif)
    pair = plain.graded(found.averaged, config, [str(files[0]), str(turned)], 1)
    assert torch.equal(pair[0], pair[1])
    half = replace(config, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain.graded(found.averaged, config, [str(turned)], 1)[0], pair[0]), "whatever is on"
    rounded = plain.graded(found.averaged, half, [str(turned)], 1)[0]
    assert 0 < (rounded - pair[0]).abs().max() < 0.05
    turned.write_bytes(b"")
    with pytest.raises(UserError, match=r"turned\.png: the file is empty; remove it"):
        plain.ours(run, [str(turned)], 1, out)()
    nine = replace(config, evaluation=replace(config.evaluation, field="multi"))
    with pytest.raises(UserError, match="one window of a photograph"):
        plain.graded(found.averaged, nine, [], 4)


@needs_dali
def test_a_run_on_raw_photographs_prepares_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tiny, tmp_path / "run", "--epochs", "1", "--loader", "resident")
    photographs = raw(tiny, tmp_path)
    replaced = sorted(photographs.glob("*.jpg"))[1]
    verb = importlib.import_module("fastddr.inference.predict")
    score = verb.score

    def meanwhile(*given: Any, **more: Any) -> Any:
        """Of a larger photograph DALI would take the part that it had been."""
        with Image.open(replaced) as image:
            image.resize((300, 300)).save(replaced)
        return score(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "score", meanwhile)
        asked = ["predict", str(run), str(photographs), "--out", str(tmp_path / "g.csv")]
        assert main([*asked, "--loader", "dali"]) == 1
        assert "no preparation: the run was trained on photographs as they are" in capsys.readouterr().out
        shutil.copy(tiny / "DR_grading" / "test" / replaced.name, replaced)
        assert main([*asked[:-1], str(tmp_path / "no.csv"), "--window", "center"]) == 2
        assert f"{replaced}: DALI decodes it to 300 × 300 pixels, and 80 × 80 were exp" in capsys.readouterr().err
    wanted, found = graded(run, "--loader", "dali"), table(tmp_path / "g.csv")
    assert [row["p0"] for row in found] == ["" if n == 1 else row["p0"] for n, row in enumerate(wanted.values())]
    assert found[1]["status"] == "changed"


def test_bad_photographs_have_a_row_and_end_nothing(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = raw(tiny, tmp_path)
    first, second, *_ = sorted(photographs.glob("*.jpg"))
    first.write_bytes(first.read_bytes()[:800])
    second.write_text("no picture")
    out = tmp_path / "grades.csv"
    assert main(["predict", str(run), str(photographs), "--out", str(out), "--batch-size", "3"]) == 1
    assert "11 photographs graded" in (said := capsys.readouterr().out)
    assert "2 cannot be used" in said
    rows = table(out)
    assert [row["status"] for row in rows] == ["truncated", "text", *["ok"] * 11]
    assert rows[0]["grade"] == rows[0]["p0"] == ""
    assert "text, not a photograph" in rows[1]["reason"]
    link = tmp_path / "link.csv"
    link.symlink_to(out.name)
    nothing = ["predict", str(run), str(first), "--out", str(link), "--overwrite"]
    assert main(nothing) == 1
    assert link.is_symlink()
    assert [row["status"] for row in table(out)] == ["truncated"]
    assert not list(tmp_path.glob(".grades.csv*")), "nothing is left beside"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "gone.jpg"], "gone.jpg: there is no such photograph"),
        (["RUN"], "name photographs"),
        (["RUN", "PHOTOS", "--out", "there.csv"], "there.csv: it is there already"),
        (["RUN", "PHOTOS", "--out", "no/such/folder.csv"], "its folder is not there"),
        (["RUN", "PHOTOS", "--preparation", "maybe"], "--preparation maybe"),
        (["RUN", "PHOTOS", "--explain", "heat", "--window", "multi"], "--explain shows one window"),
        (["nowhere", "PHOTOS"], "there is no run here"),
        (["RUN", "PHOTOS", "--out", "labels.csv", "--overwrite"], "this file is no table of grades"),
        (["MULTI", "PHOTOS", "--explain", "heat"], "--explain shows one window"),
    ],
)
def test_what_a_user_gets_wrong(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    if "--explain" in arguments:
        pytest.importorskip("captum")
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    Path("labels.csv").write_text("path,grade,split,patient\na.jpg,1,train,7\n")
    # A run that was validated by nine windows.
    multi = Path(shutil.copytree(run, "multi", symlinks=True))
    text = (run / "config.yaml").read_text()
    assert "field: full" in text
    (multi / "config.yaml").write_text(text.replace("field: full", "field: multi"))
    known = {"RUN": str(run), "MULTI": str(multi), "PHOTOS": str(tiny / "DR_grading" / "test")}
    assert main(["predict", *(known.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastddr: ")
    assert said in error
    assert error.count("\n") == 1
    assert Path("there.csv").read_text() == "mine"
    assert Path("labels.csv").read_text().startswith("path,grade,split")


def test_a_heat_map_for_each_photograph(run: Path, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    one = next((tiny / "DR_grading" / "test").glob("*.jpg"))
    (tmp_path / "other").mkdir()
    shutil.copy(one, tmp_path / "other" / one.name)
    named = [str(one), str(tmp_path / "other"), "--out", str(tmp_path / "g.csv"), "--explain", str(tmp_path / "heat")]
    assert main(["predict", str(run), *named]) == 0
    assert sorted(path.name for path in (tmp_path / "heat").iterdir()) == [
        f"00001-{one.stem}.heat.png", f"00002-{one.stem}.heat.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "heat" / f"00001-{one.stem}.heat.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    side = (sheet.shape[1] - 4) // 2
    plain, heat = sheet[:side, :side], sheet[:side, side + 4 :]
    assert np.abs(plain - heat).max() > 30, "the one on the right is under its map"


def test_heat_maps_are_of_the_grades_in_the_table(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was averaged for them; and they are made in evaluation mode, some at a time."""
    pytest.importorskip("captum")
    known: dict[str, list[Any]] = {"grades": [], "titles": []}
    heat, overlay = explain.heat, explain.overlay

    def noted(model: nn.Module, layer: Any, image: torch.Tensor, grade: torch.Tensor) -> torch.Tensor:
        assert not any(module.training for module in model.modules())
        assert len(image) <= 3
        known["grades"] += grade.tolist()
        return heat(model, layer, image, grade)

    def titled(photograph: Any, heat_map: Any, title: str) -> Image.Image:
        known["titles"].append(title)
        return overlay(photograph, heat_map, title)

    monkeypatch.setattr(explain, "heat", noted)
    monkeypatch.setattr(explain, "overlay", titled)
    monkeypatch.setattr(explain, "_TOGETHER", 3)
    photographs = raw(tiny, tmp_path)
    asked = ["--out", str(tmp_path / "g.csv"), "--tta", "dihedral", "--explain", str(tmp_path / "heat")]
    assert main(["predict", str(run), str(photographs), *asked, "--batch-size", "8"]) == 0
    rows = table(tmp_path / "g.csv")
    assert known["grades"][: len(rows)] == [int(row["grade"]) for row in rows]
    assert known["titles"] == [
        f"{row['grade']} {row['name']}, probability {float(row['confidence']):.2f}; right: what speaks for it"
        for row in rows
    ]


def test_without_captum_it_is_one_sentence(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastddr.evaluation.explain.find_spec", lambda name: None)
    out = str(tmp_path / "g.csv")
    assert main(["predict", str(run), str(tiny), "--out", out, "--explain", str(tmp_path / "heat")]) == 2
    assert "captum is not installed" in capsys.readouterr().err
    assert not Path(out).exists()
