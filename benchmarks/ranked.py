"""One rank of `scaling.py`: takes its turns with the first 1, 2, 4 ... ranks, and waits while others have theirs.

Started by `accelerate launch` as `ranked.py JOB FOUND`, JSON and a file; rank 0 writes what was found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

KINDS = ("strong", "weak")


@dataclass(frozen=True)
class Job:
    """What the ranks measure."""

    ranks: Sequence[int]
    """Numbers of ranks, from 1 up."""
    model: str
    batch_size: int
    """Of all ranks in strong scaling, of each in weak scaling."""
    image_size: int
    precision: str
    rounds: int
    steps: int
    threads: int

    def global_batch(self, kind: str, ranks: int) -> int:
        """Photographs in a step of all these ranks."""
        return self.batch_size * (ranks if kind == "weak" else 1)


def job_trials(job: Job) -> Iterator[tuple[str, int]]:
    """(Kind, number of ranks) of each trial."""
    for kind in KINDS:
        for ranks in job.ranks:
            yield kind, ranks


def main(job: Job, out: Path) -> None:
    """Measure, with all other ranks."""
    import networks
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from fastddr import cli, losses, optimizers, runtime
    from fastddr.loaders import Batch
    from fastddr.step import Tally, training_step

    # The batch of this configuration is used by nothing but the check that it divides.
    flags = ["--precision", job.precision, "--threads", str(job.threads), "--batch-size", str(job.ranks[-1])]
    run = runtime.start(cli.parse(flags, "scaling"))
    accelerator, device, gpu = run.accelerator, run.device, run.device.type == "cuda"
    # Waiting is done over the CPU, where it takes nothing from the ranks that have their turn.
    waiting = distributed.new_group(backend="gloo", timeout=timedelta(hours=1))
    groups = {count: distributed.new_group(list(range(count))) for count in job.ranks}
    turns: dict[str, Any] = {}
    gradient_bytes = 0
    for kind, ranks in job_trials(job):
        if run.rank >= ranks:
            continue
        torch.manual_seed(0)
        network = networks.as_trained(job.model, job.image_size, device)
        gradient_bytes = sum(4 * parameter.numel() for parameter in network.parameters())
        # So small a rate that weights which are not shared stay together.
        optimizer = optimizers.build(network, "adam", lr=1e-8)
        model = network
        if ranks > 1:
            keywords = runtime.share_gradients(1).to_kwargs()
            placed = {"device_ids": [device.index], "output_device": device.index} if gpu else {}
            model = DistributedDataParallel(network, process_group=groups[ranks], **placed, **keywords)
        if job.precision == "bf16":
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
        own = job.global_batch(kind, ranks) // ranks
        image = torch.randn(own, 3, job.image_size, job.image_size, device=device)
        image = image.to(run.image_dtype, memory_format=torch.channels_last)
        ids = torch.arange(own, device=device)
        batch = Batch(image=image, grade=ids % networks.CLASSES, id=ids, valid=torch.ones_like(ids, dtype=torch.bool))
        turns[f"{kind}-{ranks}"] = (ranks, model, accelerator.prepare(optimizer), batch)
    criterion, tally = losses.CrossEntropy(), Tally.zeros(device)

    def turn(trial: str, shared: bool) -> float:
        """Seconds of a step."""
        ranks, model, optimizer, batch = turns[trial]
        if gpu:
            torch.cuda.synchronize()
        if ranks > 1:
            distributed.barrier(groups[ranks])
        began = time.perf_counter()
        with nullcontext() if shared or ranks == 1 else model.no_sync():
            for _ in range(job.steps):
                training_step(accelerator, model, [batch], criterion, optimizer, tally)
        if gpu:
            torch.cuda.synchronize()
        if ranks > 1:
            distributed.barrier(groups[ranks])
        return (time.perf_counter() - began) / job.steps

    found: dict[str, list[float]] = {}
    for number in range(job.rounds + 1):  # the first one warms up
        for kind, ranks in job_trials(job):
            trial = f"{kind}-{ranks}"
            for shared in (True, False) if ranks > 1 else (True,):
                distributed.barrier(waiting)
                if run.rank < ranks:
                    took = turn(trial, shared)
                    if number:
                        found.setdefault(trial if shared else f"{trial}-alone", []).append(took)
        distributed.barrier(waiting)
    if run.is_main:
        out.write_text(json.dumps({"seconds": found, "bytes": gradient_bytes}), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
