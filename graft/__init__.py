"""Graft: LoRA fine-tuning on MLX.

The public functions are loaded when they are first used. Importing `graft` gives MLX a fast BLAS on
Linux and changes nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from graft import _checkout
from graft.runtime import blas

if TYPE_CHECKING:
    from graft.adapters.adapter import Adapter, apply_adapter
    from graft.adapters.attach import attach, detach
    from graft.adapters.files import load_adapter, save_adapter
    from graft.adapters.methods import register_method
    from graft.adapters.targets import plan
    from graft.api import TrainingResult, evaluate, generate, train
    from graft.engine.engine import Engine
    from graft.errors import InputError, RunError
    from graft.exporting.adapter import export
    from graft.exporting.fuse import fuse
    from graft.pretrained.load import load_model

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Engine",
    "InputError",
    "RunError",
    "TrainingResult",
    "apply_adapter",
    "attach",
    "detach",
    "evaluate",
    "export",
    "fuse",
    "generate",
    "load_adapter",
    "load_model",
    "plan",
    "register_method",
    "save_adapter",
    "train",
]

_MODULES = {
    "graft.adapters.adapter": ("Adapter", "apply_adapter"),
    "graft.adapters.attach": ("attach", "detach"),
    "graft.adapters.files": ("load_adapter", "save_adapter"),
    "graft.adapters.methods": ("register_method",),
    "graft.adapters.targets": ("plan",),
    "graft.api": ("TrainingResult", "evaluate", "generate", "train"),
    "graft.engine.engine": ("Engine",),
    "graft.errors": ("InputError", "RunError"),
    "graft.exporting.adapter": ("export",),
    "graft.exporting.fuse": ("fuse",),
    "graft.pretrained.load": ("load_model",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

_checkout.install()
blas.load()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
