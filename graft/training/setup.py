"""Setting up a run from its options."""

from collections.abc import Mapping

from graft.adapters.attach import LayerConfig
from graft.adapters.methods import METHODS
from graft.adapters.targets import parse_pattern, plan
from graft.errors import InputError
from graft.models import is_quantized
from graft.pretrained.folder import find_folder
from graft.pretrained.load import read_model
from graft.training.options import DEFAULT_ALPHA, Options

import mlx.core as mx
import mlx.nn as nn


def plan_run(model: nn.Module, options: Options) -> dict[str, LayerConfig]:
    """`plan` by the options of a run.

    Raises:
        InputError: as for `plan`, or patterns that cannot be read.
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


def read_originals(name: str | None, settings: Mapping[str, LayerConfig]) -> dict[str, mx.array]:
    """The weights before quantization that LoftQ starts from, by module path; none without LoftQ.

    Args:
        name: folder or Hub name of the model before quantization.
        settings: what will be adapted.

    Raises:
        InputError: LoftQ without a name, or a model that is quantized too or lacks the layers.
    """
    paths = [path for path, s in settings.items() if METHODS[s.method].start_from_original]
    if not paths:
        return {}
    if name is None:
        raise InputError("--method loftq needs --original-model, the model before quantization")
    modules = dict(read_model(find_folder(name))[0].named_modules())
    bad = [path for path in paths if path not in modules or is_quantized(modules[path])]
    if bad:
        raise InputError(f"--original-model {name} has no whole weight of {', '.join(bad)}")
    return {path: modules[path].weight for path in paths}
