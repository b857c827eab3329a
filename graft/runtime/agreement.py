"""Agreement: whether a fast path computes what the plain path does, up to rounding.

Fast paths that depend on the architecture are compared with the plain path on the model at hand
before they are used.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

# The largest difference allowed, as a fraction of the largest expected value.
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-2
# In a tree, arrays that are smaller than this share of the largest one may be rounding alone.
SMALL_SHARE = 1e-3


def agrees(
    found: mx.array, expected: mx.array, *, dtype: mx.Dtype | None = None, largest: Any = 0.0
) -> bool:
    """Whether two arrays have the same shape and, up to rounding, the same values.

    Args:
        found: what the fast path computed.
        expected: what the plain path computed.
        dtype: the precision in which it was computed, if not that of `expected`.
        largest: differences count as a fraction of this if all expected values are smaller.
    """
    if found.shape != expected.shape:
        return False
    exact = (dtype or expected.dtype) == mx.float32
    tolerance = FLOAT32_TOLERANCE if exact else HALF_TOLERANCE
    error = mx.abs(found - expected).max()
    return bool((error <= tolerance * mx.maximum(mx.abs(expected).max(), largest)).item())


def difference(fast: Callable[[], Any], expected: Any, *, dtype: mx.Dtype | None = None) -> str:
    """How the result of a fast path differs from that of the plain one; empty if it does not.

    An architecture that a fast path does not suit fails in its own way, so any exception counts.

    Args:
        fast: computes arrays, in a tree.
        expected: the same tree, computed plainly.
        dtype: the precision of the computation, if not that of the arrays.
    """
    wanted: dict[str, mx.array] = dict(tree_flatten(expected))
    try:
        found: dict[str, mx.array] = dict(tree_flatten(fast()))
        small = (
            SMALL_SHARE
            * mx.stack([mx.abs(array).max().astype(mx.float32) for array in wanted.values()]).max()
        )
        same = found.keys() == wanted.keys() and all(
            agrees(found[path], array, dtype=dtype, largest=small.item())
            for path, array in wanted.items()
        )
    except Exception as error:
        return f"this model fails with it: {type(error).__name__}"
    return "" if same else "it changes this model's results"
