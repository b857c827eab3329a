"""Renames a checkpoint's tensors as mlx-lm's architecture does, without reading them if possible.

mlx-lm renames, drops and combines arrays in memory. Here, tensors that are only renamed stay on
disk.
"""

from pathlib import Path
from typing import Any, cast

from graft.errors import InputError, first_line
from graft.pretrained.module_paths import collapsed
from graft.storage.lazy_tensors import ComputedTensor, LazyTensor, Output, StoredTensor, blocks
from graft.storage.safetensors import load_safetensors, write_safetensors

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """A model's parameters by name."""
    return dict(cast(Any, tree_flatten(model.parameters())))


def under_mlx_names(
    model: nn.Module, tensors: dict[str, LazyTensor], scratch: Path, *, source: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Rename, drop and combine tensors as the architecture's `sanitize` in mlx-lm does.

    `sanitize` works on arrays. It is first called with empty ones: those that it returns untouched
    are only renamed, and stay on disk. If it computes others, it is called again with arrays that
    MLX reads from disk when they are evaluated.

    Args:
        model: the architecture.
        tensors: the checkpoint's, by name.
        scratch: a file for a copy of the checkpoint that MLX can read, written if one is needed.
        source: the checkpoint, for messages.

    Returns:
        The tensors under mlx-lm's names, and a note if some are not used.

    Raises:
        InputError: the tensors are not those of the architecture.
    """
    empty = {name: mx.zeros(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    origin = {id(array): name for name, array in empty.items()}
    renamed = sanitized(model, empty, source)
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
        for name, array in sanitized(model, unread, source).items()
    }, []


def sanitized(model: nn.Module, arrays: dict[str, mx.array], source: str) -> dict[str, mx.array]:
    """Arrays under the names and in the shapes of mlx-lm's architecture, by its `sanitize`.

    Args:
        model: the architecture.
        arrays: a checkpoint's.
        source: the checkpoint, for the message.

    Raises:
        InputError: the arrays are not those of the architecture.
    """
    if not hasattr(model, "sanitize"):
        return arrays
    # transformers saves GPT-2 with this beginning; the files on the Hub and mlx-lm have none.
    if model.model_type == "gpt2":
        arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    try:
        renamed: dict[str, mx.array] = model.sanitize(dict(arrays))
    except Exception as error:  # every architecture fails in its own way
        raise InputError(
            f"the weights in {source} are not those of a {model.model_type}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return renamed


def _unread_arrays(tensors: dict[str, LazyTensor], scratch: Path) -> dict[str, mx.array]:
    """The tensors as arrays that MLX reads from safetensors files when they are evaluated."""
    arrays: dict[str, mx.array] = {}
    stored = {n: t.path for n, t in tensors.items() if isinstance(t, StoredTensor)}
    for file in sorted(set(stored.values())):
        loaded = _loaded(file) if file.suffix == ".safetensors" else {}
        arrays |= {n: array for n, array in loaded.items() if stored.get(n) == file}
    arrays |= {
        n: tensor.array for n, tensor in tensors.items() if isinstance(tensor, ComputedTensor)
    }
    if elsewhere := {name: tensor for name, tensor in tensors.items() if name not in arrays}:
        copies = [Output(name, t.dtype, t.shape, blocks(t)) for name, t in elsewhere.items()]
        write_safetensors(scratch, copies)
        arrays |= _loaded(scratch)
    return {name: arrays[name] for name in tensors}


def _loaded(file: Path) -> dict[str, mx.array]:
    try:
        return load_safetensors(file)
    except RuntimeError:  # a type that MLX does not have
        return {}
