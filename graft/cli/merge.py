"""The command that makes one adapter of several.

python -m graft merge A B --weights 0.7,0.3 --method svd --rank 8 --out merged
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from graft.adapters.adapter import Adapter
from graft.adapters.files import find_adapter, load_adapter
from graft.cli.command import Parser, command
from graft.cli.publishing import ADAPTER_HELP, FORCE_HELP, MODEL_HELP
from graft.console import note
from graft.errors import InputError
from graft.exporting.adapter import export, find_base
from graft.exporting.merge import (
    DEFAULT_DENSITY,
    MERGE_METHODS,
    MergeMethod,
    differences,
    in_one_order,
    merge,
)

OUT_HELP = "folder to write, or .npz or .safetensors file"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Make one adapter of several.", epilog=_methods())
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help=f"{ADAPTER_HELP}; all for one base model")
    weights = "a number for each adapter (default: 1 each for ties, otherwise equal parts of 1)"
    add("--weights", metavar="W,W,...", help=weights)
    add("--method", choices=MERGE_METHODS, default="cat", help="how to combine them")
    add("--rank", type=int, metavar="R", help="reduce the result to rank R (default: no reduction)")
    density = "fraction of a change that ties and dare keep"
    add("--density", type=float, default=DEFAULT_DENSITY, metavar="X", help=density)
    add("--seed", type=int, default=0, metavar="N", help="random seed of dare")
    add("--model", metavar="BASE", help=MODEL_HELP)
    add("--out", required=True, metavar="PATH", help=OUT_HELP)
    add("--force", action="store_true", help=FORCE_HELP)
    return parser


def _methods() -> str:
    lines = (f"  {name:<8} {method.text}" for name, method in MERGE_METHODS.items())
    return "\n".join(["methods:", *lines])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Merge adapters, and print what a lower rank lost."""
    args = build_parser().parse_args(argv)
    method = MERGE_METHODS[args.method]
    weights = _parse_weights(args.weights, len(args.adapters), method)
    check_rank_option(args.rank)
    if args.rank is None and method.needs_rank:
        raise InputError(f"{args.method} needs --rank; cat is the same at the sum of the ranks")
    if not 0 < args.density <= 1:
        raise InputError(f"--density {args.density}: give more than 0 and at most 1")
    adapters, bases = [], []
    for name in args.adapters:
        source = find_adapter(Path(name))
        adapters.append(load_adapter(source))
        bases.append(find_base(source, adapters[-1], args.model))
    base = next((base for base in bases if base is not None), None)
    adapters = in_one_order(adapters, base)
    for text in differences(args.adapters, adapters):
        note(text)
    merged, losses = merge(
        adapters, weights, method=args.method, rank=args.rank, density=args.density, seed=args.seed
    )
    export(merged, Path(args.out), base=base, force=args.force)
    print_losses(args.out, merged, losses, always=args.rank is not None)
    return 0


def _parse_weights(text: str | None, count: int, method: MergeMethod) -> list[float]:
    if text is None:
        return [1 / count if method.averages else 1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text}: give numbers separated by commas") from None
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise InputError(f"--weights {text}: give {count} numbers, one for each adapter")
    return weights


def check_rank_option(rank: int | None) -> None:
    """Refuse a rank below 1.

    Raises:
        InputError: it is below 1.
    """
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank}: give at least 1")


def print_losses(out: str, adapter: Adapter, losses: Mapping[str, float], *, always: bool) -> None:
    """Print what was written, and the energy lost if there is any or `always` is set."""
    ranks = sorted({config.rank for config in adapter.layers.values()})
    print(f"wrote {out}: {len(adapter.layers)} layers, rank {', '.join(map(str, ranks))}")
    if always or any(loss > 0 for loss in losses.values()):
        worst = max(losses, key=lambda path: losses[path])
        mean = sum(losses.values()) / len(losses)
        print(f"energy lost: mean {mean:.2%}, most {losses[worst]:.2%} in {worst}")
