"""The command that shows which layers of a model can be adapted, and what options would train."""

import argparse
from collections.abc import Sequence

from graft.adapters.attach import attach, count_parameters, lora_layers
from graft.adapters.layer_config import LayerConfig
from graft.adapters.methods import METHODS
from graft.adapters.targets import Candidate, candidates
from graft.cli.command import command
from graft.cli.run_options import options_parser, parse_options
from graft.console import table
from graft.models import is_quantized, weight_shape
from graft.pretrained.folder import find_folder
from graft.pretrained.load import read_model
from graft.training.options import from_mapping
from graft.training.setup import plan_run

TARGET_OPTIONS = (
    *("model", "lora_layers", "method", "targets"),
    *("rank", "alpha", "rank_pattern", "alpha_pattern"),
)
NUMBERS = ("rank", "alpha", "parameters")
COLUMNS = ("layer", "kind", "shape", "trained", *NUMBERS)


def build_parser() -> argparse.ArgumentParser:
    """A parser of those options of `lora.py` that decide what is adapted."""
    text = "Show which layers of a model can be adapted, and what these options would train."
    parser = options_parser(text, TARGET_OPTIONS)
    methods = (f"  {name:<12} {METHODS[name].text}" for name in sorted(METHODS))
    parser.epilog = "\n".join(["methods:", *methods])
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of every layer that can be adapted, and the totals.

    Raises:
        InputError: as for `graft.adapters.targets.plan`.
    """
    options = from_mapping(parse_options(build_parser(), argv))
    model, _ = read_model(find_folder(options.model))
    configs = plan_run(model, options)
    layers = candidates(model, -1)
    parts = {layer.path: layer.parts.names for layer in layers if layer.parts is not None}
    layers = [layer for layer in layers if layer.parts is None]
    total = count_parameters(model)[1]
    attach(model, configs, for_loading=True)
    trained = {path: count_parameters(layer)[0] for path, layer in lora_layers(model)}
    rows = [
        _row(layer, parts.get(layer.path, ()), configs.get(layer.path), trained.get(layer.path, 0))
        for layer in layers
    ]
    print(table(COLUMNS, rows, right=NUMBERS))
    count = sum(trained.values())
    print(
        f"\n{len(configs)} of {len(layers)} layers adapted: {count:,} parameters trained beside "
        f"{total:,} of the model ({count / total:.2%})"
    )
    return 0


def _row(
    layer: Candidate, parts: Sequence[str], config: LayerConfig | None, trained: int
) -> tuple[str, ...]:
    """The cells of a layer: what it is, with its parts, and how it is adapted."""
    kind = layer.kind.name + (f" ({', '.join(parts)})" if parts else "")
    bits = f", {layer.module.bits} bits" if is_quantized(layer.module) else ""
    shape = "x".join(map(str, weight_shape(layer.module))) + bits
    if config is None:
        return layer.path, kind, shape, "-", "", "", ""
    enabled = f" {'+'.join(config.parts.enabled)}" if config.parts else ""
    has_rank = layer.kind.ranked and METHODS[config.method].ranked
    rank = str(config.rank) if has_rank else "-"
    how = config.method + enabled
    return layer.path, kind, shape, how, rank, f"{config.alpha:g}", f"{trained:,}"
