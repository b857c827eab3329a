"""Memory plans chosen earlier, so that a command gets the same plan each time.

Measured peaks of equal steps differ by a few percent, so that near a budget one run would fit more
rows than the next. A plan is kept under a hash of everything that it depends on, in the folder
`plans` of the cache that also holds tokens (`graft.data.token_cache`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from graft import __version__
from graft.console import note, one_line
from graft.data.token_cache import cache_folder
from graft.errors import InputError
from graft.runtime.memory import machine_bytes
from graft.storage.atomic import new_file
from graft.training.memory_plan import MemoryPlan
from graft.training.options import Options

import mlx.core as mx


def plan_key(options: Options, fingerprints: Mapping[str, Any], layers: Mapping[str, Any]) -> str:
    """A hash of everything that a plan depends on.

    Args:
        options: of the run.
        fingerprints: of model and data.
        layers: how each layer is adapted, as JSON holds it.
    """
    free = {f.name for f in dataclasses.fields(Options) if f.metadata["resumable"]}
    values = {n: v for n, v in dataclasses.asdict(options).items() if n not in free}
    values |= {"adapter_file": None, "memory_budget": options.memory_budget}
    machine = [machine_bytes(), os.cpu_count(), str(mx.default_device()), version("mlx")]
    content = [__version__, machine, values, fingerprints, layers]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def kept_plan(key: str, choose: Callable[[], MemoryPlan]) -> MemoryPlan:
    """The plan under a key; if there is none, the one that `choose` returns, which is then kept."""
    plan = read_plan(key)
    if plan is None:
        plan = choose()
        write_plan(key, plan)
    return plan


def read_plan(key: str) -> MemoryPlan | None:
    """The plan under a key; `None` if there is none, or none that can be read."""
    folder = cache_folder("plans")
    try:
        content = json.loads((folder / key).read_text()) if folder else None
        return None if content is None else MemoryPlan(**content)
    except (OSError, ValueError, TypeError):
        return None


def write_plan(key: str, plan: MemoryPlan) -> None:
    """Keep a plan; if that fails, report it and continue."""
    folder = cache_folder("plans")
    if folder is None:
        return
    try:
        with new_file(folder / key) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(plan)))
    except (OSError, InputError) as error:
        note(f"the memory plan is not kept: {one_line(error)}")
