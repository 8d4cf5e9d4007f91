"""What else the machine did when a benchmark began and ended: a figure counts only where nobody else was at work.

Processes of others on a card are told from one's own by their ids; in a container that hides the ids of the others
they cannot be, and the record says so. `nvidia-smi` is asked because it is there with every driver.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from stored import DISTURBED

from fastddr.ranks import available_cores

#: Seconds over which the load of the cores is taken.
_SAMPLE = 0.5
#: Name in the record, and field of `nvidia-smi --query-gpu`.
_FIELDS = {
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_memory_clock_mhz": "clocks.max.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "utilisation_percent": "utilization.gpu",
    "memory_used_mib": "memory.used",
}


def busy_seconds() -> float:
    """Processor time that all processes of the machine have taken since it started."""
    times = psutil.cpu_times()
    # Interrupts and what the host of a virtual machine took for others, where the system tells them; guests are in
    # `user` already.
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def take(*, before: bool) -> dict[str, Any]:
    """The conditions now, with `disturbed` and, where it is true, `why`: a list of half sentences.

    Args:
        before: whether the benchmark has yet to begin. Its own work is still seen in the cards' utilisation afterwards,
            so that is judged only before.

    `others_cpu_share` is in shares of the cores of this process. `gpus` is None without a card, and a text with the
    reason where nothing is known about them.
    """
    share = _others_cpu_share()
    gpus = _gpus()
    why = []
    if share > DISTURBED:
        why.append(f"other processes take {100 * share:.0f} % of the cores")
    for gpu in gpus if isinstance(gpus, list) else []:
        others = gpu["other_processes_mib"]
        if isinstance(others, list) and others:
            who = "another process" if len(others) == 1 else f"{len(others)} other processes"
            why.append(f"{who} on GPU {gpu['index']}")
        elif before and (gpu["utilisation_percent"] or 0) > 100 * DISTURBED:
            why.append(f"GPU {gpu['index']} is {gpu['utilisation_percent']:.0f} % busy")
    return {
        "others_cpu_share": round(share, 3),
        "load_average": round(os.getloadavg()[0], 2),
        "gpus": gpus,
        "disturbed": bool(why),
        **({"why": why} if why else {}),
    }


def sentence(found: Mapping[str, Any], when: str) -> str | None:
    """What to say about conditions that disturb, and None about others. `when` begins the sentence."""
    if not found["disturbed"]:
        return None
    return f"{when} the machine is busy ({' and '.join(found['why'])}): measure again on an idle one."


def _others_cpu_share() -> float:
    busy, own, began = busy_seconds(), time.process_time(), time.perf_counter()
    time.sleep(_SAMPLE)
    took = time.perf_counter() - began
    others = busy_seconds() - busy - (time.process_time() - own)
    return max(others, 0.0) / (took * available_cores())


def _gpus() -> list[dict[str, Any]] | str | None:
    if not torch.cuda.is_available():
        return None
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    # Asked before CUDA is: that may put this process itself on a card.
    began = torch.cuda.is_initialized()
    try:
        apps = _smi("--query-compute-apps=gpu_uuid,pid,used_gpu_memory")
        return [_gpu(index, apps, began) for index in range(torch.cuda.device_count())]
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        said = str(getattr(problem, "stdout", None) or "").strip() or str(problem)
        return f"unknown: {said.splitlines()[0]}"


def _gpu(index: int, apps: Sequence[Sequence[str]], began: bool) -> dict[str, Any]:
    # By its UUID: nvidia-smi and CUDA may number cards in different ways.
    card = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    [values] = _smi(f"--query-gpu={','.join(_FIELDS.values())}", "-i", card)
    found: dict[str, Any] = {"index": index}
    found |= {name: _number(value) for name, value in zip(_FIELDS, values, strict=True)}
    here = {int(pid): _number(memory) for uuid, pid, memory in apps if uuid == card}
    family = _family()
    hidden = any(not Path(f"/proc/{pid}").exists() for pid in here)
    if began and hidden and not family.intersection(here):
        # This process may be among them, under an id that means nothing here.
        return found | {"other_processes_mib": "unknown: the card's processes have ids of another container"}
    return found | {"other_processes_mib": [memory for pid, memory in here.items() if pid not in family]}


def _smi(*query: str) -> list[list[str]]:
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _number(cell: str) -> float | None:
    """None for what a card does not tell: `[N/A]`, `[Not Supported]`."""
    return None if cell.startswith("[") else float(cell)


def _family() -> set[int]:
    """This process and all that came from it and still live."""
    return {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
