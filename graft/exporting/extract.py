"""Extracts the difference between two models as an adapter, layer by layer."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from graft.adapters.adapter import Adapter
from graft.adapters.factors import from_matrices
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import EMBEDDING, EXPERTS, LINEAR, VECTOR
from graft.errors import InputError
from graft.exporting.merge import decompose
from graft.models import dense_weight, weight_shape, with_arrays
from graft.pretrained.architectures import holds_experts, is_embedding
from graft.pretrained.base_config import rotary_order
from graft.pretrained.folder import find_folder
from graft.pretrained.lazy_model import BaseFiles, open_base
from graft.pretrained.module_paths import natural_key
from graft.storage.lazy_tensors import read

import mlx.core as mx


@dataclass
class Extraction:
    """The difference between two models, as an adapter.

    Attributes:
        tensors: of the adapter.
        layers: of the adapter.
        losses: for each matrix, the fraction of the energy (squared entries) lost to the rank.
        notes: what was left out, a line each.
    """

    tensors: dict[str, mx.array] = field(default_factory=dict)
    layers: dict[str, LayerConfig] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def extract(base: str, tuned: str, *, rank: int) -> tuple[Adapter, dict[str, float], list[str]]:
    """The difference between two models of one architecture as an adapter, layer by layer.

    Matrices become A and B; vectors, such as norms, are kept whole if they differ.

    Args:
        base: folder or Hub name.
        tuned: folder or Hub name.
        rank: of every matrix.

    Returns:
        The adapter, for each layer the fraction of the energy lost, and notes on what was left out.

    Raises:
        InputError: the models are not of one architecture, or do not differ.
    """
    result = Extraction()
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(
                open_base(
                    find_folder(name), Path(stack.enter_context(tempfile.TemporaryDirectory()))
                )
            )
            for name in (base, tuned)
        )
        _check_same_architecture(first, second)
        for path in dict(first.model.named_modules()):
            if f"{path}.weight" in first.tensors:
                _extract_layer(path, _arrays(path, first), _arrays(path, second), rank, result)
    if not result.layers:
        raise InputError(f"{base} and {tuned} do not differ")
    return Adapter(result.tensors, result.layers, base), result.losses, result.notes


def _extract_layer(
    path: str,
    before: dict[str, mx.array],
    after: dict[str, mx.array],
    rank: int,
    result: Extraction,
) -> None:
    delta = after["weight"] - before["weight"]
    bias = after.get("bias", mx.zeros(())) - before.get("bias", mx.zeros(()))
    if delta.ndim == 1:
        if mx.any(delta).item() or mx.any(bias).item():
            result.layers[path] = LayerConfig(1, 1.0, "norm", VECTOR.name)
            result.tensors[f"{path}.delta_weight"] = delta
            if "bias" in before:
                result.tensors[f"{path}.delta_bias"] = bias
        return
    if mx.any(bias).item():
        norm = cast(float, mx.linalg.norm(bias).item())
        result.notes.append(f"left out: the change of {path}.bias, of length {norm:.3g}")
    if not mx.any(delta).item():
        return
    if delta.ndim > 3 or (delta.ndim == 3 and not holds_experts(path)):
        result.notes.append(
            f"left out: the change of {path}, which is neither a matrix nor experts"
        )
        return
    kind = EXPERTS if delta.ndim == 3 else EMBEDDING if is_embedding(path) else LINEAR
    matrix = delta if kind.takes_ids else delta.swapaxes(-1, -2)
    matrices, result.losses[path] = decompose(matrix, rank)
    factors = from_matrices(kind, *matrices)
    result.tensors |= {f"{path}.lora_a": factors.a, f"{path}.lora_b": factors.b}
    result.layers[path] = LayerConfig(factors.rank, float(factors.rank))
    mx.eval(factors.a, factors.b)


def _arrays(path: str, base: BaseFiles) -> dict[str, mx.array]:
    """Weight and bias of a layer, float32 and dequantized."""
    module = dict(base.model.named_modules())[path]
    names = [n for n in module if f"{path}.{n}" in base.tensors]
    module = with_arrays(module, {n: read(base.tensors[f"{path}.{n}"]) for n in names})
    arrays = {"weight": dense_weight(module).astype(mx.float32)}
    if "bias" in module:
        arrays["bias"] = module.bias.astype(mx.float32)
    return arrays


def _check_same_architecture(first: BaseFiles, second: BaseFiles) -> None:
    def shapes(base: BaseFiles) -> dict[str, Any]:
        modules = dict(base.model.named_modules())
        return {p: weight_shape(m) for p, m in modules.items() if f"{p}.weight" in base.tensors}

    before, after = shapes(first), shapes(second)
    paths = before.keys() | after.keys()
    differing = [path for path in paths if before.get(path) != after.get(path)]
    if differing:
        raise InputError(
            f"{first.folder} and {second.folder} are not of one architecture: "
            f"{', '.join(sorted(differing, key=natural_key))} differ"
        )
    orders = [rotary_order(base.model) for base in (first, second)]
    if orders[0] != orders[1]:
        raise InputError(
            f"q and k are {orders[0]} in {first.folder} and {orders[1]} in {second.folder} "
            "(rope_traditional in config.json): convert both from one layout"
        )
