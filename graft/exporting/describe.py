"""Describes an adapter: its base model, and each layer's method, rank, parameters and norm."""

from collections.abc import Mapping
from typing import Any, cast

from graft.adapters.adapter import Adapter
from graft.adapters.factors import factors_of, recorded_kind
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import LAYER_KINDS, WEIGHT
from graft.adapters.methods import METHODS
from graft.pretrained.module_paths import natural_key

import mlx.core as mx


def describe(adapter: Adapter) -> dict[str, Any]:
    """Facts about an adapter, ready for JSON.

    Each layer's `delta_norm` is the Frobenius norm of the change of its weight, or of what is
    trained in place of one; `None` if that takes the base model, as for VeRA and DoRA.
    """
    layers = {
        path: _describe_layer(path, adapter) for path in sorted(adapter.layers, key=natural_key)
    }
    return {
        "base_model": adapter.base_model,
        "dropout": adapter.dropout,
        "rotary": adapter.rotary,
        "parameters": sum(layer["parameters"] for layer in layers.values()),
        "layers": layers,
    }


def _describe_layer(path: str, adapter: Adapter) -> dict[str, Any]:
    config = adapter.layers[path]
    prefix = f"{path}."
    tensors = {
        name.removeprefix(prefix): array
        for name, array in adapter.tensors.items()
        if name.startswith(prefix)
    }
    return {
        "method": config.method,
        "kind": recorded_kind(path, config, tensors.get("lora_a")).name,
        "rank": config.rank,
        "alpha": config.alpha,
        "scale": config.scale,
        "parameters": sum(array.size for array in tensors.values()),
        "delta_norm": delta_norm(path, config, tensors),
    }


def delta_norm(path: str, config: LayerConfig, tensors: Mapping[str, mx.array]) -> float | None:
    """The Frobenius norm of a layer's change, from the small products of its factors.

    |A B|^2 is the sum of (A^T A) * (B B^T), so the product itself is never made.

    Args:
        path: of the layer.
        config: of the layer.
        tensors: of the layer, by their names in it.
    """
    if any(name.startswith("delta_") for name in tensors):
        return config.scale * _norm(*tensors.values())
    kind = recorded_kind(path, config, tensors.get("lora_a"))
    if not METHODS[config.method].low_rank or kind is WEIGHT:
        return None
    layer = Adapter({f"{path}.{name}": a for name, a in tensors.items()}, {path: config})
    kinds = tuple(LAYER_KINDS.values())
    factors = factors_of(layer, holder="inspect", kinds=kinds)[path]
    a, b = factors.matrices
    square = mx.maximum(((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2))).sum(), 0)
    return abs(factors.scale) * cast(float, mx.sqrt(square).item())


def _norm(*arrays: mx.array) -> float:
    squares = [mx.square(array.astype(mx.float32)).sum() for array in arrays]
    return cast(float, mx.sqrt(mx.stack(squares).sum()).item())
