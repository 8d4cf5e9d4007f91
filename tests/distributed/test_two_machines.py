"""Two machines on one host: two network namespaces with a cable between them, and two ranks in each.

Opt-in, because it needs root and changes the host's networks for a minute:

    sudo -E env PATH="$PATH" pytest -m netns -s tests/distributed/test_two_machines.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests_support import ROOT, SMALL, ended, environment, lines, report

from fastddr import checkpoints

#: Greater than 127.0.0.1: of two addresses gloo lets the greater one connect.
ADDRESSES = ("192.168.77.1", "192.168.77.2")
#: The first machine's name, which is 127.0.1.1 to itself, as on Debian and in many clouds.
FIRST = "fastddr-first"
#: Minutes after which a rank that does not answer is given up, and seconds in which all must have ended after that: the
#: launcher gives its processes half a minute.
TIMEOUT, GRACE = 0.25, 90


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def why_not() -> str | None:
    """Why this host cannot do it."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and `ip` (the package iproute2)"
    done = subprocess.run(["ip", "netns", "add", "fastddr-try"], capture_output=True, text=True)
    if done.returncode != 0:
        return f"may not make network namespaces; run it as root ({done.stderr.strip() or 'no reason given'})"
    subprocess.run(["ip", "netns", "delete", "fastddr-try"], check=True)
    return None


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces; in each the cable is called `cable`, and /etc/hosts is its own."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    names = (f"fastddr-a{os.getpid()}", f"fastddr-b{os.getpid()}")
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
        for name, first in zip(names, ("127.0.1.1", ADDRESSES[0]), strict=True):
            own = Path("/etc/netns") / name  # `ip netns exec` lays it over /etc
            own.mkdir(parents=True)
            stack.callback(shutil.rmtree, own)
            (own / "hosts").write_text(f"127.0.0.1 localhost\n{first} {FIRST}\n")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names


@contextmanager
def job(machines: tuple[str, str], cwd: Path, name: str, *arguments: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`launch/multi_node.sh` on both, as launch/README.md has it; what machine N says goes into the file `NAME-N`."""
    many = environment() | {"NODES": "2", "HOST": FIRST, "RANKS": "2"}
    many["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{many['PATH']}"
    with ExitStack() as stack:
        processes = []
        for number, machine in enumerate(machines):
            command = ["ip", "netns", "exec", machine, str(ROOT / "launch" / "multi_node.sh"), *arguments]
            with (cwd / f"{name}-{number}").open("w") as said:
                process = subprocess.Popen(command, cwd=cwd, stdout=said, stderr=said, env=many | {"NODE": str(number)})
            processes.append(stack.enter_context(ended(process)))
        yield processes


def ours(path: Path) -> list[str]:
    """Our sentences among all that a machine has said."""
    return [line for line in path.read_text().splitlines() if line.startswith("fastddr: ")]


@pytest.mark.netns
def test_two_machines_train_lose_each_other_and_go_on(
    machines: tuple[str, str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", str(tiny), "--run-dir", "run", *SMALL, "--micro-batch-size", "1", "--epochs", "40",
                 "--save-every-steps", "1", "--rank-timeout-minutes", str(TIMEOUT)]  # fmt: skip
    with job(machines, tmp_path, "cut", *arguments) as processes:
        ends = time.monotonic() + 300
        while not (run / "checkpoints" / "best").exists():
            assert time.monotonic() < ends, (tmp_path / "cut-0").read_text()[-3000:]
            assert all(process.poll() is None for process in processes), (tmp_path / "cut-0").read_text()[-3000:]
            time.sleep(0.1)
        ip("-n", machines[1], "link", "set", "cable", "down")
        cut = time.monotonic()
        codes = [process.wait(60 * TIMEOUT + GRACE) for process in processes]
        took = time.monotonic() - cut
    status = json.loads((run / "status.json").read_text())
    saved = checkpoints.load(run / "checkpoints" / "last").state["progress"]["step"]
    sides = [ours(tmp_path / f"cut-{number}") for number in (0, 1)]
    with capsys.disabled():
        print(f"\nboth ended {took:.0f} s after the cut (timeout {60 * TIMEOUT:.0f} s); last checkpoint: step {saved}")
        print(f"status.json: {status}")
        for number, said in enumerate(sides):
            print(*(f"machine {number}: {line}" for line in dict.fromkeys(said)), sep="\n")
    assert all(codes), "neither takes it for a success"
    assert status["state"] == "failed"
    assert "rank 2, 3 did not answer in time" in status["reason"]
    assert any("rank 2, 3 did not answer in time" in line for line in sides[0])
    assert any("another rank did not answer in time" in line for line in sides[1])
    assert 0 < saved < 120

    ip("-n", machines[1], "link", "set", "cable", "up")
    with job(machines, tmp_path, "again", *arguments) as processes:
        codes = [process.wait(400) for process in processes]
    said = (tmp_path / "again-0").read_text()
    assert codes == [0, 0], said[-3000:]
    assert f"resumed at step {saved}" in said
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    logged = lines(run)
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 121)), "no step twice"
    assert [line["epoch"] for line in logged if "valid/qwk" in line] == list(range(1, 41))
    figures = report(run)
    assert {split: figures[split]["n"] for split in ("train", "valid", "test")} == {
        "train": 27,
        "valid": 11,
        "test": 13,
    }
    with capsys.disabled():
        print(f"the next start: resumed at step {saved}, done at step {logged[-1]['step']}")
