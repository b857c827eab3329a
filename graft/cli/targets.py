"""The command that shows which layers of a model can be adapted, and what options would train."""

import argparse
from collections.abc import Sequence

from graft.adapters.attach import attach, count_parameters
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import VECTOR
from graft.adapters.methods import METHODS
from graft.adapters.targets import Candidate, candidates
from graft.cli.command import command
from graft.models import is_quantized, weight_shape
from graft.pretrained.folder import find_folder
from graft.pretrained.load import read_model
from graft.training import options as run_options
from graft.training.setup import plan_run

from mlx.utils import tree_flatten

FIELDS = (
    *("model", "lora_layers", "method", "targets"),
    *("rank", "alpha", "rank_pattern", "alpha_pattern"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options of `lora.py` that tell what is adapted."""
    text = "Show which layers of a model can be adapted, and what would be trained at what rank."
    parser = run_options.build_parser(text, FIELDS)
    methods = (f"  {name:<12} {method.text}" for name, method in METHODS.items())
    parser.epilog = "\n".join(["methods:", *methods])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of every layer that can be adapted, and the totals.

    Raises:
        InputError: as for `plan`.
    """
    options = run_options.from_mapping(run_options.parse(build_parser(), argv))
    model, _ = read_model(find_folder(options.model))
    settings = plan_run(model, options)
    found = candidates(model, -1)
    layers = [layer for layer in found if layer.parts is None]
    parts = {layer.path: layer.parts.names for layer in found if layer.parts is not None}
    total = count_parameters(model)[1]
    attach(model, settings, for_loading=True)
    trained = {
        path: sum(array.size for array in dict(tree_flatten(layer.trainable_parameters())).values())
        for path, layer in model.named_modules()
        if path in settings
    }
    rows = [
        _row(layer, parts.get(layer.path, ()), settings.get(layer.path), trained.get(layer.path, 0))
        for layer in layers
    ]
    print(_table(("layer", "kind", "shape", "trained", "rank", "alpha", "parameters"), rows))
    count = sum(trained.values())
    print(
        f"\n{len(settings)} of {len(layers)} layers adapted: {count:,} parameters trained beside "
        f"{total:,} of the model ({count / total:.2%})"
    )
    return 0


def _row(
    layer: Candidate, parts: Sequence[str], setting: LayerConfig | None, trained: int
) -> tuple[str, ...]:
    """A line of the table: what the layer is, with its parts, and how it is adapted."""
    kind = layer.kind.name + (f" ({', '.join(parts)})" if parts else "")
    bits = f", {layer.module.bits} bits" if is_quantized(layer.module) else ""
    shape = "x".join(map(str, weight_shape(layer.module))) + bits
    if setting is None:
        return layer.path, kind, shape, "-", "", "", ""
    enabled = f" {'+'.join(setting.parts.enabled)}" if setting.parts else ""
    rank = str(setting.rank) if layer.kind is not VECTOR and METHODS[setting.method].ranked else "-"
    how = setting.method + enabled
    return layer.path, kind, shape, how, rank, f"{setting.alpha:g}", f"{trained:,}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest entry; numbers stand to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = ("rank", "alpha", "parameters")
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
