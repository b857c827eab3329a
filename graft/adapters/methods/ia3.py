"""(IA)3: one trained factor per output, or per input of a feed-forward block's second matrix."""

import functools

from graft.adapters.adapted_layer import AdaptedLayer, MethodFormula, whole_weight
from graft.adapters.methods import Method, register_method

import mlx.core as mx


def ia3_output(layer: AdaptedLayer, x: mx.array, *, scales_input: bool) -> mx.array:
    """(IA)3: y = l * f(x; W), or y = f(l * x; W) if it scales the input, with l starting at one.

    The first is for keys and values, the second for a feed-forward block's second matrix.

    Reference: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning" (2022), https://arxiv.org/abs/2205.05638.
    """
    if scales_input:
        return layer.linear((x * layer.ia3_l).astype(x.dtype))
    y = layer.linear(x)
    return (y * layer.ia3_l).astype(y.dtype)


def _parameters(
    layer: AdaptedLayer, key: mx.array | None, *, scales_input: bool
) -> dict[str, mx.array]:
    (*_, inputs, _), (_, outputs) = layer.layer_kind.shapes(layer.linear, 1)
    inputs *= getattr(layer.linear, "groups", 1)
    return {"ia3_l": mx.ones((inputs if scales_input else outputs,))}


def _deltas(layer: AdaptedLayer, *, scales_input: bool) -> dict[str, mx.array]:
    weight, change = whole_weight(layer), layer.ia3_l - 1
    if scales_input:
        groups = change.size // weight.shape[-1]
        rows = mx.repeat(change.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return {"weight": weight * rows.reshape(len(rows), *[1] * (weight.ndim - 2), -1)}
    bias = {"bias": layer.linear.bias * change} if "bias" in layer.linear else {}
    return {"weight": weight * change.reshape(-1, *[1] * (weight.ndim - 1)), **bias}


def ia3_formula(*, scales_input: bool) -> MethodFormula:
    """The formula that scales a layer's input or its output."""
    return MethodFormula(
        functools.partial(_parameters, scales_input=scales_input),
        functools.partial(ia3_output, scales_input=scales_input),
        functools.partial(_deltas, scales_input=scales_input),
    )


register_method(
    "ia3",
    Method(
        formula=ia3_formula(scales_input=False),
        kinds=("linear", "conv"),
        text="one trained factor per output",
        targets="k_proj,v_proj,down_proj",
        ranked=False,
        on_feed_forward_ends="ia3-input",
    ),
)

register_method(
    "ia3-input",
    Method(
        formula=ia3_formula(scales_input=True),
        kinds=("linear", "conv"),
        text="one trained factor per input",
        targets="down_proj",
        ranked=False,
    ),
)
