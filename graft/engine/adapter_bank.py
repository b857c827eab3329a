"""Many adapters beside one base model, in one forward pass: each row of a batch has its own.

    y_i = W x_i + sum over row i's adapters j of scale_ij * B_j^T (A_j^T x_i)

For each layer, the factors of all adapters of one width stand stacked, A (slots, input_dims, width)
and B (slots, width, output_dims), with zeros in slot 0 for the rows that have none. A `Lane` gives
each row its slot, and two `mx.gather_mm` compute a lane for all rows: the shrink and expand of Chen
et al., "Punica: Multi-Tenant LoRA Serving" (2023), https://arxiv.org/abs/2310.18547. Nothing of the
base is ever written to. Knows nothing of requests or generation.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from graft.engine.adapter_factors import BankFactors, dtype_of, layer_shapes, width_of
from graft.errors import RunError

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

# The adapters of a row, each with what multiplies its own scale.
RowAdapters = tuple[tuple[BankFactors, float], ...]
Stack = tuple[mx.array, ...]


@dataclass(frozen=True)
class Lane:
    """One adapter at most for each row, all of one width.

    Attributes:
        width: of the factors.
        slots: (rows,) where each row's adapter stands in the stacks; 0 for none.
        scales: (rows, 1, 1) on each row's update; `None` where all are 1.
    """

    width: int
    slots: mx.array
    scales: mx.array | None


class AdapterBank:
    """The adapters of one base model.

    Layers are changed in the model only while an adapter that is in the bank adapts them. All
    methods but `__init__` belong to one thread, the one that evaluates the model.

    Args:
        model: without adapters; its layers are wrapped in place, and unwrapped by `clear`.
        max_adapters: how many there will be at most.
        max_rank: of the largest.
    """

    def __init__(self, model: nn.Module, *, max_adapters: int, max_rank: int) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.max_adapters = max_adapters
        self.max_rank = max_rank
        self.version = 0
        self._slots: dict[int, list[BankFactors | None]] = {}
        self._layers: dict[str, _BankedLayer] = {}
        self._riding = _Riding()

    @property
    def bank_bytes(self) -> int:
        """What the limits can cost in memory: that many adapters of that rank in every layer.

        One more stands for the rows without an adapter, and one for an adapter that is being
        replaced while requests still run with it.
        """
        width = width_of(self.max_rank)
        return (self.max_adapters + 2) * sum(self._bytes_at(path, width) for path in self.modules)

    @property
    def nbytes(self) -> int:
        """What the stacks take now."""
        stacks = [stack for layer in self._layers.values() for stack in layer.stacks.values()]
        return sum(array.nbytes for stack in stacks for array in stack)

    def bytes_of(self, adapter: BankFactors) -> int:
        """What an adapter takes in the bank, beside what its neighbours leave empty for it."""
        return sum(self._bytes_at(path, adapter.width) for path in adapter.paths)

    def install(self, adapter: BankFactors) -> Iterator[None]:
        """Take an adapter in, layer by layer: it may be used when the iterator has ended.

        Forward passes may be computed between the steps. What a step costs is a copy of one layer's
        stack. An error leaves the bank as it was.
        """
        slots = self._slots.setdefault(adapter.width, [None])
        try:
            for path in self._paths(adapter.width) | adapter.paths:
                self._append(path, adapter, len(slots))
                yield
        except BaseException:
            self._truncate(adapter.width, len(slots))
            raise
        slots.append(adapter)
        adapter.layers.clear()
        self.version += 1

    def remove(self, adapter: BankFactors) -> Iterator[None]:
        """Give up an adapter that no row uses any more, layer by layer, and its memory with it.

        The last of its stack takes its place. Between the steps that adapter stands in both, so
        forward passes may be computed there.
        """
        width = adapter.width
        slots = self._slots[width]
        place, last = slots.index(adapter), len(slots) - 1
        if place != last:
            order = mx.array([*range(place), last, *range(place + 1, last + 1)])
            for path in self._paths(width):
                self._rearrange(path, width, order)
                yield
        slots[place] = slots[last]
        slots.pop()
        self.version += 1
        for path in self._paths(width):
            self._shorten(path, width, len(slots))
            yield

    def clear(self) -> None:
        """Give up all adapters; the model is as it was."""
        self._slots.clear()
        self.version += 1
        for path in list(self._layers):
            self._unwrap(path)

    def lanes(self, rows: Sequence[RowAdapters]) -> list[Lane]:
        """The lanes in which every row's adapters find a place; none where no row has any."""
        lanes = []
        for width, slots in self._slots.items():
            own = [[(a, scale) for a, scale in row if a.width == width] for row in rows]
            for number in range(max(map(len, own), default=0)):
                here = [row[number] if number < len(row) else (None, 1.0) for row in own]
                scales = [scale for _, scale in here]
                lanes.append(
                    Lane(
                        width,
                        mx.array([slots.index(adapter) for adapter, _ in here], dtype=mx.uint32),
                        mx.array(scales)[:, None, None] if set(scales) != {1.0} else None,
                    )
                )
        return lanes

    @contextmanager
    def riding(self, lanes: Sequence[Lane], rows: int) -> Iterator[None]:
        """Have the model's layers adapt a batch of `rows` rows by `lanes`, inside the block."""
        self._riding.lanes, self._riding.rows = tuple(lanes), rows
        try:
            yield
        finally:
            self._riding.lanes = ()

    def _bytes_at(self, path: str, width: int) -> int:
        """Of one slot of a layer's stack; 0 for a layer that cannot be adapted."""
        shapes = layer_shapes(self.modules[path], width)
        if shapes is None:
            return 0
        return sum(map(math.prod, shapes)) * int(dtype_of(self.modules[path]).size)

    def _paths(self, width: int) -> set[str]:
        """Of the layers that have a stack of that width."""
        return {path for path, layer in self._layers.items() if width in layer.stacks}

    def _append(self, path: str, adapter: BankFactors, slots: int) -> None:
        """Add an adapter's factors behind the `slots` that a layer's stack has."""
        module = self.modules[path]
        shapes = layer_shapes(module, adapter.width)
        assert shapes is not None
        layer, dtype = self._wrap(path), dtype_of(module)
        before = layer.stacks.get(adapter.width)
        before = before or tuple(mx.zeros((slots, *shape), dtype=dtype) for shape in shapes)
        own = adapter.layers.get(path)
        new = [mx.zeros(shape) for shape in shapes] if own is None else [mx.array(a) for a in own]
        stack = tuple(
            mx.concatenate([old, array.astype(dtype)[None]])
            for old, array in zip(before, new, strict=True)
        )
        mx.eval(stack)
        layer.stacks[adapter.width] = stack

    def _rearrange(self, path: str, width: int, order: mx.array) -> None:
        stack = tuple(mx.take(array, order, axis=0) for array in self._layers[path].stacks[width])
        mx.eval(stack)
        self._layers[path].stacks[width] = stack

    def _truncate(self, width: int, slots: int) -> None:
        for path in self._paths(width):
            self._shorten(path, width, slots)

    def _shorten(self, path: str, width: int, slots: int) -> None:
        """Keep the first `slots` of a layer's stack, or no stack if none of them adapts it."""
        layer = self._layers[path]
        if any(adapter and path in adapter.paths for adapter in self._slots[width][:slots]):
            self._rearrange(path, width, mx.arange(slots))
            return
        del layer.stacks[width]
        if not layer.stacks:
            self._unwrap(path)

    def _wrap(self, path: str) -> "_BankedLayer":
        if path not in self._layers:
            layer = _LAYERS[len(layer_shapes(self.modules[path], 1) or ())](self.modules[path])
            layer.share(self._riding)
            self.model.update_modules(tree_unflatten([(path, layer)]))
            self._layers[path] = layer
        return self._layers[path]

    def _unwrap(self, path: str) -> None:
        del self._layers[path]
        self.model.update_modules(tree_unflatten([(path, self.modules[path])]))


@dataclass
class _Riding:
    """What all layers of a model are told of the batch that is computed."""

    lanes: tuple[Lane, ...] = ()
    rows: int = 0


class _BankedLayer(nn.Module):
    """A base layer with the stacks of the adapters that adapt it, by their width.

    Args:
        base: the layer; it is not copied.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.linear = base
        # Past nn.Module's own setter: the stacks are no parameters of the model.
        object.__setattr__(self, "stacks", {})

    stacks: dict[int, Stack]
    riding: _Riding

    def share(self, riding: _Riding) -> None:
        object.__setattr__(self, "riding", riding)

    def adding(self, rows: int) -> Iterator[tuple[Lane, Stack]]:
        """The lanes that concern this layer, for an input of `rows` rows."""
        for lane in self.riding.lanes:
            stack = self.stacks.get(lane.width)
            if stack is None:
                continue
            if rows != self.riding.rows:
                raise RunError(
                    f"a layer got {rows} rows in a batch of {self.riding.rows}: this architecture "
                    "mixes the rows before the layer, so they cannot have adapters of their own"
                )
            yield lane, stack

    @property
    def weight(self) -> mx.array:
        """The base's, for modules that read it instead of calling the layer.

        Raises:
            RunError: rows have adapters here, which such modules would pass by.
        """
        if any(lane.width in self.stacks for lane in self.riding.lanes):
            raise RunError("this architecture reads a weight that rows have adapters for")
        return self.linear.weight


class _BankedLinear(_BankedLayer):
    def __call__(self, x: mx.array) -> mx.array:
        """(rows, ..., input_dims) to (rows, ..., output_dims)."""
        y = self.linear(x)
        for lane, (a, b) in self.adding(x.shape[0]):
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            y = y + _product(flat, a, b, lane).reshape(y.shape).astype(y.dtype)
        return y


class _BankedEmbedding(_BankedLayer):
    def __call__(self, ids: mx.array) -> mx.array:
        """Token ids (rows, tokens) to (rows, tokens, dims)."""
        y = self.linear(ids)
        for lane, (a, b, _) in self.adding(ids.shape[0]):
            z = _scaled(a[lane.slots[:, None], ids], lane)
            y = y + mx.gather_mm(z, b, rhs_indices=lane.slots).astype(y.dtype)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """The output projection that is tied to the embedding: (..., dims) to (..., vocabulary)."""
        y = self.linear.as_linear(x)
        for lane, (a, b, tied) in self.adding(x.shape[0]):
            z = x * tied[lane.slots][:, None, None]
            y = y + _product(z, b.swapaxes(1, 2), a.swapaxes(1, 2), lane).astype(y.dtype)
        return y


_LAYERS: Mapping[int, Any] = {2: _BankedLinear, 3: _BankedEmbedding}


def _product(x: mx.array, a: mx.array, b: mx.array, lane: Lane) -> mx.array:
    """Each row's update: x (rows, tokens, inputs) to (rows, tokens, outputs)."""
    z = _scaled(mx.gather_mm(x, a, rhs_indices=lane.slots), lane)
    return mx.gather_mm(z, b, rhs_indices=lane.slots)


def _scaled(z: mx.array, lane: Lane) -> mx.array:
    return z if lane.scales is None else z * lane.scales.astype(z.dtype)
