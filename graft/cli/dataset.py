"""The command that turns the documentation of installed packages into a dataset."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from graft.cli.command import Parser, command
from graft.corpus.build import BuiltDataset, build_dataset


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Build a dataset from the documentation of installed packages.")
    parser.add_argument(
        "packages",
        nargs="+",
        metavar="PACKAGE",
        help="an installed package, a module of the standard library, or a part such as mlx.nn",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    default = " (default: %(default)s)"
    parser.add_argument(
        "--max-chars", type=int, default=2048, metavar="N", help=f"longest text of a row{default}"
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help=f"share of the rows in test, and as many in valid{default}",
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help=f"decides the splits{default}"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help=f"processes at once{default}",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing dataset")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build a dataset from the docstrings of packages."""
    options = build_parser().parse_args(argv)
    dataset = build_dataset(
        options.packages,
        Path(options.out),
        max_chars=options.max_chars,
        test_fraction=options.test_fraction,
        seed=options.seed,
        workers=options.workers,
        force=options.force,
    )
    _print_summary(options.out, dataset)
    return 0


def _print_summary(out: str, dataset: BuiltDataset) -> None:
    counts = (f"{len(rows)} {split}" for split, rows in dataset.splits.items())
    print(f"{out}: {', '.join(counts)}")
    if dataset.shortened:
        print(f"shortened at a paragraph or sentence end: {dataset.shortened}")
    if dataset.left_out:
        print("left out:")
    for what, why in dataset.left_out.items():
        print(f"  {what}: {why}")
