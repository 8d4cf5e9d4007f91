"""A benchmark's result as a Weights & Biases run, so that speed and memory are seen over time beside the training runs.

One run a result: project `fastddr`, job type `benchmark`, group = the benchmark, name = the result's file. The JSON is
written before and is the truth; whatever goes wrong here is one sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastddr.tracking.wandb_run import FINISH_TIMEOUT, INIT_TIMEOUT, choose_mode

#: Where the runs' files go, below the working directory, as those of training runs do.
FOLDER = Path("runs") / "benchmarks"
#: Settings that stand in the name of a figure, where a row has them. The same ones every time, whether they differ
#: between the rows of this result or not: a figure must keep its name from one result to the next.
_SETTINGS = (
    "photographs", "preset", "policy", "model", "mode", "layout", "precision", "dtype", "image_size", "channels",
    "side", "batch_size",
)  # fmt: skip
#: What a row may tell beside its own figure, as well as all that ends with `_gib`.
_COSTS = ("low", "high", "data_wait", "cpu_share", "gpu_use", "share_of_copy", "share_of_matmul", "roofline_share")


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each row's median, interval and costs by readable names, `KIND/SETTINGS/NAME` and that with `/low` and so on.

    Of a row that failed the reason is kept, as `.../failed`. Names that are alike are numbered.
    """
    found: dict[str, Any] = {}
    for row in rows:
        plain = key = _key(row)
        number = 1
        while key in found or f"{key}/failed" in found:
            number += 1
            key = f"{plain} #{number}"
        if "failed" in row:
            found[f"{key}/failed"] = str(row["failed"])
            continue
        found[key] = row["median"]
        found |= {f"{key}/{name}": row[name] for name in row if _is_cost(name) and row[name] is not None}
    return found


def _is_cost(name: str) -> bool:
    return name in _COSTS or name.endswith("_gib")


def keep(record: Mapping[str, Any], result: Path, *, say: Callable[[str], None]) -> None:
    """Make the run and end it. Online or offline as WANDB_MODE says, else online where there is a login.

    Args:
        record: what `harness.writing` wrote.
        result: where; its name is the run's.
        say: gets one line: the page of the run, or what to type to upload it, or why there is none.
    """
    if os.environ.get("WANDB_MODE", "").lower() == "disabled":  # before wandb is looked for, which may not be there
        say(f"W&B is off by WANDB_MODE; the figures are in {result.name}.")
        return
    try:
        import wandb
    except ImportError as problem:
        say(f"W&B is off, the figures are in {result.name}: {_line(problem)}")
        return
    folder = FOLDER.absolute() / result.stem
    own_data_dir = "WANDB_DATA_DIR" not in os.environ
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if own_data_dir:  # where a table is staged; by default outside the folder
            os.environ["WANDB_DATA_DIR"] = str(folder)
        said = _kept(wandb, record, result, folder)
    except Exception as problem:  # noqa: BLE001  # wandb's errors derive from no class of its own
        said = f"W&B is off, the figures are in {result.name}: {_line(problem)}"
    finally:
        if own_data_dir:
            os.environ.pop("WANDB_DATA_DIR", None)
    say(said)


def _kept(wandb: Any, record: Mapping[str, Any], result: Path, folder: Path) -> str:
    mode, why = choose_mode(wandb)
    if mode == "disabled":
        return f"W&B is off by {why}; the figures are in {result.name}."
    try:
        run = _begun(wandb, mode, record, result, folder)
    except Exception as problem:  # wandb's errors again; offline it goes to the one above
        if mode in ("offline", "dryrun"):
            raise
        # The service still holds the run.
        wandb.teardown()
        why = f"could not come online: {_line(problem)}"
        run = _begun(wandb, "offline", record, result, folder)
    rows = record["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = wandb.Table(
        columns=columns, data=[[_cell(row.get(name)) for name in columns] for row in rows], allow_mixed_types=True
    )
    run.log({"rows": table})
    run.summary.update(figures(rows))
    # A copy in the run's own folder: W&B would only link to the file, which may be gone at the upload.
    shutil.copyfile(result, Path(run.dir) / result.name)
    run.save(str(Path(run.dir) / result.name), base_path=run.dir, policy="now")
    offline, url, place = run.offline, run.url, _short(Path(run.dir).parent)
    run.finish()
    if offline:
        return f"W&B: offline ({why}); upload later with: wandb sync {shlex.quote(place)}"
    return f"W&B: {url}"


def _begun(wandb: Any, mode: str, record: Mapping[str, Any], result: Path, folder: Path) -> Any:
    return wandb.init(
        project="fastddr",
        job_type="benchmark",
        group=record["benchmark"],
        name=result.stem,
        dir=str(folder),
        reinit="create_new",  # never a run that someone else began in this process
        mode=mode,
        config={key: value for key, value in record.items() if key != "rows"},
        settings=wandb.Settings(
            silent=True, console="off", init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT
        ),
    )  # fmt: skip


def _key(row: Mapping[str, Any]) -> str:
    settings = [_setting(name, row[name]) for name in _SETTINGS if name in row]
    return "/".join(_plain(part) for part in (row.get("kind", ""), ", ".join(settings), row["name"]) if part)


def _setting(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{name.replace('_', ' ')} {value}"


def _plain(part: str) -> str:
    """Without slashes, which part a name into sections."""
    return part.replace(" / ", " over ").replace("/", "-")


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _line(problem: Exception) -> str:
    """The first line of an error's text, or its name where it has none."""
    return str(problem).strip().split("\n")[0] or type(problem).__name__


def _short(path: Path) -> str:
    """The path as the user would type it: relative to where they are, if it lies below."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
