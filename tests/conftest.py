"""What all tests share: shape checks on, a cache of their own, and a tiny synthetic data set."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from fastddr.data.manifest import Manifest

# As many workers as cores, each with threads of its own, wait for each other: it takes half as long again and more.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything of fastddr is imported: every jaxtyping annotation of the package is checked in every test.
install_import_hook("fastddr", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
os.environ["WANDB_MODE"] = "offline"
# A shell starts what it puts in the background (`pytest &` in a script) deaf to Ctrl-C, and so would be what a test
# starts to stop it by one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A slow machine is no failure. What fails elsewhere is repeated here by the line that is printed.
hypothesis.settings.register_profile("fastddr", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fastddr")


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` no test sees a card: what runs on a CPU in float32 would run there, and both ranks on one."""
    asked = config.getoption("markexpr")
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # By itself xdist begins with the files of most tests, which are short ones.
    config.option.loadscopereorder = False


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of `benchmarks` by name, as its scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTDDR_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic DDR in the official layout: 27 + 11 + 13 gradable photographs of 80 px. Do not write into it."""
    from tests_support import TINY, TINY_SIZE

    from fastddr.data import synthetic

    return synthetic.generate(tmp_path_factory.mktemp("data") / "tiny", counts=TINY, size=TINY_SIZE, workers=1)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "DDR-dataset"))


@pytest.fixture(scope="session")
def found(tiny: Path) -> Manifest:
    """The manifest of the tiny set."""
    from fastddr.data import manifest

    return manifest.read(tiny)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Seven photographs a split, of many shapes and sizes (`photographs.mixed`)."""
    import photographs

    from fastddr.data import manifest

    return manifest.read(photographs.mixed(tmp_path_factory.mktemp("data") / "mixed"))


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Nineteen photographs a split that are no plain RGB JPEG (`photographs.ODD`), as large as their canvas."""
    import photographs

    from fastddr.data import manifest

    return manifest.read(photographs.odd(tmp_path_factory.mktemp("data") / "odd"))


@pytest.fixture(scope="session")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """White noise, oblong and 6 to 9 times as large as its canvas: what a wrong filter would show in."""
    import numpy as np
    import photographs

    from fastddr.data import manifest

    root = tmp_path_factory.mktemp("reduced")
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate([(480, 480), (700, 560), (300, 720), (1100, 500)]):
        for split in ("train", "valid", "test"):
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            photographs.picture(root / split / str(number) / f"{number}.jpg", noise)
    return manifest.read(root)


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of a tiny run goes into the pictures of its report: they stay blank, but where a test is of `pictures`.

    Runs that a module shares are made before, and have theirs.
    """
    from matplotlib.figure import Figure

    from fastddr.reporting import plots

    # Not the fixture `monkeypatch`: that one would begin here, and end after all other fixtures of the test.
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("pictures") is None:
            whole = plots.drawn
            patch.setattr(plots, "drawn", lambda figure, kind="png": whole(Figure(figsize=(1, 1)), kind))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a card the `gpu` tests are skipped, and `netns` ones where they are not asked for; both say why.

    Files with slow tests come first: were one of them the last, all other workers would wait for it.
    """
    import torch

    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)

    if "netns" not in config.getoption("markexpr"):
        for item in items:
            if "netns" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="changes the host's networks; ask for it with -m netns"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card and -m gpu"))
