"""A cache of what enters the first adapted block.

With only the upper blocks adapted, what the blocks below give for a row never changes. It is
computed once for each row and kept; training and measuring start from there, and the blocks below
leave the model. A stand-in takes each one's place, so that paths and masks stay. Architectures pass
their states on in many ways, so loss and gradients are compared with those of the whole model
first. Knows nothing of training loops.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.adapters.targets import block_paths
from graft.data.batches import group_rows, pad
from graft.data.examples import Example, Split
from graft.models import weight_shape
from graft.runtime.agreement import agrees
from graft.runtime.overriding import overridden, override, variant
from graft.runtime.workers import Lanes, groups
from graft.storage.atomic import new_file
from graft.training.memory_plan import machine_bytes
from graft.training.step import Arrays, Loss

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

# Of the memory that there is, and of the free disk, that the cache may take.
MEMORY_SHARE = 0.25
DISK_SHARE = 0.5
ROWS_AT_A_TIME = 8

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass
class _Doorway:
    """Carries the states of a batch from the embedding, where they come in, to the cut."""

    states: mx.array | None = None


class _StandIn(nn.Module):
    """Takes the place of a block below the cut; the uppermost one gives the states."""

    def __init__(self, block: nn.Module, doorway: _Doorway | None) -> None:
        super().__init__()
        # Models ask their blocks which mask to give them.
        vars(self).update({n: v for n, v in vars(block).items() if not n.startswith("_")})
        self.doorway = doorway

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        """The states that came in, or the input where others follow below the cut."""
        if self.doorway is None or self.doorway.states is None:
            return x
        states, self.doorway.states = self.doorway.states, None
        return states


class _Reached(Exception):
    """Ends a forward pass at the cut."""


def find_cut(model: nn.Module) -> int:
    """How many blocks lie below everything that is trained in any block."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    for number, block in enumerate(block_paths(model)):
        if any(path.startswith(f"{block}.") for path in trained):
            return number
    return 0


def cache_trunk(
    model: nn.Module,
    splits: Mapping[str, Split],
    loss: Loss,
    *,
    mode: str,
    repeated: bool,
    folder: Path,
    model_key: str,
    lanes: int = 1,
    budget: int | None = None,
) -> dict[str, Split]:
    """Cut the trunk off a model, where that pays and works, and say what was done.

    Args:
        model: with an adapter attached; changed in place.
        splits: the rows that it will be trained and measured on.
        loss: as for `graft.training.step.UpdateStep`.
        mode: "off", "memory", "disk", or "auto", which chooses.
        repeated: whether training sees rows more than once.
        folder: of the run.
        model_key: what the model is known by, before the adapter.
        lanes: batches at a time.
        budget: bytes that the training may take, if not all that there are.

    Returns:
        The splits, with the states in their examples if the trunk was cut off.
    """
    cut = find_cut(model) if mode != "off" else 0
    if cut == 0:
        if mode in ("memory", "disk"):
            print("trunk cache: none, since no block lies below the adapter")
        return dict(splits)
    if mode == "auto" and not repeated:
        return dict(splits)
    tokens = sum(split.tokens - len(split) for split in splits.values())
    (sample,) = _states_of(model, cut, _sample(splits))
    size = tokens * sample.shape[-1] * sample.dtype.size
    place = _choose_place(size, folder, budget or machine_bytes()) if mode == "auto" else mode
    if place == "off":
        print(f"trunk cache: none, since {_size(size)} would take too much memory and disk")
        return dict(splits)
    gain, blocks = _gain(model, cut), len(block_paths(model))
    print(
        f"trunk cache: {cut} of {blocks} blocks are computed once, {_size(size)} "
        f"{'on disk' if place == 'disk' else 'in memory'}; steps about {gain:.1f} times as fast"
    )
    path = folder / f"trunk-{_digest(model_key, splits, cut)}.npy" if place == "disk" else None
    start = time.perf_counter()
    rows = ROWS_AT_A_TIME if budget is None else 1
    whole = _StatesStore((tokens, sample.shape[-1]), sample.dtype, path)
    cached = whole.fill(model, cut, splits, rows=rows, lanes=lanes)
    if not _cut_off(model, cut, loss, _sample(splits)):
        whole.discard()
        print("trunk cache: none, since this model's loss is another without the blocks below")
        return dict(splits)
    print(f"trunk cache: made in {time.perf_counter() - start:.1f} s")
    return cached


def is_cut(model: nn.Module) -> bool:
    """Whether the blocks below the adapter have left a model."""
    return any(isinstance(module, _StandIn) for module in getattr(model, "layers", ()))


def bytes_in_memory(split: Split) -> int:
    """What the cached states of a split take, where they are not in a file."""
    states = (example.states for example in split.examples)
    return sum(s.nbytes for s in states if s is not None and not isinstance(s, np.memmap))


class _StatesStore:
    """The states of all rows, one after the other, in memory or in a file.

    Args:
        shape: (tokens, dims).
        dtype: of the states.
        path: of the file; `None` for memory.
    """

    def __init__(self, shape: tuple[int, int], dtype: mx.Dtype, path: Path | None) -> None:
        self._shape, self._path = shape, path
        self._dtype = np.dtype(_STORED[dtype])

    def fill(
        self, model: nn.Module, cut: int, splits: Mapping[str, Split], *, rows: int, lanes: int
    ) -> dict[str, Split]:
        """Compute the states, or take those that an earlier start left in the file."""
        if self._path is None:
            states = np.empty(self._shape, dtype=self._dtype)
            _compute(model, cut, splits, states, rows=rows, lanes=lanes)
        elif not self._path.exists():
            self.discard()
            with new_file(self._path) as temporary:
                states = np.lib.format.open_memmap(
                    temporary, mode="w+", dtype=self._dtype, shape=self._shape
                )
                _compute(model, cut, splits, states, rows=rows, lanes=lanes)
                states.flush()
                del states
        if self._path is not None:
            states = np.load(self._path, mmap_mode="r")
        return _with_states(splits, states)

    def discard(self) -> None:
        """Remove the file, and those of other models, data or cuts."""
        for path in self._path.parent.glob("trunk-*.npy") if self._path else ():
            path.unlink()


# NumPy has no bfloat16: its bits stand in for it, and are told apart from token ids by their type.
_STORED = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "uint16"}


def _compute(
    model: nn.Module,
    cut: int,
    splits: Mapping[str, Split],
    states: NDArray[Any],
    *,
    rows: int,
    lanes: int,
) -> None:
    examples = [example for split in splits.values() for example in split.examples]
    ends = np.cumsum([len(example) - 1 for example in examples])
    with Lanes(lambda part: _enter(model, cut, pad(examples, part).inputs)) as enter:
        for group in groups(group_rows(examples, rows), lanes):
            for part, array in zip(group, enter(group), strict=True):
                values = _to_numpy(array)
                for place, row in enumerate(part):
                    length = len(examples[row]) - 1
                    states[ends[row] - length : ends[row]] = values[place, :length]


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


def _states_of(model: nn.Module, cut: int, examples: Sequence[Example]) -> list[mx.array]:
    return [_enter(model, cut, example.tokens[None, :-1])[0] for example in examples]


def _enter(model: nn.Module, cut: int, inputs: NDArray[np.int32]) -> mx.array:
    """What enters block `cut`: (rows, tokens, dims)."""
    block = model.layers[cut]
    reached: list[mx.array] = []

    def stop(self: nn.Module, x: mx.array, *_: Any, **__: Any) -> None:
        reached.append(x)
        raise _Reached

    model.eval()
    with suppress(_Reached), overridden([block], lambda cls: variant(cls, __call__=stop)):
        model(mx.array(inputs))
    return reached[0]


def _sample(splits: Mapping[str, Split]) -> list[Example]:
    """A short row to compare on."""
    example = max(next(iter(splits.values())).examples[:ROWS_AT_A_TIME], key=len)
    loss_mask = np.ones(min(len(example), 17), dtype=np.bool_)
    return [Example(example.tokens[:17], loss_mask)]


def _cut_off(model: nn.Module, cut: int, loss: Loss, examples: list[Example]) -> bool:
    """Put stand-ins for the blocks below; whether loss and gradients are the same with them."""
    states = _states_of(model, cut, examples)
    mx.eval(states)
    gradient = nn.value_and_grad(model, loss)
    expected = gradient(model, *_arrays(examples))
    mx.eval(expected)
    layers, doorway = _layers(model), _Doorway()
    blocks = layers[:cut]
    layers[:cut] = [
        _StandIn(block, doorway if number == cut - 1 else None)
        for number, block in enumerate(blocks)
    ]
    undo = _open_embeddings(model, doorway)
    cached = [
        replace(example, states=_to_numpy(array))
        for example, array in zip(examples, states, strict=True)
    ]
    try:
        if _same(gradient(model, *_arrays(cached)), expected):
            return True
    except Exception:  # Every architecture fails in its own way.
        pass
    layers[:cut] = blocks
    undo()
    return False


def _layers(model: nn.Module) -> list[Any]:
    """The list that holds the blocks; `model.layers` may be a copy."""
    place, _, _ = block_paths(model)[0].rpartition(".")
    holder, _, name = place.rpartition(".")
    return dict(model.named_modules())[holder][name]


def _open_embeddings(model: nn.Module, doorway: _Doorway) -> Callable[[], None]:
    """Let embeddings take states for token ids; returns how to undo it."""
    found = [module for _, module in model.named_modules() if isinstance(module, EMBEDDINGS)]
    return override(found, lambda cls: _opened(cls, doorway))


def _opened(kind: type, doorway: _Doorway) -> type:
    def call(self: nn.Module, x: mx.array) -> mx.array:
        if x.dtype == mx.uint16:
            x = x.view(mx.bfloat16)
        if not mx.issubdtype(x.dtype, mx.floating):
            return kind.__call__(self, x)
        doorway.states = x
        return x

    return variant(kind, __call__=call)


def _arrays(examples: Sequence[Example]) -> Arrays:
    batch = pad(examples, range(len(examples)))
    return mx.array(batch.inputs), mx.array(batch.targets), mx.array(batch.loss_mask)


def _same(found: Any, expected: Any) -> bool:
    ours, theirs = dict(tree_flatten(found)), dict(tree_flatten(expected))
    return all(agrees(ours[path], array) for path, array in theirs.items())


def _to_numpy(states: mx.array) -> NDArray[Any]:
    return np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states)


def _choose_place(size: int, folder: Path, available: int) -> str:
    if size <= MEMORY_SHARE * available:
        return "memory"
    folder.mkdir(parents=True, exist_ok=True)
    return "disk" if size <= DISK_SHARE * shutil.disk_usage(folder).free else "off"


def _gain(model: nn.Module, cut: int) -> float:
    """How much faster a step is: 2 operations a weight and token forwards, 2 more backwards."""
    below = sum(map(_weights, model.layers[:cut]))
    above = _weights(model) - below
    return (2 * below + 4 * above) / (4 * above)


def _weights(module: nn.Module) -> int:
    """Weights that states are multiplied with."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    found = [m for _, m in module.named_modules() if isinstance(m, kinds)]
    return sum(int(np.prod(weight_shape(linear))) for linear in found)


def _digest(model_key: str, splits: Mapping[str, Split], cut: int) -> str:
    data = {name: split.fingerprint for name, split in splits.items()}
    return hashlib.sha256(json.dumps([model_key, data, cut]).encode()).hexdigest()[:16]


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
