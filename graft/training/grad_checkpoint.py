"""Gradient checkpointing: less memory for about a third more time.

A transformer block keeps its input and computes the rest again when the gradient needs it, with the
same random numbers as before.
Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016),
https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from graft.errors import InputError
from graft.runtime.overriding import override, variant

import mlx.core as mx
import mlx.nn as nn


def checkpoint_blocks(model: nn.Module) -> None:
    """Make every transformer block of `model` recompute its inside in the backward pass, once.

    Raises:
        InputError: the model has no list of blocks.
    """
    blocks = getattr(model, "layers", None)
    if not blocks:
        raise InputError(
            f"--grad-checkpoint: {type(model).__name__} has no list `layers` of blocks"
        )
    override([b for b in blocks if not getattr(b, "recomputes", False)], _recomputing)


def _recomputing(block_type: Any) -> Any:
    """A block type that computes as `block_type` does and keeps less."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = mx.array(_random_key())
        again = False

        def inside(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            with _randomness_from(key) if again else nullcontext():
                return block_type.__call__(self, *args, **kwargs)

        result = mx.checkpoint(inside)(self.trainable_parameters(), *args, **kwargs)
        again = True
        return result

    return variant(block_type, __call__=call, recomputes=True)


@contextmanager
def _randomness_from(key: mx.array) -> Iterator[None]:
    """Draw the random numbers that follow `key`; those drawn afterwards are what they would be."""
    now = mx.array(_random_key())
    # MLX has no way to set its key but to write into the array that it holds.
    _random_key()[...] = key
    try:
        yield
    finally:
        _random_key()[...] = now


def _random_key() -> mx.array:
    """The array in which MLX keeps its random state."""
    state: Any = mx.random.state
    return state[0]
