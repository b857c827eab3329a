"""The command that fuses an adapter into its base model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from graft.adapters.formats import detect_format
from graft.cli.command import Parser, command
from graft.cli.publishing import (
    ADAPTER_HELP,
    MODEL_HELP,
    add_publishing_options,
    open_adapter,
    publish_if_asked,
)
from graft.console import bytes_text
from graft.errors import InputError
from graft.exporting.fuse import MAX_GROWTH, MAX_KL, FusionResult, fuse
from graft.exporting.publish import FUSED_MODEL_USAGE
from graft.pretrained.module_paths import collapsed
from graft.quantization.choose import BITS, UNQUANTIZED


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Fuse an adapter into its base model: one folder for mlx-lm.")
    add = parser.add_argument
    add("--model", metavar="BASE", help=MODEL_HELP)
    add("adapter", nargs="?", metavar="ADAPTER", help=ADAPTER_HELP)
    # The name that the argument had in earlier versions.
    add("--adapter-file", help=argparse.SUPPRESS)
    add("--out", required=True, metavar="DIR", help="folder to write the model to")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--dequantize", action="store_true", help="write unquantized weights")
    precision.add_argument(
        "--q-bits",
        type=int,
        choices=BITS,
        metavar="N",
        help="bits of every quantized layer (default: as in the base model)",
    )
    add(
        "--max-kl",
        type=float,
        metavar="X",
        help="raise the bits of layers until the divergence from the adapter is at most X nats per "
        f"token (default: {MAX_KL}, while the model grows by at most {MAX_GROWTH:.0%}%)",
    )
    add(
        "--check-data",
        metavar="DATA",
        help="data to compare on, as for --data (default: the data of the run)",
    )
    add_publishing_options(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fuse, and print how the model compares with the adapter."""
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    if (args.adapter is None) == (args.adapter_file is None):
        raise InputError("name one adapter; --help lists all options")
    source, adapter = open_adapter(args.adapter or args.adapter_file, args)
    nameless = args.model is None and adapter.base_model is None
    if nameless and not detect_format(source).embedded_by_default:
        raise InputError(f"{source} records no base model; name it with --model")
    result = fuse(
        adapter,
        out,
        model=args.model,
        dequantize=args.dequantize,
        q_bits=args.q_bits,
        max_kl=args.max_kl,
        check_data=args.check_data,
        force=args.force,
        name=str(source),
    )
    _print_result(result, out, limited=args.max_kl is not None)
    publish_if_asked(
        args, adapter, source, usage=FUSED_MODEL_USAGE, files=("*",), relation="finetune"
    )
    return 0


def _print_result(result: FusionResult, out: Path, *, limited: bool) -> None:
    """Print what was written and how it compares; `limited` is whether --max-kl was given."""
    comparison = result.comparison
    growth = result.bytes_after / result.bytes_before - 1
    print(f"wrote {out}: {bytes_text(result.bytes_after)} ({growth:+.1%} against the base model)")
    print(f"fused model compared with the adapter on {comparison.tokens:,} tokens:")
    print(f"  mean KL divergence  {max(comparison.kl, 0.0):.5f} nats per token")
    print(f"  top-1 agreement     {comparison.agreement:.2%}")
    adapted, fused = comparison.adapter_loss, comparison.fused_loss
    print(f"  loss                {adapted:.4f} with the adapter, fused {fused:.4f}")
    if result.more_bits:
        print(f"layers with more bits, to keep the adapter's effect: {len(result.more_bits)}")
    for bits in sorted(set(result.more_bits.values())):
        paths = collapsed(path for path, own in result.more_bits.items() if own == bits)
        print(f"  {'not quantized' if bits == UNQUANTIZED else f'{bits} bits'}: {', '.join(paths)}")
    if comparison.kl > result.max_kl:
        reason = (
            "although no layer is quantized any more"
            if limited
            else "--max-kl reaches a limit at the cost of size"
        )
        print(f"the divergence is above {result.max_kl:g}; {reason}")
