"""The `Adapter` class: tensors with their description, taken from a model or applied to one.

Every file format is read into an `Adapter` and written from one. Knows no format.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graft.adapters.attach import attach, detach, lora_layers
from graft.adapters.layer_config import LayerConfig, config_of
from graft.adapters.methods import METHODS
from graft.adapters.rotary import REORDERINGS
from graft.errors import InputError
from graft.pretrained.base_config import head_count, rotary_order
from graft.pretrained.transformers_names import layer_in_mlx_lm

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        tensors: by their paths: `PATH.lora_a` (input_dims, rank) and `PATH.lora_b` (rank,
            output_dims), or whatever else the layer's method trains.
        layers: from module path to rank, alpha, method and kind.
        base_model: the folder or Hub name of the model that it was trained on, if known; `None` in
            Graft's own files is the included base model.
        dropout: the probability used in training.
        rotary: the order of the rows of q and k, "halves" or "interleaved"; `None` if it is the
            base model's.
        options: of the run that trained it, as `graft.training.options.record` returns them.
        row_shapes: the names of the shapes of the rows that it was trained on, if known.
        notes: assumptions made while reading it, a line each.
    """

    tensors: dict[str, mx.array]
    layers: dict[str, LayerConfig]
    base_model: str | None = None
    dropout: float = 0.0
    rotary: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    row_shapes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def adapter_of(
    model: nn.Module,
    *,
    base_model: str | None = None,
    dropout: float = 0.0,
    options: Mapping[str, Any] | None = None,
    row_shapes: Sequence[str] = (),
) -> Adapter:
    """The adapter that is attached to a model; the keywords are what the model does not know."""
    layers = layer_configs(model)
    return Adapter(
        adapter_tensors(model),
        layers,
        base_model,
        dropout,
        options=dict(options or {}),
        row_shapes=tuple(row_shapes),
    )


def adapter_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The tensors of a model's adapter by their paths, as in a file."""
    return {
        f"{path}.{name}": array
        for path, layer in lora_layers(model)
        for name, array in layer.tensors().items()
    }


def layer_configs(model: nn.Module) -> dict[str, LayerConfig]:
    """Rank, alpha, method and kind of each adapted layer of a model."""
    return {path: config_of(layer) for path, layer in lora_layers(model)}


def apply_adapter(model: nn.Module, adapter: Adapter, *, name: str) -> None:
    """Attach an adapter's layers to `model` and load its tensors into them.

    Args:
        model: without an adapter; changed in place.
        adapter: to be applied.
        name: of the adapter, for messages.

    Raises:
        InputError: the adapter does not fit the model; every tensor that does not fit is named, and
            the model is left without an adapter.
    """
    adapter = in_order_of(model, adapter)
    modules = dict(model.named_modules())
    problems = [f"the model has no layer {path}" for path in adapter.layers if path not in modules]
    if not problems:
        try:
            attach(model, adapter.layers, dropout=adapter.dropout, for_loading=True)
        except InputError as error:
            problems = [str(error)]
        else:
            problems = _mismatches(adapter_tensors(model), adapter.tensors)
    if problems:
        detach(model)
        raise InputError(f"adapter {name} does not fit the model: {'; '.join(problems)}")
    for path, layer in lora_layers(model):
        layer.load({key: adapter.tensors[f"{path}.{key}"] for key in layer.tensors()})
        mx.eval(layer.tensors())


def in_order_of(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with its layers named, and the rows of q and k ordered, as in `model`.

    Raises:
        InputError: layers that cannot be reordered; all of them named.
    """
    adapter = with_mlx_paths(model, adapter)
    config = getattr(getattr(model, "args", None), "__dict__", {})
    return reordered(
        adapter,
        rotary_order(model),
        lambda path: head_count(config, path, adapter.base_model or "the model"),
    )


def with_mlx_paths(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with mlx-lm's paths of the layers of `model`, in place of transformers'."""
    layers = dict(model.named_modules()).keys()
    architecture = str(getattr(model, "model_type", ""))
    return renamed(adapter, lambda path: layer_in_mlx_lm(path, architecture, layers))


def renamed(adapter: Adapter, name: Callable[[str], str]) -> Adapter:
    """The adapter with other paths for its layers.

    Args:
        adapter: to be renamed.
        name: from a path to the new one.
    """
    paths = {path: name(path) for path in adapter.layers}
    if all(old == new for old, new in paths.items()):
        return adapter
    tensors = {}
    for full, array in adapter.tensors.items():
        path, _, tensor = full.rpartition(".")
        tensors[f"{paths.get(path, path)}.{tensor}"] = array
    layers = {paths[path]: config for path, config in adapter.layers.items()}
    return replace(adapter, tensors=tensors, layers=layers)


def reordered(adapter: Adapter, rotary: str, heads: Callable[[str], int | None]) -> Adapter:
    """The adapter with the rows of q and k in another order.

    Args:
        adapter: in a known order, or in the wanted one already.
        rotary: the order wanted.
        heads: from a layer's path to its number of heads, `None` for all but q and k.

    Raises:
        InputError: layers that cannot be reordered; all of them named.
    """
    if adapter.rotary in (None, rotary):
        return replace(adapter, rotary=rotary)
    tensors, refused = dict(adapter.tensors), list[str]()
    for path, config in adapter.layers.items():
        count = heads(path)
        if count is None:
            continue
        method = METHODS[config.method]
        if config.parts is not None or not (method.low_rank or method.has_magnitude):
            refused.append(f"{path} ({config.method})")
            continue
        for name in (f"{path}.lora_b", f"{path}.m"):
            if name not in tensors:
                continue
            outputs = tensors[name].shape[-1]
            if outputs % (2 * count):
                refused.append(f"{name} of {outputs} outputs, {count} heads")
            else:
                tensors[name] = REORDERINGS[rotary](tensors[name], count)
    if refused:
        raise InputError(f"the rows of these layers cannot be reordered: {', '.join(refused)}")
    return replace(adapter, tensors=tensors, rotary=rotary)


def is_dropout(value: object) -> bool:
    """Whether a value from a file is a dropout probability: a number from 0 to below 1."""
    return type(value) in (int, float) and 0 <= value < 1  # type: ignore[operator]


def _mismatches(expected: Mapping[str, mx.array], tensors: Mapping[str, mx.array]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} belongs to no adapted layer" for name in tensors if name not in expected]
    return problems + [
        f"{name} has shape {tensors[name].shape}, the model needs {array.shape}"
        for name, array in expected.items()
        if name in tensors and tensors[name].shape != array.shape
    ]
