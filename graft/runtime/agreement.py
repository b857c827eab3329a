"""Agreement: whether a fast path computes what the plain path does, up to rounding.

Fast paths that depend on the architecture are compared with the plain path on the model at hand
before they are used.
"""

import mlx.core as mx

# The largest difference allowed, as a fraction of the largest expected value.
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-2


def agrees(found: mx.array, expected: mx.array, *, dtype: mx.Dtype | None = None) -> bool:
    """Whether two arrays have the same shape and, up to rounding, the same values.

    Args:
        found: what the fast path computed.
        expected: what the plain path computed.
        dtype: the precision in which it was computed, if not that of `expected`.
    """
    if found.shape != expected.shape:
        return False
    exact = (dtype or expected.dtype) == mx.float32
    tolerance = FLOAT32_TOLERANCE if exact else HALF_TOLERANCE
    difference = mx.abs(found - expected).max()
    return bool((difference <= tolerance * mx.abs(expected).max()).item())
