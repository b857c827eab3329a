"""The command that writes an adapter in another tool's format.

python -m graft export adapters/adapters.npz --to peft --out peft-adapter
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graft.adapters.formats import RECORD_NAME, writable_formats
from graft.cli.command import Parser, command
from graft.cli.publishing import (
    ADAPTER_HELP,
    MODEL_HELP,
    add_publishing_options,
    open_adapter,
    publish_if_asked,
)
from graft.exporting.adapter import export, find_base, name_base, names_repository


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Write an adapter in another tool's format.")
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help=ADAPTER_HELP)
    add("--to", required=True, choices=writable_formats(), help="format to write")
    add("--out", required=True, metavar="PATH", help="folder to write; a .gguf file for gguf")
    add("--model", metavar="BASE", help=MODEL_HELP)
    add_publishing_options(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export an adapter, and print what was changed to fit the format."""
    args = build_parser().parse_args(argv)
    source, adapter = open_adapter(args.adapter, args)
    out, base = Path(args.out), find_base(source, adapter, args.model)
    configured = None if base is None else base.config.get("_name_or_path")
    base_model = name_base(args.model, adapter.base_model, configured)
    adapter = replace(adapter, base_model=base_model)
    for text in export(adapter, out, to=args.to, base=base, force=args.force):
        print(text)
    print(f"wrote {out}: {len(adapter.layers)} layers; recorded base model: {_shown(base_model)}")
    format = writable_formats()[args.to]
    assert format.usage is not None
    files = (*format.files, RECORD_NAME) if out.is_dir() else format.companions
    publish_if_asked(args, adapter, source, usage=format.usage, files=files)
    return 0


def _shown(base_model: str | None) -> str:
    if base_model is None:
        return "none"
    if names_repository(base_model):
        return base_model
    return f"{base_model}, a path on this machine (--model OWNER/NAME records a Hub name)"
