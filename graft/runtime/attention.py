"""Attention and SwiGLU for a Linux CPU, where an exponential costs as much as 60 additions.

MLX computes attention weights in the forward pass and again in the backward pass, masked ones too.
Here they are computed once, from powers of two, which take a third of the time, for a block of
queries at a time and only for the keys that it may see:

    S = scale Q K^T + mask,   P = exp(S - max S),   O = P V / sum P,
    dS = P (dO' V^T - sum(dO' O)),   dO' = dO / sum P,   dQ = scale dS K,   dK = scale dS^T Q,
    dV = P^T dO',   dmask = dS

P is kept for the backward pass while it is small, and otherwise recomputed block by block, so that
memory grows with the number of tokens and not with its square: Dao et al., "FlashAttention" (2022),
https://arxiv.org/abs/2205.14135.

Models look these functions up in MLX and mlx-lm. `use_fast_functions` makes one model find the ones
here while it runs; other models, and other threads, keep theirs.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

from graft.runtime.overriding import override, variant

import mlx.core as mx
import mlx.nn as nn

LOG2_E = math.log2(math.e)
# Attention weights computed at a time, 2 MB, and the most kept for the backward pass.
BLOCK_VALUES = 2**19
KEPT_VALUES = 2**22
SMALLEST_BLOCK = 32
# Low enough to make any weight zero, and finite, so that no difference of two is undefined.
MASKED = -1e30

# First query, one past the last, and the keys that they may see.
Block = tuple[int, int, int]

_mlx_attention = mx.fast.scaled_dot_product_attention
_mlx_sigmoid = mx.sigmoid
_thread = threading.local()
_lock = threading.Lock()
_active_threads = 0
# Where a function was replaced, by what name, and what was there before.
_replaced: list[tuple[Any, str, Any]] = []


def use_fast_functions(model: nn.Module) -> None:
    """Let a model use the functions of this module whenever it is called."""
    if not getattr(model, "uses_fast_functions", False):
        override([model], _with_fast_functions)


def current_functions() -> Callable[[], AbstractContextManager[None]]:
    """What makes a context with the functions of now, for a later computation."""
    return fast_functions if _depth() else nullcontext


@contextmanager
def fast_functions() -> Iterator[None]:
    """Use the functions of this module in this thread until the context ends."""
    global _active_threads
    _thread.depth = _depth() + 1
    if _thread.depth == 1:
        with _lock:
            _active_threads += 1
            if _active_threads == 1:
                _replace()
    try:
        yield
    finally:
        _thread.depth -= 1
        if _thread.depth == 0:
            with _lock:
                _active_threads -= 1
                if _active_threads == 0:
                    _put_back()


def _depth() -> int:
    return getattr(_thread, "depth", 0)


def _replace() -> None:
    """Put functions that look at the thread in place of those of MLX and mlx-lm."""
    holders: list[tuple[Any, str, Callable[..., Any]]] = [
        (mx.fast, "scaled_dot_product_attention", attention),
        *((module, "swiglu", swiglu) for module in _modules_with_swiglu()),
    ]
    for holder, name, fast in holders:
        before = getattr(holder, name)
        _replaced.append((holder, name, before))
        setattr(holder, name, partial(_dispatch, fast, before))


def _put_back() -> None:
    while _replaced:
        holder, name, before = _replaced.pop()
        setattr(holder, name, before)


def _dispatch(
    fast: Callable[..., Any], before: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    return (fast if _depth() else before)(*args, **kwargs)


def _modules_with_swiglu() -> list[ModuleType]:
    """The architectures of mlx-lm that have imported its gated activation."""
    activations = sys.modules.get("mlx_lm.models.activations")
    if activations is None:
        return []
    original = activations.swiglu
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("mlx_lm.models.") and getattr(module, "swiglu", None) is original
    ]


def _with_fast_functions(cls: Any) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with fast_functions():
            return cls.__call__(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The class has no name that pickle could find, but can be made from its parent.
        _, _, *state = cls.__reduce_ex__(self, max(protocol, 2))
        return (_new_with_fast_functions, (cls,), *state)

    return variant(cls, __call__=call, __reduce_ex__=reduce, uses_fast_functions=True)


def _new_with_fast_functions(cls: Any) -> Any:
    model = cls.__new__(cls)
    use_fast_functions(model)
    return model


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **others: Any,
) -> mx.array:
    """Like `mx.fast.scaled_dot_product_attention`, to rounding.

    Args:
        q: (batch, heads, queries, dims).
        k: (batch, groups, keys, dims); `groups` divides `heads`.
        v: (batch, groups, keys, value_dims).
        scale: factor on the products.
        mask: "causal", or bool or additive and broadcastable to (batch, heads, queries, keys).
        sinks: computed by MLX, as are few queries and types other than float32.
        others: further arguments, for MLX.
    """
    exact = all(array.dtype == mx.float32 for array in (q, k, v))
    if sinks is not None or others or not exact or q.shape[2] < SMALLEST_BLOCK:
        return _mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **others)
    batch, heads, queries, dims = q.shape
    groups, keys = k.shape[1:3]
    # The heads of a group share keys: (batch, groups, heads of a group, queries, dims).
    grouped = q.reshape(batch, groups, heads // groups, queries, dims)
    causal = isinstance(mask, str)
    blocks = list(_blocks(batch * heads, queries, keys, causal=causal))
    kept = batch * heads * queries * keys <= KEPT_VALUES
    # A mask may carry a gradient, so it is an argument of the function that has a gradient.
    masks = [_grouped_mask(mask, groups, heads)] if isinstance(mask, mx.array) else []
    output = _attend(scale, blocks, causal=causal, kept=kept)(grouped, k, v, *masks)[0]
    return output.reshape(batch, heads, queries, v.shape[-1])


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """The gated activation of mlx-lm, silu(gate) * x, with the sigmoid of this module."""
    return gate * sigmoid(gate) * x


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)) of any shape."""
    if x.dtype != mx.float32:
        return _mlx_sigmoid(x)
    # The linear term is zero and carries the gradient: no logarithm of the base is needed, and it
    # works where shapes are unknown, which a custom function would not.
    s = mx.stop_gradient(mx.reciprocal(mx.power(2.0, x * -LOG2_E) + 1.0))
    return s + (x - mx.stop_gradient(x)) * (s * (1.0 - s))


def _blocks(rows: int, queries: int, keys: int, *, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first query, one past the last, keys that they may see) of each block.

    Args:
        rows: rows of the batch, times heads.
        queries: number of queries; they belong to the last keys.
        keys: number of keys, at least as many.
        causal: whether a query sees only the keys up to its own.
    """
    size = max(BLOCK_VALUES // (rows * keys), SMALLEST_BLOCK)
    # Equal sizes, so that no small block is left over.
    count = -(-queries // size)
    edges = [queries * number // count for number in range(count + 1)]
    for start, stop in pairwise(edges):
        yield start, stop, keys - queries + stop if causal else keys


def _grouped_mask(mask: mx.array, groups: int, heads: int) -> mx.array:
    """A mask that broadcasts to (batch, groups, heads of a group, queries, keys)."""
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    batch, of_heads, queries, keys = mask.shape
    parts = (groups, heads // groups) if of_heads == heads else (1, 1)
    return mask.reshape(batch, *parts, queries, keys)


def _bias(block: Block, mask: mx.array | None, *, causal: bool) -> mx.array | None:
    """The bias on a block's products, in units of log 2; broadcastable to their shape."""
    start, stop, seen = block
    if causal:
        # `seen` ends at the last query of the block.
        places = mx.arange(stop - start, dtype=mx.float32)[:, None] + (seen - (stop - start))
        behind = mx.minimum(places - mx.arange(seen, dtype=mx.float32), 0.0)
        return behind * -MASKED
    if mask is None:
        return None
    rows = mask[..., start:stop, :] if mask.shape[-2] > 1 else mask
    exact = rows.astype(mx.float32)
    return (exact - 1) * -MASKED if rows.dtype == mx.bool_ else exact * LOG2_E


def _attend(scale: float, blocks: Sequence[Block], *, causal: bool, kept: bool) -> Any:
    """(q, k, v, mask) -> the output, the sums, and what the gradient of each block needs.

    q is (batch, groups, heads, queries, dims), k (batch, groups, keys, dims), the mask, if any, is
    broadcastable to (batch, groups, heads, queries, keys), and the output has the shape of q with
    the dims of v.
    """

    def products(q: mx.array, k: mx.array, mask: mx.array | None, block: Block) -> mx.array:
        """(batch, groups, heads, queries, keys), in units of log 2."""
        start, stop, seen = block
        rows = q[..., start:stop, :] * (scale * LOG2_E)
        found = _flat(rows) @ k[:, :, :seen].swapaxes(-1, -2)
        found = found.reshape(*rows.shape[:-1], seen)
        bias = _bias(block, mask, causal=causal)
        return found if bias is None else found + bias

    @mx.custom_function
    def attend(
        q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
    ) -> tuple[mx.array, ...]:
        outputs: list[mx.array] = []
        totals, saved = [], []
        for block in blocks:
            x = products(_after(q, outputs), k, mask, block)
            top = x.max(axis=-1, keepdims=True)
            p = mx.power(2.0, x - top)
            total = p.sum(axis=-1, keepdims=True)
            weighted = (_flat(p) @ v[:, :, : block[2]]).reshape(*p.shape[:-1], v.shape[-1])
            outputs.append(weighted / total)
            totals.append(total)
            saved.append(p if kept else top)
        return _joined(outputs), _joined(totals), *saved

    @attend.vjp
    def attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        (q, k, v, *masks), (output, total, *saved) = primals, outputs
        mask = masks[0] if masks else None
        share = cotangents[0] / total
        below = (share * output).sum(axis=-1, keepdims=True)
        dq: list[mx.array] = []
        dk, dv, dmask = mx.zeros_like(k), mx.zeros_like(v), list[mx.array]()
        for block, p in zip(blocks, saved, strict=True):
            start, stop, seen = block
            if not kept:
                p = mx.power(2.0, products(_after(q, [*dq, dk, dv]), k, mask, block) - p)
            rows = _flat(share[..., start:stop, :])
            dp = (rows @ v[:, :, :seen].swapaxes(-1, -2)).reshape(p.shape)
            change = p * (dp - below[..., start:stop, :])
            # Computed only if somebody asks for the gradient of the mask: MLX is lazy.
            dmask += [_summed_like(change, each) for each in masks]
            change = _flat(change)
            dq.append((change @ k[:, :, :seen]).reshape(q[..., start:stop, :].shape) * scale)
            dk = _added(dk, change.swapaxes(-1, -2) @ (_flat(q[..., start:stop, :]) * scale))
            dv = _added(dv, _flat(p).swapaxes(-1, -2) @ rows)
        return _joined(dq), dk, dv, *(_like(dmask, each) for each in masks)

    return attend


def _summed_like(change: mx.array, mask: mx.array) -> mx.array:
    """The gradient of a block's products, summed where the mask was broadcast to them."""
    axes = [a for a, size in enumerate(mask.shape) if size == 1]
    return change.sum(axis=axes, keepdims=True) if axes else change


def _like(blocks: Sequence[mx.array], mask: mx.array) -> mx.array:
    """The gradient of the whole mask from those of its blocks."""
    whole = _joined(blocks) if mask.shape[-2] > 1 else sum(blocks, mx.array(0.0))
    return whole.astype(mask.dtype)


def _after(x: mx.array, results: Sequence[mx.array]) -> mx.array:
    """`x`, once the results of earlier blocks are there, or all would be computed at once."""
    waiting: Any = mx.depends([x], list(results)) if results else [x]
    array: mx.array = waiting[0]
    return array


def _joined(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=-2)


def _added(total: mx.array, part: mx.array) -> mx.array:
    """The sum with a part that has only the first keys: (batch, groups, keys, dims)."""
    missing = total.shape[2] - part.shape[2]
    return total + (mx.pad(part, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else part)


def _flat(x: mx.array) -> mx.array:
    """The heads of a group as further queries: (batch, groups, heads * queries, ...)."""
    batch, groups, heads, queries, last = x.shape
    return x.reshape(batch, groups, heads * queries, last)
