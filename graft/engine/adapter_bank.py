"""The adapter bank: many adapters of one base model, and a forward pass that mixes them by row.

    y_i = W x_i + sum over row i's adapters j of scale_ij * B_j^T (A_j^T x_i)

In each layer, the factors of all adapters of one width are stacked: A (slots, input_dims, width)
and B (slots, width, output_dims). Slot 0 holds zeros, for rows without an adapter. `RowSlots`
assigns a slot to each row, and two `mx.gather_mm` compute the update for all rows: the shrink and
expand of Chen et al., "Punica: Multi-Tenant LoRA Serving" (2023), https://arxiv.org/abs/2310.18547.
The base model's weights are never written.

mlx-lm sorts the tokens of experts by expert, which mixes the rows. So a block of experts is called
with indices that hold both the expert and the row of a token, and its layers take them apart.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from graft.adapters.layer_kinds import EMBEDDING, EXPERTS, LINEAR, kind_of
from graft.engine.adapter_factors import BankFactors, dtype_of, layer_shapes, width_of
from graft.errors import RunError
from graft.pretrained.architectures import EXPERT_BLOCKS
from graft.runtime.overriding import override, variant

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
        self._restore_blocks: dict[str, Callable[[], None]] = {}
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
            if path in self._layers:
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
        if not any(self._layers[sharing].stacks for sharing in self._sharing_indices(path)):
            self._unwrap(path)

    def _wrap(self, path: str) -> "_BankedLayer":
        """The wrapped layer, with those that are called with the same indices."""
        if path not in self._layers:
            sharing = self._sharing_indices(path)
            for each in sharing:
                module = self.modules[each]
                kind = kind_of(module)
                assert kind is not None
                self._layers[each] = _LAYERS[kind.name](module, each, self._current)
            self._put({each: self._layers[each] for each in sharing})
            block = _parent(path)
            if _is_expert_block(self.modules.get(block)):
                make = _make_carrying(self._current)
                self._restore_blocks[block] = override([self.modules[block]], make)
        return self._layers[path]

    def _unwrap(self, path: str) -> None:
        """Restore a layer, with those that are called with the same indices."""
        sharing = self._sharing_indices(path)
        for each in sharing:
            del self._layers[each]
        self._put({each: self.modules[each] for each in sharing})
        if restore := self._restore_blocks.pop(_parent(path), None):
            restore()

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        self.model.update_modules(tree_unflatten(list(modules.items())))

    def _sharing_indices(self, path: str) -> list[str]:
        """The layers of the block of experts that a layer is in; otherwise the layer alone."""
        block = _parent(path)
        if not _is_expert_block(self.modules.get(block)):
            return [path]
        names = [f"{block}.{name}" if block else name for name in self.modules[block].children()]
        return [name for name in names if kind_of(self.modules.get(name)) is EXPERTS]


@dataclass
class _CurrentBatch:
    """The batch being computed, shared by all layers of a model.

    Attributes:
        row_slots: adapters of the rows.
        rows: number of rows.
        carries_rows: whether the indices of experts carry rows.
    """

    row_slots: tuple[RowSlots, ...] = ()
    rows: int = 0
    carries_rows: bool = False

    def row_numbers(self, array: mx.array) -> mx.array | None:
        """The row of each item of the first axis, (items,): a whole number of items for each row.

        `None` if the axis cannot be divided among the rows.
        """
        items = array.shape[0]
        return None if items % self.rows else mx.arange(items) // (items // self.rows)

    @contextmanager
    def carrying(self, indices: mx.array) -> Iterator[mx.array]:
        """In the context, indices of experts carry rows: expert * rows + row.

        They are in the order of their experts still.

        Args:
            indices: (rows, ..., experts of a token), or (rows * tokens, experts of a token).
        """
        rows = self.row_numbers(indices) if self.row_slots else None
        if rows is None:
            yield indices
            return
        self.carries_rows = True
        try:
            rows = rows.reshape(-1, *[1] * (indices.ndim - 1))
            yield indices * self.rows + rows.astype(indices.dtype)
        finally:
            self.carries_rows = False


class _BankedLayer(nn.Module):
    """A base layer with the stacks of its adapters by width.

    Args:
        base: the layer; it is not copied.
        path: of the layer, for messages.
        current: the batch being computed.
    """

    stacks: dict[int, Stack]
    path: str
    current: _CurrentBatch

    def __init__(self, base: nn.Module, path: str, current: _CurrentBatch) -> None:
        super().__init__()
        self.linear = base
        # Bypasses nn.Module's setter, because these are not parameters of the model.
        for name, value in {"stacks": {}, "path": path, "current": current}.items():
            object.__setattr__(self, name, value)

    def updates(self) -> Iterator[tuple[RowSlots, Stack]]:
        """The slots and stacks to apply to the batch."""
        for row_slots in self.current.row_slots:
            if stack := self.stacks.get(row_slots.width):
                yield row_slots, stack

    def by_row(self, x: mx.array) -> mx.array:
        """An input (rows, ...) or (rows * tokens, dims) as (rows, tokens, dims).

        Raises:
            RunError: the first axis cannot be divided among the rows.
        """
        self.check_rows(self.current.row_numbers(x), x)
        return x.reshape(self.current.rows, -1, x.shape[-1])

    def check_rows(self, rows: mx.array | None, x: mx.array) -> mx.array:
        """The rows of an input's items, if they are known.

        Raises:
            RunError: they are not.
        """
        if rows is None:
            raise RunError(
                f"{self.path} got an input of shape {x.shape} in a batch of {self.current.rows} "
                "rows: this architecture mixes the rows before the layer, so they cannot have "
                "different adapters"
            )
        return rows

    @property
    def weight(self) -> mx.array:
        """The base weight, for modules that read it instead of calling the layer.

        Raises:
            RunError: rows have adapters for this layer, which such modules would ignore.
        """
        if any(row_slots.width in self.stacks for row_slots in self.current.row_slots):
            raise RunError(
                f"this architecture reads the weight of {self.path}, which rows have adapters for"
            )
        return self.linear.weight

    def __setattr__(self, name: str, value: Any) -> None:
        # Some modules cast a layer's weight before they read it.
        if name == "weight":
            self.linear.weight = value
        else:
            super().__setattr__(name, value)


class _BankedLinear(_BankedLayer):
    def __call__(self, x: mx.array) -> mx.array:
        """(rows, ..., input_dims) to (rows, ..., output_dims); also (rows * tokens, ...)."""
        y = self.linear(x)
        for row_slots, (a, b) in self.updates():
            update = _product(self.by_row(x), a, b, row_slots)
            y = y + update.reshape(y.shape).astype(y.dtype)
        return y


class _BankedEmbedding(_BankedLayer):
    def __call__(self, ids: mx.array) -> mx.array:
        """Token ids (rows, tokens) to (rows, tokens, dims)."""
        y = self.linear(ids)
        for row_slots, (a, b, _) in self.updates():
            by_row = self.by_row(ids[..., None])[..., 0]
            z = _scaled(a[row_slots.slots[:, None], by_row], row_slots)
            update = mx.gather_mm(z, b, rhs_indices=row_slots.slots)
            y = y + update.reshape(y.shape).astype(y.dtype)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """The output projection tied to the embedding: (..., dims) to (..., vocabulary)."""
        y = self.linear.as_linear(x)
        for row_slots, (a, b, tied) in self.updates():
            z = self.by_row(x) * tied[row_slots.slots][:, None, None]
            update = _product(z, b.swapaxes(1, 2), a.swapaxes(1, 2), row_slots)
            y = y + update.reshape(y.shape).astype(y.dtype)
        return y


class _BankedExperts(_BankedLayer):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Tokens (..., 1, input_dims) to (..., experts of a token, 1, output_dims).

        Args:
            x: tokens; in a block, one for each index once they are sorted.
            indices: of the experts, which carry rows in a block that does so.
            sorted_indices: whether tokens are in the order of their experts.
        """
        rows = None
        if self.current.carries_rows:
            indices, rows = indices // self.current.rows, indices % self.current.rows
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        for row_slots, (a, b) in self.updates():
            if rows is None:
                rows = self._rows(x, is_sorted=sorted_indices)
            chosen = row_slots.slots[rows] * a.shape[1] + indices
            z = mx.gather_mm(x, a.flatten(0, 1), rhs_indices=chosen)
            if row_slots.scales is not None:
                z = z * row_slots.scales[rows].astype(z.dtype)
            y = y + mx.gather_mm(z, b.flatten(0, 1), rhs_indices=chosen).astype(y.dtype)
        return y

    def _rows(self, x: mx.array, *, is_sorted: bool) -> mx.array:
        """The row of each token, shaped to be indexed with the tokens' experts."""
        known = not is_sorted or self.current.rows == 1
        rows = self.check_rows(self.current.row_numbers(x) if known else None, x)
        return rows.reshape(-1, *[1] * (x.ndim - 3))


_LAYERS: Mapping[str, type[_BankedLayer]] = {
    LINEAR.name: _BankedLinear,
    EMBEDDING.name: _BankedEmbedding,
    EXPERTS.name: _BankedExperts,
}


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_expert_block(module: nn.Module | None) -> bool:
    """Whether a module passes indices on to layers of experts."""
    names = (f"{parent.__module__}.{parent.__qualname__}" for parent in type(module).__mro__)
    return any(name in EXPERT_BLOCKS for name in names)


def _make_carrying(current: _CurrentBatch) -> Callable[[type], type]:
    """Makes variants of blocks of experts whose indices carry rows."""

    def make(block: Any) -> type:
        def call(self: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
            with current.carrying(indices) as carried:
                y: mx.array = block.__call__(self, x, carried)
                return y

        return variant(block, __call__=call)

    return make


def _product(x: mx.array, a: mx.array, b: mx.array, row_slots: RowSlots) -> mx.array:
    """The rows' updates: x (rows, tokens, inputs) to (rows, tokens, outputs)."""
    z = _scaled(mx.gather_mm(x, a, rhs_indices=row_slots.slots), row_slots)
    return mx.gather_mm(z, b, rhs_indices=row_slots.slots)


def _scaled(z: mx.array, row_slots: RowSlots) -> mx.array:
    return z if row_slots.scales is None else z * row_slots.scales.astype(z.dtype)
