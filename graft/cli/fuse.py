"""The command that writes a model with its adapter inside."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.cli.command import Parser, command
from graft.cli.publishing import (
    ADAPTER_HELP,
    MODEL_HELP,
    add_publishing_options,
    open_adapter,
    publish_if_asked,
)
from graft.errors import InputError
from graft.exporting.fuse import MAX_GROWTH, MAX_KL, FusionResult, fuse_checked
from graft.exporting.fused_model import Fusion
from graft.exporting.publish import FUSED_MODEL_USAGE
from graft.quantization.choose import BITS, UNQUANTIZED
from graft.storage.atomic import check_free


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Write a model with its adapter inside.")
    add = parser.add_argument
    add("--model", metavar="BASE", help=MODEL_HELP)
    add("--adapter-file", required=True, metavar="A", help=ADAPTER_HELP)
    add("--out", required=True, metavar="DIR", help="folder to write")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--dequantize", action="store_true", help="write whole weights")
    form.add_argument(
        "--q-bits", type=int, choices=BITS, metavar="N", help="bits of every quantized layer"
    )
    add(
        "--max-kl",
        type=float,
        metavar="X",
        help="give layers more bits until the divergence from the adapter is at most X nats a "
        f"token (default: {MAX_KL}, or {MAX_GROWTH:.0%}% more size if that comes first)",
    )
    add("--check-data", metavar="FILE", help="text to compare on (default: the run's own)")
    add_publishing_options(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fuse as the command line says, and print what was compared."""
    args = build_parser().parse_args(argv)
    if args.max_kl is not None and not 0 < args.max_kl < math.inf:
        raise InputError(f"--max-kl {args.max_kl}: give more than 0")
    out = Path(args.out)
    check_free(out, replace=args.force)
    source, adapter = open_adapter(args.adapter_file, args)
    form: dict[str, Any] = {"dequantize": args.dequantize, "q_bits": args.q_bits}
    model = adapter.base_model if args.model is None else args.model
    if model != adapter.base_model:
        trained_on = adapter.base_model or "the embedded base model, or none on record"
        print(f"note: {source} was trained on {trained_on}; fusing into {model}", file=sys.stderr)
    fusion = Fusion(model, adapter, name=str(source), **form)
    result = fuse_checked(
        fusion, out, max_kl=args.max_kl, check_data=args.check_data, force=args.force
    )
    print_result(result, out, named=args.max_kl is not None)
    publish_if_asked(args, adapter, source, usage=FUSED_MODEL_USAGE, relation="finetune")
    return 0


def print_result(result: FusionResult, out: Path, *, named: bool) -> None:
    """Print what was written and how it compares; `named` tells whether --max-kl was."""
    found = result.comparison
    growth = result.bytes_after / result.bytes_before - 1
    print(f"wrote {out}: {result.bytes_after / 1e6:,.1f} MB ({growth:+.1%} of the base's)")
    print(f"on {found.tokens:,} tokens, adapter against fused model:")
    print(f"  mean KL divergence  {max(found.kl, 0.0):.5f} nats a token")
    print(f"  top-1 agreement     {found.agreement:.2%}")
    print(f"  loss                {found.adapter_loss:.4f} and {found.fused_loss:.4f}")
    for path, bits in result.more_bits.items():
        print(f"  {'whole' if bits == UNQUANTIZED else f'{bits} bits'}: {path}")
    if result.more_bits:
        print(f"layers with more bits, so as not to lose the adapter: {len(result.more_bits)}")
    if found.kl > result.max_kl:
        way = "though no layer is rounded any more" if named else "name --max-kl to grow for less"
        print(f"the divergence is above {result.max_kl:g}, {way}")
