"""Reads an adapter for the bank: A and B for each layer, checked and padded.

This runs on another thread than the engine's, so the factors stay in NumPy arrays.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graft.adapters.adapter import Adapter, in_order_of
from graft.adapters.factors import Factors, factors_of
from graft.adapters.files import is_missing, load_adapter
from graft.adapters.layer_config import config_problems, resolve_kind
from graft.adapters.layer_kinds import (
    EMBEDDING,
    EMBEDDING_INPUT,
    EXPERTS,
    LINEAR,
    LayerKind,
    kind_of,
)
from graft.adapters.methods import stored_rank
from graft.engine.errors import AdapterDoesNotFit, AdapterNotFound, RankTooLarge
from graft.errors import InputError
from graft.models import is_quantized, weight_shape

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
SMALLEST_WIDTH = 8
MIXABLE_KINDS = (LINEAR, EMBEDDING, EMBEDDING_INPUT, EXPERTS)


@dataclass(frozen=True, eq=False)
class BankFactors:
    """An adapter for the bank.

    Attributes:
        layers: (A, B) by module path for linear layers: A (input_dims, width) and B (width,
            output_dims), which includes the adapter's scale. For experts both have an axis
            of experts before these. For embeddings (A, B, tied), where tied is 1 if the output tied
            to the embedding is adapted too, and 0 if not. The bank clears it once it has copied
            the factors.
        paths: paths of the layers.
        width: the rank that the factors are padded to, a power of two.
        rank: highest rank of its layers.
        digest: hash of the content, equal for equal adapters whatever their files are called.
    """

    layers: dict[str, tuple[Array, ...]]
    paths: frozenset[str]
    width: int
    rank: int
    digest: str


def read_factors(path: Path, model: nn.Module, modules: Mapping[str, nn.Module]) -> BankFactors:
    """Read an adapter of any format for a base model.

    Args:
        path: a file, a folder that contains one, or a Hub name.
        model: the base model; only its configuration is used.
        modules: the base model's layers by path.

    Raises:
        AdapterNotFound: the path does not exist.
        AdapterDoesNotFit: its layers are not the model's, or of kinds that a batch cannot mix; all
            of them are named.
        InputError: a file is damaged.
    """
    if is_missing(path):
        raise AdapterNotFound(f"there is no adapter at {path}")
    return make_factors(load_adapter(path), model, modules, name=str(path))


def make_factors(
    adapter: Adapter,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    *,
    name: str,
) -> BankFactors:
    """Like `read_factors`, for an adapter in memory; `name` is its name in errors.

    Raises:
        AdapterDoesNotFit: as for `read_factors`.
    """
    problems = config_problems(modules, adapter.layers, for_loading=True) or _unmixable(
        modules, adapter
    )
    problems = problems or _shape_problems(modules, adapter)
    layers: dict[str, tuple[Array, ...]] = {}
    if not problems:
        try:
            adapter = in_order_of(model, adapter)
            factors = factors_of(adapter, holder="a batch of mixed adapters", kinds=MIXABLE_KINDS)
        except InputError as error:
            raise AdapterDoesNotFit(f"adapter {name} does not fit: {error}") from error
        for path, layer in factors.items():
            layers[path] = _arrays(resolve_kind(modules[path], adapter.layers[path]), layer)
        problems = [
            f"{path} has values that are not finite"
            for path, arrays in layers.items()
            if not all(np.isfinite(array).all() for array in arrays)
        ]
    if problems:
        raise AdapterDoesNotFit(f"adapter {name} does not fit: {'; '.join(problems)}")
    rank = max((arrays[1].shape[-2] for arrays in layers.values()), default=1)
    width = width_of(rank)
    return BankFactors(
        {path: _padded(arrays, width) for path, arrays in layers.items()},
        frozenset(layers),
        width,
        rank,
        _digest(layers),
    )


def check_bank_rank(factors: BankFactors, max_rank: int, *, name: str) -> None:
    """Refuse an adapter whose rank is above the limit.

    Raises:
        RankTooLarge: it is.
    """
    if factors.rank > max_rank:
        raise RankTooLarge(
            f"adapter {name} has rank {factors.rank} and the limit is {max_rank}; start with a "
            "higher limit, or reduce the rank with `graft merge --rank`"
        )


def width_of(rank: int) -> int:
    """The rank that factors are padded to: the next power of two, at least 8.

    Adapters of one width share a stack, so a layer computes few products, and less than half of
    them is padding.
    """
    return max(SMALLEST_WIDTH, 1 << (rank - 1).bit_length())


def layer_shapes(module: nn.Module, width: int) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of a layer's factors in the bank; `None` if the bank cannot adapt it."""
    kind = kind_of(module)
    if kind is LINEAR:
        outputs, inputs = weight_shape(module)
        return (inputs, width), (width, outputs)
    if kind is EMBEDDING:
        vocabulary, dims = weight_shape(module)
        return (vocabulary, width), (width, dims), ()
    if kind is EXPERTS:
        experts, outputs, inputs = weight_shape(module)
        return (experts, inputs, width), (experts, width, outputs)
    return None


def dtype_of(module: nn.Module) -> mx.Dtype:
    """The precision that a layer computes in."""
    dtype: mx.Dtype = (module.scales if is_quantized(module) else module.weight).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.float32


def _unmixable(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    kinds = {path: resolve_kind(modules[path], config) for path, config in adapter.layers.items()}
    refused = [
        f"{path} ({kind.name})"
        for path, kind in kinds.items()
        if kind is not None
        if kind not in MIXABLE_KINDS and adapter.layers[path].parts is None
    ]
    if not refused:
        return []
    return [f"the rows of a batch cannot have different adapters in {', '.join(refused)}"]


def _shape_problems(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    problems = []
    for path, config in adapter.layers.items():
        kind = resolve_kind(modules[path], config)
        assert kind is not None
        shapes = kind.shapes(modules[path], stored_rank(config.method, config.rank))
        names = (f"{path}.lora_a", f"{path}.lora_b")
        problems += [
            f"{name} has shape {adapter.tensors[name].shape}, the model needs {shape}"
            for name, shape in zip(names, shapes, strict=True)
            if name in adapter.tensors and adapter.tensors[name].shape != shape
        ]
    return problems


def _arrays(kind: LayerKind | None, layer: Factors) -> tuple[Array, ...]:
    """A, B times the scale, and for an embedding whether the tied output is adapted too."""
    matrix_a, matrix_b = layer.matrices
    a, b = np.array(matrix_a), np.array(matrix_b * layer.scale)
    if kind in (EMBEDDING, EMBEDDING_INPUT):
        return a, b, np.array(kind is EMBEDDING, dtype=np.float32)
    return a, b


def _padded(arrays: tuple[Array, ...], width: int) -> tuple[Array, ...]:
    a, b, *others = arrays
    missing = width - a.shape[-1]
    leading = ((0, 0),) * (a.ndim - 2)
    padded_a = np.pad(a, (*leading, (0, 0), (0, missing)))
    return padded_a, np.pad(b, (*leading, (0, missing), (0, 0))), *others


def _digest(layers: Mapping[str, tuple[Array, ...]]) -> str:
    digest = hashlib.sha256()
    for path, arrays in sorted(layers.items()):
        digest.update(repr((path, [array.shape for array in arrays])).encode())
        for array in arrays:
            digest.update(array.tobytes())
    return digest.hexdigest()
