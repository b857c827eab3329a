"""DoRA: LoRA on the direction of the weight, and a trained magnitude."""

from typing import Any

from graft.adapters.adapted_layer import AdaptedLayer, MethodFormula, whole_weight
from graft.adapters.layer_kinds import EMBEDDING_COLUMNS, LINEAR
from graft.adapters.methods import SINGLE_MATRIX_KINDS, Method, register_method
from graft.adapters.methods.lora import (
    low_rank_deltas,
    low_rank_parameters,
    low_rank_update,
    tied_update,
)
from graft.models import with_arrays

import mlx.core as mx


def dora_output(layer: AdaptedLayer, x: mx.array, *inputs: Any, **settings: Any) -> mx.array:
    """DoRA: W' = m * (W + scale * A B) / |W + scale * A B|, with one magnitude m per output.

    It is computed as

        y = f(x; W) + (g - 1) (f(x; W) - b) + g * scale * (x A) B,   g = m / |W + scale * A B|

    so that an untrained layer returns what its base returns, bit for bit. An embedding has one
    magnitude per row, as in mlx-lm, or, as kind "embedding-columns", one per dimension, as in PEFT.
    No gradient flows through the norm, as in section 4.3 of the paper.

    Reference: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024),
    https://arxiv.org/abs/2402.09353.
    """
    kind = layer.layer_kind
    assert kind.update is not None
    y = layer.linear(x, *inputs, **settings)
    ratio = kind.spread(_ratio(layer), x, *inputs, **settings)
    bias = layer.linear.get("bias")
    plain = y if bias is None else y - kind.spread(bias, x, *inputs, **settings)
    z = low_rank_update(layer, kind.update, x, *inputs, **settings)
    return y + ((ratio - 1) * plain + ratio * z).astype(y.dtype)


def _parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    assert layer.layer_kind.norm is not None
    lengths = layer.layer_kind.norm(whole_weight(layer))
    return {**low_rank_parameters(layer, key), "m": lengths, "_base_lengths": lengths}


def _ratio(layer: AdaptedLayer) -> mx.array:
    """g, one value per output."""
    assert layer.layer_kind.norm is not None
    if layer.layer_kind == LINEAR:
        lengths = _linear_lengths(layer)
    else:
        lengths = layer.layer_kind.norm(whole_weight(layer) + low_rank_deltas(layer)["weight"])
    return layer.m / mx.stop_gradient(_positive(lengths))


def _positive(lengths: mx.array) -> mx.array:
    """Lengths to divide by: 1 for an output whose weights are all zero, which stays zero."""
    return mx.where(lengths > 0, lengths, 1.0)


def _linear_lengths(layer: AdaptedLayer) -> mx.array:
    """|W + scale * (A B)^T| of each output, without computing the sum.

    |w + s d|^2 = |w|^2 + 2 s w.d + s^2 |d|^2 with d = A b needs W A, which is the layer itself on
    rank rows, and A^T A. What is added to |w|, and not to its square, is exactly 0 if B is.
    """
    a, b, scale = layer.lora_a, layer.lora_b, layer.scale
    projected = with_arrays(layer.linear, {"bias": None})(a.T)
    added = scale * ((2 * projected + scale * (a.T @ a) @ b) * b).sum(axis=0)
    lengths = layer._base_lengths
    total = lengths + mx.sqrt(mx.maximum(lengths * lengths + added, 0))
    return lengths + added / _positive(total)


def _as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    ratio = _ratio(layer)
    y = layer.linear.as_linear(x)
    z = low_rank_update(layer, tied_update, x)
    return y + ((ratio - 1) * y + ratio * z).astype(y.dtype)


def _deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    weight, ratio = whole_weight(layer), _ratio(layer)
    if layer.layer_kind != EMBEDDING_COLUMNS:
        ratio = ratio.reshape(*ratio.shape, *[1] * (weight.ndim - ratio.ndim))
    return {"weight": ratio * (weight + low_rank_deltas(layer)["weight"]) - weight}


register_method(
    "dora",
    Method(
        formula=MethodFormula(_parameters, dora_output, _deltas, as_linear=_as_linear),
        kinds=(*SINGLE_MATRIX_KINDS, "embedding-columns", "experts"),
        text="LoRA on the weight's direction, and a trained magnitude per output",
        has_magnitude=True,
    ),
)
