"""The activation cache: the output of the frozen prefix, computed once for each row and kept.

With only the upper blocks adapted, training and evaluation start from these states and never
compute the blocks below again. They are kept in memory or in a file of the run's folder.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.targets import block_paths
from graft.console import bytes_text, say
from graft.data.batches import group_rows
from graft.data.collate import collate
from graft.data.examples import Split
from graft.runtime.memory import machine_bytes
from graft.runtime.workers import Workers, in_groups
from graft.storage.atomic import new_file, reserve
from graft.training.frozen_prefix import (
    count_prefix_weights,
    prefix_length,
    prefix_output,
    probe_prefix,
    remove_prefix,
    stored_dtype,
    to_numpy,
)
from graft.training.objectives import Objective

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

# The share of the memory, and of the free disk space, that the cache may take.
MEMORY_SHARE = 0.25
DISK_SHARE = 0.5
ROWS_AT_A_TIME = 8
FILE_PATTERN = "activations-*.npy"
# The name in earlier versions.
FORMER_PATTERN = "trunk-*.npy"


def cache_activations(
    model: nn.Module,
    splits: Mapping[str, Split],
    objective: Objective,
    *,
    mode: str,
    repeated: bool,
    folder: Path,
    model_key: str,
    workers: int = 1,
    budget: int | None = None,
) -> dict[str, Split]:
    """Replace the frozen prefix of a model by cached states, if that pays and works; report it.

    Args:
        model: with an adapter attached; changed in place.
        splits: the rows that it will be trained and evaluated on.
        objective: what will be trained.
        mode: "off", "memory", "disk", or "auto", which chooses.
        repeated: whether training sees rows more than once.
        folder: of the run.
        model_key: fingerprint of the base model.
        workers: batches computed at a time.
        budget: bytes that the run may take; by default all the machine has.

    Returns:
        The splits; if the prefix was replaced, their examples hold the states.
    """
    length = prefix_length(model) if mode != "off" else 0
    if length == 0:
        if mode in ("memory", "disk"):
            say("activation cache: off because no block is below the adapter")
        return dict(splits)
    if mode == "auto" and not repeated:
        return dict(splits)
    states = probe_prefix(model, length, objective)
    if states is None:
        return dict(splits)
    tokens = sum(split.tokens - len(split) for split in splits.values())
    size = tokens * states.shape[-1] * states.dtype.size
    where = _choose_place(size, folder, budget or machine_bytes()) if mode == "auto" else mode
    if where == "off":
        say(f"activation cache: off because {bytes_text(size)} would not fit in memory or on disk")
        return dict(splits)
    _announce(model, length, size, where)
    path = None
    if where == "disk":
        path = folder / FILE_PATTERN.replace("*", _digest(model_key, splits, length))
    start = time.perf_counter()
    rows = ROWS_AT_A_TIME if budget is None else 1
    store = _StatesStore((tokens, states.shape[-1]), states.dtype, path)
    try:
        cached = store.fill(model, length, splits, rows=rows, workers=workers)
    except OSError as error:
        say(f"activation cache: off because {path} cannot be written ({error.strerror})")
        return dict(splits)
    remove_prefix(model, length)
    say(f"activation cache: filled in {time.perf_counter() - start:.1f} s")
    return cached


def cached_bytes(split: Split) -> int:
    """Memory taken by the cached states of a split; states in a file take none."""
    states = (example.states for example in split.examples)
    return sum(s.nbytes for s in states if s is not None and not isinstance(s, np.memmap))


class _StatesStore:
    """The states of all rows, one after another, in memory or in a file.

    Args:
        shape: (tokens, dims).
        dtype: of the states.
        path: of the file; `None` for memory.
    """

    def __init__(self, shape: tuple[int, int], dtype: mx.Dtype, path: Path | None) -> None:
        self._shape, self._path = shape, path
        self._dtype = stored_dtype(dtype)

    def fill(
        self, model: nn.Module, length: int, splits: Mapping[str, Split], *, rows: int, workers: int
    ) -> dict[str, Split]:
        """Compute the states, or take those that an earlier start left in the file."""
        if self._path is None:
            states = np.empty(self._shape, dtype=self._dtype)
            _compute(model, length, splits, states, rows=rows, workers=workers)
        elif not self._path.exists():
            self.discard()
            with new_file(self._path) as temporary:
                states = np.lib.format.open_memmap(
                    temporary, mode="w+", dtype=self._dtype, shape=self._shape
                )
                reserve(temporary)
                _compute(model, length, splits, states, rows=rows, workers=workers)
                states.flush()
                del states
        if self._path is not None:
            states = np.load(self._path, mmap_mode="r")
        return _with_states(splits, states)

    def discard(self) -> None:
        """Remove the file, and those of other models, data or prefixes."""
        if self._path is not None:
            for pattern in (FILE_PATTERN, FORMER_PATTERN):
                for path in self._path.parent.glob(pattern):
                    path.unlink()


def _compute(
    model: nn.Module,
    length: int,
    splits: Mapping[str, Split],
    states: NDArray[Any],
    *,
    rows: int,
    workers: int,
) -> None:
    examples = [example for split in splits.values() for example in split.examples]
    ends = np.cumsum([len(example) - 1 for example in examples])

    def output(part: list[int]) -> mx.array:
        return prefix_output(model, length, collate(examples, part)["inputs"])

    with Workers(output) as outputs:
        for group in in_groups(group_rows(examples, rows), workers):
            for part, array in zip(group, outputs(group), strict=True):
                values = to_numpy(array)
                for line, row in enumerate(part):
                    tokens = len(examples[row]) - 1
                    states[ends[row] - tokens : ends[row]] = values[line, :tokens]


def _with_states(splits: Mapping[str, Split], states: NDArray[Any]) -> dict[str, Split]:
    """The splits with each example's part of `states`."""
    end, result = 0, {}
    for name, split in splits.items():
        examples = []
        for example in split.examples:
            start, end = end, end + len(example) - 1
            examples.append(replace(example, states=states[start:end]))
        result[name] = replace(split, examples=examples)
    return result


def _choose_place(size: int, folder: Path, available: int) -> str:
    if size <= MEMORY_SHARE * available:
        return "memory"
    folder.mkdir(parents=True, exist_ok=True)
    return "disk" if size <= DISK_SHARE * shutil.disk_usage(folder).free else "off"


def _announce(model: nn.Module, length: int, size: int, where: str) -> None:
    # A weight takes 2 operations per token in the forward pass, and 2 more in the backward pass.
    below, above = count_prefix_weights(model, length)
    gain = (2 * below + 4 * above) / (4 * above)
    place = "on disk" if where == "disk" else "in memory"
    say(
        f"activation cache: {length} of {len(block_paths(model))} blocks computed once, "
        f"{bytes_text(size)} {place}; steps about {gain:.1f} times as fast"
    )


def _digest(model_key: str, splits: Mapping[str, Split], length: int) -> str:
    data = {name: split.fingerprint for name, split in splits.items()}
    return hashlib.sha256(json.dumps([model_key, data, length]).encode()).hexdigest()[:16]
