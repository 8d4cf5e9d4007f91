"""Loaders on a card under way: batches that are dropped, or made ahead; a bad photograph; what must change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import needs_dali
from tests_support import batches, runs_ahead, same, task, warm_for_running_ahead

from fastddr import loaders
from fastddr.data import manifest
from fastddr.errors import UserError

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)
#: The loaders that decode on the card.
DECODING = [pytest.param("dali", marks=needs_dali), "resident"]


@pytest.mark.alone
@needs_dali
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_batch_of_dali_that_is_dropped_is_read_before_it_is_written_over(dtype: torch.dtype, tiny: Path) -> None:
    """In these two it is DALI's own buffer. The card is kept behind, and reads it after Python has let go."""
    loader = loaders.build("dali", task(manifest.read(tiny), device=CARD, dtype=dtype))
    calm = [batch.image.clone() for batch in loader.epoch(0)]
    for _ in range(5):
        late = []
        for batch in loader.epoch(0):
            torch.cuda._sleep(5 * 10**7)  # some hundredths of a second
            late.append(batch.image.clone())
            del batch
        assert all(torch.equal(one, other) for one, other in zip(late, calm, strict=True))
    loader.close()


@pytest.mark.alone
@needs_dali
def test_dali_runs_ahead_of_training(tiny: Path) -> None:
    """As far as `_hold_back` lets it: three batches are handed out behind a training that has not begun."""
    found = manifest.read(tiny)
    loader = loaders.build("dali", task(found, device=CARD, ids=found.ids("train")[:24], batch_size=8))
    warm_for_running_ahead(loader)
    runs_ahead(loader)
    loader.close()


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("damage", ["truncated", "junk"])
def test_a_photograph_that_the_card_cannot_decode_is_named(name: str, damage: str, tiny: Path, tmp_path: Path) -> None:
    found = manifest.read(tiny)
    files = found.files()
    content = Path(files[3]).read_bytes()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:2] + b"junk" * 100)
    files[3] = str(bad)
    loader = loaders.build(name, task(found, files=files, ids=np.arange(8), batch_size=8, device=CARD))
    with pytest.raises(UserError, match=r"bad\.jpg"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("name", DECODING)
def test_threads_prefetch_and_the_first_step_change_nothing(name: str, mixed: manifest.Manifest) -> None:
    wanted = task(mixed, batch_size=2, device=CARD)
    expected = batches(name, wanted)
    others: list[dict[str, Any]] = [{"threads": 4}, {"prefetch": 4}, {"prefetch": 1}]
    for changes in others:
        changed = replace(wanted, **changes)
        for start in (0, 1):
            got = batches(name, changed, start=start)
            assert all(same(one, other) for one, other in zip(got, expected[start:], strict=True)), (changes, start)
