"""What the documents tell a reader to type works."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro
from tests_support import ROOT

import fastddr
from fastddr import cli, models, verbs
from fastddr.__main__ import LATER, VERBS
from fastddr.config import flatten
from fastddr.inference import flags
from fastddr.memory import questions
from fastddr.memory.asked import Plan

PAGES = ("README.md", "launch/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


def blocks(page: str) -> Iterator[str]:
    """The indented blocks of a page."""
    for found in re.finditer(r"(?:^    .*\n|^\n+(?=    ))+", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


def spans(page: str) -> Iterator[str]:
    """What a page has between backticks, in one line each."""
    for found in re.findall(r"`([^`]+)`", (ROOT / page).read_text(encoding="utf-8")):
        yield " ".join(found.split())


def run(page: str, holding: str, **names: Any) -> dict[str, Any]:
    """Executes the one block of a page that holds these words, with `names`; its names."""
    (block,) = [found for found in blocks(page) if holding in found]
    names = {"__name__": __name__, **names}  # timm asks for the module of a model
    exec(compile(block, page, "exec"), names)
    return names


#: How a command of ours begins, and the words by which it goes on; what a shell script is given goes to a training.
BEGINS = (
    (r"(?:fastddr/train\.py|launch/(?:local|multi_gpu|multi_node)\.sh|\.sbatch \S+)", "train"),
    (r"(?:(?:^|(?<!from) )fastddr|mine\.py) (?=[a-z])", ""),
    (r"python (?=benchmarks/\w+\.py)", ""),
)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of ours in a piece of shell: a verb or a benchmark, and what it is given."""
    for line in re.sub(r"(?m)(?:^| )#.*", "", text.replace("\\\n", " ")).splitlines():
        for begins, first in BEGINS:
            for found in re.finditer(begins, line):
                rest = first + re.sub(r"\$\w+", "0", line[found.end() :])
                words = shlex.shlex(rest, posix=True, punctuation_chars=True)
                words.whitespace_split = True
                given = itertools.takewhile(lambda word: not set(word) <= set("();<>|&"), words)
                # Settings of one's own are quickstart's here.
                yield [re.sub(r"^\S+\.yaml$", "quickstart", word) for word in given if word != "..."]


def told(page: str) -> list[list[str]]:
    """All commands of a page's blocks; those of benchmarks, which need nothing but flags, in its lines as well."""
    within = [words for span in spans(page) for words in commands(span) if "/" in words[0]]
    return [*(words for block in blocks(page) for words in commands(block)), *within]


def understand(words: list[str], load: Any) -> None:
    """Parses a command as its own `main` does."""
    program, *given = words
    if program == "train":
        cli.parse(given, program)
    elif program == "plan":
        asked, training = cli.known(Plan, given, program)
        questions.configured(training, asked.depth)
    elif program in verbs.VERBS:
        cli.flags(verbs.VERBS[program], given, program)
    elif program in LATER:
        cli.flags(getattr(flags, program.capitalize()), given, program)
    else:
        tyro.cli(load(Path(program).stem).Options, args=given)


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_is_told_is_understood(page: str, load: Any) -> None:
    for words in told(page):
        understand(words, load)


def test_there_are_such_commands() -> None:
    found = [words[0] for page in PAGES for words in told(page)]
    assert set(found) >= set(VERBS)
    assert found.count("train") >= 20
    assert len({program for program in found if program.startswith("benchmarks/")}) >= 15


#: Flags of other programs that the pages name beside ours.
OTHERS = {
    "--account", "--config_file", "--cpu", "--exclusive", "--gpus-per-node", "--help", "--ipc", "--logdir",
    "--machine_rank", "--mem", "--multi_gpu", "--no-deps", "--partition", "--resolution", "--shm-size", "--time",
}  # fmt: skip


def test_every_flag_that_is_named_is_there(load: Any) -> None:
    """Also beside no command; in docs/coming-from.md they stand beside those of others."""
    known = {"--" + key.replace("_", "-") for key in flatten(asdict(cli.parse([], "test")))}
    known |= {re.sub(r"(--|\.)(?=[^.]+$)", r"\1no-", flag) for flag in known}
    benchmarks = [load(path.stem) for path in (ROOT / "benchmarks").glob("*.py") if "class Options" in path.read_text()]
    asked = [*verbs.VERBS.values(), *(getattr(flags, verb.capitalize()) for verb in LATER), Plan]
    for made in (*asked, *(benchmark.Options for benchmark in benchmarks)):
        known |= {"--" + field.name.removeprefix("as_").replace("_", "-") for field in fields(made)}
    for page in sorted({*PAGES, "CONTRIBUTING.md"} - {"docs/coming-from.md"}):
        named = re.findall(r"(?<!\S)--[a-z][a-z0-9_.-]*[a-z0-9](?![\w.*-])", "\n".join(spans(page)))
        assert set(named) <= known | OTHERS, page


def test_flags_beside_those_of_others_are_ours() -> None:
    """In docs/coming-from.md the last column is fastddr's; flags of its other verbs are not settings."""
    known = {"--" + key.replace("_", "-") for key in flatten(asdict(cli.parse([], "test")))}
    known |= {flag.replace(".", ".no-") for flag in known} | {"--tta", "--split"}
    rows = [line for line in (ROOT / "docs/coming-from.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    told = {flag for row in rows for flag in re.findall(r"--[a-z][a-z.-]*", row.strip("| ").split(" | ", 1)[1])}
    assert len(told) > 20
    assert told <= known


def test_what_is_told_of_python_runs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that was stopped goes on as it says, from the Trainer's own settings."""
    chosen = {
        "data": str(tiny), "image_size": 64, "canvas": 80, "batch_size": 8, "threads": 1, "max_hours": 1e-9,
        "convmixer": {"dim": 8, "depth": 1}, "tracking": {"wandb": False, "tensorboard": False},
    }  # fmt: skip
    whole = fastddr.load_preset
    monkeypatch.setattr(fastddr, "load_preset", lambda name, over: whole(name, over | chosen))
    monkeypatch.chdir(tmp_path)
    first = run("README.md", "trainer.fit()", __name__="__main__")["trainer"]
    assert first.stopped
    with fastddr.Trainer(replace(first.config, max_hours=None)) as trainer:
        trainer.fit()
    assert (trainer.finished, trainer.run.path, trainer.progress.epoch) == (True, first.run.path, 3)
    assert trainer.config.augment.rotate == 180
    Path("runs/NAME").symlink_to(trainer.run.path.name)
    names = run("README.md", "fastddr.load(", fastddr=fastddr, images=torch.zeros(2, 3, 64, 64))
    assert names["logits"].shape == (2, 5)


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
