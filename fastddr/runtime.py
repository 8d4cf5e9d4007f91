"""Device, precision, threads, seed and ranks: chosen once, in code, and printed with the reason."""

from __future__ import annotations

import ctypes
import inspect
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel

from fastddr import alone, ranks
from fastddr.config import Config
from fastddr.errors import UserError

#: From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

#: What `accelerate config` may have stored for all that is launched, by its variable.
_OTHERS = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}  # fmt: skip

#: Why a configuration names a precision, where no more is known: a flag or a preset does.
ASKED = "the settings ask for it"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where a run runs and how it is cut: what `auto` became, and why."""

    accelerator: Accelerator
    device: torch.device
    precision: str
    threads: int
    rank: int
    world: int
    micro_batch_size: int
    accumulation: int
    decisions: tuple[str, ...]

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    @property
    def image_dtype(self) -> torch.dtype:
        """What a batch's images are: the autocast dtype on a GPU, float32 on a CPU."""
        return DTYPES[self.precision] if self.device.type == "cuda" else torch.float32


class DDP(DistributedDataParallelKwargs):
    """How gradients are shared: bucket by bucket while the backward pass goes on, each gradient a view of its bucket.

    Buffers are not sent in each step, as they are by default: BatchNorm trains on its batch's statistics, and its
    running ones are taken from rank 0 where they count (`Trainer._score`, checkpoints).
    """

    def to_kwargs(self) -> dict[str, Any]:
        """Keywords of `DistributedDataParallel`. Newer PyTorch deprecates the name `broadcast_buffers`."""
        names = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        found: dict[str, Any] = super().to_kwargs()
        return found | {buffers: False}


def share_gradients(accumulation: int) -> DDP:
    """DDP as it is here. No search for unused parameters, which is its default.

    The graph of a step is always the same, and DDP is told so where each backward pass shares its gradients. Within an
    accumulation it cannot be: PyTorch's reducer wants to share them in the first pass, and fails in `no_sync`
    ("expect_autograd_hooks_ INTERNAL ASSERT").
    """
    return DDP(gradient_as_bucket_view=True, static_graph=accumulation == 1)


def choose_precision(
    asked: str, launched: str, capability: tuple[int, int] | None, card: str = "", why: str = ASKED
) -> tuple[str, str]:
    """The precision, and the reason for it.

    Args:
        asked: the `precision` of the configuration.
        launched: what `accelerate launch` was told (`ACCELERATE_MIXED_PRECISION`), "no" or "" if nothing.
        capability: compute capability of the card, None on a CPU.
        card: its name.
        why: the reason for one that is asked for.

    Raises:
        UserError: a precision that nothing here can train in.
    """
    if launched in ("fp16", "bf16"):
        chosen, reason = launched, "accelerate launch asked for it"
    elif launched not in ("", "no"):
        raise UserError(
            f"accelerate launch --mixed_precision {launched}: fastddr trains in fp16, bf16 or fp32; launch with "
            "`no` and it chooses itself."
        )
    elif asked != "auto":
        chosen, reason = asked, why
    elif capability is None:
        chosen, reason = "fp32", "no GPU; on a CPU half precision is slower than float32"
    elif "GTX 16" in card:
        # PyTorch's issues 58123 and 77955: convolutions in half precision give NaN there, and are no faster.
        chosen, reason = "fp32", f"half precision gives wrong numbers on cards of this series ({card})"
    elif capability >= (8, 0):
        chosen, reason = "bf16", f"the card has it (compute capability {capability[0]}.{capability[1]})"
    else:
        chosen, reason = "fp16", f"the card has no fast bf16 (compute capability {capability[0]}.{capability[1]})"
    if chosen == "fp16" and capability is None:
        raise UserError("precision fp16 needs a GPU; on a CPU use --precision fp32 or bf16.")
    if chosen == "bf16" and capability is not None and capability < (8, 0):
        reason += "; this card only emulates it, which is slow"
    return chosen, reason


def agree_on_precision(
    asked: str, launched: str, capability: tuple[int, int] | None, card: str, why: str = ASKED
) -> tuple[str, str]:
    """As `choose_precision`, the same on all ranks, whose cards may differ: what the weakest can. Called by all."""
    found = ranks.gather([choose_precision(asked, launched, capability, card, why)])
    return min(found, key=lambda choice: ("fp32", "fp16", "bf16").index(choice[0]))


def card_of(device: torch.device) -> tuple[tuple[int, int], str]:
    """A card's compute capability and name; `UserError` where it is older than all that PyTorch was built for."""
    capability, card = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    built_for = (name.removeprefix("sm_") for name in torch.cuda.get_arch_list())  # sm_75, compute_120 and so on
    known = [int(number) for number in built_for if number.isdecimal()]
    if known and 10 * capability[0] + capability[1] < min(known):
        least = divmod(min(known), 10)
        raise UserError(
            f"{card} (compute capability {capability[0]}.{capability[1]}) is older than what this PyTorch is built for "
            f'({least[0]}.{least[1]} and later); install a PyTorch for CUDA 12 (see "DALI" in the README), or train on '
            "the CPU with `accelerate launch --cpu`."
        )
    return capability, card


def divide_batch(global_batch: int, micro: int | str, world: int) -> tuple[int, int]:
    """(photographs a rank holds at once, how many such make a step) for a global batch.

    Raises:
        UserError: the global batch is not a whole number of micro batches on every rank.
    """
    if global_batch % world:
        raise UserError(
            f"batch_size {global_batch} (the global batch) cannot be divided by {world} ranks; "
            f"the nearest that can is {max(1, round(global_batch / world)) * world}."
        )
    per_rank = global_batch // world
    if micro == "auto":
        return per_rank, 1
    if per_rank % int(micro):
        raise UserError(
            f"batch_size {global_batch} on {world} rank(s) is {per_rank} photographs a rank, which "
            f"micro_batch_size {micro} does not divide; choose a divisor of {per_rank}."
        )
    return int(micro), per_rank // int(micro)


def keep_memory() -> None:
    """Let glibc keep the memory that is freed, for the next batch that needs as much. Linux; elsewhere nothing happens.

    By default it gives every large block back to the system, and each new batch and activation then costs a page fault
    for every 4 kB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Older versions take no more than 32 MiB. Where both are refused the other stays as it is too: set alone, it would
    # keep the threshold from growing by itself.
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


#: How many tasks SLURM and MPI say that they started.
_TASKS = ("SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


def join(*, cpu: bool = False) -> PartialState:
    """Join the other ranks, on the GPU or the CPU, with `cpu` on that whatever there is. Safe to call again."""
    cpu = cpu or on_cpu()
    ranks.die_with_parent()
    tasks = max(int(os.environ.get(name) or 1) for name in _TASKS)
    if tasks > 1 and not os.environ.get("WORLD_SIZE"):
        raise UserError(
            f"srun or mpirun started {tasks} tasks that know nothing of each other: start one on each machine, which "
            "starts its ranks by itself (launch/slurm.sbatch, launch/multi_node.sh)."
        )
    if ranks.world() > 1 and not os.environ.get("LOCAL_RANK"):
        raise UserError(
            f"WORLD_SIZE is {ranks.world()} here, but nothing says which process of its machine this is: start it with "
            "`accelerate launch` (launch/multi_node.sh), or unset WORLD_SIZE."
        )
    for name, what in _OTHERS.items():
        if os.environ.get(name, "").lower() == "true":
            raise UserError(
                f"accelerate launch asked for {what}, which fastddr does not do: each GPU holds the whole model; "
                "launch with --config_file accelerate_config.yaml, or leave it out in `accelerate config`."
            )
    cards = 0 if cpu else torch.cuda.device_count()
    if 0 < cards < ranks.local_world():
        raise UserError(
            f"{ranks.local_world()} processes on a machine with {cards} GPU(s): each needs one of its own; start as "
            "many as there are GPUs, or train on the CPU with `accelerate launch --cpu`."
        )
    if cards == 0 and not _asked_for_cpu() and ranks.world() > ranks.local_world() and (blind := _blind()) is not None:
        # Machines of which some have found their GPUs and some have not would wait for each other.
        raise UserError(f"{blind}; mend it on this machine, or train on all of them with `accelerate launch --cpu`.")
    state = ranks.join(cpu=cpu)
    # Where Accelerate was told the card of a single process, it leaves the current one as it is, and events and Triton
    # are of that one. A device without an index is the current one.
    if state.device.type == "cuda" and state.device.index is not None:
        torch.cuda.set_device(state.device)
    return state


def on_cpu() -> bool:
    """Whether this process trains on the CPU: there is no GPU, or it was asked for."""
    return not torch.cuda.is_available() or _asked_for_cpu()


def _asked_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")


def numerics(deterministic: bool, cpu: bool) -> None:
    """How PyTorch computes, for the whole process, whatever was set before; before its first product on a GPU."""
    if deterministic:
        # cuBLAS reads it when it first needs its workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # To find what reads memory that nobody has written; nothing here does.
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]  # by its class
    if not cpu:
        torch.backends.cudnn.benchmark = not deterministic
        # TF32, as cuDNN's convolutions have it by default; repeatable like any other.
        torch.set_float32_matmul_precision("high")


def _why_device(cpu: bool) -> str:
    if not cpu:
        return "a GPU is there"
    if torch.cuda.is_available():
        return "asked for"
    return _blind() or "PyTorch sees no GPU"


def _blind() -> str | None:
    """What is wrong where NVIDIA's driver is there and PyTorch sees no GPU; None where nothing is."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if torch.version.cuda is None or not shutil.which("nvidia-smi") or hidden:
        return None
    return (
        f"PyTorch sees no GPU, though NVIDIA's driver is there; it may be too old for CUDA {torch.version.cuda} "
        "(`nvidia-smi` says which it can do)"
    )


def start(config: Config, trainer: object = None, precision_of: str = ASKED, *, cpu: bool = False) -> Runtime:
    """Choose device, precision and threads, and seed, for the process.

    Args:
        trainer: the one that this is for, if any.
        precision_of: why the configuration names its precision, where it names one.
        cpu: on the CPU, whatever there is.

    Raises:
        UserError: a precision or a batch that this machine cannot do, or another Trainer is open.
    """
    alone.check(trainer)
    state = join(cpu=cpu)
    cpu = cpu or on_cpu()
    decisions = [f"device {'cpu' if cpu else 'cuda'}: {_why_device(cpu)}"]
    capability, card = (None, "") if cpu else card_of(state.device)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    precision, reason = agree_on_precision(config.precision, launched, capability, card, precision_of)
    tf32 = ", products in TF32" if precision == "fp32" and capability is not None and capability >= (8, 0) else ""
    decisions.append(f"precision {precision}{tf32}: {reason}")
    micro, accumulation = divide_batch(config.batch_size, config.micro_batch_size, state.num_processes)
    decisions.append(
        f"batch {config.batch_size} = {micro} at once × {accumulation} accumulated × {state.num_processes} rank(s)"
    )
    if config.sync_batchnorm and cpu:
        raise UserError(
            "--sync-batchnorm shares BatchNorm's statistics among GPUs, and this trains on a CPU; leave it off here."
        )
    # Accelerate gathers by it, and PyTorch has given it another name.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather_into_tensor`", FutureWarning)
    threads = config.threads or ranks.cores()
    # accelerate launch sets OMP_NUM_THREADS=1 on a CPU, which halves the speed; this overrides it.
    torch.set_num_threads(threads)
    if cpu:
        keep_memory()
    decisions.append(f"threads {threads}: {'asked for' if config.threads else 'the cores of this rank'}")
    numerics(config.deterministic, cpu)
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        decisions.append(
            f"accelerate launch asked for the compiler {compiler}, which is left out: compile is fastddr's --compile"
        )
    # The precision of an earlier run in this process is still Accelerate's, which refuses another one. Nothing else is
    # forgotten: device and process group are `PartialState`'s.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=cpu,
        dynamo_backend="no",
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulation,
        step_scheduler_with_optimizer=False,
    )
    accelerator.ddp_handler = share_gradients(accumulation)  # as an argument it may not be of a class of ours
    # Every rank the same seed: the weights start equal, and what differs by rank is drawn from (seed, epoch, id).
    torch.manual_seed(config.seed)
    return Runtime(
        accelerator=accelerator,
        device=accelerator.device,
        precision=precision,
        threads=threads,
        rank=state.process_index,
        world=state.num_processes,
        micro_batch_size=micro,
        accumulation=accumulation,
        decisions=tuple(decisions),
    )
