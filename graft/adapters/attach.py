"""Puts LoRA layers into a model and takes them out again.

Knows module paths, kinds and methods; nothing of files or training. Which layers to adapt is chosen
by `graft.adapters.targets`, or by the caller.
"""

from collections.abc import Callable, Iterable, Mapping

from graft.adapters.layer_config import LayerConfig, config_problems, resolve_kind
from graft.adapters.methods import METHODS, make_layer
from graft.errors import InputError
from graft.models import LoRALayer
from graft.pretrained.mlx_names import parameters_of
from graft.pretrained.module_paths import natural_key

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def attach(
    model: nn.Module,
    layers: Mapping[str, LayerConfig],
    *,
    dropout: float = 0.0,
    seed: int = 0,
    unquantized_weights: Mapping[str, mx.array] | None = None,
    for_loading: bool = False,
    report: Callable[[str], object] | None = None,
) -> None:
    """Freeze `model` and put a LoRA layer over each module named in `layers`.

    Layers with running statistics, such as `nn.BatchNorm`, stay in evaluation mode until `detach`,
    even while the model trains, so the statistics do not change.

    Args:
        model: any MLX model; changed in place.
        layers: from module path to rank, alpha and method.
        dropout: probability of zeroing an input of A during training; without effect on layers
            whose update has no such input: ids, vectors, merge-first, (IA)3.
        seed: seed of the initial `lora_a`; each layer's draw depends on its position in `layers`
            only.
        unquantized_weights: weights before quantization by module path, for LoftQ.
        for_loading: whether tensors will be loaded into the layers, so that LoftQ needs no
            unquantized weights, and ranks may be higher than is useful.
        report: called with the number of trained parameters before and after, a line each, such as
            `print`.

    Raises:
        InputError: paths that the model does not have, modules that cannot be adapted, or not by
            this method, ranks that they cannot have; all of them named, and the model unchanged.
    """
    modules = dict(model.named_modules())
    starts = {} if for_loading else _starts(layers)
    weights = unquantized_weights or {}
    problems = config_problems(modules, layers, for_loading=for_loading)
    problems += _missing_weights(layers, [path for path in starts if path not in weights])
    if problems:
        raise InputError("; ".join(problems))
    counts_before = count_parameters(model)
    model.freeze()
    _hold_statistics(modules.values(), hold=True)
    keys = mx.random.split(mx.random.key(seed), max(len(layers), 1))
    adapted = [
        (path, _adapt(modules[path], config, dropout, key))
        for (path, config), key in zip(layers.items(), keys, strict=False)
    ]
    for path, layer in adapted:
        if path in starts:
            starts[path](layer, weights[path])
    model.update_modules(tree_unflatten(adapted))
    if report is not None:
        report(_counts_text("before", *counts_before))
        report(_counts_text("after", *count_parameters(model)))


def detach(model: nn.Module) -> None:
    """Put the base layers back in place of the LoRA layers."""
    bases = [(path, layer.base) for path, layer in lora_layers(model)]
    model.update_modules(tree_unflatten(bases))
    _hold_statistics([module for _, module in model.named_modules()], hold=False)


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """The LoRA layers of a model with their paths, in the model's order."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALayer)]
    return sorted(layers, key=lambda item: natural_key(item[0]))


def base_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The parameters of a model without its adapter, by the names they have without it."""
    parameters = parameters_of(model)
    for path, layer in lora_layers(model):
        for name in [name for name in parameters if name.startswith(f"{path}.")]:
            array, inside = parameters.pop(name), name.removeprefix(f"{path}.")
            if inside not in layer:
                parameters[f"{path}.{inside.removeprefix('linear.')}"] = array
    return parameters


def merge_all(model: nn.Module) -> int:
    """Merge every LoRA layer, for faster inference; returns the bytes that this takes."""
    return sum(layer.merge() for _, layer in lora_layers(model))


def unmerge_all(model: nn.Module) -> None:
    """Run every base and update separately again."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters of a model; a quantized weight counts as before quantization."""
    trained = sum(array.size for array in dict(tree_flatten(model.trainable_parameters())).values())
    return trained, sum(_parameters_of(module) for _, module in model.named_modules())


def _parameters_of(module: nn.Module) -> int:
    """The number of parameters of a module, without those of the modules in it."""
    if hasattr(module, "bits") and "weight" in module:
        bias: int = module["bias"].size if "bias" in module else 0
        size: int = module.weight.size * 32 // module.bits
        return size + bias
    # Names with a leading underscore are constants, such as rotary frequencies.
    return sum(
        array.size
        for name, array in module.items()
        if isinstance(array, mx.array) and not name.startswith("_")
    )


def _starts(layers: Mapping[str, LayerConfig]) -> dict[str, Callable[[LoRALayer, mx.array], None]]:
    """How to initialize the layers whose method needs the weights before quantization, by path."""
    methods = {path: METHODS.get(config.method) for path, config in layers.items()}
    starts = {path: method.start_from_original for path, method in methods.items() if method}
    return {path: start for path, start in starts.items() if start is not None}


def _missing_weights(layers: Mapping[str, LayerConfig], missing: Iterable[str]) -> list[str]:
    paths_of: dict[str, list[str]] = {}
    for path in missing:
        paths_of.setdefault(layers[path].method, []).append(path)
    return [
        f"{method} needs the weights before quantization of {', '.join(paths)}"
        for method, paths in paths_of.items()
    ]


def _hold_statistics(modules: Iterable[nn.Module], *, hold: bool) -> None:
    """Keep layers with running statistics in evaluation mode, or let them train again."""
    for module in modules:
        if "running_mean" not in module:
            continue
        if hold:
            module.eval()
            vars(module)["_set_training_mode"] = _keep_mode
        else:
            vars(module).pop("_set_training_mode", None)


def _keep_mode(mode: bool) -> None:
    """What a held layer does when its mode is set: nothing."""


def _counts_text(when: str, trained: int, total: int) -> str:
    return f"{when}: {trained:,} of {total:,} parameters trained ({trained / total:.2%})"


def _adapt(module: nn.Module, config: LayerConfig, dropout: float, key: mx.array) -> LoRALayer:
    kind = resolve_kind(module, config)
    assert kind is not None
    layer = make_layer(
        module,
        config.rank,
        kind=kind,
        method=config.method,
        alpha=config.alpha,
        dropout=dropout,
        key=key,
    )
    if config.parts is not None:
        layer.parts = config.parts
    return layer
