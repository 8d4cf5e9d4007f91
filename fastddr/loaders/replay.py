"""One batch again and again: the ceiling that the other loaders are measured against."""

from __future__ import annotations

from collections.abc import Callable, Generator

from torch import Tensor

from fastddr.loaders.base import Loader, Requests, Task


class ReplayLoader(Loader):
    """Repeats the images of the first micro batch that it was asked for; ids and grades go on as they would."""

    name = "replay"

    def __init__(self, task: Task, source: Callable[[Task], Loader]) -> None:
        super().__init__(task)
        self._source = source
        self._kept: Tensor | None = None

    def _images(self, requests: Requests, start: int) -> Generator[Tensor, None, None]:
        if self._kept is None:
            loader = self._source(self.task)
            images = loader._images(requests, start)
            self._kept = next(images).to(self.task.device, self.task.dtype).clone()
            images.close()
            loader.close()
        for _ in range(start, len(requests)):
            yield self._kept
