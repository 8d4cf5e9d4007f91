"""`fastddr export`: a file that gives the run's own answers, or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests_support import report, train

from fastddr.__main__ import main
from fastddr.data import manifest
from fastddr.errors import UserError
from fastddr.inference import card, export, formats, restore
from fastddr.runs import RunFolder

QUICK = ("--epochs", "1", "--lr", "0.01")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("runs") / "run", *QUICK)


@pytest.fixture(scope="module")
def regression(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("runs") / "regression", *QUICK, "--loss.name", "mse",
                 "--evaluation.tta", "flips", "--evaluation.no-test")  # fmt: skip


def needs(format: str) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def takes_any_batch_and_canvas(file: Path, fingerprint: str) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(put.name, put.type) for put in session.get_inputs()] == [("canvas", "tensor(uint8)")]
    canvas = np.random.default_rng(0).integers(0, 256, (5, 90, 131, 3), dtype=np.uint8)
    [whole] = session.run(["probabilities"], {"canvas": canvas})
    assert whole.shape == (5, 5)
    assert whole.sum(1) == pytest.approx(1, abs=1e-5)
    [window] = session.run(None, {"canvas": np.ascontiguousarray(canvas[2:3, 13:77, 33:97])})
    np.testing.assert_allclose(window[0], whole[2], atol=1e-6, err_msg="the middle 64 px are what is graded")
    stored = session.get_modelmeta().custom_metadata_map["fastddr"]
    assert json.loads(stored)["fingerprint"] == fingerprint


@pytest.mark.parametrize(
    ("format", "window"), [("safetensors", "full"), ("torch-export", "center"), ("onnx", "full"), ("onnx", "multi")]
)
def test_a_file_gives_the_runs_answers(run: Path, tiny: Path, tmp_path: Path, format: str, window: str) -> None:
    needs(format)
    out = tmp_path / "out"
    tmp_path.chmod(0o2755)
    assert main(["export", str(run), "--format", format, "--out", str(out), "--window", window]) == 0
    # Elsewhere a folder has the group of the one above without the bit.
    assert sys.platform == "darwin" or out.stat().st_mode & stat.S_ISGID, "a folder passes its group on"
    about = json.loads((out / "export.json").read_text())
    file = out / formats.FILES[format]  # type: ignore[index]
    assert sorted(path.name for path in out.iterdir()) == sorted(["export.json", "model_card.md", file.name])
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside"
    assert 0 <= about["difference"] <= 1e-6 < about["allowed"]
    assert about["photographs"] == 11
    assert about["prepared"] is None
    assert str(run.parent) not in (out / "export.json").read_text(), "no place of this machine"
    card = (out / "model_card.md").read_text()
    assert "Research use only; not a medical device." in card
    figures = report(run)["test"]
    low, high = figures["ci"]["accuracy"]
    assert f"{100 * figures['accuracy']:.1f} % ({100 * low:.1f}–{100 * high:.1f})" in card
    assert "| train | 9 | 4 | 7 | 3 | 4 | 1 |" in card
    assert ("which graded by the window `full`" in card) == (window != "full")
    if (format, window) == ("onnx", "full"):
        takes_any_batch_and_canvas(out / "model.onnx", manifest.read(tiny).fingerprint)


@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_a_regression_is_exported_with_its_thresholds(regression: Path, tmp_path: Path, format: str) -> None:
    """What is kept has passed the check against the run's own grades; the weights alone go back into a model."""
    needs(format)
    out = tmp_path / "out"
    assert main(["export", str(regression), "--format", format, "--out", str(out)]) == 0
    about = json.loads((out / "export.json").read_text())
    state = json.loads((regression / "checkpoints" / "best" / "state.json").read_text())
    assert about["grading"] == state["progress"]["grading"]
    if format == "safetensors":
        best = load_file(regression / "checkpoints" / "best" / "model.safetensors")
        assert load_file(out / "model.safetensors").keys() == best.keys()
        card = (out / "model_card.md").read_text()
        assert "one value" in card
        figures = report(regression)
        assert set(figures) == {"train", "valid", "valid_last"}
        assert f"{figures['valid']['qwk']:.3f} (" in card
        assert "flips averaged views, and this file sees one" in card
        assert "thresholds between the grades were fitted on valid" in card
        assert "thresholds between the grades were fitted on valid" in (regression / "report" / "report.md").read_text()
        assert not (regression / "test_scorings.jsonl").exists(), "test is left alone"


def test_the_card_has_the_figures_of_the_last_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "safetensors", "--weights", "last", "--out", str(out)]) == 0
    assert "|  | valid (last weights) |" in (out / "model_card.md").read_text()
    weights = json.loads((out / "export.json").read_text())["weights"]
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    restored = restore.Restored(RunFolder(copy), restore.stored(run), torch.nn.Identity(), weights, fingerprint="")
    figures = report(copy)
    assert figures["valid_last"]["weights"] == weights
    lost = f"{weights}, for the best ones are lost"  # as `saving.best` names them
    for told, views in ((f"{weights}, flips averaged", True), (lost, False), (f"{lost}, flips averaged", True)):
        figures["valid_last"]["weights"] = told
        (copy / "report" / "metrics.json").write_text(json.dumps(figures))
        known = card.read(restored)
        assert list(known.figures) == ["valid_last"]
        said = "; the run took each photograph's flips averaged views, and this file sees one"
        assert card._averaged(known.figures) == (said if views else "")
    # What is torn is told before the export, which is long.
    for text in ("[]", '{"valid": []}', '{"valid": {"weights": 1}}', json.dumps({"valid": {"weights": weights}}), "{"):
        (copy / "report" / "metrics.json").write_text(text)
        with pytest.raises(UserError, match=r"metrics\.json: these are no figures of a report"):
            card.read(restored)
    (copy / "report" / "metrics.json").unlink()
    listed = (copy / "manifest.csv").read_text()
    for text in (listed[:-30], listed.replace("split", "part"), listed.replace("train,", "train,x")):
        (copy / "manifest.csv").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.csv: this is no list of a run's photographs"):
            card.read(restored)
    (copy / "manifest.csv").unlink()
    assert card.read(restored).data == ["The run has no manifest.csv, so its photographs are not known."]

    def away(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "is_file", away)
    with pytest.raises(UserError, match=r"manifest\.csv: this is no list of a run's photographs"):
        card.read(restored)


def test_photographs_that_are_not_the_runs_any_more_are_not_called_so(run: Path, tiny: Path, tmp_path: Path) -> None:
    """They lie where its own did."""
    data, copy = tmp_path / "data", Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    shutil.copytree(tiny, data)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(tiny), str(data)))
    one = next((data / "DR_grading" / "train").iterdir())
    for changed in (False, True):
        if changed:
            one.write_bytes(one.read_bytes() + b"0")
        asked = ["--format", "safetensors", "--out", str(tmp_path / f"out-{changed}"), "--count", "2"]
        assert main(["export", str(copy), *asked]) == 0
        card = (tmp_path / f"out-{changed}" / "model_card.md").read_text()
        assert ("(of the valid split of its data)" in card) != changed
        assert ("data folder now, and is not what it was trained on)" in card) == changed


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_other_models_as_onnx(tiny: Path, tmp_path: Path, model: str) -> None:
    needs("onnx")
    run = train(tiny, tmp_path / model, *QUICK, "--model", model)
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--photographs", str(tiny), "--count", "5"]) == 0
    assert json.loads((out / "export.json").read_text())["photographs"] == 5


def test_a_file_with_other_answers_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = formats.write

    def spoilt(format, deployed, file, about) -> None:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            deployed.model.head.bias[0] += 0.01
        write(format, deployed, file, about)
        with torch.no_grad():
            deployed.model.head.bias[0] -= 0.01

    monkeypatch.setattr(formats, "write", spoilt)
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 2
    assert "so it is not kept" in capsys.readouterr().err
    asked = ["export", str(run), "--out", str(out)]
    monkeypatch.setattr(formats, "write", write)
    monkeypatch.setattr(formats, "find_spec", lambda name: name)
    monkeypatch.setattr(formats, "_LARGEST", 2**10)
    assert main(asked) == 2
    assert "GiB, and one file holds 0.00 GiB); take another --format." in capsys.readouterr().err
    if find_spec("onnxruntime") is not None:
        monkeypatch.setattr(formats, "write", lambda format, deployed, file, about: file.write_bytes(b"junk"))
        assert main(asked) == 2
        assert "--format onnx: onnxruntime does not run the file" in capsys.readouterr().err

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats, "write", full)
    assert main([*asked, "--format", "safetensors"]) == 2
    assert f"fastddr: {out}: No space left on device; make room" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main([*asked, "--format", "safetensors"]) == 2
    assert "--mixed_precision bf16: an export is checked in float32" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_how_photographs_were_prepared_may_be_forgotten(run: Path, tiny: Path, tmp_path: Path) -> None:
    """A run without its manifest.csv is exported all the same; the card says what nobody knows."""
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    text = (copy / "manifest.csv").read_text()
    told = '# prepared: {"prepare": 2, "size": 96, "format": "png"}'
    (copy / "manifest.csv").write_text(text.replace("# prepared: null", told))
    flags = ["--format", "safetensors", "--photographs", str(tiny), "--count", "2", "--out"]
    assert main(["export", str(copy), *flags, str(tmp_path / "known")]) == 0
    about = json.loads((tmp_path / "known" / "export.json").read_text())
    assert about["prepared"] == {"size": 96, "format": "png", "version": 2}
    (copy / "manifest.csv").unlink()
    assert main(["export", str(copy), *flags, str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["prepared"] == "unknown"
    assert "prepared as the run's were, which is not known any more" in (tmp_path / "out/model_card.md").read_text()


def test_an_earlier_export_is_replaced_only_when_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["export", str(run), "--format", "safetensors", "--out", str(out)]
    assert main(asked) == 0
    assert main(asked) == 2
    assert "it is there already" in capsys.readouterr().err
    (out / "export.json").write_text("{}")
    link = tmp_path / "link"
    link.symlink_to("out")
    assert main([*asked[:-1], str(link), "--overwrite"]) == 0
    assert json.loads((out / "export.json").read_text())["format"] == "safetensors"
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, out]
    (out / "serve.py").write_text("mine")
    assert main([*asked, "--overwrite"]) == 2
    assert "serve.py is no file of an export; move it, or give another folder" in capsys.readouterr().err
    assert (out / "serve.py").read_text() == "mine"
    (out / "serve.py").unlink()
    (out / "export.json").unlink()
    assert main([*asked, "--overwrite"]) == 2, "a folder that is no export stays"


def test_what_came_to_lie_at_out_meanwhile_stays(tmp_path: Path) -> None:
    """While the model was written and checked."""
    out, part = tmp_path / "out", tmp_path / ".out.x"
    part.mkdir()
    (part / "export.json").write_text("new")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="it is there and no export; give another folder"):
            export._keep(part, out, overwrite)
    (out / "notes.txt").rename(out / "export.json")
    with pytest.raises(UserError, match="it is there already"):
        export._keep(part, out, False)
    assert (out / "export.json").read_text() == "mine"
    export._keep(part, out, True)
    assert (out / "export.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no run here"),
        (["RUN", "--format", "onnx"], "onnxruntime is not installed"),
        (["RUN", "--format", "safetensors", "--photographs", "gone"], "there is no such photograph"),
        (["RUN", "--format", "safetensors", "--count", "-1"], "give a number of photographs, or 0 for all"),
    ],
)
def test_what_a_user_gets_wrong(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else name)
    assert main(["export", *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastddr: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (run / "exports" / "onnx").exists()
