"""The command that shows what an adapter is: format, base model, methods, ranks and norms.

python -m graft inspect adapters/adapters.npz
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.adapters.files import find_adapter, load_adapter
from graft.adapters.formats import detect_format
from graft.cli.command import Parser, command
from graft.cli.publishing import ADAPTER_HELP, add_alpha
from graft.console import table
from graft.exporting.describe import describe


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Show what an adapter is.")
    parser.add_argument("adapter", metavar="ADAPTER", help=ADAPTER_HELP)
    add_alpha(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print what an adapter is."""
    args = build_parser().parse_args(argv)
    file = find_adapter(Path(args.adapter))
    adapter = load_adapter(file, alpha=args.alpha)
    facts = {"path": str(file), "format": detect_format(file).name, **describe(adapter)}
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(facts)
    return 0


def _print_table(facts: dict[str, Any]) -> None:
    print(f"{facts['path']}: {facts['format']}")
    print(f"base model: {facts['base_model'] or 'not recorded, or the included one'}")
    if facts["rotary"] is not None:
        print(f"rows of q and k: {facts['rotary']}")
    print(f"{len(facts['layers'])} layers, {facts['parameters']:,} parameters")
    head = ("layer", "method", "kind", "rank", "alpha", "parameters", "|delta|")
    rows = [_row(path, layer) for path, layer in facts["layers"].items()]
    print(table(head, rows, right=head[3:]))


def _row(path: str, layer: dict[str, Any]) -> tuple[str, ...]:
    norm = layer["delta_norm"]
    return (
        path,
        layer["method"],
        layer["kind"],
        str(layer["rank"]),
        f"{layer['alpha']:g}",
        f"{layer['parameters']:,}",
        "-" if norm is None else f"{norm:.4g}",
    )
