"""The adapter bank: many adapters of one base model, and a forward pass that mixes them by row.

    y_i = W x_i + sum over row i's adapters j of scale_ij * B_j^T (A_j^T x_i)

In each layer, the factors of all adapters of one width are stacked: A (slots, input_dims, width)
and B (slots, width, output_dims). Slot 0 holds zeros, for rows without an adapter. `RowSlots`
assigns a slot to each row, and two `mx.gather_mm` compute the update for all rows: the shrink and
expand of Chen et al., "Punica: Multi-Tenant LoRA Serving" (2023), https://arxiv.org/abs/2310.18547.
The base model's weights are never written.
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

# The adapters of a row, each with a factor on its scale.
ScaledAdapters = tuple[tuple[BankFactors, float], ...]
Stack = tuple[mx.array, ...]


@dataclass(frozen=True)
class RowSlots:
    """At most one adapter for each row, all of one width.

    Attributes:
        width: padded rank of the factors.
        slots: (rows,) the index of each row's adapter in the stacks; 0 for none.
        scales: (rows, 1, 1) factors on the rows' updates; `None` if all are 1.
    """

    width: int
    slots: mx.array
    scales: mx.array | None


class AdapterBank:
    """The adapters of one base model.

    A layer of the model is wrapped only while an adapter in the bank adapts it. All methods except
    `__init__` must be called on the thread that evaluates the model.

    Args:
        model: the model, without adapters; its layers are wrapped in place and restored by `clear`.
        max_adapters: most adapters at a time.
        max_rank: highest rank of an adapter.

    Attributes:
        version: grows with every change of the slots.
    """

    def __init__(self, model: nn.Module, *, max_adapters: int, max_rank: int) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.max_adapters = max_adapters
        self.max_rank = max_rank
        self.version = 0
        self._slots: dict[int, list[BankFactors | None]] = {}
        self._layers: dict[str, _BankedLayer] = {}
        self._current = _CurrentBatch()

    @property
    def bank_bytes(self) -> int:
        """Most memory that adapters can take: all of them, of the highest rank, in every layer.

        It includes slot 0, and a slot for an adapter that has been replaced while requests still
        use it.
        """
        width = width_of(self.max_rank)
        return (self.max_adapters + 2) * sum(self._bytes_at(path, width) for path in self.modules)

    @property
    def nbytes(self) -> int:
        """Memory of the stacks."""
        stacks = [stack for layer in self._layers.values() for stack in layer.stacks.values()]
        return sum(array.nbytes for stack in stacks for array in stack)

    def bytes_of(self, adapter: BankFactors) -> int:
        """Memory that an adapter takes, without the slots of zeros in layers that it skips."""
        return sum(self._bytes_at(path, adapter.width) for path in adapter.paths)

    def install(self, adapter: BankFactors) -> Iterator[None]:
        """Add an adapter, one layer for each item; it can be used once the iterator is exhausted.

        Forward passes may run between the items. An item costs a copy of one layer's stack. An
        error leaves the bank as it was.
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
        """Remove an adapter that no row uses, one layer for each item, and free its memory.

        The stack's last adapter moves to the free slot. Between the items it is in both slots, so
        that forward passes may run.
        """
        width = adapter.width
        slots = self._slots[width]
        slot, last = slots.index(adapter), len(slots) - 1
        if slot != last:
            order = mx.array([*range(slot), last, *range(slot + 1, last + 1)])
            for path in self._paths(width):
                self._rearrange(path, width, order)
                yield
        slots[slot] = slots[last]
        slots.pop()
        self.version += 1
        for path in self._paths(width):
            self._shorten(path, width, len(slots))
            yield

    def clear(self) -> None:
        """Remove all adapters and restore the model."""
        self._slots.clear()
        self.version += 1
        for path in list(self._layers):
            self._unwrap(path)

    def row_slots(self, rows: Sequence[ScaledAdapters]) -> list[RowSlots]:
        """As many `RowSlots` as it takes to hold every row's adapters; none if no row has any."""
        row_slots = []
        for width, slots in self._slots.items():
            of_width = [[(a, scale) for a, scale in row if a.width == width] for row in rows]
            for number in range(max(map(len, of_width), default=0)):
                column = [row[number] if number < len(row) else (None, 1.0) for row in of_width]
                scales = [scale for _, scale in column]
                row_slots.append(
                    RowSlots(
                        width,
                        mx.array([slots.index(adapter) for adapter, _ in column], dtype=mx.uint32),
                        mx.array(scales)[:, None, None] if set(scales) != {1.0} else None,
                    )
                )
        return row_slots

    @contextmanager
    def applied(self, row_slots: Sequence[RowSlots], rows: int) -> Iterator[None]:
        """In the context, apply adapters to batches of `rows` rows."""
        self._current.row_slots, self._current.rows = tuple(row_slots), rows
        try:
            yield
        finally:
            self._current.row_slots = ()

    def _bytes_at(self, path: str, width: int) -> int:
        """Memory of one slot of a layer's stack; 0 for a layer that cannot be adapted."""
        shapes = layer_shapes(self.modules[path], width)
        if shapes is None:
            return 0
        return sum(map(math.prod, shapes)) * int(dtype_of(self.modules[path]).size)

    def _paths(self, width: int) -> set[str]:
        """The layers that have a stack of that width."""
        return {path for path, layer in self._layers.items() if width in layer.stacks}

    def _append(self, path: str, adapter: BankFactors, slots: int) -> None:
        """Add an adapter's factors to a layer's stack, which has `slots` slots."""
        module = self.modules[path]
        shapes = layer_shapes(module, adapter.width)
        assert shapes is not None
        layer, dtype = self._wrap(path), dtype_of(module)
        stack = layer.stacks.get(adapter.width)
        stack = stack or tuple(mx.zeros((slots, *shape), dtype=dtype) for shape in shapes)
        factors = adapter.layers.get(path)
        new = [mx.array(a) for a in factors] if factors else [mx.zeros(shape) for shape in shapes]
        stack = tuple(
            mx.concatenate([old, array.astype(dtype)[None]])
            for old, array in zip(stack, new, strict=True)
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
        """Keep the first `slots` slots of a layer's stack, or drop it if none of them adapts it."""
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
            layer.share(self._current)
            self.model.update_modules(tree_unflatten([(path, layer)]))
            self._layers[path] = layer
        return self._layers[path]

    def _unwrap(self, path: str) -> None:
        del self._layers[path]
        self.model.update_modules(tree_unflatten([(path, self.modules[path])]))


@dataclass
class _CurrentBatch:
    """The batch being computed, shared by all layers of a model."""

    row_slots: tuple[RowSlots, ...] = ()
    rows: int = 0


class _BankedLayer(nn.Module):
    """A base layer with the stacks of its adapters by width.

    Args:
        base: the layer; it is not copied.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.linear = base
        # Bypasses nn.Module's setter, because the stacks are not parameters of the model.
        object.__setattr__(self, "stacks", {})

    stacks: dict[int, Stack]
    current: _CurrentBatch

    def share(self, current: _CurrentBatch) -> None:
        object.__setattr__(self, "current", current)

    def updates(self, rows: int) -> Iterator[tuple[RowSlots, Stack]]:
        """The slots and stacks to apply to an input of `rows` rows.

        Raises:
            RunError: the input has another number of rows than the batch.
        """
        for row_slots in self.current.row_slots:
            stack = self.stacks.get(row_slots.width)
            if stack is None:
                continue
            if rows != self.current.rows:
                raise RunError(
                    f"a layer got {rows} rows in a batch of {self.current.rows}: this architecture "
                    "mixes the rows before the layer, so they cannot have different adapters"
                )
            yield row_slots, stack

    @property
    def weight(self) -> mx.array:
        """The base weight, for modules that read it instead of calling the layer.

        Raises:
            RunError: rows have adapters for this layer, which such modules would ignore.
        """
        if any(row_slots.width in self.stacks for row_slots in self.current.row_slots):
            raise RunError("this architecture reads a weight that rows have adapters for")
        return self.linear.weight


class _BankedLinear(_BankedLayer):
    def __call__(self, x: mx.array) -> mx.array:
        """(rows, ..., input_dims) to (rows, ..., output_dims)."""
        y = self.linear(x)
        for row_slots, (a, b) in self.updates(x.shape[0]):
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            y = y + _product(flat, a, b, row_slots).reshape(y.shape).astype(y.dtype)
        return y


class _BankedEmbedding(_BankedLayer):
    def __call__(self, ids: mx.array) -> mx.array:
        """Token ids (rows, tokens) to (rows, tokens, dims)."""
        y = self.linear(ids)
        for row_slots, (a, b, _) in self.updates(ids.shape[0]):
            z = _scaled(a[row_slots.slots[:, None], ids], row_slots)
            y = y + mx.gather_mm(z, b, rhs_indices=row_slots.slots).astype(y.dtype)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """The output projection tied to the embedding: (..., dims) to (..., vocabulary)."""
        y = self.linear.as_linear(x)
        for row_slots, (a, b, tied) in self.updates(x.shape[0]):
            z = x * tied[row_slots.slots][:, None, None]
            y = y + _product(z, b.swapaxes(1, 2), a.swapaxes(1, 2), row_slots).astype(y.dtype)
        return y


_LAYERS: Mapping[int, Any] = {2: _BankedLinear, 3: _BankedEmbedding}


def _product(x: mx.array, a: mx.array, b: mx.array, row_slots: RowSlots) -> mx.array:
    """The rows' updates: x (rows, tokens, inputs) to (rows, tokens, outputs)."""
    z = _scaled(mx.gather_mm(x, a, rhs_indices=row_slots.slots), row_slots)
    return mx.gather_mm(z, b, rhs_indices=row_slots.slots)


def _scaled(z: mx.array, row_slots: RowSlots) -> mx.array:
    return z if row_slots.scales is None else z * row_slots.scales.astype(z.dtype)
