"""No figure is typed: texts and pictures are those of the results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tests_support import ROOT

from fastddr.errors import UserError

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The texts and the results in a folder of their own."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "fastddr" / "presets", tmp_path / "fastddr" / "presets")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_has_its_form(path: Path) -> None:
    record = json.loads(path.read_text())
    assert {"benchmark", "machine", "versions", "date", "command", "rows"} <= set(record)
    assert path.stem.startswith(record["benchmark"])
    assert path.stem.endswith(datetime.fromisoformat(record["date"]).strftime("_%Y-%m-%d"))
    assert {"cpu", "cores", "memory_gib", "system", "gpu"} <= set(record["machine"])
    assert {"python", "torch", "fastddr"} <= set(record["versions"])
    assert record["command"].startswith(f"python benchmarks/{record['benchmark']}.py")
    assert "/" not in record["command"].removeprefix("python benchmarks/"), "a place of the machine"
    assert record["rows"]
    for row in record["rows"]:
        if "failed" in row:
            assert row["name"]
            assert isinstance(row["failed"], str)
            continue
        assert {"name", "median", "low", "high", "unit", "n"} <= set(row), row
        assert row["low"] <= row["median"] <= row["high"], row
        # Whole runs, counts of faults, a batch that was searched for, what was worked out or predicted: no medians.
        kind, whole = row.get("kind", ""), ("quickstart", "faults", "report", "ablation")
        single = record["benchmark"] in whole or kind in ("largest", "predicted") or kind.startswith("paper")
        assert row["n"] >= (1 if single else 5), row


def test_the_newest_of_each_name_and_machine(load: Callable[[str], Any], tmp_path: Path) -> None:
    def write(name: str, gpu: str | None, date: str, kind: str = "dali", **more: Any) -> None:
        machine = {"cpu": "some", "cores": 2, "gpu": gpu}
        hardware = "2-core-cpu" if gpu is None else "-".join(gpu.lower().split())
        rows = [{"name": "a", "kind": kind, **({"failed": "why"} if kind == "failed" else {"median": 1.0})}]
        record = {"benchmark": name.partition("-")[0], "machine": machine, "versions": {}, "command": "", "rows": rows}
        (tmp_path / f"{name}_{hardware}_{date}.json").write_text(
            json.dumps(record | {"date": f"{date}T00:00:00+00:00"} | more)
        )

    for date in ("2026-11-09", "2026-11-10", "2025-12-30"):
        write("loader", None, date)
    write("loader-real", None, "2026-01-01")
    write("loader", "NVIDIA X", "2024-01-01")
    # What measured nothing, or was stopped, takes no place.
    write("loader", None, "2026-11-11", "failed")
    write("loader", None, "2026-11-12", "limit")
    write("loader", None, "2026-11-13", complete=False)
    write("loader-real", None, "2026-01-01", complete=True)
    write("step", None, "2026-01-01", "ceiling")
    found = load("stored").newest(tmp_path)
    assert [(result.name, result.hardware, result.record["date"][:10]) for result in found] == [
        ("loader", "NVIDIA X", "2024-01-01"),
        ("loader", "2-core CPU", "2026-11-10"),
        ("loader-real", "2-core CPU", "2026-01-01"),
    ]


def test_what_is_no_result_is_refused(load: Callable[[str], Any], tmp_path: Path) -> None:
    stored = load("stored")
    for text, said in (("{", "no JSON"), ('{"rows": []}', "lacks benchmark, machine")):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(UserError, match=said):
            stored.read(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot be read"):
        stored.read(tmp_path / "none.json")


# --------------------------------------------------------------------------------------------------------------- texts


def test_every_generated_text_is_up_to_date(load: Callable[[str], Any]) -> None:
    tables, results = load("tables"), load("stored").newest()
    seen = []
    for path in tables.files():
        for name, old, wanted in tables.rendered(path, path.read_text(), results):
            assert old == wanted, f"{path.relative_to(ROOT)}, {name}: run `python benchmarks/tables.py`"
            seen.append(f"{path.name} {name}")
    assert {"README.md quickstart", "README.md loader", "README.md train", "quickstart.yaml quickstart-header"} <= {
        *seen
    }


def test_a_changed_figure_is_noticed_and_written(load: Callable[[str], Any], copy: Path) -> None:
    tables = load("tables")
    check, write = tables.Options(check=True), tables.Options()
    tables.main(check, copy)
    path = next((copy / "benchmarks" / "results").glob("quickstart_2-core-cpu_*.json"))
    record = json.loads(path.read_text())
    row = next(row for row in record["rows"] if row["name"] == "whole command")
    row |= {"median": 1234.5, "low": 1230.0, "high": 1240.0, "n": 3, "seeds": [0, 1, 2]}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"^README\.md: the generated text 'quickstart' is out of date"):
        tables.main(check, copy)
    tables.main(write, copy)
    assert "it takes 1,234 s (1,230-1,240) after installation" in (copy / "README.md").read_text()
    assert "# Time:   1,234 s (1,230-1,240) on 2 CPU cores" in (copy / "fastddr/presets/quickstart.yaml").read_text()
    tables.main(check, copy)


def test_a_changed_text_is_noticed(load: Callable[[str], Any], copy: Path) -> None:
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("after installation and", "and"))
    with pytest.raises(UserError, match="'quickstart' is out of date"):
        load("tables").main(load("tables").Options(check=True), copy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- begin generated: quickstart -->\ntext\n", "a mark of a generated text without its other one"),
        ("text\n<!-- end generated -->\n", "a mark of a generated text without its other one"),
        ("<!-- begin generated: quickstar -->\n<!-- end generated -->\n", "did you mean 'quickstart'"),
    ],
)
def test_a_wrong_mark_is_refused(load: Callable[[str], Any], tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(load("tables").rendered(tmp_path / "x.md", text, []))


def training() -> dict[str, Any]:
    """A result of whole training, invented."""
    about = {"photographs": "synthetic", "precision": "fp32", "image_size": 224, "batch_size": 32}

    def row(name: str, kind: str, median: float, unit: str = "images/s") -> dict[str, Any]:
        figures = {"median": median, "low": 0.9 * median, "high": 1.1 * median, "unit": unit, "n": 5}
        return {"name": name, "kind": kind, **about, "model": "ConvMixer", **figures}

    rows = [
        row("fastddr", "fastddr", 118.0),
        row("report", "peer", 75.0),
        {"name": "timm", "kind": "peer", **about, "model": "ConvMixer", "failed": "no memory"},
        row("fastddr / report", "ratio", 1.5733, "×"),
        row("fastddr", "fastddr", 3000.0) | {"model": "CNN"},
    ]
    machine = {"cpu": "AMD EPYC", "cores": 2, "gpu": None, "memory_gib": 8.0, "system": "Linux"}
    busy = {"before": None, "after": {"disturbed": True}}
    return {
        "benchmark": "train", "machine": machine, "versions": {"torch": "2.11.0"}, "date": "2026-12-01T00:00:00+00:00",
        "command": "python benchmarks/train.py --out x.json --wandb", "conditions": busy, "rows": rows,
    }  # fmt: skip


@pytest.fixture
def trained(load: Callable[[str], Any], tmp_path: Path) -> Any:
    """That result, read."""
    path = tmp_path / "benchmarks" / "results" / "train_2-core-cpu_2026-12-01.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(training()))
    return load("stored").read(path)


def test_a_count_has_no_interval(load: Callable[[str], Any]) -> None:
    row = {"median": 0, "low": 0, "high": 0, "n": 20}
    assert load("wording").figure(row | {"unit": "of 20"}) == "0"
    assert load("wording").figure(row | {"unit": "of linear"}) == "0.00 (0.00-0.00)"


def test_what_failed_or_was_missed_is_said(load: Callable[[str], Any], trained: Any, tmp_path: Path) -> None:
    """What the stored results, whose texts are compared above, lack."""
    kappas, blocks = load("kappas"), load("blocks").BLOCKS
    about, table, source, unmeasured = blocks["train"]([trained], str)
    assert "Adam, float32), in the default layout (NCHW) alone. `times" in about
    assert table.splitlines()[2:] == [
        "| ConvMixer | 118 (106-130) | | 1.57 (1.42-1.73) | |", "| CNN | 3,000 (2,700-3,300) | | | |",
    ]  # fmt: skip
    assert source.endswith("to be measured again.")
    assert unmeasured == "**GPU.** Not measured yet: `python benchmarks/train.py`."
    failed = "Without a figure: timm (synthetic, ConvMixer, fp32 precision, 224 px, batches of 32): no memory."
    assert failed in "\n".join(blocks["train-all"]([trained], str))
    case = {"precision": "auto", "image_size": 64, "batch_size": 4, "epochs_at_most": 2}
    fast, slow = kappas.Curve([1.0, 2.0], [0.5, 0.75]), kappas.Curve([4.0, 9.0], [0.5, 0.6])
    rows = kappas.rows({"fastddr": [fast] * 5, "report": [slow] * 5}, case | {"model": "M"}, (0.5, 0.7), range(5))
    rows.append({"name": "timm", "kind": "qwk", **case, "model": "N", "recipe": "timm", "failed": "it is not there"})
    path = tmp_path / "train-kappa_2-core-cpu_2026-11-24.json"
    path.write_text(json.dumps(training() | {"rows": rows}))
    result = load("stored").read(path)
    _, table, *_ = blocks["train-kappa"]([result], str)
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]] == [
        ["M, fastddr", "1.00 (1.00-1.00)", "1", "1", "2.0 (2.0-2.0)", "2", "1"],
        ["M, report", "4.0 (4.0-4.0)", "1", "4.0 (4.0-4.0)", "0 of 5 seeds", "-", "-"],
        ["N, timm", *["-"] * 6],
    ]
    *_, came, missed, _ = blocks["train"]([trained, result], str)
    assert came.startswith("Until the quadratic-weighted kappa on valid comes to 0.5, "), "not all came to 0.7"
    assert missed.startswith("Not all came to a kappa that was asked for, of N, auto precision")
    path.write_text(json.dumps(training() | {"rows": rows[-1:]}))
    [none] = blocks["train-kappa"]([load("stored").read(path)], str)
    assert "No loop could run" in none


def test_what_is_not_measured_is_said(load: Callable[[str], Any], trained: Any) -> None:
    for name, block in load("blocks").BLOCKS.items():
        said = block([], lambda path: path.name)
        assert len(said) == 1, name
        assert "ot measured yet: " in said[0], name
    assert load("blocks").BLOCKS["step"]([trained], lambda path: path.name) == [
        "**2-core CPU.** Not measured yet: `python benchmarks/step.py`.",
        "**GPU.** Not measured yet: `python benchmarks/step.py`.",
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (12345.6, "12,346"),
        (53.1, "53"),
        (9.96, "10"),
        (2.196, "2.2"),
        (0.844, "0.84"),
        (0.0341, "0.034"),
        (0.0, "0.00"),
    ],
)
def test_figures_keep_the_digits_that_count(load: Callable[[str], Any], value: float, said: str) -> None:
    assert load("wording").number(value) == said


# ------------------------------------------------------------------------------------------------------------ pictures


def test_every_picture_is_up_to_date(load: Callable[[str], Any]) -> None:
    plots = load("plots")
    for result, path in load("plot").pictures(load("stored").newest()):
        assert plots.digest_of(path) == result.digest, f"{path.relative_to(ROOT)}: run `python benchmarks/plot.py`"


def test_pictures_are_drawn_from_the_file(load: Callable[[str], Any], trained: Any, tmp_path: Path) -> None:
    plot, plots = load("plot"), load("plots")
    step = {"kind": "step", "model": "timm:convmixer", "name": "timm:convmixer, eager, NCHW", "precision": "fp32",
            "image_size": 64, "batch_size": 4, "median": 5.0, "low": 4.0, "high": 6.0, "n": 5,
            "unit": "images/s"}  # fmt: skip
    other = step | {"model": "convmixer", "name": "convmixer, eager, NCHW"}
    record = training() | {"benchmark": "step", "rows": [step, other]}
    (tmp_path / "step.json").write_text(json.dumps(record))
    kappas = load("kappas")
    curves = {"fastddr": [kappas.Curve([1.0, 2.0], [0.5, 0.75])] * 5}
    case = {"model": "M", "precision": "auto", "image_size": 64, "batch_size": 4}
    rows = kappas.rows(curves, case, (0.5, 0.7), range(5))
    (tmp_path / "kappa.json").write_text(json.dumps(training() | {"rows": rows}))
    drawn = (trained.path, tmp_path / "step.json", tmp_path / "kappa.json")
    plot.main(plot.Options(results=drawn))
    for result in map(load("stored").read, drawn):
        picture = result.path.with_suffix(".png")
        assert picture.stat().st_size > 10_000
        assert plots.digest_of(picture) == result.digest
    assert plots.digest_of(tmp_path / "none.png") is None
    (tmp_path / "data.json").write_text(json.dumps(record | {"benchmark": "data"}))
    with pytest.raises(UserError, match="there is no picture of data"):
        plot.main(plot.Options(results=(tmp_path / "data.json",)))
