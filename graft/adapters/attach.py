"""Puts LoRA layers into a model and takes them out again.

Knows module paths, kinds and methods; knows nothing of files or training. Which layers to adapt is
for `graft.adapters.targets` to say, or for the caller.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from graft.adapters.methods import METHODS, make_layer
from graft.errors import InputError
from graft.models import LoRALayer, is_quantized, linear_dims, scale_of
from graft.pretrained.module_paths import natural_key

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is adapted.

    Attributes:
        rank: of the update; 1 for a method or a kind that has none.
        alpha: numerator of the scale.
        method: one of `graft.adapters.methods.METHODS`.
        kind: what the layer is to be taken for; its type tells, unless "weight" asks for
            merge-first, "embedding-input" for an embedding whose tied output stays as it was, or
            "embedding-columns" for the same with DoRA, as PEFT has it.
        parts: the parts of a fused projection that are adapted; `None` adapts the whole.
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


def attach(
    model: nn.Module,
    settings: Mapping[str, LayerConfig],
    *,
    dropout: float = 0.0,
    seed: int = 0,
    originals: Mapping[str, mx.array] | None = None,
    blank: bool = False,
    report: Callable[[str], object] | None = None,
) -> None:
    """Freeze `model` and put a LoRA layer over each module named in `settings`.

    Running statistics, as of `nn.BatchNorm`, are held too: such layers stay in evaluation mode,
    also while the model trains, until `detach`.

    Args:
        model: any MLX model; changed in place.
        settings: from module path to rank, alpha and method.
        dropout: probability of zeroing an input of A while training; without effect on layers whose
            update has no such input: ids, vectors, merge-first, (IA)3.
        seed: of the initial `lora_a`; each layer's draw depends on its place in `settings` only.
        originals: weights before quantization by module path, for LoftQ.
        blank: the layers' tensors will be loaded, so that LoftQ needs no originals.
        report: is told how many parameters were trained before and are now, such as `print`.

    Raises:
        InputError: paths that the model does not have, modules that cannot be adapted, or not by
            this method, ranks that they cannot have; all of them named, and the model left as it
            was.
    """
    modules = dict(model.named_modules())
    problems = setting_problems(modules, settings)
    if not blank:
        problems += _without_originals(settings, originals or {})
    if problems:
        raise InputError("; ".join(problems))
    before = count_parameters(model)
    model.freeze()
    _hold_statistics(modules.values(), hold=True)
    keys = mx.random.split(mx.random.key(seed), max(len(settings), 1))
    layers = [
        (path, _adapt(modules[path], setting, dropout, key))
        for (path, setting), key in zip(settings.items(), keys, strict=False)
    ]
    if not blank:
        for path, layer in layers:
            start = METHODS[settings[path].method].start_from_original
            if start is not None:
                start(layer, (originals or {})[path])
    model.update_modules(tree_unflatten(layers))
    if report is not None:
        report(_counts("before", *before))
        report(_counts("after", *count_parameters(model)))


def detach(model: nn.Module) -> None:
    """Put the base layers back in place of the LoRA layers."""
    bases = [(path, layer.base) for path, layer in lora_layers(model)]
    model.update_modules(tree_unflatten(bases))
    _hold_statistics([module for _, module in model.named_modules()], hold=False)


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """The LoRA layers of a model with their paths, in the model's order."""
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, LoRALayer)]
    return sorted(found, key=lambda item: natural_key(item[0]))


def merge_all(model: nn.Module) -> int:
    """Fold every adapter in for inference; returns the bytes held for it, see `LoRALayer.merge`."""
    return sum(layer.merge() for _, layer in lora_layers(model))


def unmerge_all(model: nn.Module) -> None:
    """Run every base and adapter apart again, the bases bit for bit as ever."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def setting_of(layer: LoRALayer) -> LayerConfig:
    """The setting that made a layer."""
    parts = getattr(layer, "parts", None)
    return LayerConfig(layer.rank, layer.alpha, layer.method, layer.kind, parts)


def resolve_kind(module: nn.Module | None, setting: LayerConfig) -> LayerKind | None:
    """The kind that a setting takes a module for, or `None` if there is nothing to adapt."""
    kind = kind_of(module, setting.parts)
    if kind is EMBEDDING:
        others = {other.name: other for other in (EMBEDDING_COLUMNS, EMBEDDING_INPUT)}
        kind = others.get(setting.kind or "", kind)
    merge_first = METHODS[setting.method].merge_first or setting.kind == WEIGHT.name
    return WEIGHT if merge_first and kind not in (None, VECTOR) else kind


def largest_rank(module: nn.Module, setting: LayerConfig) -> int:
    """The highest rank that a module can have under a setting's method."""
    kind = resolve_kind(module, setting)
    if kind is None or not METHODS[setting.method].ranked:
        return 1
    return kind.largest_rank(module)


def setting_problems(
    modules: Mapping[str, nn.Module], settings: Mapping[str, LayerConfig]
) -> list[str]:
    """What is wrong with adapting a model so, in words; each cause once, with all its layers."""
    causes: dict[tuple[str, str], list[str]] = {}
    for path, setting in settings.items():
        for before, name, after in _problems(path, modules.get(path), setting):
            causes.setdefault((before, after), []).append(name)
    return [before + ", ".join(names) + after for (before, after), names in causes.items()]


def _problems(
    path: str, module: nn.Module | None, setting: LayerConfig
) -> Iterator[tuple[str, str, str]]:
    """(what, layer, what is allowed) of each problem."""
    if setting.method not in METHODS:
        yield f"unknown method {setting.method!r} for ", path, f": there are {', '.join(METHODS)}"
        return
    if not path or module is None or kind_of(module) is None:
        yield "the model has no adaptable layer ", path or "'' (the model itself)", ""
        return
    if setting.parts is not None and (bad := list(_parts_problems(path, module, setting.parts))):
        yield from bad
        return
    kind = resolve_kind(module, setting)
    assert kind is not None
    if setting.kind not in (None, kind.name):
        yield f"not of kind {setting.kind}: ", f"{path} ({kind.name})", ""
    method, largest = METHODS[setting.method], largest_rank(module, setting)
    if kind.name not in method.kinds:
        allowed = f", only on {', '.join(method.kinds)}"
        yield f"{setting.method} is not defined on ", f"{path} ({kind.name})", allowed
    elif method.needs_bias and "bias" not in module:
        yield "there is no bias to train in ", path, ""
    elif method.start_from_original and not is_quantized(module):
        what = f"{setting.method} undoes the rounding of quantized layers, and there is none in "
        yield what, path, ""
    elif not 0 < setting.rank <= largest:
        yield f"rank {setting.rank} for ", path, f": give 1 to {largest}"
    elif not math.isfinite(setting.alpha) or (setting.alpha <= 0 and method.divides_by_scale):
        yield f"alpha {setting.alpha} for ", path, f": {setting.method} needs one above 0"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters of a model; a quantized weight counts as what it stands for."""
    trained = sum(array.size for array in dict(tree_flatten(model.trainable_parameters())).values())
    total = 0
    for _, module in model.named_modules():
        # Names with a leading underscore are constants such as rotary frequencies.
        own = sum(
            array.size
            for name, array in module.items()
            if isinstance(array, mx.array) and not name.startswith("_")
        )
        if hasattr(module, "bits") and "weight" in module:
            bias = module["bias"].size if "bias" in module else 0
            own = module.weight.size * 32 // module.bits + bias
        total += own
    return trained, total


def _parts_problems(
    path: str, module: nn.Module, parts: FusedParts
) -> Iterator[tuple[str, str, str]]:
    if kind_of(module) is not LINEAR:
        yield "only linear layers have parts, not ", path, ""
        return
    outputs = linear_dims(module)[1]
    if parts.repeats * sum(parts.sizes) != outputs:
        sizes = f"{parts.repeats} x ({' + '.join(map(str, parts.sizes))})"
        yield f"parts of {sizes} outputs do not make up the {outputs} of ", path, ""
    unknown = [name for name in parts.enabled if name not in parts.names]
    if len(set(parts.enabled)) < len(parts.enabled):
        yield f"parts named twice among {', '.join(parts.enabled)} in ", path, ""
    if unknown or not parts.enabled:
        allowed = f": there are {', '.join(parts.names)}"
        yield f"no part {', '.join(unknown) or 'chosen'} in ", path, allowed


def _without_originals(
    settings: Mapping[str, LayerConfig], originals: Mapping[str, mx.array]
) -> list[str]:
    lacking: dict[str, list[str]] = {}
    for path, setting in settings.items():
        method = METHODS.get(setting.method)
        if method is not None and method.start_from_original and path not in originals:
            lacking.setdefault(setting.method, []).append(path)
    return [
        f"{name} needs the weights before quantization of {', '.join(paths)}"
        for name, paths in lacking.items()
    ]


def _hold_statistics(modules: Iterable[nn.Module], *, hold: bool) -> None:
    """Keep layers with running statistics in evaluation mode, or let them train again."""
    for module in modules:
        if "running_mean" not in module:
            continue
        if hold:
            module.eval()
            vars(module)["_set_training_mode"] = _stay
        else:
            vars(module).pop("_set_training_mode", None)


def _stay(mode: bool) -> None:
    """What a held layer does instead of changing its mode."""


def _counts(when: str, trained: int, total: int) -> str:
    return f"{when}: {trained:,} of {total:,} parameters trained ({trained / total:.2%})"


def _adapt(module: nn.Module, setting: LayerConfig, dropout: float, key: mx.array) -> nn.Module:
    kind = resolve_kind(module, setting)
    assert kind is not None
    layer = make_layer(
        module,
        setting.rank,
        kind=kind,
        method=setting.method,
        alpha=setting.alpha,
        dropout=dropout,
        key=key,
    )
    if setting.parts is not None:
        layer.parts = setting.parts
    return layer
