"""Chooses which layers of a model are quantized, and with which settings."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from graft.errors import InputError
from graft.models import is_quantized, weight_shape
from graft.pretrained.module_paths import collapsed

import mlx.nn as nn
from mlx.utils import tree_flatten

# Bits that MLX can quantize to, and what stands for a layer that stays whole.
BITS = (2, 3, 4, 5, 6, 8)
WHOLE = 16
GROUP_SIZES = (32, 64, 128)
# A head is known by Meta's name too, as in the MLX example's converter.
META_NAMES = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}

Quantization = dict[str, Any]


def quantization_settings(bits: int | None, group_size: int | None) -> Quantization:
    """What config.json says of a quantized model; affine, 4 bits and groups of 64 by default.

    Raises:
        InputError: bits or group size that MLX has no kernels for.
    """
    bits = 4 if bits is None else bits
    group_size = 64 if group_size is None else group_size
    problems = []
    if bits not in BITS:
        problems.append(f"--q-bits {bits} is not supported; choose one of {_listed(BITS)}")
    if group_size not in GROUP_SIZES:
        sizes = _listed(GROUP_SIZES)
        problems.append(f"--q-group-size {group_size} is not supported; choose one of {sizes}")
    if problems:
        raise InputError("; ".join(problems))
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def quantize(
    model: nn.Module, settings: Quantization, skip: Sequence[str]
) -> tuple[dict[str, Quantization], list[str]]:
    """Choose the layers to quantize as mlx-lm does, by their class and the model's own rule.

    Args:
        model: the architecture, not quantized.
        settings: group size, bits and mode.
        skip: names or globs of layers to leave whole.

    Returns:
        The settings of each chosen layer, by path, and notes on those that stay whole.

    Raises:
        InputError: a name in `skip` matches no layer, or no layer is left to quantize.
    """
    leaves = cast(Any, tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    layers = {path: module for path, module in leaves if hasattr(module, "to_quantized")}
    rule = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    chosen: dict[str, Quantization] = {}
    whole: dict[str, list[str]] = {"as --q-skip says": _matching(skip, layers)}
    for path, module in layers.items():
        wanted, width = rule(path, module), module.weight.shape[-1]
        layer = settings | (wanted if isinstance(wanted, dict) else {})
        if path in whole["as --q-skip says"]:
            continue
        if not wanted:
            whole.setdefault("as mlx-lm leaves them in this architecture", []).append(path)
        elif width % settings["group_size"] or width % layer["group_size"]:
            reason = f"since groups of {layer['group_size']} do not divide their width of {width}"
            whole.setdefault(reason, []).append(path)
        else:
            chosen[path] = layer
    notes = [f"whole, {why}: {_listed(collapsed(paths))}" for why, paths in whole.items() if paths]
    if not chosen:
        raise InputError(f"-q leaves nothing to quantize ({'; '.join(notes)})")
    return chosen, notes


def _matching(patterns: Sequence[str], paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches: as a glob, or as one or more whole parts of the path."""
    names = {pattern: META_NAMES.get(pattern, pattern) for pattern in patterns}
    matches = {
        pattern: [path for path in paths if fnmatchcase(path, name) or f".{name}." in f".{path}."]
        for pattern, name in names.items()
    }
    if unmatched := [pattern for pattern, found in matches.items() if not found]:
        there = _listed(collapsed(paths))
        raise InputError(f"--q-skip {' '.join(unmatched)} matches no layer; there are {there}")
    return [path for path in paths if any(path in found for found in matches.values())]


def settings_like(base: nn.Module, bits: int | None) -> Quantization:
    """Group size, bits and mode of a layer that is to be quantized like its base."""
    if not is_quantized(base):
        return {"group_size": 64, "bits": bits or 4, "mode": "affine"}
    same = bits is None or bits == base.bits
    mode = base.mode if same else "affine"
    group_size = base.group_size if base.group_size in (32, 64, 128) else 32
    size = base.group_size if same else group_size
    return {"group_size": size, "bits": bits or base.bits, "mode": mode}


def can_quantize(module: nn.Module) -> bool:
    """Whether MLX can quantize a layer in groups of 64."""
    return hasattr(module, "to_quantized") and weight_shape(module)[-1] % 64 == 0


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
