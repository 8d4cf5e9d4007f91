"""How soon `fastddr` answers: help, and questions about memory, with an empty cache and again.

    python benchmarks/answers.py

Each answer is a process of its own, from its start to its end, as a user waits for it. Every question is asked twice a
round: with an empty cache, so that all it needs is traced, and again. `target` is the most that it should take then.
The table is of all models at two sizes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import script

from fastddr.errors import UserError

ROOT = Path(__file__).parents[1]
#: Seconds that an answer should take at most: one training, and the table.
ONE, TABLE = 20, 60
#: By name, what is asked, and the target with an empty cache.
QUESTIONS: dict[str, tuple[tuple[str, ...], float]] = {
    "ConvMixer 512/12, 256 px": (("--model", "convmixer", "--vram", "8"), ONE),
    "the report's ResNet of 40 layers, 512 px, full resolution behind the stem": (
        ("--model", "resnet", "--depth", "40", "--resnet.stem", "stride1", "--image-size", "512", "--precision", "fp32",
         "--batch-size", "16", "--vram", "8"), ONE),
    "ResNet of 101 layers, 512 px, too large": (
        ("--model", "resnet", "--depth", "101", "--image-size", "512", "--batch-size", "64", "--vram", "4"), ONE),
    "timm's ConvNeXt-T, 512 px, too large": (
        ("--model", "timm:convnext_tiny", "--image-size", "512", "--batch-size", "64", "--vram", "4"), ONE),
    "the table": (("--vram", "8"), TABLE),
}  # fmt: skip


@dataclass
class Options(script.Output):
    """Time the answers of `fastddr`."""

    rounds: int = 5
    """How often each is asked, at least 5."""


def seconds(arguments: tuple[str, ...], cache: Path) -> float:
    """How long `fastddr ARGUMENTS` takes.

    Raises:
        UserError: it ends with an error.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"FASTDDR_CACHE": str(cache), "PYTHONPATH": paths}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fastddr", *arguments], env=environment, capture_output=True, text=True
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"fastddr {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return took


def asked(questions: dict[str, tuple[tuple[str, ...], float]], folder: Path) -> dict[str, Callable[[], float]]:
    """The trials: help, and each question with an empty cache and, right after that, again."""
    trials: dict[str, Callable[[], float]] = {
        "help of predict": lambda: seconds(("predict", "--help"), folder / "none")
    }
    number = 0

    def afresh(flags: tuple[str, ...]) -> float:
        nonlocal number
        number += 1
        return seconds(("plan", *flags), folder / str(number))

    for name, (flags, _) in questions.items():
        trials[name] = lambda flags=flags: afresh(flags)
        trials[f"{name}, again"] = lambda flags=flags: seconds(("plan", *flags), folder / str(number))
    return trials


def main(options: Options, questions: dict[str, tuple[tuple[str, ...], float]] | None = None) -> None:
    """Measure, print and write.

    Raises:
        UserError: too few rounds, or a question that cannot be answered.
    """
    harness.begin(options.rounds)
    questions = QUESTIONS if questions is None else questions
    if importlib.util.find_spec("timm") is None:
        left = [name for name, (flags, _) in questions.items() if any(flag.startswith("timm:") for flag in flags)]
        questions = {name: question for name, question in questions.items() if name not in left}
        if left:
            harness.say(f"without timm: left out {', '.join(left)}; pip install -e '.[timm]'")
    rows: list[dict[str, Any]] = []
    found: dict[str, list[float]] = {}
    with (
        harness.writing("answers", rows, options.out, wandb=options.wandb),
        tempfile.TemporaryDirectory() as folder,
    ):
        trials = asked(questions, Path(folder))
        try:
            harness.interleaved(
                trials, options.rounds, lambda k: harness.say(f"  round {k} of {options.rounds}"), found=found
            )
        finally:
            # Also where it is stopped; else all rounds are whole.
            for name, values in harness.whole_rounds(found).items():
                row = {"name": name, "kind": "answer", **harness.spread(values), "unit": "s"}
                if name in questions:
                    most = questions[name][1]
                    row |= {"flags": " ".join(questions[name][0]), "target": most, "met": row["median"] <= most}
                rows.append(row)
        harness.show("Seconds to an answer", rows)


if __name__ == "__main__":
    script.run(main, Options)
