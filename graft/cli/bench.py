"""The command that measures training, generation and serving, beside other tools."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from graft.bench import work as bench_work
from graft.bench.runner import PEERS, check, interleave, machine, runs_of, table
from graft.bench.work import WORKS
from graft.cli.command import Parser, command
from graft.storage.atomic import new_file


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(prog="graft bench", description=__doc__)
    about = "; ".join(f"{name}: {work.about}" for name, work in WORKS.items())
    parser.add_argument("--work", nargs="+", metavar="NAME", help=f"what to measure ({about})")
    parser.add_argument(
        "--against", default="", metavar="NAMES", help=f"by comma, any of {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--peft-python", default=sys.executable, metavar="PATH", help="a Python with torch and peft"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each tool (default: 3)")
    parser.add_argument(
        "--folder", type=Path, metavar="PATH", help="keep models and data here for the next time"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for and print a table of medians.

    Raises:
        InputError: names that are unknown, or a tool that does not run.
    """
    options = build_parser().parse_args(argv)
    # A server needs an extra, so it is measured where it is asked for.
    names = options.work or [name for name, work in WORKS.items() if not work.requests]
    peers = [name for name in options.against.split(",") if name]
    check(names, peers, options.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch, "materials")
        bench_work.make_materials(folder, [WORKS[name].model for name in names])
        results = {}
        for name in names:
            runs = runs_of(WORKS[name], peers, folder, Path(scratch), options.peft_python)
            results[name] = interleave(runs, options.repeats)
            print(table(name, results[name]), flush=True)
    if options.json:
        with new_file(options.json) as temporary:
            record = {"machine": machine(), "works": results}
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0
