"""Probes: whether a fast path leaves the loss and all gradients of the model at hand as they are.

Packing, the activation cache and gradient checkpointing rely on how an architecture passes states
from block to block. Each is tried on two short rows before it is used. One that changes a result,
or raises, stays off and is reported.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from graft.console import say
from graft.data.collate import collate
from graft.data.examples import Example
from graft.errors import InputError
from graft.runtime.agreement import difference
from graft.runtime.randomness import randomness_from
from graft.training.objectives import BatchArrays, Objective
from graft.training.step import mean_loss

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# Of different lengths, so that there is padding; one long enough for the fast attention.
ROW_LENGTHS = (34, 21)
# Small enough for any vocabulary.
ROW_IDS = 16


@cache
def sample_examples() -> tuple[Example, ...]:
    """The rows that fast paths are tried on."""
    return tuple(map(_example, ROW_LENGTHS))


def _example(length: int) -> Example:
    tokens = (length * np.arange(length, dtype=np.int32) + 1) % ROW_IDS
    return Example(tokens, np.ones(length, dtype=np.bool_))


def sample_batch(examples: tuple[Example, ...] | None = None) -> BatchArrays:
    """A batch of these rows, by default those of `sample_examples`, in MLX."""
    examples = examples or sample_examples()
    return collate(examples, range(len(examples))).to_mlx()


def loss_and_gradients(model: nn.Module, objective: Objective, batch: BatchArrays) -> Any:
    """What training computes for a batch, the same numbers drawn each time for dropout."""
    model.train()
    with randomness_from(mx.random.key(0)):
        found = nn.value_and_grad(model, mean_loss(objective))(model, batch)
        mx.eval(found)
    return found


def works(name: str, fast: Callable[[], Any], expected: Any) -> bool:
    """Whether a fast path computes what is expected; if not, say that it is off, and why.

    Args:
        name: of the fast path, for the message.
        fast: computes arrays, in a tree.
        expected: the same tree from the plain computation.
    """
    reason = difference(fast, expected)
    if reason:
        say(f"{name}: off because {reason}")
    return not reason


def check_trainable(model: nn.Module, objective: Objective) -> None:
    """Compute a gradient, plainly.

    Raises:
        InputError: the architecture has none in mlx-lm.
    """
    try:
        loss_and_gradients(model, objective, sample_batch())
    except Exception as error:
        kind = getattr(model, "model_type", type(model).__name__)
        raise InputError(
            f"mlx-lm's architecture {kind} cannot be trained: {type(error).__name__}: {error}"
        ) from error
