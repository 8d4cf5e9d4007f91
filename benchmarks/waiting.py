"""How long a training step waits for its data: the figure that says whether a faster loader would help at all."""

from __future__ import annotations

import gc
import os
import shutil
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import harness
import networks
import torch
from accelerate import Accelerator
from halted import own_cache
from trials import Spec

from fastddr import loaders, losses, optimizers
from fastddr.loaders import Task
from fastddr.meters import Waited
from fastddr.runtime import numerics
from fastddr.step import Tally, training_step
from fastddr.watch import Watch

#: The ConvMixer (width, depth, kernel, patch) for which there is an aim, on a GPU.
MODEL = (512, 12, 9, 8)
#: Steps before the counted ones.
_WARM = 5
#: Counted steps are cut into so many parts, whose shares are the repeats.
_PARTS = 10


def share(spec: Spec, task: Task, model: tuple[int, int, int, int], steps: int) -> dict[str, Any]:
    """As `_share`, with a cache of its own: a store that is kept between runs would be found full the next time."""
    folder = own_cache()
    try:
        with patch.dict(os.environ, FASTDDR_CACHE=folder):
            return _share(spec, task, model, steps)
    finally:
        # Whatever is measured next is in another process, which cannot use what this one's allocator holds.
        gc.collect()
        torch.cuda.empty_cache()
        shutil.rmtree(folder, ignore_errors=True)


def _share(spec: Spec, task: Task, model: tuple[int, int, int, int], steps: int) -> dict[str, Any]:
    """A row: the per cent of a step in which the host waits for the loader, of a ConvMixer trained at full speed.

    In bf16 on a GPU, in float32 on a CPU, as training does by default. The first epoch, in which the resident loader
    decodes, has passed.
    """
    gpu = task.device.type == "cuda"
    numerics(False, cpu=not gpu)
    task = replace(task, dtype=torch.bfloat16 if gpu else torch.float32)
    # A GPU's cards without bf16 are not what this is measured on.
    accelerator = Accelerator(mixed_precision="bf16" if gpu else "no", cpu=not gpu)
    dim, depth, kernel, patch_size = model
    torch.manual_seed(0)
    network = networks.as_trained(f"convmixer-{dim}-{depth}-k{kernel}-p{patch_size}", task.image_size, task.device)
    network, optimizer = accelerator.prepare(network, optimizers.build(network, "adam", lr=1e-3))
    criterion, tally = losses.CrossEntropy(), Tally.zeros(task.device)
    loader = loaders.build(spec.name, spec.task(task))
    watch = Watch(task.device)
    shares: list[float] = []
    try:
        if spec.name == "resident":
            for _ in loader.epoch(0):
                pass
        wanted = _WARM + steps
        part = max(steps // _PARTS, 1)
        done, epoch, waited, began = 0, 1, 0.0, 0.0
        while done < wanted:
            batches = Waited(loader.epoch(epoch))
            before = 0.0
            for batch in batches:
                told = training_step(accelerator, network, [batch], criterion, optimizer, tally)
                # As training does, which so waits for the step before. A loader that holds the host back would wait for
                # it otherwise, and the model's own time would count as its.
                watch.look(told, done, [batch.id])
                done += 1
                waited += batches.waited - before
                before = batches.waited
                if done >= _WARM and (done - _WARM) % part == 0:
                    # Reading a figure waits for the device, as a line of the log does.
                    tally.stack().tolist()
                    now = time.perf_counter()
                    if done > _WARM:
                        shares.append(100 * waited / (now - began))
                    waited, began = 0.0, now
                if done >= wanted:
                    break
            epoch += 1
    finally:
        loader.close()
    row: dict[str, Any] = {
        "name": f"data wait, {spec.label}",
        "kind": "wait",
        "model": f"ConvMixer {dim}/{depth} k{kernel} p{patch_size}",
        **harness.spread(shares),
        "unit": "% of the step",
    }
    if gpu and model == MODEL:
        row |= {"kind": "target", "target": 1.0, "met": row["median"] < 1.0}
    return row
