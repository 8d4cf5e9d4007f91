"""Everything on this machine in one command, most important first: is my machine all right?

    python benchmarks/suite.py                  # ten minutes, on a GPU or a CPU
    python benchmarks/suite.py --minutes 25     # with more time for each part
    python benchmarks/suite.py --tiny           # a rehearsal in a few minutes on a CPU

Each part is a benchmark of this folder in a process of its own, with its JSON and its log in the output folder, and
`suite.json` after each part: a part that crashes or takes too long is said, and the next one goes on. At the end the
figures are compared with those in `results/` of the same hardware, and `diagnosis` says what is slow and why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import compare
import diagnosis
import harness
import script
import stored
import torch

from fastddr.errors import UserError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A benchmark, its arguments by machine, and its share of the time."""

    name: str
    share: float
    gpu: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    seconds: float | None = None
    """Of a script with `--seconds`, after which it begins nothing new: this share of its time."""
    gpus: int = 0
    """How many GPUs it needs, except in a rehearsal on a CPU."""

    def arguments(self, *, gpu: bool, tiny: bool) -> tuple[str, ...]:
        """What its script is given."""
        return self.tiny if tiny else self.gpu if gpu else self.cpu


_TINY_SET = ("--photographs", "60")
#: In the order of their weight: first whether the decoder can be trusted, then the table that decides about kernels.
#: What a GPU is given is chosen to end within ten minutes for all: on a GPU a process takes some ten seconds to begin,
#: and compiling a model half a minute.
PARTS = (
    Part(
        "decode", 1.1,
        # As training decodes; the other ways are of no weight for it.
        gpu=("--photographs", "96", "--limit", "25", "--ways", "training", "--batches", "16", "--compared", "32"),
        tiny=(*_TINY_SET, "--batch-size", "8", "--batches", "4", "--compared", "8"),
    ),
    # The decoder's photographs, so that none have to be made.
    Part("ceilings", 0.5, gpu=("--encodings", "95-420", "--photographs", "96"), tiny=("--tiny",)),
    Part("operations", 0.8, gpu=("--dtypes", "bf16", "--rounds", "5"), tiny=("--tiny", "--rounds", "5")),
    Part(
        "step", 3.0,
        # All that `step.py` could do takes hours to compile.
        gpu=("--modes", "eager", "compile", "deterministic", "--rounds", "5", "--layout-optimization", "on",
             "--models", "convmixer-512-12-k9-p8", "timm:convmixer-512-12-k9-p8"),
        tiny=("--tiny", "--rounds", "5"),
        # What is compiled then has yet to race.
        seconds=0.55,
    ),
    Part(
        "loader", 2.8,
        gpu=("--encodings", "95-420", "--policies", "report", "--rounds", "5", "--seconds", "0.5", "--loaders", "dali",
             "resident:vram", "torch-pil", "torchvision-gpu", "resident:ram", "--step", "dali", "resident"),
        cpu=("--encodings", "95-420", "--policies", "report", "--rounds", "5", "--seconds", "0.8", "--length", "0",
             "--loaders", "dali", "resident:mmap", "torch-pil", "replay"),
        tiny=(*_TINY_SET, "--encodings", "95-420", "--policies", "report", "--rounds", "5", "--seconds", "0.05",
              "--length", "0", "--batch-size", "8", "--loaders", "dali", "torch-pil"),
    ),
    Part(
        "memory", 1.2,
        # Five, of which the error of the prediction has a median.
        gpu=("--image-sizes", "256", "--batch-sizes", "16", "--recomputed", "False", "--precisions", "bf16",
             "--models", "convmixer-512-12-k9-p8", "resnet,depth=40", "cnn", "timm:resnet50", "timm:convnext_tiny"),
        cpu=("--tiny",),
        # A process a trial, most of whose time is its start.
        tiny=("--tiny", "--models", "cnn,blocks=2,width=8", "--image-sizes", "32", "64", "96", "128", "160"),
    ),
    Part(
        "train", 3.4,
        # What is compiled comes last: the others would not begin any more.
        gpu=("--length", "3130", "--recipes", "fastddr", "fastddr:loader=replay", "report", "timm:compile"),
        cpu=("--recipes", "fastddr", "fastddr:loader=replay", "report:channels_last,workers=0",
             "timm:channels_last,workers=0"),
        tiny=(*_TINY_SET, "--batch-sizes", "8", "--recipes", "fastddr", "fastddr:loader=replay", "report:workers=0"),
        # Then all that has begun has yet to race.
        seconds=0.6,
    ),
    # Where there are several GPUs.
    Part("scaling", 0.5, gpu=("--rounds", "5"), tiny=("--rounds", "5", "--steps", "1", "--image-size", "32"), gpus=2),
)  # fmt: skip


@dataclass
class Options:
    """Measure everything."""

    minutes: float = 10.0
    """For all parts together; each gets its share, and what the earlier ones left over."""
    parts: tuple[str, ...] = field(default_factory=lambda: tuple(part.name for part in PARTS))
    """Which, in this order."""
    tiny: bool = False
    """Little of everything, for a rehearsal; nothing is compared."""
    out: Path | None = None
    """The folder; by default runs/suite-TIME. Copy its JSON files to benchmarks/results/ to keep them there."""
    results: Path = stored.RESULTS
    """What to compare with."""
    wandb: bool = False
    """Also keep the figures of each part as a W&B run of job type `benchmark`."""


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    state: str
    """done, failed, stopped (out of time)."""
    seconds: float = 0.0
    why: str = ""
    file: str = ""


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts of these names.

    Raises:
        UserError: there is no such part.
    """
    known = {part.name: part for part in PARTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--parts {' '.join(unknown)}: known are {', '.join(known)}.")
    return [known[name] for name in names]


def run(part: Part, arguments: Sequence[str], folder: Path, limit: float) -> Outcome:
    """Run a part for `limit` seconds at most. What it had written by then is kept."""
    file = folder / harness.place(part.name).name
    log = folder / f"{part.name}.log"
    command = [sys.executable, str(HERE / f"{part.name}.py"), *arguments, "--out", str(file)]
    # In a folder that is used again an earlier result of this day may stay.
    places = (file, harness.incomplete(file))
    before = [_written(place) for place in places]
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
            state, why = ("done", "") if code == 0 else ("failed", f"exit code {code}: {_last_line(log)}")
        except subprocess.TimeoutExpired:
            _end(process)
            state, why = "stopped", f"it was not done after {limit:.0f} s"
        except BaseException:  # Ctrl-C: the part must not outlive the suite
            _end(process)
            raise
    seconds = round(time.perf_counter() - began, 1)
    new = (place.name for place, then in zip(places, before, strict=True) if _written(place) != then)
    return Outcome(part.name, state, seconds, why, next(new, ""))


def _end(process: subprocess.Popen[bytes]) -> None:
    """First as Ctrl-C, so that it writes what it has and ends its own processes."""
    process.terminate()
    try:
        process.wait(20)
    finally:
        process.kill()  # nothing of one that has ended
        process.wait()


def _written(file: Path) -> tuple[int, int] | None:
    """What changes when a result is written; None where there is none."""
    if not file.exists():
        return None
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def environment() -> dict[str, Any]:
    """What every figure depends on."""
    return {
        "machine": harness.machine(),
        "versions": harness.versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "conditions": harness.begin(),
    }


def collected(folder: Path, outcomes: Sequence[Outcome]) -> dict[str, stored.Result]:
    """The results that there are, by benchmark."""
    return {outcome.name: stored.read(folder / outcome.file) for outcome in outcomes if outcome.file}


def verdict(found: Mapping[str, stored.Result], results: Path, *, tiny: bool) -> dict[str, Any]:
    """Comparison and diagnosis, for people and for `suite.json`."""
    older = [] if tiny or not results.is_dir() else stored.newest(results)
    compared = {}
    for name, result in found.items():
        partner = compare.partner(result, older)
        if partner is not None:
            compared[name] = {
                "with": partner.path.name,
                "changes": [asdict(change) for change in compare.changes(result, partner)],
            }
    return {"summary": diagnosis.summary(found), "compared": compared, "diagnosis": diagnosis.tell(found, older)}


def main(options: Options) -> int:
    """Run all parts; exit code 1 if one failed."""
    say = harness.say
    gpu = torch.cuda.is_available()
    rehearsed = options.tiny and not gpu
    parts = [part for part in chosen(options.parts) if rehearsed or part.gpus <= torch.cuda.device_count()]
    if options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes:g}: give it some time, ten are enough for most machines.")
    folder = options.out or Path("runs") / f"suite-{datetime.now():%Y%m%d-%H%M%S}"
    harness.check_folder(folder)
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment()}
    say(f"{harness.hardware_name(record['environment']['machine'])}, into {folder}")
    ends = time.perf_counter() + 60 * options.minutes
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        left = sum(later.share for later in parts[number:])
        limit = max(ends - time.perf_counter(), 0.0) * part.share / left
        arguments = [*part.arguments(gpu=gpu, tiny=options.tiny), *(["--wandb"] if options.wandb else [])]
        if part.seconds is not None:
            arguments += ["--seconds", f"{part.seconds * limit:.0f}"]
        outcome = run(part, arguments, folder, limit)
        outcomes.append(outcome)
        said = f"{outcome.state} in {outcome.seconds:.0f} s" if outcome.state == "done" else outcome.state
        say(f"{part.name}: {said}{': ' * bool(outcome.why)}{outcome.why}")
        record |= {"parts": [asdict(each) for each in outcomes]}
        # What is known so far, should the machine go away.
        record |= verdict(collected(folder, outcomes), options.results, tiny=options.tiny)
        (folder / "suite.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, figure in record.get("summary", {}).items():
        say(f"  {name}: {figure}")
    for name, found in record.get("compared", {}).items():
        worse = sum(change["worse"] for change in found["changes"])
        say(f"{name}: {len(found['changes'])} figures are also in {found['with']}, {worse} of them worse now")
    if not record.get("compared") and not options.tiny:
        say(f"No result of this hardware is stored in {options.results.name}/, so nothing is compared.")
    for sentence in record.get("diagnosis", []):
        say(f"- {sentence}")
    say(f"written to {folder / 'suite.json'}")
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    script.run(main, Options)
