"""fastddr: train graders of diabetic retinopathy from fundus photographs, as fast as the hardware allows.

import fastddr

if __name__ == "__main__":  # worker processes import the script too
    with fastddr.Trainer(fastddr.load_preset("quickstart", {"epochs": 3})) as trainer:
        trainer.fit()
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: The public names and where they live. They are imported when first used, so that `import fastddr` costs nothing.
_PUBLIC = {
    "Config": ("fastddr.config", "Config"),
    "Manifest": ("fastddr.data.manifest", "Manifest"),
    "Trainer": ("fastddr.trainer", "Trainer"),
    "UserError": ("fastddr.errors", "UserError"),
    "load": ("fastddr.inference.restore", "load"),
    "load_preset": ("fastddr.config", "load_preset"),
    "read_manifest": ("fastddr.data.manifest", "read"),
}
__all__ = ["Config", "Manifest", "Trainer", "UserError", "__version__", "load", "load_preset", "read_manifest"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastddr' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
