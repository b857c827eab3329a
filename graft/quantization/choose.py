"""Chooses which layers of a model are quantized, and with which settings."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, cast

from graft.errors import InputError
from graft.models import is_quantized, weight_shape
from graft.pretrained.architectures import architecture_of, is_embedding
from graft.pretrained.base_config import is_tied
from graft.pretrained.convert import QuantizationPlan
from graft.pretrained.module_paths import collapsed

import mlx.nn as nn
from mlx.utils import tree_flatten

# What MLX can quantize to.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, 64
# Means "not quantized" wherever a number of bits is chosen.
UNQUANTIZED = 16
# Meta's names for layers are accepted too, as in the MLX example's converter.
META_NAMES = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}

Quantization = dict[str, Any]


def quantization_settings(bits: int | None, group_size: int | None) -> Quantization:
    """Settings of affine quantization, as config.json lists them; `None` means the default.

    Raises:
        InputError: MLX has no kernels for these bits or this group size.
    """
    bits = DEFAULT_BITS if bits is None else bits
    group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    problems = []
    if bits not in BITS:
        problems.append(f"--q-bits {bits} is not supported; choose one of {_listed(BITS)}")
    if group_size not in GROUP_SIZES:
        sizes = _listed(GROUP_SIZES)
        problems.append(f"--q-group-size {group_size} is not supported; choose one of {sizes}")
    if problems:
        raise InputError("; ".join(problems))
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def choose_quantized_layers(
    model: nn.Module, settings: Quantization, skip: Sequence[str] = ()
) -> QuantizationPlan:
    """Choose the layers to quantize as mlx-lm does, by their class and the model's own rule.

    Args:
        model: the architecture, not quantized.
        settings: group size, bits and mode.
        skip: names or globs of layers to leave unquantized.

    Raises:
        InputError: a name in `skip` matches no layer, or no layer is left to quantize.
    """
    leaves = cast(Any, tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    layers = {path: module for path, module in leaves if hasattr(module, "to_quantized")}
    rule = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    skipped = set(_matching(skip, layers))
    reads_embedding = architecture_of(model).reads_embedding and is_tied(model)
    chosen: dict[str, Quantization] = {}
    unquantized: dict[str, list[str]] = {}
    for path, module in layers.items():
        layer, reason = _settings_or_reason(module, settings, rule(path, module))
        if reads_embedding and is_embedding(path):
            reason = "since the architecture reads their weight"
        if path in skipped:
            reason = "as --q-skip says"
        if reason:
            unquantized.setdefault(reason, []).append(path)
        else:
            chosen[path] = layer
    notes = [f"not quantized, {why}: {_listed(collapsed(p))}" for why, p in unquantized.items()]
    if not chosen:
        raise InputError(f"-q leaves nothing to quantize ({'; '.join(notes)})")
    differing = {path: layer for path, layer in chosen.items() if layer != settings}
    return QuantizationPlan(chosen, settings | differing, notes)


def _settings_or_reason(
    module: Any, settings: Quantization, wanted: bool | Quantization
) -> tuple[Quantization, str]:
    """How a layer is quantized, or why it is not; `wanted` is the answer of the model's rule."""
    layer = settings | (wanted if isinstance(wanted, dict) else {})
    if not wanted:
        return layer, "as mlx-lm leaves them in this architecture"
    if not signature(module.to_quantized).parameters.keys() >= settings.keys():
        return layer, f"since mlx-lm's {type(module).__name__} has no way to"
    width = module.weight.shape[-1]
    if width % settings["group_size"] or width % layer["group_size"]:
        return layer, f"since groups of {layer['group_size']} do not divide their width of {width}"
    return layer, ""


def _matching(patterns: Sequence[str], paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches, as a glob or as one or more whole parts of the path."""
    names = {pattern: META_NAMES.get(pattern, pattern) for pattern in patterns}
    matches = {
        pattern: [path for path in paths if fnmatchcase(path, name) or f".{name}." in f".{path}."]
        for pattern, name in names.items()
    }
    if unmatched := [pattern for pattern, matched in matches.items() if not matched]:
        known = _listed(collapsed(paths))
        raise InputError(f"--q-skip {' '.join(unmatched)} matches no layer; there are {known}")
    return [path for path in paths if any(path in matched for matched in matches.values())]


def settings_like(layer: nn.Module, bits: int | None) -> Quantization:
    """Settings for quantizing a layer's weight again after a change.

    Args:
        layer: quantized or not.
        bits: the bits to use; `None` keeps the layer's, or takes the default.

    Returns:
        The layer's own settings if the bits stay the same. Other bits may not go with its mode or
        its group size, so they are affine and use a group size that MLX has for all bits.
    """
    if not is_quantized(layer):
        return quantization_settings(bits, None)
    if bits in (None, layer.bits):
        return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    group_size = layer.group_size if layer.group_size in GROUP_SIZES else min(GROUP_SIZES)
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def can_quantize(layer: nn.Module) -> bool:
    """Whether MLX can quantize a layer with the default group size."""
    if not hasattr(layer, "to_quantized"):
        return False
    return weight_shape(layer)[-1] % DEFAULT_GROUP_SIZE == 0


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
