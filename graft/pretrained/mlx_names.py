"""From a checkpoint's tensors to those of mlx-lm's architecture, still unread where possible.

mlx-lm renames, drops and combines tensors with arrays in hand; here that happens on disk's side.
Knows nothing of layouts: see `meta_llama` and `hugging_face`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from graft.errors import InputError
from graft.pretrained.module_paths import collapsed
from graft.storage.lazy_tensors import ComputedTensor, LazyTensor, Output, StoredTensor, blocks
from graft.storage.safetensors import write_safetensors

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Config = dict[str, Any]
Tensors = dict[str, LazyTensor]


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """A model's parameters by name."""
    return dict(cast(Any, tree_flatten(model.parameters())))


def quantization_of(config: Config) -> str | None:
    """How a checkpoint is quantized, if it is: MLX's way or another tool's."""
    if "quantization" in config:
        return "by MLX"
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    theirs = config.get("quantization_config") or nested
    return f"by {theirs.get('quant_method')}" if isinstance(theirs, dict) else None


def translated(folder: Path) -> tuple[Config, Tensors]:
    """Another tool's quantized checkpoint (AWQ, GPTQ, MXFP4, ...) in MLX's form, by mlx-lm.

    Raises:
        InputError: mlx-lm does not know that kind.
    """
    from mlx_lm.utils import load_model

    try:
        model, config = load_model(folder, lazy=True)
    except (ValueError, KeyError, FileNotFoundError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} is quantized in a way mlx-lm cannot read: {reason}") from error
    if "quantization" not in config:  # It made the weights whole.
        config.pop("quantization_config", None)
    return config, {name: ComputedTensor(array) for name, array in parameters_of(model).items()}


def under_mlx_names(model: nn.Module, tensors: Tensors, scratch: Path) -> tuple[Tensors, list[str]]:
    """Rename, drop and combine tensors as the architecture's `sanitize` in mlx-lm does.

    `sanitize` works on arrays. It is shown empty ones first: those that come back untouched are
    merely renamed, and stay on disk. Only if it computes others is it shown arrays that MLX reads
    when they are evaluated.

    Args:
        model: the architecture.
        tensors: the checkpoint's.
        scratch: a place for a copy of the checkpoint that MLX can read, should it need one.

    Returns:
        The tensors under mlx-lm's names, and a note on those that were dropped.

    Raises:
        InputError: the tensors are not those of the architecture.
    """
    empty = {name: mx.zeros(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    origin = {id(array): name for name, array in empty.items()}
    renamed = _sanitized(model, empty)
    if all(id(array) in origin for array in renamed.values()):
        kept = {name: origin[id(array)] for name, array in renamed.items()}
        dropped = sorted(set(tensors) - set(kept.values()))
        notes = (
            [f"not used by the architecture: {', '.join(collapsed(dropped))}"] if dropped else []
        )
        return {name: tensors[old] for name, old in kept.items()}, notes
    unread = _unread_arrays(tensors, scratch)
    origin = {id(array): name for name, array in unread.items()}
    return {
        name: tensors[origin[id(array)]] if id(array) in origin else ComputedTensor(array)
        for name, array in _sanitized(model, unread).items()
    }, []


def _sanitized(model: nn.Module, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    if not hasattr(model, "sanitize"):
        return arrays
    try:
        sanitized: dict[str, mx.array] = model.sanitize(dict(arrays))
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"the tensors are not those of a {model.model_type}: {type(error).__name__} {error}"
        ) from error
    return sanitized


def _unread_arrays(tensors: Tensors, scratch: Path) -> dict[str, mx.array]:
    """The tensors as arrays that MLX reads, from safetensors files, when they are evaluated."""
    stored = {tensor.path for tensor in tensors.values() if isinstance(tensor, StoredTensor)}
    arrays = _loaded(file for file in sorted(stored) if file.suffix == ".safetensors")
    arrays |= {
        n: tensor.array for n, tensor in tensors.items() if isinstance(tensor, ComputedTensor)
    }
    if elsewhere := {name: tensor for name, tensor in tensors.items() if name not in arrays}:
        copies = [Output(name, t.dtype, t.shape, blocks(t)) for name, t in elsewhere.items()]
        write_safetensors(scratch, copies)
        arrays |= _loaded([scratch])
    return {name: arrays[name] for name in tensors}


def _loaded(files: Iterable[Path]) -> dict[str, mx.array]:
    loaded: dict[str, mx.array] = {}
    for file in files:
        loaded |= cast(dict[str, mx.array], mx.load(str(file)))
    return loaded
