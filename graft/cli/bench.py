"""The command that measures training, generation and serving, compared with other tools."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.bench.results_table import results_table
from graft.bench.runner import PEERS, measure_works, save_record
from graft.bench.work import WORKS
from graft.cli.command import Parser, command


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    works = "\n".join(f"  {name:<18} {work.about}" for name, work in WORKS.items())
    parser = Parser(
        description="Measure speed and memory on random models, compared with other tools.",
        epilog=f"what --work names:\n{works}",
    )
    add = parser.add_argument
    add(
        "--work",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what to measure, from the list below (default: all except serve)",
    )
    add(
        "--against",
        metavar="NAMES",
        help=f"comma-separated tools to compare Graft with: {', '.join(PEERS)}",
    )
    add(
        "--peft-python",
        metavar="PATH",
        help="a Python that has torch and peft (default: the one that runs Graft)",
    )
    add("--repeats", type=int, default=3, metavar="N", help="runs of each tool")
    add(
        "--folder",
        type=Path,
        metavar="DIR",
        help="keep models and data in this folder (default: a temporary one)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the works and print a table of medians after each."""
    options = build_parser().parse_args(argv)
    results: dict[str, Any] = {}
    for name, tools in measure_works(
        options.work,
        [name for name in (options.against or "").split(",") if name],
        repeats=options.repeats,
        folder=options.folder,
        peft_python=options.peft_python or sys.executable,
    ):
        results[name] = tools
        print(results_table(name, tools), flush=True)
    if options.json:
        save_record(options.json, results)
    return 0
