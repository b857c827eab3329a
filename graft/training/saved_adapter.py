"""The adapter of a run in its checkpoints: enough to attach it again without any other file.

`graft.training.step` saves what is trained; here is the rest: how each layer is adapted, and what
its method keeps constant.
"""

from collections.abc import Mapping
from typing import Any

from graft.adapters.adapter import layer_configs
from graft.adapters.attach import attach, detach, lora_layers
from graft.adapters.formats.graft import config_from_json, config_to_json
from graft.adapters.methods import METHODS
from graft.errors import InputError

import mlx.core as mx
import mlx.nn as nn

CONSTANT = "constant."


def layers_record(model: nn.Module) -> dict[str, Any]:
    """How each layer of a model is adapted, by module path, as JSON holds it."""
    return {path: config_to_json(config) for path, config in layer_configs(model).items()}


def constant_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The initial A and B of the methods that subtract them, by their paths."""
    return {
        f"{CONSTANT}{path}.{name}": array
        for path, layer in lora_layers(model)
        if METHODS[layer.method].keeps_start
        for name, array in layer.items()
        if name.startswith("_") and isinstance(array, mx.array)
    }


def attach_saved(
    model: nn.Module, layers: Mapping[str, Any], *, dropout: float = 0.0, seed: int = 0
) -> None:
    """Attach the layers of `layers_record`, in place of an adapter that the model has.

    Raises:
        InputError: they do not fit the model.
    """
    try:
        configs = {path: config_from_json(content) for path, content in layers.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the checkpoint's adapter is not one of Graft's: {error!r}") from error
    detach(model)
    attach(model, configs, dropout=dropout, seed=seed, for_loading=True)


def restore_constants(model: nn.Module, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Put back what `constant_arrays` returned; also the other arrays of a checkpoint."""
    layers = dict(lora_layers(model))
    for name in arrays:
        if name.startswith(CONSTANT):
            path, _, last = name.removeprefix(CONSTANT).rpartition(".")
            layers[path][last] = arrays[name]
    return {name: array for name, array in arrays.items() if not name.startswith(CONSTANT)}
