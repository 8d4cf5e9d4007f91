"""How training speed grows with the ranks, and what share of a step is communication.

    python benchmarks/scaling.py                          # all GPUs of this machine; two ranks on a CPU
    python benchmarks/scaling.py --ranks 1 2 4 --batch-size 128
    python benchmarks/scaling.py --paper                  # arithmetic for 8 to 1,024 GPUs: `paper`

Strong scaling keeps the global batch, so each rank gets less to do; weak scaling keeps the photographs of a rank, so
the global batch grows. Each step is `fastddr.step.training_step` under DDP as `fastddr.runtime` sets it up, on one
batch that stays on the device: no loader. `ranked` is what runs on each rank.

How to read it: efficiency is the speed by so many times that of one rank. Communication is the share of a step that is
gone when gradients are not shared: what overlaps with the backward pass does not count. Both are taken round by round,
and within a round each number of ranks has its turns while the other ranks wait. On a CPU every rank has as many
threads in all turns, the cores by the most ranks, so two ranks have twice the cores that one has; what they share is
the memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import harness
import networks
import paper
import script
import torch
from ranked import Job, job_trials
from whole import launcher

from fastddr.errors import UserError
from fastddr.ranks import available_cores

WORKER = Path(__file__).parent / "ranked.py"


@dataclass
class Options(script.Output):
    """Measure scaling."""

    ranks: tuple[int, ...] = ()
    """Numbers of ranks; 1 is always among them. By default the powers of two up to the GPUs, or 1 and 2 on a CPU."""
    model: str = ""
    """Network, as `benchmarks/networks.py` names them; by default the report's ConvMixer, on a CPU the quickstart's."""
    batch_size: int | None = None
    """Photographs of one rank in weak scaling, and of all ranks together in strong scaling; by default 64, on a CPU
    16."""
    image_size: int | None = None
    """Side of the images; by default 256, on a CPU 128."""
    precision: Literal["fp32", "bf16"] | None = None
    """By default bf16 on a GPU and fp32 on a CPU."""
    rounds: int = 7
    """Rounds, at least 5."""
    steps: int | None = None
    """Steps of a turn; by default 20, on a CPU 4."""
    paper: bool = False
    """Measure nothing; work out larger machines from published figures, as results/scaling-paper_...."""


def job(options: Options) -> Job:
    """What is to be measured here.

    Raises:
        UserError: this machine has not so many ranks, or the batch cannot be divided among them.
    """
    gpus = torch.cuda.device_count()
    most = gpus or max(2, available_cores())
    powers = [2**power for power in range(most.bit_length()) if 2**power <= (gpus or 2)]
    ranks = tuple(sorted({1, *(options.ranks or powers)}))
    if ranks[0] < 1 or ranks[-1] > most:
        what = f"{gpus} GPU(s)" if gpus else f"{available_cores()} core(s)"
        raise UserError(
            f"--ranks {' '.join(map(str, options.ranks))}: this machine has {what}, so at most {most} ranks."
        )
    if ranks == (1,):
        raise UserError("there is one GPU here, and scaling is measured over several; run it where there are more.")
    batch = options.batch_size or (64 if gpus else 16)
    if any(batch % count for count in ranks):
        raise UserError(f"--batch-size {batch} cannot be divided by each of {', '.join(map(str, ranks))} ranks.")
    model = options.model or ("convmixer-512-12-k9-p8" if gpus else "convmixer-64-4-k5-p8")
    networks.check(model)
    return Job(
        ranks=ranks,
        model=model,
        batch_size=batch,
        image_size=options.image_size or (256 if gpus else 128),
        precision=options.precision or ("bf16" if gpus else "fp32"),
        rounds=options.rounds,
        steps=options.steps or (20 if gpus else 4),
        threads=max(1, available_cores() // ranks[-1]),
    )


def measured(wanted: Job) -> dict[str, Any]:
    """What the ranks found: seconds a step by trial, round by round, and bytes of the gradients.

    Raises:
        RuntimeError: they failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, *launcher(wanted.ranks[-1]), str(WORKER), json.dumps(asdict(wanted)), str(found)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the ranks ended with {done.returncode}: {done.stderr[-3000:]}")
        return json.loads(found.read_text(encoding="utf-8"))


def rows(wanted: Job, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Images a second, efficiency and share of communication of each kind and number of ranks."""
    seconds: Mapping[str, Sequence[float]] = found["seconds"]
    model = str(networks.mixer(wanted.model) or wanted.model)
    base = {"model": model, "precision": wanted.precision, "image_size": wanted.image_size}
    made = []
    for kind, ranks in job_trials(wanted):
        trial = f"{kind}-{ranks}"
        batch = wanted.global_batch(kind, ranks)
        about = {"kind": kind, "ranks": ranks, **base, "batch_size": batch, "gradient_mb": found["bytes"] / 1e6}
        name, took = f"{kind} scaling, {ranks} rank{'s' * (ranks > 1)}", seconds[trial]
        speed = [batch / value for value in took]
        made.append({"name": name, **about, **harness.spread(speed), "unit": "images/s"})
        if ranks == 1:
            continue
        one = [wanted.batch_size / value for value in seconds[f"{kind}-1"]]
        linear = [ranks * value for value in one]
        made.append({"name": f"{name}: efficiency", **about, **harness.ratio(speed, linear), "unit": "of linear"})
        shared = [
            max(0.0, 1 - alone / together) for alone, together in zip(seconds[f"{trial}-alone"], took, strict=True)
        ]
        made.append({"name": f"{name}: communication", **about, **harness.spread(shared), "unit": "of a step"})
    return made


def main(options: Options) -> None:
    """Measure, print and write; or work out."""
    if options.paper:
        worked, part = paper.rows(), "paper"
        harness.show("Scaling on paper", worked)
    else:
        wanted, worked, part = job(options), [], None
        harness.begin(options.rounds)
    with harness.writing("scaling", worked, options.out, part=part, wandb=options.wandb):
        if not options.paper:
            worked += rows(wanted, measured(wanted))
            harness.show("Scaling", worked, ("batch_size",))


if __name__ == "__main__":
    script.run(main, Options)
