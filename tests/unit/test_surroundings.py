"""What a machine, a container or a file system may lack: told in a sentence, or done without."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests_support import ROOT, printed

from fastddr import checkpoints, cli, control_groups, files, ranks, runs, runtime
from fastddr.checkpoints import Training
from fastddr.config import load_preset
from fastddr.data import cache, source, survey
from fastddr.errors import EXIT_USER_ERROR, UserError, unusable
from fastddr.progress import EpochBar, terminal
from fastddr.terminal import any_terminal


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/job\n", {"job/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/job/step\n", {"job/cpu.max": "300000 100000\n", "job/step/cpu.max": "max 100000\n"}, 3.0),
        ("0::/job\n", {"job/cpu.max": "max 100000\n"}, None),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        # In a container the group's path is the host's, and its own is the root.
        ("0::/docker/abc\n", {"cpu.max": "400000 100000\n"}, 4.0),
        ("4:memory:/job\n", {}, None),
    ],
)
def test_the_cores_that_a_container_allows(
    own: str, files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    (tmp_path / "self").write_text(own)
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content)
    assert control_groups.cpus(tmp_path / "groups", tmp_path / "self") == cores
    assert control_groups.cpus(tmp_path / "groups", tmp_path / "nothing") is None


@pytest.mark.parametrize(("allowed", "cores"), [(None, 8), (2.5, 3), (0.5, 1), (64.0, 8)])
def test_threads_are_no_more_than_the_cores_that_are_allowed(
    allowed: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(control_groups, "cpus", lambda: allowed)
    assert ranks.available_cores() == cores


def test_a_bar_leaves_stderr_and_log_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a rank that says nothing, and where FORCE_COLOR makes rich take a file for a terminal."""
    log, screen = io.StringIO(), io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    stderr = sys.stderr
    for console in (
        Console(quiet=True, force_terminal=True, file=screen), Console(force_terminal=True, file=log)
    ):  # fmt: skip
        with EpochBar(console, "epoch", 10) as bar:
            bar.update(3, kept=lambda: pytest.fail("counted for nobody"))
            assert sys.stderr is stderr
    assert log.getvalue() == ""


@pytest.mark.parametrize("kept", [None, 0.37])
@pytest.mark.parametrize(("width", "said"), [(80, "images/s"), (60, ""), (44, "")])
def test_a_bar_in_a_narrow_terminal_keeps_its_count_and_its_time(
    width: int, said: str, kept: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    with EpochBar(console, "epoch 12/100", 1234) as bar:
        bar.update(123, 12_345.0, 0.12, kept=lambda: kept)
        line = "".join(segment.text for segment in console.render(bar._progress.get_renderable()))
    assert " 123/1234 " in line
    assert line.rstrip("\n").endswith("ETA -:--:--")
    assert said in line


def test_what_is_said_in_a_notebook_is_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    terminal().print("a long line " * 20)
    assert capsys.readouterr().out == "a long line " * 20 + "\n"


def test_a_terminal_that_cannot_show_a_character_shows_another(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    any_terminal()
    print("writing the report … 512×512", flush=True)
    assert written.getvalue().decode("latin-1") == "writing the report ? 512×512\n"


#: Says something, twice more when nobody hears it, and what it knows of that by its exit code.
TALKER = """
import sys
from fastddr.terminal import to_nobody
to_nobody()
print("begun", flush=True)
sys.stdin.read()
for stream in (sys.stdout, sys.stderr):
    print("x" * 100_000, file=stream, flush=True)
sys.exit(7)
"""


def talker(**streams: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", TALKER], text=True, env=environment, stdin=subprocess.PIPE, **streams
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_training_goes_on_where_nobody_listens_any_more() -> None:
    """A pipe whose reader has ended, and the full disk of a log."""
    with talker(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "begun\n"
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 7
    with open("/dev/full", "w") as full, talker(stdout=full, stderr=full) as process:
        process.communicate("", timeout=60)
        assert process.returncode == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_what_cannot_be_said_takes_no_exit_code_and_no_file(tmp_path: Path) -> None:
    """A mistake is told beside the full disk of a log, and a verb that writes files does so unheard."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    verb = [sys.executable, "-m", "fastddr"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [*verb, "check", "nowhere"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment
        )
        assert found.returncode == 2
        assert found.stderr.startswith("fastddr: --data nowhere: there is no such folder")
        assert "Traceback" not in found.stderr
        made = subprocess.run(
            [*verb, "synth", str(tmp_path / "set"), "--count", "40", "--size", "64"], stdout=full, stderr=full,
            timeout=60, env=environment,
        )  # fmt: skip
    assert made.returncode == 0
    assert len(list(tmp_path.rglob("*.jpg"))) == 40


def test_a_stream_that_was_closed_at_the_start_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `fastddr check DDR-dataset >&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    any_terminal()
    with sys.stdout:
        sys.stdout.write("to nobody")
        sys.stdout.flush()


@pytest.mark.parametrize("words", [["--help"], ["check", "--help"]])
def test_a_verb_that_nobody_reads_ends_without_a_word(words: list[str]) -> None:
    """As in `fastddr check DDR-dataset | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        [sys.executable, "-m", "fastddr", *words], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")


def test_a_cache_without_a_home_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("FASTDDR_CACHE", raising=False)
    monkeypatch.setattr(cache, "user_cache_dir", nobody)
    with pytest.raises(UserError, match="set FASTDDR_CACHE or HOME"):
        cache.folder()
    monkeypatch.setenv("FASTDDR_CACHE", "~/photographs")
    assert cache.folder() == Path.home() / "photographs"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_tasks_without_a_launcher_are_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="started 4 tasks that know nothing of each other"):
        runtime.join()
    monkeypatch.setenv(name, "1")
    assert runtime.join().num_processes == 1


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_place_without_links_is_refused_before_anything_is_trained(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Any) -> None:
        raise OSError(code, os.strerror(code))

    assert list(runs.claim(tmp_path / "run", named=True).iterdir()) == []
    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(UserError, match="no symbolic links"):
        runs.claim(tmp_path / "run", named=True)


def test_a_machine_that_does_not_see_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_SEEN_AFTER", 0.3)
    with pytest.raises(UserError, match="a folder that all machines share"):
        runs.seen(tmp_path)
    (tmp_path / "config.yaml").touch()
    runs.seen(tmp_path)


def test_a_place_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(stream: Any, flags: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runs.fcntl, "lockf", lockf)
    said: list[str] = []
    with runs.hold(tmp_path, said.append, begins=True) as stream:
        assert "without locks" in said[0]
        assert not stream.closed
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="another start has begun a run here"):
        runs.hold(tmp_path, said.append, begins=True)


@pytest.mark.parametrize("code", [errno.ESHUTDOWN, errno.ENOTCONN, errno.ETIMEDOUT, errno.EIO, errno.EDQUOT])
def test_errors_of_a_network_are_one_sentence(code: int) -> None:
    assert unusable(OSError(code, os.strerror(code)), Path("runs/a")) is not None


def test_a_disk_that_is_full_when_a_file_is_synced_or_closed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors of writing name no file."""

    def fails(code: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    for work in (lambda: files.put(tmp_path / "grades.csv", b"new", sync=True), lambda: os.fsync(1)):
        assert cli.answered(work) == EXIT_USER_ERROR
    own, other = capsys.readouterr().err.splitlines()
    assert own == f"fastddr: {tmp_path / 'grades.csv'}: {other.removeprefix('fastddr: ')}"
    assert other == "fastddr: No space left on device; make room, or give a place that can be used."
    monkeypatch.setattr(os, "fsync", fails(errno.EBADF))
    with pytest.raises(OSError, match="Bad file descriptor"):  # a mistake of ours keeps its traceback
        cli.answered(lambda: os.fsync(1))


def _written(folder: Path, step: int, *, best: bool) -> None:
    model = torch.nn.Linear(2, 2)
    training = Training(model, None, torch.optim.SGD(model.parameters(), 0.1), None)
    checkpoints.write(folder, training.snapshot(step, {"progress": {"step": step}}), best=best, keep=2)


def test_a_run_whose_links_were_followed_goes_on(tmp_path: Path) -> None:
    """`scp -r` and `cp -L` make folders of `last` and `best`."""
    _written(tmp_path / "own", 3, best=True)
    _written(tmp_path / "own", 6, best=False)
    copied = Path(shutil.copytree(tmp_path / "own", tmp_path / "copied", symlinks=False))
    assert not (copied / "best").is_symlink()
    assert checkpoints.led_to(copied / "best") == copied / "best"
    _written(copied, 9, best=True)
    assert {path.name for path in copied.iterdir()} == {"step-00000006", "step-00000009", "last", "best"}
    assert os.readlink(copied / "best") == os.readlink(copied / "last") == "step-00000009"
    # What is no copy of a checkpoint beside it is kept.
    (copied / "last").unlink()
    shutil.copytree(tmp_path / "own" / "step-00000003", copied / "last")
    checkpoints.point(copied, copied / "step-00000009", best=False)
    assert checkpoints.load(copied / "last-copied").state["progress"]["step"] == 3


def test_a_checkpoint_is_told_by_the_path_that_was_given(tmp_path: Path) -> None:
    """Links on the way to it may be of one machine alone."""
    _written(tmp_path / "real", 3, best=True)
    folder, standing = tmp_path / "link", tmp_path / "real" / "step-00000003"
    folder.symlink_to("real")
    standing.symlink_to(standing.rename(tmp_path / "on-another-disk"))
    found = checkpoints.load_newest(folder)
    assert found is not None
    assert found.path == checkpoints.led_to(folder / "best") == folder / "step-00000003"


def test_a_system_that_knows_fewer_errors_trains_all_the_same() -> None:
    """macOS, for one."""
    printed("import errno; vars(errno).pop('EREMOTEIO', None); import fastddr.saving")


def test_a_world_without_local_ranks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 here"):
        runtime.join()


def test_photographs_that_cannot_be_remembered_are_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache.json"))

    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "keep", refuse)
    seen = survey.take(tiny)
    file = io.StringIO()
    source.decode(seen, Console(file=file, width=300))
    assert f"and again at the next start ({tmp_path}/photographs/" in file.getvalue()
    assert ".json: Permission denied; set FASTDDR_CACHE)" in file.getvalue()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has names in UTF-8 alone")
def test_a_folder_whose_name_is_no_text_holds_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xe9tine")
    _written(folder, 3, best=True)
    assert checkpoints.load(folder / "best").state["progress"]["step"] == 3


@pytest.mark.parametrize(("asked", "threads"), [(2, 2), (None, 3)])
def test_threads_are_the_runs_and_not_the_launchers_one(
    asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1, which PyTorch reads as it starts."""
    monkeypatch.setattr(ranks, "cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = replace(load_preset("quickstart"), precision="fp32", batch_size=4, threads=asked)
        assert runtime.start(config).threads == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
