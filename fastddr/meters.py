"""What a run measures of itself: waiting, throughput, memory and its end, versions."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import resource
import subprocess
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import accelerate
import torch

import fastddr
from fastddr.config import MODELS, Config
from fastddr.errors import UserError

T = TypeVar("T")
#: What a failure to decode begins with where there is little memory left.
IN_DALI = "CUDA out of memory, in DALI"
_NO_ENGINE = "unable to find an engine"
#: What cuBLAS, cuDNN (also before its version 9), the driver, Triton, NCCL and DALI say where there is no more; cuDNN
#: finds no algorithm without its workspace.
_OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", _NO_ENGINE, "CUDA out of memory",
    "CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory",
    "Cuda failure 2 'out of memory'", "CUDA allocation failed", "DefaultCPUAllocator: can't allocate memory",
)  # fmt: skip


class Waited(Generic[T]):
    """An iterator that adds up the seconds for which `next` kept the host waiting."""

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches
        self.waited = 0.0

    def __iter__(self) -> Waited[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - began


class Window:
    """Means over the steps since the last log line, of all ranks."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        #: By rank: loss, correct, count, photographs seen, seconds waited.
        self._seen = torch.zeros(1, 5, dtype=torch.float64)
        self.rate: float | None = None
        self.wait_share: float | None = None

    def close(
        self,
        gather: Callable[[torch.Tensor], torch.Tensor],
        sums: torch.Tensor,
        waited: float,
        peaks: Mapping[str, float],
    ) -> dict[str, float]:
        """What there is to log of the steps since the last call; sets `rate` and `wait_share`. Called by all ranks.

        Mean loss and accuracy are NaN without photographs. Of what each rank has its own of, the time for which it
        waited for data and its memory, the largest counts: one slow disk, or one full card, holds up all.

        Args:
            gather: rows of one rank to those of all, as Accelerate's.
            sums: (4,) loss, correct and count of this rank's photographs, and how many were seen, since the beginning
                (`Tally.stack`). The speed is of all that were seen: a bad step takes as long as another.
            waited: seconds since the beginning for which this rank waited for data.
            peaks: of this rank's memory, by name.
        """
        own = torch.tensor([waited, *peaks.values()], dtype=sums.dtype, device=sums.device)
        ranks = gather(torch.cat([sums, own])[None]).cpu()
        now, seen = time.perf_counter(), ranks[:, :5]
        new, seconds = seen - self._seen, now - self._began
        loss, correct, count, photographs = new[:, :4].sum(0).tolist()
        self.rate, self.wait_share = photographs / seconds, float(new[:, 4].max()) / seconds
        self._seen, self._began = seen, now
        return {
            "train/loss": loss / count if count else math.nan,
            "train/accuracy": correct / count if count else math.nan,
            RATE: self.rate,
            WAIT: self.wait_share,
            **dict(zip(peaks, ranks[:, 5:].amax(0).tolist(), strict=True)),
        }


RATE, WAIT = "train/images_per_second", "train/data_wait"


class OfTraining(NamedTuple):
    """A figure of `Window.close` over all of a run's training."""

    mean: float
    """Over the time: each second counts alike, so the mean speed is all photographs by all seconds."""
    median: float
    """Of the steps: half of them were in lines of this figure or less. A start that takes long is left out of it."""


def of_training(logged: Iterable[Mapping[str, Any]], name: str) -> OfTraining | None:
    """Speed or wait, by its name, over all lines of metrics.jsonl; None where there is none.

    A line is of the steps since the one before: of one or of hundreds, and of milliseconds or of minutes.
    """
    found: list[tuple[float, int, float]] = []
    before = 0
    for line in logged:
        rate, value = line.get(RATE), line.get(name)
        if isinstance(rate, int | float) and rate > 0:
            steps, before = line["step"] - before, line["step"]
            if steps > 0 and isinstance(value, int | float):
                found.append((value, steps, steps / rate))
    if not found:
        return None
    values, steps, seconds = zip(*sorted(found), strict=True)
    middle = bisect_left(list(accumulate(steps)), sum(steps) / 2)
    mean = sum(value * time for value, time in zip(values, seconds, strict=True)) / sum(seconds)
    return OfTraining(mean, values[middle])


MEMORY = {
    "memory/predicted_gib": "Peak GPU memory, predicted for PyTorch",
    "memory/peak_allocated_gib": "Peak GPU memory, allocated",
    "memory/peak_reserved_gib": "Peak GPU memory, reserved",
    "memory/peak_rss_gib": "Peak memory of the process",
}


def memory(device: torch.device, predicted: float | None = None) -> dict[str, float]:
    """Peaks of this process so far, in GiB, by the names in `MEMORY`."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    found = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if predicted is not None:
        found["memory/predicted_gib"] = predicted
    if device.type == "cuda":
        found["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return found


def largest(
    gather: Callable[[torch.Tensor], torch.Tensor], peaks: Mapping[str, float], device: torch.device
) -> dict[str, float]:
    """The largest of all ranks of each figure, as in `Window.close`. Called by all ranks."""
    ranks = gather(torch.tensor([[*peaks.values()]], device=device))
    return dict(zip(peaks, ranks.amax(0).tolist(), strict=True))


def scaling(scaler: Any, overflowed: int) -> dict[str, float]:
    """What there is to log of float16's scaler, and of the steps that it left out; nothing where there is none."""
    if scaler is None:
        return {}
    return {"train/loss_scale": scaler.get_scale(), "train/overflowed_steps": overflowed}


@cache
def code_state() -> str | None:
    """The commit of the checkout that this code lies in, with "-dirty" where files were changed; None without git.

    As it was when this was first asked: the checkout may move on while a run goes on with what it has loaded.
    """
    package = Path(fastddr.__file__).parent

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(package), *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An installed package may lie in somebody else's checkout.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def packages() -> tuple[tuple[str, str], ...]:
    """Name and version of every package that is installed. To read them takes a while, and so is done once."""
    found = []
    for distribution in importlib.metadata.distributions():
        with suppress(OSError, UnicodeDecodeError):  # somebody else's, and broken
            found.append((str(distribution.metadata["Name"]), str(distribution.metadata["Version"])))
    return tuple(found)


def dali_builds() -> tuple[str, ...]:
    """Names of the builds of DALI that are installed: one for each CUDA, of which there should be one or none."""
    return tuple(sorted({name for name, _ in packages() if name.replace("_", "-").startswith("nvidia-dali-cuda")}))


def versions() -> dict[str, str]:
    """What a run was made with; of DALI only the build that is installed."""
    return {
        "fastddr": fastddr.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "accelerate": accelerate.__version__,
        **{name: version(name) for name in dali_builds()},
    }


def out_of_memory(
    config: Config,
    device: torch.device,
    world: int,
    *,
    store: str,
    need: float | None = None,
    scoring: bool = False,
    run: Path | None = None,
    named: bool = True,
) -> str:
    """What to tell the user whose card was too small, and the ways out, the one that changes least first.

    Args:
        config: of the training; where its micro batch is `auto`, a rank's whole part of the global batch was held.
        store: where the loader keeps photographs.
        need: GiB that were predicted for PyTorch, None where nothing was.
        scoring: whether a split was scored, and not trained on.
        run: the run's folder where it can go on, and so cannot with other settings.
        named: whether the same command goes on with it, or has to be given that folder.
    """
    micro = config.micro_batch_size
    held = max(1, config.batch_size // world) if micro == "auto" else int(micro)
    if scoring and config.evaluation.batch_size is not None:
        held = config.evaluation.batch_size
    told = "" if need is None else f" ({need:.1f} GiB were predicted)"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        gib = [f"{size / 2**30:.1f} GiB" for size in (peak, total, free)]
        predicted = "" if need is None else f"{need:.1f} GiB were predicted; "
        told = f" ({predicted}PyTorch held up to {gib[0]} of {gib[1]}; {gib[2]} are free now)"
    when, ways = " as a split is scored" if scoring else "", list(_ways(config, held, store, scoring, run))
    what = f"{held} photographs of {config.image_size} px at once"
    # The last way of a run that could go on is a new run.
    on = "" if run is None or named or len(ways) < 2 else f"give the command again with --run-dir {run} to go on, and "
    return f"the memory of {device} is too small for {what}{when}{told}: {on}{', or '.join(ways)}."


def _ways(config: Config, held: int, store: str, scoring: bool, run: Path | None) -> Iterator[str]:
    """The ways out that the checks of a configuration allow, and in a run that goes on its identity."""
    if store == "vram":
        yield "keep photographs elsewhere with --loading.store ram"
    image = "take a smaller --image-size and --canvas (`fastddr plan` says what fits)"
    least = 2 if config.augment.mixup or config.augment.cutmix else 1
    smaller = max((size for size in range(least, held) if held % size == 0), default=None)
    fewer = f"hold fewer photographs at once with --micro-batch-size {smaller}, which keeps the global batch"
    if scoring:
        if held > 1:
            yield f"score fewer photographs at once with --evaluation.batch-size {held // 2}"
    else:
        if run is None and smaller is not None:
            yield fewer
        if run is None and config.compile:
            yield f"let less be kept with --memory.activation-budget {config.memory.activation_budget / 2:.2g}"
        if not (config.compile or config.memory.checkpointing):
            can = "" if config.model in MODELS else ", where the model can"
            yield f"compute activations again with --memory.checkpointing{can}: the same numbers, and it takes longer"
    if run is None:
        yield image
        return
    batch = config.batch_size
    # So many that the micro batch is chosen anew (`runs.continue_from`).
    ranks = next((n for n in range(1, batch // least + 1) if batch % n == 0 and n * held > batch), None)
    if not scoring and ranks is not None:
        yield f"go on with {ranks} GPUs in all, each of which then holds fewer"
    other = f"{fewer}, or {image}" if smaller is not None and not scoring else image
    # With a slash it is a path; else it would be a name in runs/.
    place = run if len(run.parts) > 1 else f"./{run}"
    yield (
        f"begin a new run, with another --run-dir, and there {other}; --init run:{place} begins it at this one's "
        "weights once they have been validated"
    )


@contextmanager
def enough_memory(sentence: Callable[[], str]) -> Iterator[None]:
    """Within it an error that says that memory is too small is a `UserError` with this sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Only PyTorch's own is surely the card's: cuDNN's word for it may mean that it cannot do a step at all, DALI's
        # that it cannot decode a file, and Python's and CUDA's that the machine's memory is full.
        unsure = not isinstance(error, torch.OutOfMemoryError)
        said = f" What was said: {(str(error).strip() or type(error).__name__).splitlines()[0]}" if unsure else ""
        raise UserError(f"{sentence()}{said}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or DALI says that memory is too small: libraries have words of their own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
