"""Which photographs were in a step whose gradient was not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddr.loaders.base import Batch

#: Photographs that are named.
_NAMED = 4


@dataclass(frozen=True)
class Bad:
    """A step that changed nothing."""

    step: int
    ids: Sequence[int]
    """Its photographs on this rank."""

    def sentence(self, paths: Sequence[str]) -> str:
        """What happened, and to which photographs; without a full stop."""
        names = ", ".join(paths[id_] for id_ in self.ids[:_NAMED])
        more = f" and {len(self.ids) - _NAMED} more" if len(self.ids) > _NAMED else ""
        return f"the gradient of step {self.step} is not finite (photographs {names}{more})"


def noted(batches: Iterable[Batch], ids: list[Tensor]) -> Iterator[Batch]:
    """The same batches; their ids are kept in `ids` as they pass."""
    for batch in batches:
        ids.append(batch.id)
        yield batch


class Watch:
    """Tells of bad steps: at once on a CPU, one step late on a GPU, where to know sooner would be to wait."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._waiting: tuple[Tensor, torch.cuda.Event, int, list[Tensor]] | None = None

    def look(self, bad: Tensor, step: int, ids: list[Tensor]) -> Bad | None:
        """Hand over what `training_step` returned of a step; what is known of this one or of the one before."""
        if not self._gpu:
            return _told(step, ids) if bad else None
        told = self.settle()
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(bad, non_blocking=True)
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
        return _told(step, ids) if host else None


def _told(step: int, ids: Sequence[Tensor]) -> Bad:
    return Bad(step, [int(id_) for part in ids for id_ in part.tolist()])
