"""Objectives: what training minimizes, one per file.

A file `NAME.py` in this folder makes `--objective NAME`. It defines

    objective(model, batch) -> (sum, weight, metrics)

where `batch` is named arrays (see `graft.data.collate.Batch`), `sum` is the loss summed over what
counts, in nats, `weight` is the number of things summed over (tokens, pairs), and `metrics` are
further sums by name. Training minimizes sum / weight over all micro-batches of a step together, so
that dividing a batch changes memory use and not the result.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graft.errors import InputError

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BatchArrays = Mapping[str, "mx.array"]
Objective = Callable[
    ["nn.Module", "BatchArrays"], tuple["mx.array", "mx.array", dict[str, "mx.array"]]
]

OBJECTIVES = tuple(
    sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
)


def get_objective(name: str) -> Objective:
    """The objective of `--objective NAME`.

    Raises:
        InputError: there is none of this name.
    """
    if name not in OBJECTIVES:
        raise InputError(f"no objective {name!r}; there are: {', '.join(OBJECTIVES)}")
    found: Objective = importlib.import_module(f"{__name__}.{name}").objective
    return found
