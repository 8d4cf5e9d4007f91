"""A model on a split: every photograph once, whatever the number of ranks and the padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastddr.evaluation.metrics import SplitResult
from fastddr.loaders.base import Loader


@torch.inference_mode()
def score(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    *,
    paths: Sequence[str],
    weights: str,
    patients: Sequence[str] | None = None,
    on_batch: Callable[[], object] | None = None,
) -> SplitResult:
    """The logits of every photograph of the loader's split, in the order of their ids, on every rank.

    Where the loader gives several windows of a photograph, they are the logarithm of the windows' mean probabilities.

    Args:
        accelerator: gathers from all ranks; its autocast is the model's.
        model: bare, not wrapped by DDP: images (b, 3, h, w) to logits (b, C).
        loader: an evaluation loader.
        paths: name of each id, as the reports show it.
        weights: which weights these are, for the reader of the report.
        patients: of each id, None where none is known.
        on_batch: called after each batch; what it raises ends the scoring.
    """
    was_training = model.training
    # What a model keeps while it is scored, as LeViT its attention's biases, timm 1.0.15 forgets on this call alone;
    # averaged weights change, and are never trained.
    model.train()
    model.eval()
    parts = []
    try:
        for batch in loader.epoch():
            with accelerator.autocast():
                logits = model(batch.image)
            parts.append((logits.float(), batch.grade, batch.id, batch.valid))
            if on_batch is not None:
                on_batch()
        # Once more before the ranks wait for each other's GPUs: there nobody could be told of a rank that is lost.
        if on_batch is not None:
            on_batch()
    finally:
        model.train(was_training)
    # Every rank holds as many rows, padding included, so one plain gather a tensor does it.
    logits, grades, ids, valid = (accelerator.gather(torch.cat(column)).cpu() for column in zip(*parts, strict=True))
    logits, grades, ids = logits[valid], grades[valid], ids[valid]
    if loader.task.views > 1:
        logits, grades, ids = _mean(logits, grades, ids, loader.task.views)
    order = ids.argsort()
    wanted = torch.as_tensor(loader.task.ids).sort().values
    if not torch.equal(ids[order], wanted):
        raise RuntimeError(f"scored {len(ids)} photographs where the split has {len(wanted)}, or not the same ones")
    ids = ids[order]
    rows = ids.tolist()
    return SplitResult(
        logits=logits[order], grades=grades[order], ids=ids, paths=[paths[i] for i in rows], weights=weights,
        patients=None if patients is None else [patients[i] for i in rows],
    )  # fmt: skip


def _mean(
    logits: Float[Tensor, "v C"], grades: Int[Tensor, " v"], ids: Int[Tensor, " v"], views: int
) -> tuple[Float[Tensor, "n C"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """One row for each photograph, of the rows of its windows."""
    order = ids.argsort(stable=True)
    logits, grades, ids = (column[order].unflatten(0, (-1, views)) for column in (logits, grades, ids))
    if not torch.equal(ids, ids[:, :1].expand_as(ids)):
        raise RuntimeError(f"not every photograph was scored in {views} windows")
    return logits.log_softmax(2).logsumexp(1) - math.log(views), grades[:, 0], ids[:, 0]
