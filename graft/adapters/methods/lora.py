"""LoRA: a low-rank update beside a frozen weight."""

from collections.abc import Callable
from typing import Any

from graft.adapters.adapted_layer import AdaptedLayer, FactorPair, MethodFormula, whole_weight
from graft.adapters.methods import LOW_RANK_KINDS, Method, register_method
from graft.models import LoRALayer, dense_layer, fused, is_quantized
from graft.runtime.cpu import lora_linear_type

import mlx.core as mx
import mlx.nn as nn


def low_rank_parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    """A, drawn at random, and B, zero."""
    a, b = layer.layer_kind.draw(layer.linear, layer.rank, key)
    return {"lora_a": a, "lora_b": b}


def low_rank_update(
    layer: AdaptedLayer, update: Callable[..., mx.array], x: mx.array, *inputs: Any, **settings: Any
) -> mx.array:
    """scale * (x A) B, minus the same of the initial A and B if the layer keeps them."""
    x = layer.dropped(x)
    z = update(layer.linear, layer.lora_a, layer.lora_b, x, *inputs, **settings)
    if "_start_a" in layer:
        z = z - update(layer.linear, layer._start_a, layer._start_b, x, *inputs, **settings)
    return layer.scale * z


def run_changed(layer: AdaptedLayer, run: Callable[[nn.Module], mx.array]) -> mx.array:
    """The output of a layer with the changes added to its parameters first.

    A quantized layer's own product and that with its dequantized weight differ in the last bits, so
    over a quantized weight the output is the base's plus the difference between two dequantized
    runs.
    """
    deltas = layer.deltas()
    changed = run(fused(layer.linear, deltas, dequantize=True))
    if not is_quantized(layer.linear) or "weight" not in deltas:
        return changed
    y = run(layer.linear)
    return y + (changed - run(dense_layer(layer.linear))).astype(y.dtype)


def low_rank_output(layer: AdaptedLayer, x: mx.array, *inputs: Any, **settings: Any) -> mx.array:
    """LoRA: y = f(x; W) + scale * (x A) B, or, merge-first, y = f(x; W + scale * A B).

    If the layer keeps the initial A and B, the update is the difference to their product,

        y = f(x; W) + scale * ((x A) B - (x A0) B0),

    which equals training A and B over the residual base W - scale * A0 B0, but leaves the base
    itself unchanged, so the exported adapter works on it.

    Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021),
    https://arxiv.org/abs/2106.09685.
    """
    update = layer.layer_kind.update
    if update is None:
        return run_changed(layer, lambda base: base(x, *inputs, **settings))
    y = layer.linear(x, *inputs, **settings)
    return y + low_rank_update(layer, update, x, *inputs, **settings).astype(y.dtype)


def tied_update(base: nn.Module, a: mx.array, b: mx.array, x: mx.array) -> mx.array:
    """What an embedding's update A B (vocabulary, dims) adds to the logits of a tied output."""
    return (x @ b.T) @ a.T


def low_rank_as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    """The logits of an output that is tied to an adapted embedding."""
    if layer.layer_kind.update is None:
        return run_changed(layer, lambda base: base.as_linear(x))
    y = layer.linear.as_linear(x)
    return y + low_rank_update(layer, tied_update, x).astype(y.dtype)


def low_rank_deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    """The change of the weight, scale * A B in the weight's layout."""
    product = layer.layer_kind.product(layer.linear, layer.lora_a, layer.lora_b)
    if "_start_a" in layer:
        product = product - layer.layer_kind.product(layer.linear, layer._start_a, layer._start_b)
    return {"weight": layer.scale * product}


def _lora_linear(base: nn.Module, rank: int, **settings: Any) -> LoRALayer:
    return lora_linear_type()(base, rank, **settings)


LOW_RANK_FORMULA = MethodFormula(
    low_rank_parameters,
    low_rank_output,
    low_rank_deltas,
    as_linear=low_rank_as_linear,
    linear_layer=_lora_linear,
)


def started_formula(start: Callable[[mx.array, int, float], FactorPair]) -> MethodFormula:
    """LoRA that starts from a decomposition of the weight and keeps the initial A and B.

    Args:
        start: (weight as (inputs, outputs), rank, scale) -> the initial A and B.
    """

    def parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
        kind = layer.layer_kind
        assert kind.flat is not None
        a, b = start(kind.flat(whole_weight(layer)), layer.rank, layer.scale)
        a = a.reshape(kind.shapes(layer.linear, layer.rank)[0])
        return {"lora_a": a, "lora_b": b, "_start_a": a, "_start_b": b}

    return MethodFormula(parameters, low_rank_output, low_rank_deltas, as_linear=low_rank_as_linear)


register_method(
    "lora",
    Method(
        formula=LOW_RANK_FORMULA,
        kinds=LOW_RANK_KINDS,
        text="low-rank update, scaled by alpha / rank",
        low_rank=True,
    ),
)
