"""The frozen prefix: the transformer blocks below the first adapted one, taken out of a model.

The output of these blocks for a row never changes, so training can start from it
(`graft.training.activation_cache` stores it). A stand-in takes the place of each block, so that
parameter paths and masks stay the same. Architectures pass states on in many ways, so loss and
gradients are compared with those of the whole model before the blocks are left out.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from graft.adapters.targets import block_paths
from graft.data.examples import Example
from graft.models import weight_shape
from graft.runtime.overriding import overridden, override, variant
from graft.training.objectives import Objective
from graft.training.probe import loss_and_gradients, sample_batch, sample_examples, works

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

EMBEDDING_TYPES = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass
class _StateChannel:
    """Carries the states of a batch from the embedding to the first block that is computed."""

    states: mx.array | None = None


class _StandIn(nn.Module):
    """Takes the place of a frozen block; the last one returns the states of the batch."""

    def __init__(self, block: nn.Module, channel: _StateChannel | None) -> None:
        super().__init__()
        # Models ask their blocks which mask they need.
        vars(self).update({n: v for n, v in vars(block).items() if not n.startswith("_")})
        self.channel = channel

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        """The states of the batch, or the input if more stand-ins follow."""
        if self.channel is None or self.channel.states is None:
            return x
        states, self.channel.states = self.channel.states, None
        return states


class _Reached(Exception):
    """Ends a forward pass at the first adapted block."""


def prefix_length(model: nn.Module) -> int:
    """How many blocks are below everything that is trained in any block."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    for number, block in enumerate(block_paths(model)):
        if any(path.startswith(f"{block}.") for path in trained):
            return number
    return 0


def prefix_removed(model: nn.Module) -> bool:
    """Whether the frozen prefix of a model was taken out."""
    return any(isinstance(module, _StandIn) for module in getattr(model, "layers", ()))


def prefix_output(model: nn.Module, length: int, inputs: NDArray[np.int32]) -> mx.array:
    """The input of block `length` (rows, tokens, dims) for token ids (rows, tokens)."""
    reached: list[mx.array] = []

    def stop(self: nn.Module, x: mx.array, *_: Any, **__: Any) -> None:
        reached.append(x)
        raise _Reached

    model.eval()
    block = model.layers[length]
    with suppress(_Reached), overridden([block], lambda cls: variant(cls, __call__=stop)):
        model(mx.array(inputs))
    return reached[0]


def probe_prefix(model: nn.Module, length: int, objective: Objective) -> mx.array | None:
    """Try to train from the prefix's output, and report it if loss or gradients change.

    Args:
        model: with an adapter attached.
        length: how many blocks the prefix has.
        objective: what will be trained.

    Returns:
        The prefix's output (tokens, dims) for one of the rows that it was tried on; `None` if the
        results were others.
    """
    expected = loss_and_gradients(model, objective, sample_batch())
    states: list[mx.array] = []

    def fast() -> Any:
        states.extend(example_states(model, length, sample_examples()))
        pairs = zip(sample_examples(), states, strict=True)
        rows = tuple(replace(example, states=to_numpy(s)) for example, s in pairs)
        undo = remove_prefix(model, length)
        try:
            return loss_and_gradients(model, objective, sample_batch(rows))
        finally:
            undo()

    return states[0] if works("activation cache", fast, expected) else None


def remove_prefix(model: nn.Module, length: int) -> Callable[[], None]:
    """Put stand-ins in place of the first blocks; returns a function that undoes it.

    Args:
        model: with an adapter attached; changed in place.
        length: how many blocks.
    """
    layers, channel = _layer_list(model), _StateChannel()
    blocks = layers[:length]
    layers[:length] = [
        _StandIn(block, channel if number == length - 1 else None)
        for number, block in enumerate(blocks)
    ]
    embeddings_again = _let_embeddings_take_states(model, channel)

    def undo() -> None:
        layers[:length] = blocks
        embeddings_again()

    return undo


def stored_dtype(dtype: mx.Dtype) -> "np.dtype[Any]":
    """How NumPy stores states; bfloat16, which it lacks, as the bits of uint16."""
    return np.dtype({mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "uint16"}[dtype])


def to_numpy(states: mx.array) -> NDArray[Any]:
    """States as NumPy stores them."""
    return np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states)


def _layer_list(model: nn.Module) -> list[Any]:
    """The list that holds the blocks; `model.layers` may be a copy."""
    list_path, _, _ = block_paths(model)[0].rpartition(".")
    holder, _, name = list_path.rpartition(".")
    return dict(model.named_modules())[holder][name]


def _let_embeddings_take_states(model: nn.Module, channel: _StateChannel) -> Callable[[], None]:
    """Let embeddings take states in place of token ids; returns a function that undoes it."""
    modules = [m for _, m in model.named_modules() if isinstance(m, EMBEDDING_TYPES)]
    return override(modules, lambda cls: _taking_states(cls, channel))


def _taking_states(cls: type, channel: _StateChannel) -> type:
    def call(self: nn.Module, x: mx.array) -> mx.array:
        if x.dtype == mx.uint16:
            x = x.view(mx.bfloat16)
        if not mx.issubdtype(x.dtype, mx.floating):
            return cls.__call__(self, x)
        channel.states = x
        return x

    return variant(cls, __call__=call)


def count_prefix_weights(model: nn.Module, length: int) -> tuple[int, int]:
    """Weights of matrix products in the first blocks, and in the rest of the model."""
    below = sum(map(_matrix_weights, model.layers[:length]))
    return below, _matrix_weights(model) - below


def _matrix_weights(module: nn.Module) -> int:
    types = (nn.Linear, nn.QuantizedLinear)
    linears = [m for _, m in module.named_modules() if isinstance(m, types)]
    return sum(int(np.prod(weight_shape(linear))) for linear in linears)


def example_states(model: nn.Module, length: int, examples: Sequence[Example]) -> list[mx.array]:
    """The prefix's output (tokens - 1, dims) of each example, computed one by one."""
    return [prefix_output(model, length, e.tokens[None, :-1])[0] for e in examples]
