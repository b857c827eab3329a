"""Low-rank factors: takes an adapter apart into A, B and alpha per layer, and makes one of them.

`factors_of` takes an adapter apart, for writing, merging and serving; `from_factors` makes one.
Knows no format.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from graft.adapters.adapter import Adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import (
    CONV,
    EMBEDDING,
    EMBEDDING_COLUMNS,
    EMBEDDING_INPUT,
    EXPERTS,
    LAYER_KINDS,
    LINEAR,
    FusedParts,
    LayerKind,
    fused_kind,
)
from graft.adapters.methods import METHODS
from graft.errors import InputError
from graft.models import scale_of
from graft.pretrained.architectures import is_embedding

import mlx.core as mx

# Kinds that a record must name. The type of a layer determines the others, which are guessed from
# names where there is no model.
_RECORDED_KINDS = (CONV, EMBEDDING_INPUT, EMBEDDING_COLUMNS)


@dataclass(frozen=True)
class Factors:
    """One layer's update: the product of two matrices, scaled.

    Attributes:
        kind: of the layer, which determines what the product means.
        a: (input_dims, rank); (vocabulary, rank) for an embedding, (experts, rank, input_dims) for
            experts, (*window, inputs, rank) for a convolution.
        b: (rank, output_dims); (experts, output_dims, rank) for experts.
        alpha: numerator of the scale.
        rank_stabilized: whether the scale is alpha / sqrt(rank).
        magnitude: what DoRA trains beside them, one value an output.
    """

    kind: LayerKind
    a: mx.array
    b: mx.array
    alpha: float
    rank_stabilized: bool = False
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        """The rank of both matrices."""
        return self.b.shape[self.kind.rank_axes[1]]

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return scale_of(self.rank, self.alpha, rank_stabilized=self.rank_stabilized)

    @property
    def matrices(self) -> tuple[mx.array, mx.array]:
        """A as (..., inputs, rank) and B as (..., rank, outputs), float32, without the scale."""
        as_matrix = self.kind.as_matrix
        return as_matrix(self.a.astype(mx.float32)), as_matrix(self.b.astype(mx.float32))

    def with_matrices(self, a: mx.array, b: mx.array) -> "Factors":
        """Other factors of the same kind, at scale 1, from matrices as `matrices` returns them."""
        return from_matrices(self.kind, a, b, window=self.a.shape[:-2])

    def at_scale(self, scale: float) -> "Factors":
        """The same update at another scale: the ratio goes into B, exact to rounding."""
        b = self.b if scale == self.scale else self.b * (self.scale / scale)
        alpha = alpha_for(scale, self.rank)
        return replace(self, b=b, alpha=alpha, rank_stabilized=False)

    def padded(self, rank: int) -> "Factors":
        """The same update at the same scale, with zeros up to a higher rank."""
        if rank == self.rank:
            return self
        a_axis, b_axis = self.kind.rank_axes
        a = _pad_with_zeros(self.a, a_axis, rank - self.rank)
        b = _pad_with_zeros(self.b, b_axis, rank - self.rank)
        alpha = alpha_for(self.scale, rank)
        return replace(self, a=a, b=b, alpha=alpha, rank_stabilized=False)


def from_matrices(
    kind: LayerKind, a: mx.array, b: mx.array, *, window: tuple[int, ...] = ()
) -> Factors:
    """Factors at scale 1.

    Args:
        kind: of the layer.
        a: (..., inputs, rank).
        b: (..., rank, outputs).
        window: of a convolution.
    """
    return Factors(kind, kind.from_matrix(a, window), kind.from_matrix(b, ()), float(a.shape[-1]))


def _pad_with_zeros(array: mx.array, axis: int, count: int) -> mx.array:
    shape = list(array.shape)
    shape[axis] = count
    return mx.concatenate([array, mx.zeros(shape, array.dtype)], axis=axis)


def alpha_for(scale: float, rank: int) -> float:
    """An alpha whose quotient by `rank` is `scale`, to the last bit if there is one."""
    alpha = scale * rank
    if not math.isfinite(alpha):
        return alpha  # `from_factors` refuses it
    near = (alpha, float(round(alpha)), math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
    return next((value for value in near if value / rank == scale), alpha)


def recorded_kind(path: str, config: LayerConfig, a: mx.array | None) -> LayerKind:
    """The kind of a layer without its model: as recorded, or guessed from the name and A."""
    if config.parts is not None:
        return fused_kind(config.parts)
    if config.kind is not None:
        return LAYER_KINDS.get(config.kind, LINEAR)
    return guess_kind(path, a)


def guess_kind(path: str, a: mx.array | None) -> LayerKind:
    """The kind of a layer by its path and the shape of A."""
    if a is not None and a.ndim == 3:
        return EXPERTS
    return EMBEDDING if is_embedding(path) else LINEAR


def factors_at_scale(path: str, halves: Mapping[str, mx.array], scale: float) -> Factors:
    """Factors from tensors in mlx-lm's layout, without a record of their kind.

    Args:
        path: of the layer.
        halves: A as "a", B as "b", and DoRA's magnitude as "m" if there is one.
        scale: of the product.
    """
    kind = guess_kind(path, halves["a"])
    factors = Factors(kind, halves["a"], halves["b"], 1.0, magnitude=halves.get("m"))
    rank = factors.rank if factors.b.ndim > 1 else 1
    return replace(factors, alpha=alpha_for(scale, rank))


def factors_of(
    adapter: Adapter, *, holder: str, kinds: Container[LayerKind], dora: bool = False
) -> dict[str, Factors]:
    """Every layer of an adapter as A, B and scale.

    A fused projection becomes one linear layer with the ranks of its parts added up, which is exact
    but larger.

    Args:
        adapter: to be taken apart.
        holder: what is to hold the factors, for messages.
        kinds: of layers that the holder takes.
        dora: whether the holder takes DoRA.

    Raises:
        InputError: layers that the holder does not take, or tensors that are missing; all of them
            named.
    """
    factors: dict[str, Factors] = {}
    refused: list[str] = []
    missing: list[str] = []
    for path, config in adapter.layers.items():
        a, b = (adapter.tensors.get(f"{path}.{name}") for name in ("lora_a", "lora_b"))
        kind = recorded_kind(path, config, a)
        method = METHODS[config.method]
        if not kind.ranked or not (method.low_rank or (method.has_magnitude and dora)):
            refused.append(f"{path} ({config.method}{'' if kind.ranked else ', a vector'})")
        elif (kind if config.parts is None else LINEAR) not in kinds:
            refused.append(f"{path} (of kind {kind.name})")
        elif a is None or b is None:
            missing += [f"{path}.{n}" for n, half in (("lora_a", a), ("lora_b", b)) if half is None]
        else:
            factors[path] = _layer_factors(kind, a, b, config, adapter.tensors.get(f"{path}.m"))
    if refused:
        raise InputError(f"{holder} cannot hold these layers: {', '.join(refused)}")
    if missing:
        raise InputError(f"the adapter lacks {', '.join(missing)}")
    return factors


def _layer_factors(
    kind: LayerKind, a: mx.array, b: mx.array, config: LayerConfig, magnitude: mx.array | None
) -> Factors:
    if config.parts is not None:
        kind, b = LINEAR, _spread_over_parts(b, config.parts)
    factors = Factors(kind, a, b, config.alpha, METHODS[config.method].rank_stabilized, magnitude)
    if factors.rank == config.rank:
        return factors
    # The rank doubles if the start is stored beside A and B, and adds up over the parts.
    alpha = alpha_for(config.scale, factors.rank)
    return replace(factors, alpha=alpha, rank_stabilized=False)


def _spread_over_parts(b: mx.array, parts: FusedParts) -> mx.array:
    """B of a fused projection, (rank, outputs of the parts), as (parts * rank, all outputs)."""
    rows, first = [], 0
    for name, outputs in zip(parts.enabled, parts.outputs(), strict=True):
        columns = mx.unflatten(b[:, first : first + outputs], -1, (parts.repeats, -1))
        number = parts.names.index(name)
        widths = sum(parts.sizes[:number]), sum(parts.sizes[number + 1 :])
        rows.append(mx.pad(columns, [(0, 0), (0, 0), widths]).flatten(-2))
        first += outputs
    return mx.concatenate(rows)


def from_factors(
    factors: Mapping[str, Factors],
    *,
    base_model: str | None = None,
    dropout: float = 0.0,
    rotary: str | None = None,
    notes: tuple[str, ...] = (),
) -> Adapter:
    """An adapter made of factors, in float32, the precision of training.

    Args:
        factors: by module path.
        base_model: the base model's name, if it is known.
        dropout: the probability used in training.
        rotary: the order of the rows of q and k, as in `Adapter`.
        notes: assumptions made while reading, a line each.

    Raises:
        InputError: factors that do not make a product, or numbers that are not finite; all named.
    """
    problems = [text for path, layer in factors.items() for text in _factor_problems(path, layer)]
    if problems:
        raise InputError("; ".join(problems))
    tensors, layers = {}, {}
    for path, layer in factors.items():
        tensors[f"{path}.lora_a"] = layer.a.astype(mx.float32)
        tensors[f"{path}.lora_b"] = layer.b.astype(mx.float32)
        method, alpha = "rslora" if layer.rank_stabilized else "lora", layer.alpha
        if layer.magnitude is not None:
            tensors[f"{path}.m"] = layer.magnitude.astype(mx.float32)
            method = "dora"
            alpha = alpha_for(layer.scale, layer.rank) if layer.rank_stabilized else alpha
        kind = layer.kind.name if layer.kind in _RECORDED_KINDS else None
        layers[path] = LayerConfig(layer.rank, alpha, method, kind)
    return Adapter(tensors, layers, base_model, dropout, rotary, notes=notes)


def _factor_problems(path: str, factors: Factors) -> list[str]:
    if not _make_a_product(factors):
        shapes = f"A of shape {factors.a.shape} and B of shape {factors.b.shape}"
        return [f"{path}: {shapes} do not make a product"]
    problems = []
    if not math.isfinite(factors.alpha):
        problems.append(f"{path}: alpha {factors.alpha} is not finite")
    arrays = {"A": factors.a, "B": factors.b, "the magnitude": factors.magnitude}
    for name, array in arrays.items():
        if array is not None and not mx.isfinite(array).all().item():
            problems.append(f"{path}: {name} holds numbers that are not finite")
    return problems


def _make_a_product(factors: Factors) -> bool:
    if min(factors.a.ndim, factors.b.ndim) < 2:
        return False
    a, b = factors.matrices
    return a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2] >= 1


def paired(
    tensors: Mapping[str, mx.array], suffixes: Mapping[str, str]
) -> tuple[dict[str, dict[str, mx.array]], list[str]]:
    """Group tensors by the layer that they belong to.

    Args:
        tensors: by name.
        suffixes: from the end of a name to what such a tensor is: "a", "b" or "m".

    Returns:
        From path to the layer's tensors by what they are, and the names without such an end.

    Raises:
        InputError: layers that lack A or B; all of them named.
    """
    layers: dict[str, dict[str, mx.array]] = {}
    unknown = []
    for name, array in tensors.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is None:
            unknown.append(name)
        else:
            layers.setdefault(name.removesuffix(suffix), {})[suffixes[suffix]] = array
    missing = [
        f"{path or '(no name)'} has no {half.upper()}"
        for path, halves in layers.items()
        for half in ("a", "b")
        if half not in halves
    ]
    if missing:
        raise InputError(f"half a layer: {', '.join(missing)}")
    return layers, unknown
