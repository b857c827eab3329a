"""The variants of LoRA, each a formula written once for all kinds of layers.

`METHODS` tells which layer each method makes of which kind. In the formulas W is the frozen weight,
f(x; W) what the base gives, and (x A) B stands for the update in the terms of the layer's kind.
Knows nothing of paths or files.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graft.adapters.adapted_layer import AdaptedLayer, Factors, MethodFormula, whole_weight
from graft.adapters.layer_kinds import EMBEDDING_COLUMNS, LINEAR, VECTOR, LayerKind
from graft.models import dense_layer, dense_weight, is_quantized, with_arrays
from graft.runtime.cpu import lora_linear_type

import mlx.core as mx
import mlx.nn as nn


def _low_rank_parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    a, b = layer.form.draw(layer.linear, layer.rank, key)
    return {"lora_a": a, "lora_b": b}


def _low_rank_update(
    layer: AdaptedLayer, update: Callable[..., mx.array], x: mx.array, *inputs: Any, **settings: Any
) -> mx.array:
    """scale * (x A) B, less the same of the start."""
    x = layer.dropped(x)
    z = update(layer.linear, layer.lora_a, layer.lora_b, x, *inputs, **settings)
    if "_start_a" in layer:
        z = z - update(layer.linear, layer._start_a, layer._start_b, x, *inputs, **settings)
    return layer.scale * z


def _run_changed(layer: AdaptedLayer, run: Callable[[nn.Module], mx.array]) -> mx.array:
    """What a layer gives with its deltas in its parameters: the merge-first form.

    A quantized layer computes in its own way, which a whole weight does not repeat to the last bit.
    So there it is the difference between two whole weights that is added to its output.
    """
    changed = run(layer.fuse(dequantize=True))
    if not is_quantized(layer.linear) or layer.method == "bias":
        return changed
    y = run(layer.linear)
    return y + (changed - run(dense_layer(layer.linear))).astype(y.dtype)


def low_rank_output(layer: AdaptedLayer, x: mx.array, *inputs: Any, **settings: Any) -> mx.array:
    """LoRA: y = f(x; W) + scale * (x A) B, or, merge-first, y = f(x; W + scale * A B).

    With a start, what is added is the difference to it,

        y = f(x; W) + scale * ((x A) B - (x A0) B0),

    which is what training A and B over the residual base W - scale * A0 B0 computes, while the base
    stays as it is: the exported adapter works on it.

    References: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021),
    https://arxiv.org/abs/2106.09685. rsLoRA differs in its scale alone: Kalajdzievski, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023),
    https://arxiv.org/abs/2312.03732.
    """
    if layer.form.update is None:
        return _run_changed(layer, lambda base: base(x, *inputs, **settings))
    y = layer.linear(x, *inputs, **settings)
    return y + _low_rank_update(layer, layer.form.update, x, *inputs, **settings).astype(y.dtype)


def _tied_update(base: nn.Module, a: mx.array, b: mx.array, x: mx.array) -> mx.array:
    """What an embedding's update A B (vocabulary, dims) adds to the logits it is tied to."""
    return (x @ b.T) @ a.T


def _low_rank_as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    if layer.form.update is None:
        return _run_changed(layer, lambda base: base.as_linear(x))
    y = layer.linear.as_linear(x)
    return y + _low_rank_update(layer, _tied_update, x).astype(y.dtype)


def _low_rank_deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    product = layer.form.product(layer.linear, layer.lora_a, layer.lora_b)
    if "_start_a" in layer:
        product = product - layer.form.product(layer.linear, layer._start_a, layer._start_b)
    return {"weight": layer.scale * product}


LOW_RANK = MethodFormula(
    _low_rank_parameters, low_rank_output, _low_rank_deltas, as_linear=_low_rank_as_linear
)


def pissa_start(weight: mx.array, rank: int, scale: float) -> Factors:
    """The principal part of a matrix, divided evenly: A = U sqrt(S / scale), B = sqrt(S / scale) V.

    Args:
        weight: (inputs, outputs).
        rank: how many singular values to take.
        scale: of the update.

    Reference: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
    Large Language Models" (2024), https://arxiv.org/abs/2404.02948, equations 2 and 3.
    """
    u, s, vt = truncated_svd(weight, rank)
    root = mx.sqrt(s / scale)
    return u * root, root[:, None] * vt


def olora_start(weight: mx.array, rank: int, scale: float) -> Factors:
    """The first directions of the QR decomposition of the transpose, Q R: A = R^T, B = Q^T.

    Args:
        weight: (inputs, outputs).
        rank: how many directions to take.
        scale: of the update; A and B do not depend on it.

    Reference: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models" (2024),
    https://arxiv.org/abs/2406.01775.
    """
    q, r = mx.linalg.qr(weight.T, stream=mx.cpu)
    return r[:rank].T, q[:, :rank].T


# (weight as (inputs, outputs), rank, scale) -> A0 and B0.
STARTS: dict[str, Callable[[mx.array, int, float], Factors]] = {
    "pissa": pissa_start,
    "olora": olora_start,
}


def _started_parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    assert layer.form.flat is not None
    a, b = STARTS[layer.method](layer.form.flat(whole_weight(layer)), layer.rank, layer.scale)
    a = a.reshape(layer.form.shapes(layer.linear, layer.rank)[0])
    return {"lora_a": a, "lora_b": b, "_start_a": a, "_start_b": b}


STARTED = MethodFormula(
    _started_parameters, low_rank_output, _low_rank_deltas, as_linear=_low_rank_as_linear
)


def loftq_start(layer: Any, original: mx.array) -> None:
    """Set A and B of a layer over a quantized base Q to the best correction of its rounding.

    scale * A B is the truncated SVD of W - Q, so that the untrained layer is nearer to the model
    before quantization. This is the first of the paper's alternating steps; the further ones would
    change Q, and the adapter would fit no other copy of the base. Li et al., "LoftQ:
    LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (2023),
    https://arxiv.org/abs/2310.08659, algorithm 1.

    Args:
        layer: with `method` "loftq".
        original: the weight before quantization.
    """
    flat = getattr(layer, "form", LINEAR).flat
    assert flat is not None
    rounding = original.astype(mx.float32) - dense_weight(layer.base).astype(mx.float32)
    a, b = pissa_start(flat(rounding), layer.rank, layer.scale)
    layer.load({"lora_a": a, "lora_b": b})


def truncated_svd(matrix: mx.array, rank: int) -> tuple[mx.array, mx.array, mx.array]:
    """U (rows, rank), S (rank,) and V^T (rank, columns) of the largest singular values.

    Exact up to 1024 rows or columns; beyond, by randomized subspace iteration, as in Halko et al.,
    "Finding Structure with Randomness" (2009), https://arxiv.org/abs/0909.4061, algorithm 4.4,
    with 8 iterations and 16 directions more than asked for.
    """
    with mx.stream(mx.cpu):
        if min(matrix.shape) <= 1024:
            u, s, vt = _thin_svd(matrix)
            return u[:, :rank], s[:rank], vt[:rank]
        width = min(rank + 16, *matrix.shape)
        basis = matrix @ mx.random.normal((matrix.shape[1], width), key=mx.random.key(0))
        for _ in range(8):
            basis = mx.linalg.qr(matrix.T @ mx.linalg.qr(basis)[0])[0]
            basis = matrix @ basis
        q = mx.linalg.qr(basis)[0]
        u, s, vt = _thin_svd(q.T @ matrix)
        return q @ u[:, :rank], s[:rank], vt[:rank]


def _thin_svd(matrix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The decomposition without the square factor that MLX makes of a matrix's longer side."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = _thin_svd(matrix.T)
        return vt.T, s, u.T
    q, r = mx.linalg.qr(matrix)
    u, s, vt = mx.linalg.svd(r)
    return q @ u, s, vt


def _dora_parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    assert layer.form.norm is not None
    lengths = layer.form.norm(whole_weight(layer))
    return {**_low_rank_parameters(layer, key), "m": lengths, "_base_lengths": lengths}


def _dora_ratio(layer: AdaptedLayer) -> mx.array:
    """g, one value an output."""
    assert layer.form.norm is not None
    if layer.kind == LINEAR.name:
        lengths = _linear_lengths(layer)
    else:
        lengths = layer.form.norm(whole_weight(layer) + _low_rank_deltas(layer)["weight"])
    return layer.m / mx.stop_gradient(_positive(lengths))


def _positive(lengths: mx.array) -> mx.array:
    """Lengths to divide by; an output whose weights are all zero has none, and stays zero."""
    return mx.where(lengths > 0, lengths, 1.0)


def _linear_lengths(layer: AdaptedLayer) -> mx.array:
    """|W + scale * (A B)^T| of each output, without making the sum.

    |w + s d|^2 = |w|^2 + 2 s w.d + s^2 |d|^2 with d = A b needs W A, which is the layer itself on
    rank rows, and A^T A. What is added to |w|, and not to its square, is exactly 0 if B is.
    """
    a, b, scale = layer.lora_a, layer.lora_b, layer.scale
    projected = with_arrays(layer.linear, {"bias": None})(a.T)
    added = scale * ((2 * projected + scale * (a.T @ a) @ b) * b).sum(axis=0)
    lengths = layer._base_lengths
    total = lengths + mx.sqrt(mx.maximum(lengths * lengths + added, 0))
    return lengths + added / _positive(total)


def dora_output(layer: AdaptedLayer, x: mx.array, *inputs: Any, **settings: Any) -> mx.array:
    """DoRA: W' = m * (W + scale * A B) / |W + scale * A B|, with one length m an output.

    It is computed as

        y = f(x; W) + (g - 1) (f(x; W) - b) + g * scale * (x A) B,   g = m / |W + scale * A B|

    so that an untrained layer gives what its base gives bit for bit. An embedding has a length a
    row, as in mlx-lm, or, where its kind says so, a length a dimension, as in PEFT. No gradient
    goes through the norm, as in section 4.3 of the paper.

    Reference: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024),
    https://arxiv.org/abs/2402.09353.
    """
    assert layer.form.update is not None
    y = layer.linear(x, *inputs, **settings)
    ratio = layer.form.spread(_dora_ratio(layer), x, *inputs, **settings)
    bias = layer.linear.get("bias")
    plain = y if bias is None else y - layer.form.spread(bias, x, *inputs, **settings)
    z = _low_rank_update(layer, layer.form.update, x, *inputs, **settings)
    return y + ((ratio - 1) * plain + ratio * z).astype(y.dtype)


def _dora_as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    ratio = _dora_ratio(layer)
    y = layer.linear.as_linear(x)
    z = _low_rank_update(layer, _tied_update, x)
    return y + ((ratio - 1) * y + ratio * z).astype(y.dtype)


def _dora_deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    weight, ratio = whole_weight(layer), _dora_ratio(layer)
    if layer.kind != EMBEDDING_COLUMNS.name:
        ratio = ratio.reshape(*ratio.shape, *[1] * (weight.ndim - ratio.ndim))
    return {"weight": ratio * (weight + _low_rank_deltas(layer)["weight"]) - weight}


DORA = MethodFormula(_dora_parameters, dora_output, _dora_deltas, as_linear=_dora_as_linear)


@functools.lru_cache(maxsize=64)
def _projection(shape: tuple[int, ...], fan_in: int, seed: int) -> mx.array:
    """A frozen random factor: Kaiming's uniform distribution, within sqrt(6 / fan_in)."""
    bound = math.sqrt(6 / fan_in)
    return mx.random.uniform(-bound, bound, shape=shape, key=mx.random.key(seed))


def _vera_parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    a_shape, b_shape = layer.form.shapes(layer.linear, layer.rank)
    return {
        "_projection_a": _projection(a_shape, layer.form.fan_in(layer.linear), 0),
        "_projection_b": _projection(b_shape, layer.rank, 1),
        "lambda_d": mx.full((layer.rank,), 0.1),
        "lambda_b": mx.zeros(b_shape[-1:]),
    }


def _vera_factors(layer: AdaptedLayer) -> Factors:
    return layer._projection_a * layer.lambda_d, layer._projection_b * layer.lambda_b


def vera_output(layer: AdaptedLayer, x: mx.array) -> mx.array:
    """VeRA: y = f(x; W) + scale * lambda_b * ((lambda_d * (x A)) B), A and B frozen and random.

    lambda_d (rank,) starts at 0.1 and lambda_b (outputs,) at zero; the scale is 1 in the paper. A
    and B depend on their shapes alone: layers of one size share them, and no file holds them.

    Reference: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (2023),
    https://arxiv.org/abs/2310.11454.
    """
    assert layer.form.update is not None
    y = layer.linear(x)
    z = layer.form.update(layer.linear, *_vera_factors(layer), layer.dropped(x))
    return y + (layer.scale * z).astype(y.dtype)


def _vera_as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    y = layer.linear.as_linear(x)
    z = _tied_update(layer.linear, *_vera_factors(layer), layer.dropout(x))
    return y + (layer.scale * z).astype(y.dtype)


def _vera_deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    return {"weight": layer.scale * layer.form.product(layer.linear, *_vera_factors(layer))}


VERA = MethodFormula(_vera_parameters, vera_output, _vera_deltas, as_linear=_vera_as_linear)


def _ia3_parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    (*_, inputs, _), (_, outputs) = layer.form.shapes(layer.linear, 1)
    inputs *= getattr(layer.linear, "groups", 1)
    return {"ia3_l": mx.ones((inputs if layer.method == "ia3-input" else outputs,))}


def ia3_output(layer: AdaptedLayer, x: mx.array) -> mx.array:
    """(IA)3: y = l * f(x; W), or y = f(l * x; W) for `ia3-input`, with l starting at one.

    The first is for keys and values, the second for a feed-forward block's second matrix.

    Reference: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning" (2022), https://arxiv.org/abs/2205.05638.
    """
    if layer.method == "ia3-input":
        return layer.linear((x * layer.ia3_l).astype(x.dtype))
    y = layer.linear(x)
    return (y * layer.ia3_l).astype(y.dtype)


def _ia3_deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    weight, change = whole_weight(layer), layer.ia3_l - 1
    if layer.method == "ia3-input":
        groups = change.size // weight.shape[-1]
        rows = mx.repeat(change.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return {"weight": weight * rows.reshape(len(rows), *[1] * (weight.ndim - 2), -1)}
    bias = {"bias": layer.linear.bias * change} if "bias" in layer.linear else {}
    return {"weight": weight * change.reshape(-1, *[1] * (weight.ndim - 1)), **bias}


IA3 = MethodFormula(_ia3_parameters, ia3_output, _ia3_deltas)


def _whole_parameters(layer: AdaptedLayer, key: mx.array | None) -> dict[str, mx.array]:
    names = ("bias",) if layer.method == "bias" else ("weight", "bias")
    base = layer.linear
    shapes = {"weight": dense_weight(base).shape, "bias": base.get("bias", mx.array(0)).shape}
    return {f"delta_{name}": mx.zeros(shapes[name]) for name in names if name in base}


def _whole_deltas(layer: AdaptedLayer) -> dict[str, mx.array]:
    changes = {name.removeprefix("delta_"): array for name, array in layer.tensors().items()}
    return {name: layer.scale * change for name, change in changes.items()}


def whole_output(layer: AdaptedLayer, x: mx.array, *inputs: Any, **settings: Any) -> mx.array:
    """Whole parameters: y = f(x; W + scale * delta_weight, b + scale * delta_bias).

    Both deltas start at zero. This is full fine-tuning of chosen layers, training of norms, and
    training of biases alone.

    Reference for the last: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for
    Transformer-based Masked Language-models" (2021), https://arxiv.org/abs/2106.10199.
    """
    return _run_changed(layer, lambda base: base(x, *inputs, **settings))


def _whole_as_linear(layer: AdaptedLayer, x: mx.array) -> mx.array:
    return _run_changed(layer, lambda base: base.as_linear(x))


WHOLE = MethodFormula(_whole_parameters, whole_output, _whole_deltas, as_linear=_whole_as_linear)


@dataclass(frozen=True)
class Method:
    """A variant of LoRA.

    Attributes:
        formula: what it does.
        kinds: names of the kinds of layers that it is defined on.
        text: what it is, in a line.
        targets: what `--targets` is without being given.
        ranked: whether it has a rank; without, rank and alpha are 1.
        divides: whether its start is divided by the scale, which then must be positive.
        rank_stabilized: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    """

    formula: MethodFormula
    kinds: tuple[str, ...]
    text: str
    targets: str = "all-linear"
    ranked: bool = True
    divides: bool = False
    rank_stabilized: bool = False


WHOLE_KINDS = ("linear", "embedding", "conv", "experts", "weight", "vector")
LOW_RANK_KINDS = (*WHOLE_KINDS, "fused", "embedding-input")
SINGLE_MATRIX_KINDS = ("linear", "embedding", "conv")

MERGE_FIRST = "merge-first"

METHODS: dict[str, Method] = {
    "lora": Method(LOW_RANK, LOW_RANK_KINDS, "low-rank update, scaled by alpha / rank"),
    "rslora": Method(
        LOW_RANK, LOW_RANK_KINDS, "LoRA scaled by alpha / sqrt(rank)", rank_stabilized=True
    ),
    MERGE_FIRST: Method(LOW_RANK, ("weight",), "LoRA on the weight before the layer runs"),
    "dora": Method(
        DORA,
        (*SINGLE_MATRIX_KINDS, "embedding-columns", "experts"),
        "LoRA on direction, and a length",
    ),
    "pissa": Method(STARTED, SINGLE_MATRIX_KINDS, "LoRA from the principal part on", divides=True),
    "olora": Method(STARTED, SINGLE_MATRIX_KINDS, "LoRA that starts from a QR decomposition"),
    "loftq": Method(LOW_RANK, ("linear", "embedding"), "LoRA that undoes rounding", divides=True),
    "vera": Method(VERA, SINGLE_MATRIX_KINDS, "two vectors around shared random matrices"),
    "ia3": Method(
        IA3, ("linear", "conv"), "a factor an output", "k_proj,v_proj,down_proj", ranked=False
    ),
    "ia3-input": Method(IA3, ("linear", "conv"), "a factor an input", "down_proj", ranked=False),
    "full": Method(WHOLE, WHOLE_KINDS, "a change of the whole weight and bias", ranked=False),
    "norm": Method(WHOLE, ("vector",), "norms alone", "all-norms", ranked=False),
    "bias": Method(WHOLE, WHOLE_KINDS, "biases alone", "all-biases", ranked=False),
}


# What a file of them holds is A and B, and the update is their product.
LOW_RANK_METHODS = tuple(n for n, m in METHODS.items() if m.formula in (LOW_RANK, STARTED))


def stored_rank(method: str, rank: int) -> int:
    """The rank of A and B in a file: twice the layer's where the start stands beside them."""
    return 2 * rank if METHODS[method].formula is STARTED else rank


def make_layer(
    base: nn.Module,
    rank: int,
    *,
    kind: LayerKind,
    method: str = "lora",
    alpha: float = 16.0,
    dropout: float = 0.0,
    key: mx.array | None = None,
) -> nn.Module:
    """The layer that a method makes of a base; arguments as for `AdaptedLayer`."""
    settings: dict[str, Any] = {
        "method": method,
        "alpha": alpha,
        "rank_stabilized": METHODS[method].rank_stabilized,
        "dropout": dropout,
        "key": key,
    }
    if kind is LINEAR and METHODS[method].formula is LOW_RANK:
        return lora_linear_type()(base, rank, **settings)
    formula = WHOLE if kind is VECTOR else METHODS[method].formula
    return AdaptedLayer(base, rank, kind=kind, formula=formula, **settings)
