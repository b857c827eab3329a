"""Full fine-tuning of the chosen layers: a trained change of the whole weight and bias."""

import functools
from typing import Any

from graft.adapters.adapted_layer import AdaptedLayer, MethodFormula
from graft.adapters.methods import WHOLE_KINDS, Method, register_method
from graft.adapters.methods.lora import run_changed
from graft.models import dense_weight

import mlx.core as mx


def whole_output(layer: AdaptedLayer, x: mx.array, *inputs: Any, **settings: Any) -> mx.array:
    """Whole parameters: y = f(x; W + scale * delta_weight, b + scale * delta_bias).

    Both deltas start at zero.
    """
    return run_changed(layer, lambda base: base(x, *inputs, **settings))


def _parameters(
    layer: AdaptedLayer, key: mx.array | None, *, names: tuple[str, ...]
) -> dict[str, mx.array]:
    base = layer.linear
    shapes = {"weight": dense_weight(base).shape, "bias": base.get("bias", mx.array(0)).shape}
    return {f"delta_{name}": mx.zeros(shapes[name]) for name in names if name in base}


def _deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    changes = {name.removeprefix("delta_"): array for name, array in layer.tensors().items()}
    return {name: layer.scale * change for name, change in changes.items()}


def _as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    return run_changed(layer, lambda base: base.as_linear(x))


def whole_formula(*names: str) -> MethodFormula:
    """The formula that trains a change of the named parameters, "weight" and "bias"."""
    parameters = functools.partial(_parameters, names=names)
    return MethodFormula(parameters, whole_output, _deltas, as_linear=_as_linear)


register_method(
    "full",
    Method(
        formula=whole_formula("weight", "bias"),
        kinds=WHOLE_KINDS,
        text="the whole weight and bias",
        ranked=False,
    ),
)
