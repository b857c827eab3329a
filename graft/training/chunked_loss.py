"""Cross-entropy in chunks, which never holds the logits of all tokens.

With a large vocabulary, logits take most of a training step's memory and half of its time. Here
they exist for one chunk of trained positions at a time, and their gradient, which cross-entropy has
in closed form, is computed in the forward pass:

    loss = sum_t (logsumexp(z_t) - z_t[y_t]),   d loss / d h_t = W^T (softmax(z_t) - onehot(y_t))

with z_t = W h_t. An architecture may change its logits after the last layer, so the model's logits
are compared with those of the layer once; if they differ, the plain loss is used.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

from graft.adapters.attach import lora_layers
from graft.console import say
from graft.models import dense_weight, is_quantized, linear_dims, weight_shape
from graft.runtime.agreement import agrees
from graft.runtime.cpu import exponential, runs_on_cpu
from graft.runtime.overriding import overridden, variant
from graft.training.packing import forward

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Logits computed at a time: 8 MB in float32, and as much again for their softmax.
CHUNK_VALUES = 2**21
SMALLEST_CHUNK = 32
LINEARS = (nn.Linear, nn.QuantizedLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class Head:
    """The last layer of a language model, which turns hidden states into logits.

    Args:
        module: a linear layer, or the embedding whose weight is used for it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._name = "as_linear" if isinstance(module, EMBEDDINGS) else "__call__"

    def cross_entropy(self, model: nn.Module, batch: Mapping[str, mx.array]) -> mx.array:
        """Cross-entropy summed over the tokens of the loss mask, in nats.

        Args:
            model: the model with this head; in training mode the gradient is computed as well.
            batch: `inputs`, `targets`, `loss_mask` and perhaps `segment_ids`, each (rows, tokens).
        """
        with self.skipped():
            hidden = forward(model, batch["inputs"], batch.get("segment_ids"))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        targets, loss_mask = batch["targets"].reshape(-1), batch["loss_mask"].reshape(-1)
        positions = _trained_positions(loss_mask)
        if positions is not None:
            hidden, targets = hidden[positions], targets[positions]
            loss_mask = loss_mask[positions]
        return summed_cross_entropy(
            self.project(), hidden, targets, loss_mask, differentiable=model.training
        )

    def project(self) -> Callable[[mx.array], mx.array]:
        """The function from hidden states (rows, dims) to logits (rows, vocabulary)."""
        if not (is_quantized(self._module) and runs_on_cpu()):
            return getattr(self._module, self._name)
        weight, bias = dense_weight(self._module), self._module.get("bias")
        return lambda x: x @ weight.T if bias is None else x @ weight.T + bias

    @contextmanager
    def skipped(self, factor: float = 1.0) -> Iterator[None]:
        """Until the context ends, the model returns `factor` times what enters its last layer."""
        with overridden([self._module], lambda cls: _passing(cls, self._name, factor)):
            yield


def find_head(model: nn.Module, *, training: bool = True) -> tuple[Head | None, str]:
    """The last layer of a model, if the model's logits are the output of that layer.

    Args:
        model: a language model, with or without an adapter.
        training: whether the model will be trained; a head that is trained itself does not serve.

    Returns:
        The head, or `None` and the reason.
    """
    model.eval()
    tokens = mx.arange(16).reshape(2, 8)
    logits = model(tokens)
    adapted = {path for path, _ in lora_layers(model)}
    reason = "no layer outputs the logits unchanged"
    for path, module in model.named_modules():
        if not _gives(module, logits.shape[-1]):
            continue
        over = adapted.intersection(accumulate(path.split("."), "{}.{}".format))
        if over or (training and tree_flatten(module.trainable_parameters())):
            reason = f"{min(over, default=path)} is adapted"
        elif _explains(Head(module), model, tokens, logits):
            return Head(module), ""
    return None, reason


def use_chunked_loss(model: nn.Module, *, training: bool = True) -> None:
    """Let objectives compute their loss in chunks, or report why they cannot."""
    model.loss_head, reason = find_head(model, training=training)
    if model.loss_head is None:
        say(f"loss: chunked cross-entropy off because {reason}")


def rows_of_a_chunk(vocabulary: int) -> int:
    """Positions whose logits exist at the same time."""
    return max(CHUNK_VALUES // vocabulary, SMALLEST_CHUNK)


def summed_cross_entropy(
    project: Callable[[mx.array], mx.array],
    hidden: mx.array,
    targets: mx.array,
    loss_mask: mx.array,
    *,
    differentiable: bool = True,
    chunk: int | None = None,
) -> mx.array:
    """Cross-entropy of projected hidden states, summed over the loss mask, in float32.

    Args:
        project: hidden states (rows, dims) to logits (rows, vocabulary); linear and frozen.
        hidden: (rows, dims).
        targets: (rows,) token ids.
        loss_mask: (rows,) bool.
        differentiable: compute the gradient of `hidden` along with the loss.
        chunk: rows at a time; by default as many as keep the logits small.
    """
    if hidden.shape[0] == 0:
        return mx.array(0.0)
    chunk = chunk or rows_of_a_chunk(project(hidden[:1]).shape[-1])

    def over_chunks(hidden: mx.array) -> tuple[mx.array, mx.array]:
        total = mx.array(0.0)
        gradients: list[mx.array] = []
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            # One chunk after another, or the logits of all of them would be computed at once.
            waiting: Any = mx.depends([hidden[part]], [total, *gradients[-1:]])
            rows = waiting[0]
            loss, gradient = _chunk(project, rows, targets[part], loss_mask[part], differentiable)
            total = total + loss
            gradients += gradient
        return total, mx.concatenate(gradients) if gradients else hidden

    if not differentiable:
        return over_chunks(hidden)[0]
    function = mx.custom_function(over_chunks)

    @function.vjp
    def multiply(_: Any, cotangents: Any, outputs: Any) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(outputs[1].dtype)

    results: Any = function(hidden)
    return results[0]


def _chunk(
    project: Callable[[mx.array], mx.array],
    hidden: mx.array,
    targets: mx.array,
    loss_mask: mx.array,
    differentiable: bool,
) -> tuple[mx.array, list[mx.array]]:
    """Summed loss of some rows and, if asked for, its gradient with respect to `hidden`."""
    raw = project(hidden)
    logits, places = raw.astype(mx.float32), targets[:, None]
    wanted = mx.take_along_axis(logits, places, axis=-1)
    if not differentiable:
        return ((mx.logsumexp(logits, axis=-1, keepdims=True) - wanted)[:, 0] * loss_mask).sum(), []
    # Apart from the matrix products, passes over the logits cost most, exponentials above all:
    # they are computed once for loss and gradient, and scaled where there are fewer numbers.
    top = logits.max(axis=-1, keepdims=True)
    powers = exponential(logits - top)
    total = powers.sum(axis=-1, keepdims=True)
    loss = (top + mx.log(total) - wanted)[:, 0] * loss_mask
    missing = mx.take_along_axis(powers, places, axis=-1) - total
    error, scale = mx.put_along_axis(powers, places, missing, axis=-1), loss_mask[:, None] / total
    if raw.dtype == hidden.dtype == mx.float32:
        _, (gradient,) = mx.vjp(project, [hidden], [error])
        return loss.sum(), [gradient * scale]
    # Unscaled errors may overflow half precision.
    _, (gradient,) = mx.vjp(project, [hidden], [(error * scale).astype(raw.dtype)])
    return loss.sum(), [gradient]


def _trained_positions(loss_mask: mx.array) -> mx.array | None:
    """Indices of the loss mask; `None` on a GPU, where shapes must not depend on values."""
    return mx.array(np.flatnonzero(np.array(loss_mask))) if runs_on_cpu() else None


@lru_cache
def _passing(kind: type, name: str, factor: float) -> type:
    """A type like `kind` whose method `name` returns its argument times `factor`."""
    return variant(kind, **{name: lambda self, x: x if factor == 1 else x * factor})


def _gives(module: nn.Module, vocabulary: int) -> bool:
    if isinstance(module, EMBEDDINGS):
        return weight_shape(module)[0] == vocabulary
    return isinstance(module, LINEARS) and linear_dims(module)[1] == vocabulary


def _explains(head: Head, model: nn.Module, tokens: mx.array, logits: mx.array) -> bool:
    """Whether the model's logits are the head's output, scaled by nothing and capped by nothing."""
    factor = 1000.0
    try:
        with head.skipped():
            hidden = model(tokens)
        with head.skipped(factor):
            larger = model(tokens)
        found = head.project()(hidden)
    except Exception:  # Skipping a layer that is not the head breaks each model in another way.
        return False
    return agrees(found, logits) and agrees(larger / factor, hidden)
