"""Steps that changed nothing: which photographs were in one whose loss or gradient was not finite, and in float16 how
many of them the scaler left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddr import ranks
from fastddr.loaders.base import Batch

#: Steps in a row that the scaler left out, at which its scale is no longer why: from PyTorch's first, 2 ** 16, it has
#: come down to 2 ** -8.
OVERFLOWS = 24


@dataclass(frozen=True)
class Bad:
    """A step that changed nothing, because its loss or its gradient was not finite."""

    step: int
    ids: Sequence[int]
    """Photographs of this rank's micro batches whose loss was not finite; of all its micro batches if there is none."""
    certain: bool
    """Whether there is one."""


def listed(names: Sequence[str], most: int = 4) -> str:
    """`photographs a.jpg, b.jpg and 5 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"photographs {', '.join(names[:most])}{more}"


def suspects(bad: Bad, paths: Sequence[str]) -> list[str]:
    """Names of the photographs of a bad step, of all ranks; `paths` has the name of each id. Called by all ranks."""
    everywhere = ranks.gather([(bad.certain, [paths[id_] for id_ in bad.ids])])
    sure = [names for certain, names in everywhere if certain]
    return [name for part in sure or [names for _, names in everywhere] for name in part]


def noted(batches: Iterable[Batch], ids: list[Tensor]) -> Iterator[Batch]:
    """The same batches; their ids are kept in `ids` as they pass."""
    for batch in batches:
        ids.append(batch.id)
        yield batch


class Watch:
    """Tells of bad steps: at once on a CPU, one step late on a GPU, where to know sooner would be to wait."""

    def __init__(self, device: torch.device, overflowed: int = 0) -> None:
        #: Steps that the scaler left out, which is no fault while it looks for its scale.
        self.overflowed = overflowed
        self._in_a_row = 0
        self._gpu = device.type == "cuda"
        self._waiting: tuple[Tensor, torch.cuda.Event, int, list[Tensor]] | None = None

    def look(self, found: Tensor, step: int, ids: list[Tensor]) -> Bad | None:
        """Hand over what `training_step` returned of a step; what is known of this one or of the one before."""
        if not self._gpu:
            return self._told(found, step, ids)
        told = self.settle()
        host = torch.empty(found.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting = host, event, step, ids
        return told

    def settle(self) -> Bad | None:
        """As `look`, of the last step."""
        if self._waiting is None:
            return None
        host, event, step, ids = self._waiting
        self._waiting = None
        event.synchronize()
        return self._told(host, step, ids)

    def _told(self, found: Tensor, step: int, ids: Sequence[Tensor]) -> Bad | None:
        bad, overflowed, *spoilt = found.tolist()
        self._in_a_row = self._in_a_row + 1 if overflowed else 0
        if overflowed and self._in_a_row < OVERFLOWS:
            self.overflowed += 1
            return None
        if not (bad or overflowed):
            return None
        # A gradient can overflow where no loss did; then any photograph of the step may be why.
        certain = any(spoilt)
        chosen = [part for part, its in zip(ids, spoilt, strict=True) if its or not certain]
        return Bad(step, [int(id_) for part in chosen for id_ in part.tolist()], certain)
