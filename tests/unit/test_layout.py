"""What the layout promises: names that shadow nothing, a light command line, short modules."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from contextlib import suppress
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests_support import ROOT, printed


def installed_with_fastddr() -> set[str]:
    """The distributions that fastddr and all of its extras bring along, by their normalised names."""
    extras = importlib.metadata.metadata("fastddr").get_all("Provides-Extra") or []
    seen: set[tuple[str, str]] = set()
    wanted = [("fastddr", extra) for extra in ("", *extras)]
    for name, extra in wanted:  # which grows
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        with suppress(importlib.metadata.PackageNotFoundError):  # of another system, or an extra that is not there
            for one in map(Requirement, importlib.metadata.requires(name) or []):
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    wanted += [(canonicalize_name(one.name), more) for more in ("", *one.extras)]
    return {name for name, _ in seen}


def test_no_file_of_the_package_shadows_another_module() -> None:
    """`accelerate launch fastddr/train.py` puts fastddr/ first on sys.path."""
    ours = {p.stem for p in (ROOT / "fastddr").iterdir() if not p.name.startswith("__") and p.suffix in ("", ".py")}
    assert ours >= {"train", "config", "data", "loaders"}
    known = installed_with_fastddr()
    assert known >= {"torch", "tensorboard", "markdown"}, "what is needed by what is needed too"
    modules = importlib.metadata.packages_distributions().items()
    taken = {module for module, of in modules if known & set(map(canonicalize_name, of))}
    assert not ours & ((taken | set(sys.stdlib_module_names)) - {"fastddr"})


def test_train_py_is_short_and_defines_no_class() -> None:
    text = (ROOT / "fastddr" / "train.py").read_text()
    assert len(text.splitlines()) < 100
    assert not re.search(r"^\s*class ", text, re.MULTILINE)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """`import fastddr`, a wrong flag and the help of each verb do not wait for PyTorch."""
    code = (
        "import contextlib, io, sys, fastddr, fastddr.__main__, fastddr.config\n"
        "from fastddr.train import main\n"
        "assert main(['--nonsense']) == 2\n"
        "for verb in fastddr.__main__.VERBS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        try:\n"
        "            code = fastddr.__main__.main([verb, '--help'])\n"
        "        except SystemExit as end:\n"
        "            code = end.code\n"
        "        assert not code, verb\n"
        "print([m for m in ('torch', 'nvidia.dali', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    assert printed(code) == "[]"


def test_a_run_and_a_question_begin_without_what_only_their_end_needs() -> None:
    """Each takes a second or two, in every rank."""
    code = (
        "import sys, fastddr.trainer, fastddr.memory.questions\n"
        "from fastddr.inference import compare, evaluate, export, predict, report\n"
        "late = ('matplotlib', 'sklearn', 'torchvision', 'scipy.stats', 'torch._dynamo', 'wandb')\n"
        "print([m for m in late if m in sys.modules])"
    )
    assert printed(code) == "[]"


def test_the_public_names_are_there() -> None:
    import fastddr

    for name in fastddr.__all__:
        assert getattr(fastddr, name) is not None


def test_no_module_is_longer_than_a_room() -> None:
    longest = {p.name: len(p.read_text().splitlines()) for p in Path(ROOT / "fastddr").rglob("*.py")}
    assert {name: n for name, n in longest.items() if n > 450} == {}


def test_the_collector_is_at_work_again_after_imports_even_failed_ones() -> None:
    code = """
import gc
from fastddr.collector import no_collector
seen = []
for begins in (gc.enable, gc.disable):
    begins()
    try:
        with no_collector():
            seen.append(gc.isenabled())
            import nowhere
    except ImportError:
        seen.append(gc.isenabled())
print(seen)
"""
    assert printed(code) == "[False, True, False, False]"
