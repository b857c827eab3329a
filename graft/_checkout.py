"""Makes `import models` in a checkout return `graft.models`; `lora` and `convert` likewise.

Files of these names lie at the top of a checkout, to be read and run there, and links in `graft/`
point to them; an installation has them in `graft/` alone. `import models` from the top of a
checkout must not load a second copy, whose classes would differ from those of `graft.models`.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

NAMES = ("convert", "lora", "models")
TOP = Path(__file__).resolve().parents[1]


class CheckoutFinder(MetaPathFinder):
    """Finds `models` as `graft.models` where Python would find the checkout's own file."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a name at the top of a checkout, or `None` for every other module."""
        if name not in NAMES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or not _is_ours(name, spec.origin):
            return None
        return ModuleSpec(name, _SameModule(), origin=spec.origin)


class _SameModule(Loader):
    def exec_module(self, module: ModuleType) -> None:
        # What importing returns is read from here afterwards.
        sys.modules[module.__name__] = importlib.import_module(f"graft.{module.__name__}")


def install() -> None:
    """Make both names of the three modules one, whichever is imported first."""
    if not (Path(__file__).parent / "models.py").is_symlink():
        return
    sys.meta_path.insert(0, CheckoutFinder())
    for name in NAMES:
        loaded = sys.modules.get(name)
        if loaded is not None and _is_ours(name, getattr(loaded, "__file__", None)):
            sys.modules[f"graft.{name}"] = loaded
            setattr(sys.modules["graft"], name, loaded)


def _is_ours(name: str, origin: str | None) -> bool:
    return origin is not None and Path(origin).resolve() == TOP / f"{name}.py"
