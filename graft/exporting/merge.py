"""Merges adapters: several into one, or a large one into a smaller one.

Each layer is merged by itself, as A (..., inputs, rank) and B (..., rank, outputs) with the scale
inside.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from graft.adapters.adapter import Adapter, reordered, with_mlx_paths
from graft.adapters.factors import Factors, factors_of, from_factors
from graft.adapters.layer_kinds import CONV, EMBEDDING, EMBEDDING_INPUT, EXPERTS, LINEAR
from graft.adapters.svd import truncated_svd
from graft.errors import InputError
from graft.pretrained.base_config import BaseConfig
from graft.pretrained.module_paths import natural_key

import mlx.core as mx

MERGEABLE_KINDS = (LINEAR, EMBEDDING, EMBEDDING_INPUT, CONV, EXPERTS)
DEFAULT_DENSITY = 0.5
# A as (..., inputs, rank) and B as (..., rank, outputs).
FactorMatrices = tuple[mx.array, mx.array]


# ---- methods ---------------------------------------------------------------------------------


def concatenate(layers: Sequence[Factors], weights: Sequence[float]) -> FactorMatrices:
    """The weighted sum of the updates, exactly: A side by side, B one under the other."""
    matrices = [layer.matrices for layer in layers]
    a = mx.concatenate([a for a, _ in matrices], axis=-1)
    scales = [weight * layer.scale for layer, weight in zip(layers, weights, strict=True)]
    scaled = [scale * b for scale, (_, b) in zip(scales, matrices, strict=True)]
    return a, mx.concatenate(scaled, axis=-2)


def add_halves(layers: Sequence[Factors], weights: Sequence[float]) -> FactorMatrices:
    """The sums of the A and of the B, each weighted by the square root of weight times scale.

    The rank stays the same. Products of one adapter's A with another's B come in, so this is for
    adapters that started from the same A. It is PEFT's "linear".

    Raises:
        InputError: ranks differ, or a weight is below 0.
    """
    ranks = {layer.rank for layer in layers}
    if len(ranks) > 1 or min(weights) < 0:
        raise InputError(
            f"linear needs one rank and weights of at least 0, not ranks {sorted(ranks)} and "
            f"weights {list(weights)}; cat takes any"
        )
    matrices = [layer.matrices for layer in layers]
    roots = [math.sqrt(w * layer.scale) for layer, w in zip(layers, weights, strict=True)]
    a = [root * a for root, (a, _) in zip(roots, matrices, strict=True)]
    b = [root * b for root, (_, b) in zip(roots, matrices, strict=True)]
    return mx.stack(a).sum(axis=0), mx.stack(b).sum(axis=0)


def ties(deltas: Sequence[mx.array], weights: Sequence[float], density: float) -> mx.array:
    """Trim, elect sign, merge.

    Each change keeps its largest entries. The sign of an entry is that of the sum, and the weighted
    entries that agree with it are averaged.

    Reference: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023),
    https://arxiv.org/abs/2306.01708, algorithm 1, with weights as in PEFT.

    Args:
        deltas: of one shape.
        weights: one for each.
        density: the fraction of entries that is kept.
    """
    trimmed = mx.stack([trim(delta, density) for delta in deltas])
    factors = mx.array(list(weights)).reshape(-1, *[1] * (trimmed.ndim - 1))
    elected = mx.where(trimmed.sum(axis=0) >= 0, 1, -1)
    agreeing = mx.sign(trimmed) == elected
    total = (trimmed * factors * agreeing).sum(axis=0)
    return total / mx.maximum(agreeing.sum(axis=0), 1)


def trim(delta: mx.array, density: float) -> mx.array:
    """The fraction `density` of the entries that are largest, and zero for the others."""
    kept = int(density * delta.size)
    if kept >= delta.size:
        return delta
    if kept == 0:
        return mx.zeros_like(delta)
    sizes = mx.abs(delta).flatten()
    threshold = mx.sort(sizes)[delta.size - kept]
    return mx.where(mx.abs(delta) >= threshold, delta, 0)


def dare(
    deltas: Sequence[mx.array], weights: Sequence[float], density: float, key: mx.array
) -> mx.array:
    """Drop entries at random, rescale the others to make up for it, and sum.

    Reference: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous
    Models as a Free Lunch" (2023), https://arxiv.org/abs/2311.03099, equation 1.

    Args:
        deltas: of one shape.
        weights: one for each.
        density: the probability of keeping an entry.
        key: of the random numbers.
    """
    total = mx.zeros_like(deltas[0])
    keys = mx.random.split(key, len(deltas))
    for delta, weight, delta_key in zip(deltas, weights, keys, strict=True):
        kept = mx.random.bernoulli(density, delta.shape, key=delta_key)
        total = total + weight * mx.where(kept, delta / density, 0)
    return total


@dataclass(frozen=True)
class MergeMethod:
    """A way to combine the updates of one layer; one of the two functions is set.

    Attributes:
        text: what it does, in a line.
        on_factors: (layers, weights) -> A and B.
        on_deltas: (updates as matrices, weights, density, random key) -> the update as a matrix.
        averages: whether the weights default to equal parts of 1, and not to 1 each.
        needs_rank: whether the rank of the result must be given.
    """

    text: str
    on_factors: Callable[[Sequence[Factors], Sequence[float]], FactorMatrices] | None = None
    on_deltas: Callable[[Sequence[mx.array], Sequence[float], float, mx.array], mx.array] | None = (
        None
    )
    averages: bool = True
    needs_rank: bool = False


MERGE_METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod("sums of the A and of the B", add_halves),
    "cat": MergeMethod("the exact sum, with the sum of the ranks", concatenate),
    "svd": MergeMethod("the exact sum, reduced to a lower rank", concatenate, needs_rank=True),
    "ties": MergeMethod(
        "small entries trimmed, conflicting signs dropped",
        on_deltas=lambda deltas, weights, density, key: ties(deltas, weights, density),
        averages=False,
    ),
    "dare": MergeMethod("entries dropped at random, the others rescaled", on_deltas=dare),
}


# ---- a lower rank ----------------------------------------------------------------------------


def shrink(factors: FactorMatrices, rank: int) -> tuple[FactorMatrices, float]:
    """The nearest product of a rank, and the fraction of the energy (squared entries) lost.

    A B = Qa (Ra Rb^T) Qb^T, so the large product is never made.
    """
    with mx.stream(mx.cpu):
        qa, ra = mx.linalg.qr(factors[0])
        qb, rb = mx.linalg.qr(factors[1].swapaxes(-1, -2))
        u, s, vt = mx.linalg.svd(ra @ rb.swapaxes(-1, -2))
        kept = min(rank, s.shape[-1])
        root = mx.sqrt(s[..., :kept])
        a = (qa @ u[..., :kept]) * root[..., None, :]
        b = root[..., :, None] * (vt[..., :kept, :] @ qb.swapaxes(-1, -2))
        energy, left = mx.square(s).sum(), mx.square(s[..., kept:]).sum()
        lost = cast(float, (left / mx.maximum(energy, 1e-30)).item())
    return (a, b), lost


def decompose(delta: mx.array, rank: int) -> tuple[FactorMatrices, float]:
    """The A and B of a rank nearest to a matrix (..., inputs, outputs), and the energy lost."""
    kept = min(rank, *delta.shape[-2:])
    energy = cast(float, mx.square(delta).sum().item())
    if delta.ndim == 2:
        u, s, vt = truncated_svd(delta, kept)
    else:
        u, s, vt = mx.linalg.svd(delta, stream=mx.cpu)
        u, s, vt = u[..., :kept], s[..., :kept], vt[..., :kept, :]
    root = mx.sqrt(s)
    lost = 1 - cast(float, mx.square(s).sum().item()) / max(energy, 1e-30)
    return (u * root[..., None, :], root[..., :, None] * vt), max(lost, 0.0)


# ---- merging ---------------------------------------------------------------------------------


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float = DEFAULT_DENSITY,
    seed: int = 0,
) -> tuple[Adapter, dict[str, float]]:
    """One adapter of several; a layer that an adapter lacks counts as unchanged by it.

    Args:
        adapters: for one base model, with q and k in one order.
        weights: one for each.
        method: one of `MERGE_METHODS`.
        rank: of the result; required for svd; for ties and dare the highest rank by default.
        density: the fraction of a change that ties and dare keep.
        seed: of what dare drops.

    Returns:
        The adapter, and for each layer the fraction of the energy lost to a lower rank.

    Raises:
        InputError: layers are more than A and B, or do not have the same shapes in all adapters;
            all of them named.
    """
    all_factors = [factors_of(a, holder="merge", kinds=MERGEABLE_KINDS) for a in adapters]
    _check_shapes(all_factors)
    merged: dict[str, Factors] = {}
    losses: dict[str, float] = {}
    options: dict[str, Any] = {"method": MERGE_METHODS[method], "rank": rank, "density": density}
    for number, path in enumerate(sorted(set().union(*all_factors), key=natural_key)):
        present = [(f[path], w) for f, w in zip(all_factors, weights, strict=True) if path in f]
        layers, layer_weights = [layer for layer, _ in present], [weight for _, weight in present]
        key = mx.random.key(seed * 1_000_003 + number)
        matrices, losses[path] = _combine(layers, layer_weights, key=key, **options)
        merged[path] = layers[0].with_matrices(*matrices)
        mx.eval(merged[path].a, merged[path].b)
    first = adapters[0]
    return from_factors(merged, base_model=first.base_model, rotary=first.rotary), losses


def _combine(
    layers: Sequence[Factors],
    weights: Sequence[float],
    *,
    method: MergeMethod,
    rank: int | None,
    density: float,
    key: mx.array,
) -> tuple[FactorMatrices, float]:
    if method.on_deltas is not None:
        deltas = [layer.scale * mx.matmul(*layer.matrices) for layer in layers]
        delta = method.on_deltas(deltas, weights, density, key)
        return decompose(delta, rank or max(layer.rank for layer in layers))
    assert method.on_factors is not None
    a, b = method.on_factors(layers, weights)
    # A matrix never needs more ranks than it has rows or columns.
    largest = min(a.shape[-2], b.shape[-1])
    if rank is None and a.shape[-1] <= largest:
        return (a, b), 0.0
    return shrink((a, b), rank or largest)


def _check_shapes(all_factors: Sequence[Mapping[str, Factors]]) -> None:
    def shape(layer: Factors) -> tuple[Any, ...]:
        a, b = layer.matrices
        return layer.kind.name, a.shape[:-1], b.shape[-1]

    problems = []
    for path in set().union(*all_factors):
        shapes = {shape(factors[path]) for factors in all_factors if path in factors}
        if len(shapes) > 1:
            problems.append(path)
    if problems:
        raise InputError(
            f"not adapters of one base model: {', '.join(sorted(problems))} differ in shape or kind"
        )


def in_one_order(adapters: Sequence[Adapter], base: BaseConfig | None) -> list[Adapter]:
    """Adapters with one name for each layer, and the rows of q and k in one order.

    Raises:
        InputError: the orders differ, and the base model is not known.
    """
    if base is not None:
        adapters = [with_mlx_paths(base.model, adapter) for adapter in adapters]
    if len({adapter.rotary for adapter in adapters}) <= 1:
        return list(adapters)
    if base is None:
        raise InputError("q and k are ordered differently: name the base model with --model")
    known = [replace(a, rotary=a.rotary or base.rotary) for a in adapters]
    return [reordered(adapter, base.rotary, base.heads) for adapter in known]


def differences(names: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """How adapters that are to be merged differ, where merging does not refuse it; a line each."""
    notes = []
    if len({adapter.base_model for adapter in adapters}) > 1:
        bases = (f"{name}: {a.base_model}" for name, a in zip(names, adapters, strict=True))
        notes.append(f"their records name different base models ({', '.join(bases)})")
    everything = {path for adapter in adapters for path in adapter.layers}
    for name, adapter in zip(names, adapters, strict=True):
        missing = sorted(everything - adapter.layers.keys(), key=natural_key)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            notes.append(
                f"{name} does not adapt {', '.join(missing[:3])}{more}: counted as no change"
            )
    return notes
