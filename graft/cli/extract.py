"""The command that extracts the difference between two models as an adapter.

python -m graft extract --base M0 --tuned M1 --rank 16 --out difference
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from graft.cli.command import Parser, command
from graft.cli.merge import OUT_HELP, check_rank_option, print_losses
from graft.cli.publishing import FORCE_HELP
from graft.exporting.adapter import export
from graft.exporting.extract import extract


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Extract the difference between two models as an adapter.")
    add = parser.add_argument
    add("--base", required=True, metavar="M0", help="model before training: folder or Hub name")
    add("--tuned", required=True, metavar="M1", help="model after training: folder or Hub name")
    add("--rank", type=int, required=True, metavar="R", help="rank of every layer")
    add("--out", required=True, metavar="PATH", help=OUT_HELP)
    add("--force", action="store_true", help=FORCE_HELP)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Extract an adapter, and print what the rank lost."""
    args = build_parser().parse_args(argv)
    check_rank_option(args.rank)
    adapter, losses, notes = extract(args.base, args.tuned, rank=args.rank)
    export(adapter, Path(args.out), force=args.force)
    print_losses(args.out, adapter, losses, always=True)
    for text in notes:
        print(text)
    return 0
