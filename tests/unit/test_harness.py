"""What every benchmark does beside measuring: conditions of the machine, the JSON, and the W&B run of `--wandb`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trackers import forget_wandb

from fastddr.data import cache
from fastddr.errors import UserError

ROWS = [
    {"name": "dali", "kind": "fastddr", "photographs": "synthetic", "policy": policy, "batch_size": 8, "ram_gib": 0.5,
     "seeds": [0, 1], "median": 100.0, "low": 90.0, "high": 120.0, "n": 5, "unit": "images/s"}
    for policy in ("report", "fundus")
]  # fmt: skip
ROWS.append({"name": "dali / timm", "kind": "ratio", "median": 2.5, "low": 2.0, "high": 3.0, "n": 5, "unit": "×"})
ROWS.append({"name": "timm", "kind": "peer", "failed": "out of memory"})


@pytest.fixture
def harness(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Before any benchmark began, on a machine without a card, whose cores nobody else takes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(load("harness"), "_before", None)
    taking(monkeypatch, load("conditions"), 0.0)
    return load("harness")


def taking(monkeypatch: pytest.MonkeyPatch, conditions: Any, share: float) -> None:
    """Other processes take that share of this process's cores, and this process a tenth; no time passes but asleep."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.1 * now[0], sleep=sleep)
    monkeypatch.setattr(conditions, "time", clock)
    busy = share * conditions.available_cores() + 0.1
    monkeypatch.setattr(conditions, "busy_seconds", lambda: busy * now[0])


def test_conditions_are_stored_before_and_after(
    harness: Any, load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    conditions = load("conditions")
    taking(monkeypatch, conditions, 0.5)
    began = harness.begin()
    assert began["others_cpu_share"] == 0.5
    assert (began["disturbed"], began["gpus"]) == (True, None)
    taking(monkeypatch, conditions, 0.02)
    record = json.loads(write(harness, ROWS, tmp_path / "r.json").read_text())
    said = capsys.readouterr().out
    assert said.count("\n") == 2, "and where the result lies"
    wanted = "the machine is busy (other processes take 50 % of the cores): measure again on an idle one."
    assert f"Before the measurement {wanted}" in said
    assert record["conditions"]["before"] == began
    assert record["conditions"]["after"]["disturbed"] is False
    assert record["conditions"]["after"]["load_average"] >= 0
    assert record["rows"] == ROWS


def test_a_result_is_written_without_begin(harness: Any, tmp_path: Path) -> None:
    record = json.loads(write(harness, ROWS, tmp_path / "r.json").read_text())
    assert record["conditions"]["before"] is None
    assert {"benchmark", "machine", "versions", "date", "command", "rows"} <= set(record)


def write(harness: Any, rows: list[dict[str, Any]], out: Path, *, complete: bool = True, **more: Any) -> Path:
    """Where the result lies of a benchmark that ended with these rows, or was stopped."""
    with suppress(KeyboardInterrupt), harness.writing(more.pop("benchmark", "some"), rows, out, **more) as written:
        if not complete:
            raise KeyboardInterrupt
    path: Path = written.path
    return path


CARD = "GPU-11111111-2222-3333-4444-555555555555"
SMI = """#!/bin/sh
case "$1" in
*compute-apps*) cat {apps} ;;
*) [ "$3" = -i ] || [ "$2" = -i ] || exit 9; echo "1980, 1980, 2619, 2619, 41, 70.25, [N/A], {use}, 1024" ;;
esac
"""


@pytest.fixture
def card(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The conditions with a card, on which processes (id, memory) run, as an invented nvidia-smi tells them."""
    conditions = load("conditions")
    monkeypatch.setattr(conditions, "_others_cpu_share", lambda: 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=CARD.removeprefix("GPU-"))
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def take(processes: list[tuple[int, str]], use: str = "0", initialised: bool = False, before: bool = True) -> Any:
        apps = tmp_path / "apps"
        others = "GPU-99999999-2222-3333-4444-555555555555, 1, 5\n"
        apps.write_text(others + "".join(f"{CARD}, {number}, {memory}\n" for number, memory in processes))
        script = tmp_path / "nvidia-smi"
        script.write_text(SMI.format(apps=apps, use=use))
        script.chmod(0o755)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
        return conditions.take(before=before)

    return take


def test_a_card_s_clocks_and_processes(card: Callable[..., Any]) -> None:
    quiet = card([(os.getpid(), "400")])
    assert quiet["disturbed"] is False
    assert quiet["gpus"] == [
        {"index": 0, "sm_clock_mhz": 1980, "max_sm_clock_mhz": 1980, "memory_clock_mhz": 2619,
         "max_memory_clock_mhz": 2619, "temperature_c": 41, "power_w": 70.25, "power_limit_w": None,
         "utilisation_percent": 0, "memory_used_mib": 1024, "other_processes_mib": []}
    ]  # fmt: skip
    busy = card([(os.getpid(), "400"), (1, "2048"), (os.getppid(), "[N/A]")])
    assert busy["gpus"][0]["other_processes_mib"] == [2048, None]
    assert busy["why"] == ["2 other processes on GPU 0"]


def test_a_child_is_no_other_process(card: Callable[..., Any]) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as child:
        try:
            assert card([(child.pid, "400")])["gpus"][0]["other_processes_mib"] == []
        finally:
            child.communicate("\n")


def test_a_busy_card_disturbs_only_before(card: Callable[..., Any]) -> None:
    assert card([], use="87")["why"] == ["GPU 0 is 87 % busy"]
    assert card([], use="87", before=False)["disturbed"] is False, "that was the benchmark itself"


def test_a_container_s_ids_are_not_guessed(card: Callable[..., Any]) -> None:
    beyond = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1 if Path("/proc").exists() else 10**9
    hidden = card([(beyond, "400")], initialised=True)
    assert hidden["gpus"][0]["other_processes_mib"].startswith("unknown: ")
    assert hidden["disturbed"] is False
    assert card([(beyond, "400")], initialised=False)["disturbed"] is True, "this process has no work there yet"


def test_without_nvidia_smi_it_is_unknown(card: Callable[..., Any], tmp_path: Path) -> None:
    card([])
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 12\n")
    conditions = sys.modules["conditions"]
    assert conditions.take(before=True)["gpus"] == "unknown: NVIDIA-SMI has failed"
    os.environ["PATH"] = str(tmp_path / "nothing")
    assert conditions.take(before=True)["gpus"] == "unknown: there is no nvidia-smi"


def written(harness: Any, out: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    """Where a result of one row goes, of a benchmark that was started so."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/train.py", *argv])
    place: Path = write(harness, ROWS[:1], out, benchmark="train", **more)
    return place


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--data=/data/masters/", "--data=masters"),
        ("--flags=--data /data/masters --lr=0.1", "'--flags=--data masters --lr=0.1'"),
        ("wide: --init /m/best.pth --lr 0.001", "'wide: --init best.pth --lr 0.001'"),
        ("run:~/runs/a", "run:a"),
        ("/home/John Doe/masters", "masters"),
        ("--data=/mnt/My Photos/DDR", "--data=DDR"),
        ("--data /data/masters --epochs 20", "'--data masters --epochs 20'"),
    ],
)
def test_of_a_command_nothing_but_places_is_left_out(
    given: str, kept: str, harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = written(harness, tmp_path / "r.json", [given], monkeypatch)
    assert json.loads(out.read_text())["command"] == f"python benchmarks/train.py {kept}"


def test_what_is_not_complete_takes_the_place_of_nothing_and_is_gone_once_it_is(
    harness: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, beside = (tmp_path / f"train{word}_2-core-cpu_2026-12-01.json" for word in ("", "-incomplete"))
    command = ["--rounds", "5"]
    assert written(harness, out, command, monkeypatch, complete=False) == beside
    assert load("stored").read(beside).name == "train", "so that the suite compares what there is"
    assert written(harness, out, command, monkeypatch) == out
    assert not beside.exists()
    whole = out.read_text()
    assert written(harness, out, command, monkeypatch, complete=False) == beside
    failed = write(harness, [ROWS[3]], out, benchmark="train", failures=True)
    assert (failed, out.read_text()) == (beside, whole), "what has no figure is not published either"
    assert [result.path for result in load("stored").newest(tmp_path)] == [out]
    assert written(harness, tmp_path / "r.json", command, monkeypatch, complete=False).name == "r-incomplete.json"


def test_a_result_that_goes_on_is_complete_at_its_end_alone(harness: Any, tmp_path: Path) -> None:
    out, rows = tmp_path / "r.json", [ROWS[0]]
    with harness.writing("train", rows, out) as going:
        going.save()
        assert going.path.name == "r-incomplete.json"
        rows.append(ROWS[1])
    assert (going.path, len(json.loads(out.read_text())["rows"])) == (out, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(RuntimeError), harness.writing("train", rows[:1], out) as going:
        raise RuntimeError
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert not json.loads(going.path.read_text())["complete"]


def test_where_nothing_was_measured_no_result_is_written(
    harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, said = tmp_path / "r.json", f"Nothing was measured, so no result is written to {tmp_path / 'r.json'}."
    with pytest.raises(UserError, match=re.escape(said)), harness.writing("train", ROWS[3:], out) as going:
        going.save()
    # What broke is what is told first.
    with pytest.raises(RuntimeError, match="it broke"), harness.writing("train", [], out):
        raise RuntimeError("it broke")
    assert said in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_what_the_time_cut_short_is_not_complete(harness: Any, tmp_path: Path) -> None:
    late = {"name": "timm", "kind": "peer", "failed": harness.TIME_UP}
    for rows, complete in (([*ROWS], True), ([*ROWS, late], False)):
        out = tmp_path / f"{complete}.json"
        with harness.writing("train", rows, out) as going:
            pass
        assert json.loads(going.path.read_text())["complete"] is complete


def test_whole_rounds(harness: Any) -> None:
    assert harness.whole_rounds({"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 2.0, 3.0]}) == {
        "a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]
    }  # fmt: skip
    assert harness.whole_rounds({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0]}) == {}
    assert harness.whole_rounds({}) == {}


def test_versions_are_those_that_are_imported(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package that is there twice the first on the path."""
    there = [SimpleNamespace(metadata={"Name": "torch"}, version=version) for version in ("2.11", "2.4")]
    monkeypatch.setattr(harness.importlib.metadata, "distributions", lambda: there)
    assert harness.versions()["torch"] == "2.11"


# ----------------------------------------------------------------------------------------------------- Weights & Biases


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No login, no network, no home, and a working directory of its own."""
    forget_wandb(monkeypatch, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_figures_have_names_that_last(load: Callable[[str], Any]) -> None:
    names = load("tracked").figures([*ROWS, ROWS[0]])
    assert names["fastddr/synthetic, report, batch size 8/dali"] == 100
    assert names["fastddr/synthetic, fundus, batch size 8/dali/low"] == 90
    assert names["fastddr/synthetic, report, batch size 8/dali/ram_gib"] == 0.5
    assert names["fastddr/synthetic, report, batch size 8/dali #2"] == 100
    assert names["ratio/dali over timm"] == 2.5
    assert names["peer/timm/failed"] == "out of memory"


def test_an_offline_run_is_read_back(
    harness: Any, offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    asked: dict[str, Any] = {}
    init = wandb.init

    def begin(**options: Any) -> Any:
        asked.update(options)
        return init(**options)

    monkeypatch.setattr(wandb, "init", begin)
    out = write(harness, ROWS, offline / "some_2-core-cpu_2026-11-24.json", wandb=True)
    wandb.teardown()
    assert (asked["project"], asked["job_type"], asked["group"], asked["name"]) == (
        "fastddr", "benchmark", "some", out.stem
    )  # fmt: skip
    [run] = (offline / "runs" / "benchmarks" / out.stem / "wandb").glob("offline-run-*")
    place = run.relative_to(offline)
    assert f"W&B: offline (not logged in); upload later with: wandb sync {place}\n" in capsys.readouterr().out
    [file] = run.glob("*.wandb")
    program = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(file)]
    read = json.loads(subprocess.run(program, capture_output=True, text=True, timeout=60, check=True).stdout)
    record = json.loads(out.read_text())
    assert (read["project"], read["name"], read["state"]) == ("fastddr", out.stem, "finished")
    assert read["summary"]["fastddr/synthetic, report, batch size 8/dali/high"] == 120
    assert read["summary"]["ratio/dali over timm"] == 2.5
    for key in ("machine", "versions", "command", "conditions"):
        assert read["config"][key] == record[key], key
    assert (run / "files" / out.name).read_bytes() == out.read_bytes()
    assert out.name.encode() in file.read_bytes(), "or an upload would leave it behind"
    [table] = (run / "files" / "media" / "table").glob("rows*.json")
    rows = json.loads(table.read_text())
    assert dict(zip(rows["columns"], rows["data"][0], strict=True))["seeds"] == "[0, 1]"
    assert "WANDB_DATA_DIR" not in os.environ


@pytest.mark.parametrize("how", ["disabled", "not installed", "broken"])
def test_without_wandb_the_json_is_there(
    harness: Any, offline: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no service\nat all")

    if how == "disabled":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    elif how == "not installed":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr("wandb.init", broken)
    out = write(harness, ROWS, offline / "r.json", wandb=True)
    assert json.loads(out.read_text())["rows"] == ROWS
    said = capsys.readouterr().out.strip().splitlines()
    assert said.pop() == f"written to {out}"
    assert len(said) == 1, said
    why = {"disabled": " by WANDB_MODE", "not installed": "import of wandb halted", "broken": ": no service"}[how]
    assert said[0].startswith("W&B is off")
    assert why in said[0]
    assert "r.json" in said[0]


@pytest.mark.parametrize(("n", "held"), [(3, 0.75), (5, 0.94), (7, 0.87)])
def test_how_often_an_interval_of_few_rounds_holds_the_truth(n: int, held: float, harness: Any) -> None:
    """What docs/benchmarks.md says of it."""
    rng = np.random.default_rng(0)
    intervals = [harness.spread(rng.normal(size=n)) for _ in range(300)]
    inside = np.mean([found["low"] <= 0 <= found["high"] for found in intervals])
    assert inside == pytest.approx(held, abs=0.05)


def test_prepare_is_measured_as_if_for_the_first_time_in_every_round(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache knows of a photograph is not decoded strictly again."""
    data, caches = load("data"), []

    def made(source: str, out: Path, *_: Any, **__: Any) -> None:
        caches.append(cache.folder())
        assert not cache.folder().exists()
        cache.keep(cache.folder() / "known", "all")

    monkeypatch.setattr(data.prepare, "run", made)
    before = cache.folder()
    assert [data.preparing(tmp_path, 32) > 0 for _ in range(2)] == [True, True]
    assert before not in caches
    assert cache.folder() == before
    assert not any(folder.exists() for folder in caches)


def test_figures_of_a_pretended_card_are_of_no_gpu(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDR_PRETENDED_CARD", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = harness.machine()
    assert (found["gpu"], found["pretended_card"]) == (None, True)
