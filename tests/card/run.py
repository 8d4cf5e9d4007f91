"""Run a command on a machine without a GPU as if it had one: every line of ours that only a card runs, and PyTorch's.

    python tests/card/run.py pytest tests/gpu -m "gpu and not slow" -n 2 --dist worksteal
    CARD_GIB=6 CARD_COUNT=2 python tests/card/run.py accelerate launch fastddr/train.py --epochs 1

Memory of the allocator and the order of calls are those of a card, values are the CPU's; kernels, their speed and their
scratch, cuDNN, DALI's graph on a GPU, NCCL and `torch.compile` are not there. Tensors of different devices mix
unnoticed, which `tests/fake_card.py` shows. `runtime.c` says what may be set. Needs Linux, a C compiler with binutils,
and a PyTorch for CUDA 13.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"
#: The driver has no card: whoever asks it directly, as DALI does, is told so.
NO_DRIVER = """
int cuInit(unsigned flags) { return 100; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "pretended"; return 0; }
"""


def missing() -> str | None:
    """Why there can be no such card here; None where there can."""
    for tool in ("cc", "nm"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}`"
    if not any(RUNTIME in symbol for symbol in _wanted()):
        return f"PyTorch is not built for {RUNTIME}"
    return None


@cache  # to read them takes seconds
def _wanted() -> frozenset[str]:
    """Symbols that the libraries of PyTorch and torchvision look for in others."""
    found: set[str] = set()
    for package in ("torch", "torchvision"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for library in Path(spec.origin).parent.glob("**/*.so"):
            listed = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=False).stdout
            rows = (line.split() for line in listed.splitlines())
            found.update(row[-1] for row in rows if len(row) >= 2 and row[-2] == "U")
    return frozenset(found)


def build(folder: Path) -> None:
    """Compile the runtime and the driver into the folder."""
    wanted = _wanted()
    source = (HERE / "runtime.c").read_text()
    called = {name.partition("@")[0] for name in wanted if name.endswith(f"@{RUNTIME}")}
    more = [f"long {name}(void) {{ return 0; }}" for name in sorted(called) if f"{name}(" not in source]
    driver = {name for name in wanted if name.startswith("cu") and name[2:3].isupper()}
    none = [f"int {name}(void) {{ return 0; }}" for name in sorted(driver) if f"{name}(" not in NO_DRIVER]
    _compile(folder / RUNTIME, [source, "\n".join(more)], f"{RUNTIME} {{ global: *; }};")
    _compile(folder / DRIVER, [NO_DRIVER + "\n".join(none)])


def _compile(library: Path, sources: list[str], versions: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / f"{number}.c" for number in range(len(sources))]
        for file, source in zip(files, sources, strict=True):
            file.write_text(source)
        command = ["cc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, *files]
        if versions is not None:
            (Path(place) / "versions").write_text(versions)
            command.append(f"-Wl,--version-script={place}/versions")
        subprocess.run([*map(str, command), "-lpthread"], check=True)


def environment(folder: Path, others: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment, of processes that see the card; `build` has filled the folder."""
    paths = {"PYTHONPATH": str(HERE), "LD_LIBRARY_PATH": str(folder)}
    joined = {name: os.pathsep.join(filter(None, [path, others.get(name)])) for name, path in paths.items()}
    return {**others, **joined, "LD_PRELOAD": str(folder / RUNTIME), "FASTDDR_PRETENDED_CARD": "1"}


if __name__ == "__main__":
    if (why := missing()) is not None:
        sys.exit(f"{why}, so no card can be pretended here")
    with tempfile.TemporaryDirectory() as place:
        build(Path(place))
        with subprocess.Popen(sys.argv[1:], env=environment(Path(place))) as command:
            signal.signal(signal.SIGINT, lambda *_: None)  # the command has had it too, and ends by itself
            code = command.wait()
    sys.exit(code if code >= 0 else 128 - code)
