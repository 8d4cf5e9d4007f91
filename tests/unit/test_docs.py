"""What the documents tell a reader to type works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import ROOT

from fastddr import cli, models
from fastddr.config import flatten

PAGES = ("README.md", "launch/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


def blocks(page: str) -> Iterator[str]:
    """The indented blocks of a page."""
    for found in re.finditer(r"(?:^    .*\n|^\n+(?=    ))+", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


def run(page: str, holding: str) -> dict[str, Any]:
    """Executes the one block of a page that holds these words; its names."""
    (block,) = [found for found in blocks(page) if holding in found]
    names: dict[str, Any] = {"__name__": __name__}  # timm asks for the module of a model
    exec(compile(block, page, "exec"), names)
    return names


def commands(page: str) -> Iterator[list[str]]:
    """The flags of every training that a page's blocks start, as a shell would hand them over."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:fastddr/train\.py|fastddr train|launch/(?:local|multi_gpu)\.sh) +(--.*)", line)
            if found:
                words = re.sub(r"[>;].*", "", found[1])
                yield shlex.split(re.sub(r"\$\w+", "0", words), comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_a_training_that_is_told_is_understood(page: str) -> None:
    for words in commands(page):
        if "runs/NAME/config.yaml" not in words:
            cli.parse(words, page)


def test_there_are_such_trainings() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) >= 10


def test_flags_beside_those_of_others_are_ours() -> None:
    """In docs/coming-from.md the last column is fastddr's; flags of its other verbs are not settings."""
    known = {"--" + key.replace("_", "-") for key in flatten(asdict(cli.parse([], "test")))}
    known |= {flag.replace(".", ".no-") for flag in known} | {"--tta", "--split"}
    rows = [line for line in (ROOT / "docs/coming-from.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    told = {flag for row in rows for flag in re.findall(r"--[a-z][a-z.-]*", row.strip("| ").split(" | ", 1)[1])}
    assert len(told) > 20
    assert told <= known


def test_the_sheet_of_augmented_photographs_is_drawn(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "masters").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    run("docs/augmentation.md", "fundus.png")
    assert (tmp_path / "fundus.png").stat().st_size > 10_000


def test_the_loader_works_in_a_loop_of_ones_own(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "masters").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    names = run("docs/loading.md", "loader.epoch(epoch)")
    assert names["epoch"] == 1
    assert names["loss"].isfinite()
    with pytest.raises(RuntimeError, match="closed"):
        names["loader"].epoch(2)


def test_tuples_of_each_epoch_are_what_lightning_gets() -> None:
    class Loader:
        def __len__(self) -> int:
            return 1

        def epoch(self, epoch: int) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(image=epoch, grade=0)

    epochs = run("docs/loading.md", "class Epochs")["Epochs"](Loader())
    assert (len(epochs), [list(epochs), list(epochs)]) == (1, [[(0, 0)], [(1, 0)]])


def test_a_model_of_ones_own_is_built_by_its_name() -> None:
    pytest.importorskip("timm")
    run("docs/models.md", "register_model")
    model = models.build("timm:small_net", num_classes=3, image_size=64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_the_lines_to_change_are_in_the_script() -> None:
    """For one GPU of a machine, under SLURM."""
    told = re.findall(r"^    (#SBATCH \S+) +->", (ROOT / "launch/README.md").read_text(), re.MULTILINE)
    assert len(told) == 2
    assert set(told) <= set((ROOT / "launch/slurm.sbatch").read_text().splitlines())
