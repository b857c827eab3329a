"""Says what an adapter file is: its form, base model, methods, ranks, parameters and norms.

python -m graft inspect adapters/adapters.npz
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from graft.adapters.factors import guess_kind, products
from graft.adapters.files import AdapterRecord, find_adapter, load_adapter
from graft.adapters.formats import Adapter, detect
from graft.adapters.layer_config import LayerConfig
from graft.adapters.methods import METHODS
from graft.cli.command import Parser, command
from graft.pretrained.module_paths import natural_key

import mlx.core as mx

# A line that is longer than the terminal wraps there; a table cut to fit would lose what it tells.
WIDTH = 200
ALL_KINDS = ("linear", "embedding", "embedding-input", "embedding-columns", "conv", "experts")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Say what an adapter is.")
    parser.add_argument("adapter", metavar="PATH", help="file, folder or Hub name, of any tool")
    parser.add_argument("--alpha", type=float, metavar="X", help="alpha of an npz that tells none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print what an adapter is."""
    args = build_parser().parse_args(argv)
    file = find_adapter(Path(args.adapter))
    tensors, record = load_adapter(file, alpha=args.alpha)
    found = {"path": str(file), "format": detect(file), **describe(tensors, record)}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print_table(found)
    return 0


def describe(tensors: dict[str, mx.array], record: AdapterRecord) -> dict[str, Any]:
    """What there is to say of an adapter, ready for JSON.

    Each layer's `delta_norm` is the Frobenius norm of the change of its weight, or of what is
    trained in place of one; `None` where the base model would be needed, as for VeRA and DoRA.
    """
    layers = {
        path: _describe_layer(path, record.layers[path], tensors)
        for path in sorted(record.layers, key=natural_key)
    }
    return {
        "base_model": record.base_model,
        "dropout": record.dropout,
        "rotary": record.rotary,
        "parameters": sum(layer["parameters"] for layer in layers.values()),
        "layers": layers,
    }


def _describe_layer(
    path: str, setting: LayerConfig, tensors: dict[str, mx.array]
) -> dict[str, Any]:
    own = {n.removeprefix(f"{path}."): a for n, a in tensors.items() if n.startswith(f"{path}.")}
    return {
        "method": setting.method,
        "kind": guess_kind(path, setting, own.get("lora_a")),
        "rank": setting.rank,
        "alpha": setting.alpha,
        "scale": setting.scale,
        "parameters": sum(array.size for array in own.values()),
        "delta_norm": delta_norm(path, setting, own),
    }


def delta_norm(path: str, setting: LayerConfig, own: dict[str, mx.array]) -> float | None:
    """The Frobenius norm of a layer's change, from the two matrices' small products.

    |A B|^2 is the sum of (A^T A) * (B B^T), so that the product itself is never made.
    """
    if any(name.startswith("delta_") for name in own):
        return setting.scale * _norm(*own.values())
    if not METHODS[setting.method].low_rank or setting.kind == "weight":
        return None
    tensors = {f"{path}.{name}": array for name, array in own.items()}
    adapter = Adapter(tensors, {path: setting})
    product = products(adapter, target="inspect", kinds=ALL_KINDS)[path]
    a, b = product.a.astype(mx.float32), product.b.astype(mx.float32)
    if product.kind == "experts":
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    elif product.kind == "conv":
        a = a.flatten(0, -2)
    square = mx.maximum(((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2))).sum(), 0)
    return abs(product.scale) * cast(float, mx.sqrt(square).item())


def _norm(*arrays: mx.array) -> float:
    squares = [mx.square(array.astype(mx.float32)).sum() for array in arrays]
    return cast(float, mx.sqrt(mx.stack(squares).sum()).item())


def _print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    console.print(f"{found['path']}: {found['format']}", markup=False)
    base = found["base_model"] or "not told, or the embedded one"
    console.print(f"base model: {base}", markup=False)
    if found["rotary"] is not None:
        console.print(f"rows of q and k: {found['rotary']}")
    console.print(f"{len(found['layers'])} layers, {found['parameters']:,} parameters")
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "method", "kind", "rank", "alpha", "parameters", "|delta|"):
        left = title in ("layer", "method", "kind")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for path, layer in found["layers"].items():
        norm = layer["delta_norm"]
        numbers = (str(layer["rank"]), f"{layer['alpha']:g}", f"{layer['parameters']:,}")
        shown = "-" if norm is None else f"{norm:.4g}"
        table.add_row(path, layer["method"], layer["kind"], *numbers, shown)
    console.print(table)
