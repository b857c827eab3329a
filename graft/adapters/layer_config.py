"""How a layer is adapted, and whether it can be.

`LayerConfig` is what adapter files record for each layer. Knows modules, kinds and methods; nothing
of files, training or the model around a layer.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from graft.adapters.layer_kinds import (
    EMBEDDING,
    EMBEDDING_COLUMNS,
    EMBEDDING_INPUT,
    LINEAR,
    VECTOR,
    WEIGHT,
    FusedParts,
    LayerKind,
    kind_of,
)
from graft.adapters.methods import METHODS
from graft.models import LoRALayer, is_quantized, linear_dims, scale_of

import mlx.nn as nn


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is adapted.

    Attributes:
        rank: rank of the update; 1 for a method or a kind that has none.
        alpha: numerator of the scale.
        method: one of `graft.adapters.methods.METHODS`.
        kind: kind to treat the layer as; `None` for the kind of its type. "weight" asks for
            merge-first, "embedding-input" for an embedding whose tied output stays as it is, and
            "embedding-columns" for the same with DoRA as in PEFT.
        parts: the parts of a fused projection that are adapted; `None` adapts the whole layer.
    """

    rank: int
    alpha: float
    method: str = "lora"
    kind: str | None = None
    parts: FusedParts | None = None

    @property
    def scale(self) -> float:
        """The factor on the update."""
        rank_stabilized = METHODS[self.method].rank_stabilized
        return scale_of(self.rank, self.alpha, rank_stabilized=rank_stabilized)


@dataclass(frozen=True)
class LayerProblem:
    """Why a layer cannot be adapted as configured.

    Attributes:
        reason: the problem, in words that the names of the layers complete.
        layer: path of the layer, with its kind if that matters.
        hint: what is allowed instead; may be empty.
    """

    reason: str
    layer: str
    hint: str = ""


def config_of(layer: LoRALayer) -> LayerConfig:
    """The configuration that made an adapted layer."""
    parts = getattr(layer, "parts", None)
    return LayerConfig(layer.rank, layer.alpha, layer.method, layer.kind, parts)


def resolve_kind(module: nn.Module | None, config: LayerConfig) -> LayerKind | None:
    """The kind that a module is adapted as, or `None` if there is nothing to adapt in it."""
    kind = kind_of(module, config.parts)
    if kind is EMBEDDING:
        variants = {variant.name: variant for variant in (EMBEDDING_COLUMNS, EMBEDDING_INPUT)}
        kind = variants.get(config.kind or "", kind)
    merge_first = METHODS[config.method].merge_first or config.kind == WEIGHT.name
    return WEIGHT if merge_first and kind not in (None, VECTOR) else kind


# The highest rank that is read from a file, for any layer.
LARGEST_READ_RANK = 2**12


def largest_rank(module: nn.Module, config: LayerConfig) -> int:
    """The highest rank that a module can have under a configuration's method."""
    kind = resolve_kind(module, config)
    if kind is None or not METHODS[config.method].ranked:
        return 1
    return kind.largest_rank(module)


def config_problems(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, LayerConfig],
    *,
    for_loading: bool = False,
) -> list[str]:
    """Why layers cannot be adapted as configured: one text per cause, which names its layers.

    Args:
        modules: a model's modules by path.
        layers: from path to configuration.
        for_loading: whether a file decides the ranks: mlx-lm trains one rank in every layer, even
            in one with a single output, and an export pads all layers to one rank.
    """
    causes: dict[tuple[str, str], list[str]] = {}
    for path, config in layers.items():
        for problem in _problems(path, modules.get(path), config, for_loading):
            causes.setdefault((problem.reason, problem.hint), []).append(problem.layer)
    return [
        f"{reason} {', '.join(names)}" + (f": {hint}" if hint else "")
        for (reason, hint), names in causes.items()
    ]


def _problems(
    path: str, module: nn.Module | None, config: LayerConfig, for_loading: bool
) -> Iterator[LayerProblem]:
    if config.method not in METHODS:
        hint = f"there are {', '.join(sorted(METHODS))}"
        yield LayerProblem(f"unknown method {config.method!r} for", path, hint)
    elif not path or module is None or kind_of(module) is None:
        layer = path or "'' (the model itself)"
        yield LayerProblem("the model has no adaptable layer", layer)
    elif problems := list(_parts_problems(path, module, config.parts)):
        yield from problems
    else:
        yield from _method_problems(path, module, config, for_loading)


def _method_problems(
    path: str, module: nn.Module, config: LayerConfig, for_loading: bool
) -> Iterator[LayerProblem]:
    method, kind = METHODS[config.method], resolve_kind(module, config)
    assert kind is not None
    named = f"{path} ({kind.name})"
    largest = largest_rank(module, config)
    if for_loading and kind.ranked and method.ranked:
        largest = max(largest, LARGEST_READ_RANK)
    if config.kind not in (None, kind.name):
        yield LayerProblem(f"not of kind {config.kind}:", named)
    if kind.name not in method.kinds:
        hint = f"only on {', '.join(method.kinds)}"
        yield LayerProblem(f"{config.method} is not defined on", named, hint)
    elif method.needs_bias and "bias" not in module:
        yield LayerProblem("there is no bias to train in", path)
    elif method.start_from_original and not is_quantized(module):
        yield LayerProblem(f"{config.method} needs quantized layers, which these are not:", path)
    elif not 0 < config.rank <= largest:
        yield LayerProblem(f"rank {config.rank} for", path, f"give 1 to {largest}")
    elif not math.isfinite(config.alpha) or (config.alpha <= 0 and method.divides_by_scale):
        yield LayerProblem(f"alpha {config.alpha} for", path, f"{config.method} needs one above 0")


def _parts_problems(
    path: str, module: nn.Module, parts: FusedParts | None
) -> Iterator[LayerProblem]:
    if parts is None:
        return
    if kind_of(module) is not LINEAR:
        yield LayerProblem("only linear layers have parts, not", path)
        return
    outputs = linear_dims(module)[1]
    if parts.repeats * sum(parts.sizes) != outputs:
        sizes = f"{parts.repeats} x ({' + '.join(map(str, parts.sizes))})"
        yield LayerProblem(f"parts of {sizes} outputs do not make up the {outputs} of", path)
    unknown = [name for name in parts.enabled if name not in parts.names]
    if len(set(parts.enabled)) < len(parts.enabled):
        yield LayerProblem(f"parts named twice among {', '.join(parts.enabled)} in", path)
    if unknown or not parts.enabled:
        hint = f"there are {', '.join(parts.names)}"
        yield LayerProblem(f"no part {', '.join(unknown) or 'chosen'} in", path, hint)
