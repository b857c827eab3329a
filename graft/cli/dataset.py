"""The command that builds a dataset from the documentation of installed packages."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from graft.cli.command import Parser, command
from graft.corpus.build import BuiltDataset, build_dataset


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Build a dataset from the documentation of installed packages.")
    add = parser.add_argument
    add(
        "packages",
        nargs="+",
        metavar="PACKAGE",
        help="an installed package, a standard-library module, or part of one, such as mlx.nn",
    )
    add("--out", required=True, metavar="DIR", help="folder to write the dataset to")
    add(
        "--max-chars",
        type=int,
        default=2048,
        metavar="N",
        help="longest text of a row, in characters",
    )
    add(
        "--test-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="fraction of rows in the test split, and again in the valid split",
    )
    add("--seed", type=int, default=42, metavar="N", help="seed of the division into splits")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read files at the same time (default: one per CPU core)",
    )
    add("--force", action="store_true", help="replace an existing dataset")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build the dataset and print how many rows each split has."""
    options = build_parser().parse_args(argv)
    dataset = build_dataset(
        options.packages,
        Path(options.out),
        max_chars=options.max_chars,
        test_fraction=options.test_fraction,
        seed=options.seed,
        workers=os.cpu_count() or 1 if options.workers is None else options.workers,
        force=options.force,
    )
    _print_summary(options.out, dataset)
    return 0


def _print_summary(out: str, dataset: BuiltDataset) -> None:
    counts = (f"{len(rows)} {split}" for split, rows in dataset.splits.items())
    print(f"{out}: {', '.join(counts)}")
    if dataset.shortened:
        print(f"shortened to the end of a paragraph or sentence: {dataset.shortened}")
    if dataset.left_out:
        print("left out:")
    for what, why in dataset.left_out.items():
        print(f"  {what}: {why}")
