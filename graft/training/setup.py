"""Sets up a run from its options: what is adapted, and from which weights it starts."""

from collections.abc import Mapping

from graft.adapters.attach import attach
from graft.adapters.layer_config import LayerConfig
from graft.adapters.methods import METHODS
from graft.adapters.targets import parse_pattern, plan
from graft.errors import InputError
from graft.models import is_quantized
from graft.pretrained.folder import find_folder
from graft.pretrained.load import read_model
from graft.training.options import DEFAULT_ALPHA, Options

import mlx.core as mx
import mlx.nn as nn


def attach_new_adapter(model: nn.Module, options: Options) -> None:
    """Attach the untrained adapter that a run starts from.

    Raises:
        InputError: as for `plan_run` and `read_unquantized_weights`.
    """
    layers = plan_run(model, options)
    weights = read_unquantized_weights(options.original_model, layers)
    attach(
        model,
        layers,
        dropout=options.dropout,
        seed=options.seed,
        unquantized_weights=weights,
    )


def plan_run(model: nn.Module, options: Options) -> dict[str, LayerConfig]:
    """The configuration of each layer that a run adapts, by module path.

    Raises:
        InputError: as for `graft.adapters.targets.plan`, or patterns that cannot be parsed.
    """
    return plan(
        model,
        options.targets,
        rank=options.rank,
        alpha=DEFAULT_ALPHA if options.alpha is None else options.alpha,
        method=options.method,
        num_layers=options.lora_layers,
        rank_pattern=parse_pattern(options.rank_pattern or "", int, option="--rank-pattern"),
        alpha_pattern=parse_pattern(options.alpha_pattern or "", float, option="--alpha-pattern"),
    )


def read_unquantized_weights(
    name: str | None, layers: Mapping[str, LayerConfig]
) -> dict[str, mx.array]:
    """The weights before quantization of the layers whose method needs them, by module path.

    Args:
        name: folder or Hub name of the model before quantization.
        layers: from module path to how the layer is adapted.

    Raises:
        InputError: a method needs the weights but there is no name, or the named model is quantized
            too or lacks the layers.
    """
    needed = {
        path: config.method
        for path, config in layers.items()
        if METHODS[config.method].start_from_original
    }
    if not needed:
        return {}
    if name is None:
        methods = ", ".join(sorted(set(needed.values())))
        raise InputError(
            f"--method {methods} needs --original-model, the model before quantization"
        )
    modules = dict(read_model(find_folder(name))[0].named_modules())
    bad = [path for path in needed if path not in modules or is_quantized(modules[path])]
    if bad:
        raise InputError(f"--original-model {name} has no unquantized weight of {', '.join(bad)}")
    return {path: modules[path].weight for path in needed}
