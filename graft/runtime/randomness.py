"""MLX's random numbers: drawing the same ones again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


@contextmanager
def randomness_from(key: mx.array) -> Iterator[None]:
    """Draw the random numbers that follow `key`; later ones are as if none had been drawn."""
    now = mx.array(random_key())
    # The only way to set MLX's key is to write into the array that holds it.
    random_key()[...] = key
    try:
        yield
    finally:
        random_key()[...] = now


def random_key() -> mx.array:
    """The array that holds MLX's random state."""
    state: Any = mx.random.state
    return state[0]
