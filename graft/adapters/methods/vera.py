"""VeRA: two trained vectors around frozen random matrices."""

import functools
import math

from graft.adapters.adapted_layer import AdaptedLayer, FactorPair, MethodFormula
from graft.adapters.methods import SINGLE_MATRIX_KINDS, Method, register_method
from graft.adapters.methods.lora import tied_update

import mlx.core as mx


def vera_output(layer: AdaptedLayer, x: mx.array) -> mx.array:
    """VeRA: y = f(x; W) + scale * lambda_b * ((lambda_d * (x A)) B), A and B frozen and random.

    lambda_d (rank,) starts at 0.1 and lambda_b (outputs,) at zero; the scale is 1 in the paper. A
    and B depend on their shapes only: layers of one size share them, and no file stores them.

    Reference: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (2023),
    https://arxiv.org/abs/2310.11454.
    """
    assert layer.layer_kind.update is not None
    y = layer.linear(x)
    z = layer.layer_kind.update(layer.linear, *_factors(layer), layer.dropped(x))
    return y + (layer.scale * z).astype(y.dtype)


@functools.lru_cache(maxsize=64)
def _projection(shape: tuple[int, ...], fan_in: int, seed: int) -> mx.array:
    """A frozen random matrix: Kaiming's uniform distribution, within sqrt(6 / fan_in)."""
    bound = math.sqrt(6 / fan_in)
    return mx.random.uniform(-bound, bound, shape=shape, key=mx.random.key(seed))


def _parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    kind = layer.layer_kind
    a_shape, b_shape = kind.shapes(layer.linear, layer.rank)
    return {
        "_projection_a": _projection(a_shape, kind.fan_in(layer.linear), 0),
        "_projection_b": _projection(b_shape, layer.rank, 1),
        "lambda_d": mx.full((layer.rank,), 0.1),
        "lambda_b": mx.zeros(b_shape[-1:]),
    }


def _factors(layer: AdaptedLayer) -> FactorPair:
    return layer._projection_a * layer.lambda_d, layer._projection_b * layer.lambda_b


def _as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    y = layer.linear.as_linear(x)
    z = tied_update(layer.linear, *_factors(layer), layer.dropout(x))
    return y + (layer.scale * z).astype(y.dtype)


def _deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    return {"weight": layer.scale * layer.layer_kind.product(layer.linear, *_factors(layer))}


register_method(
    "vera",
    Method(
        formula=MethodFormula(_parameters, vera_output, _deltas, as_linear=_as_linear),
        kinds=SINGLE_MATRIX_KINDS,
        text="two trained vectors around frozen random matrices",
        alpha_is_rank=True,
    ),
)
