"""The training methods: LoRA and its variants, one file each.

Every module in this folder is imported and registers the method that it is named after, so adding
a method means adding one file. Code outside this repository calls `register_method` itself. A
method's formula is written once for all kinds of layers: W is the frozen weight, f(x; W) the output
of the base, and (x A) B the low-rank update in the terms of the layer's kind. Methods know nothing
of module paths or files.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graft.adapters.adapted_layer import AdaptedLayer, MethodFormula
from graft.adapters.layer_kinds import LAYER_KINDS, LINEAR, LayerKind
from graft.models import LoRALayer

import mlx.core as mx
import mlx.nn as nn

WHOLE_KINDS = ("linear", "embedding", "conv", "experts", "weight", "vector")
LOW_RANK_KINDS = (*WHOLE_KINDS, "fused", "embedding-input")
SINGLE_MATRIX_KINDS = ("linear", "embedding", "conv")
# Vectors, such as those of norms, have no rank: methods with a rank train them as this one does.
VECTOR_METHOD = "full"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method.

    Attributes:
        formula: what is trained and how it changes a layer.
        kinds: names of the kinds of layers that the method is defined on.
        text: one line that describes the method.
        targets: the default of `--targets`.
        ranked: whether the method has a rank; without one, rank and alpha are 1.
        rank_stabilized: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        alpha_is_rank: whether alpha defaults to the rank, so that the scale is 1.
        divides_by_scale: whether the initial A and B are divided by the scale, which must then be
            positive.
        low_rank: whether files store A and B, and the update is their product.
        keeps_start: whether files store the initial A and B too, which doubles the stored rank.
        has_magnitude: whether files store a magnitude `m` with A and B.
        merge_first: whether the update is added to the weight before the layer runs.
        needs_bias: whether only layers with a bias can be adapted.
        start_from_original: (layer, weight before quantization) -> sets the initial A and B; `None`
            if the method does not need the original weights. Only quantized layers can be adapted
            by a method that does.
        on_feed_forward_ends: name of the method to use instead on the second matrix of a
            feed-forward block.
    """

    formula: MethodFormula
    kinds: tuple[str, ...]
    text: str
    targets: str = "all-linear"
    ranked: bool = True
    rank_stabilized: bool = False
    alpha_is_rank: bool = False
    divides_by_scale: bool = False
    low_rank: bool = False
    keeps_start: bool = False
    has_magnitude: bool = False
    merge_first: bool = False
    needs_bias: bool = False
    start_from_original: Callable[[LoRALayer, mx.array], None] | None = None
    on_feed_forward_ends: str | None = None


METHODS: dict[str, Method] = {}


def register_method(name: str, method: Method) -> None:
    """Make a method available under a name, as for `--method` and in adapter files.

    Raises:
        ValueError: the name is taken, or one of the kinds does not exist.
    """
    if name in METHODS:
        raise ValueError(f"method {name!r} is registered already")
    if unknown := set(method.kinds) - set(LAYER_KINDS):
        raise ValueError(f"method {name!r}: no kind {', '.join(sorted(unknown))}")
    METHODS[name] = method


def stored_rank(method: str, rank: int) -> int:
    """The rank of A and B in a file: twice the layer's if the file stores their start too."""
    return 2 * rank if METHODS[method].keeps_start else rank


def make_layer(
    base: nn.Module,
    rank: int,
    *,
    kind: LayerKind,
    method: str = "lora",
    alpha: float = 16.0,
    dropout: float = 0.0,
    key: mx.array | None = None,
) -> LoRALayer:
    """The adapted layer of a method over a base layer; arguments as for `AdaptedLayer`."""
    settings: dict[str, Any] = {
        "method": method,
        "alpha": alpha,
        "rank_stabilized": METHODS[method].rank_stabilized,
        "dropout": dropout,
        "key": key,
    }
    trained_whole = METHODS[method].ranked and not kind.ranked
    formula = METHODS[VECTOR_METHOD if trained_whole else method].formula
    if kind == LINEAR and formula.linear_layer is not None:
        return formula.linear_layer(base, rank, **settings)
    return AdaptedLayer(base, rank, kind=kind, formula=formula, **settings)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
