"""Gradient checkpointing: less memory for about a third more time.

A transformer block keeps only its input and recomputes its activations in the backward pass, with
the same random numbers and on the same fast paths. Where blocks hand on more than their output, as
keys and values through the cache, gradients would be lost, so they are compared once.
Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016),
https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from graft.errors import InputError
from graft.runtime.attention import current_functions
from graft.runtime.overriding import override, variant
from graft.runtime.randomness import random_key, randomness_from
from graft.training.objectives import Objective
from graft.training.probe import loss_and_gradients, sample_batch, works

import mlx.core as mx
import mlx.nn as nn


def can_checkpoint(model: nn.Module, objective: Objective) -> bool:
    """Whether recomputing leaves loss and gradients as they are; reported if not.

    Args:
        model: with an adapter attached; its blocks are as before afterwards.
        objective: what will be trained.
    """
    batch = sample_batch()
    expected = loss_and_gradients(model, objective, batch)

    def fast() -> Any:
        undo = checkpoint_blocks(model)
        try:
            return loss_and_gradients(model, objective, batch)
        finally:
            undo()

    return works("gradient checkpointing", fast, expected)


def checkpoint_blocks(model: nn.Module) -> Callable[[], None]:
    """Make every transformer block of `model` recompute its activations in the backward pass.

    Returns:
        A function that undoes it.

    Raises:
        InputError: the model has no list of blocks.
    """
    blocks = getattr(model, "layers", None)
    if not blocks:
        raise InputError(
            f"--grad-checkpoint: {type(model).__name__} has no list `layers` of blocks"
        )
    return override([b for b in blocks if not getattr(b, "recomputes", False)], _recomputing)


def _recomputing(block_type: Any) -> Any:
    """A subclass of `block_type` that computes the same and keeps less."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = mx.array(random_key())
        recomputing, functions = False, current_functions()

        def inside(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            with randomness_from(key) if recomputing else nullcontext(), functions():
                return block_type.__call__(self, *args, **kwargs)

        result = mx.checkpoint(inside)(self.trainable_parameters(), *args, **kwargs)
        recomputing = True
        return result

    return variant(block_type, __call__=call, recomputes=True)
