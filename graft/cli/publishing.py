"""What the commands share that read an adapter and can upload what they write."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graft.adapters.adapter import Adapter
from graft.adapters.files import find_adapter, load_adapter
from graft.adapters.formats import Usage
from graft.exporting.adapter import name_base
from graft.exporting.publish import make_card, publish
from graft.pretrained.hub import check_repository

ADAPTER_HELP = "adapter of any tool: file, folder or Hub name"
MODEL_HELP = "base model: folder or Hub name (default: as recorded)"
FORCE_HELP = "replace what exists at --out"


def add_alpha(parser: argparse.ArgumentParser) -> None:
    """Add --alpha, for every command that reads an adapter."""
    text = "alpha of the adapter, if its file records none"
    parser.add_argument("--alpha", type=float, metavar="X", help=text)


def add_publishing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that reads an adapter and writes what can go to the Hub."""
    add_alpha(parser)
    text = "upload it to the Hub as owner/name, with a model card"
    parser.add_argument("--upload-repo", metavar="NAME", help=text)
    parser.add_argument("--force", action="store_true", help=FORCE_HELP)


def open_adapter(name: str, args: argparse.Namespace) -> tuple[Path, Adapter]:
    """The file of an adapter, and what it holds.

    Raises:
        InputError: the adapter is missing or damaged, or --upload-repo is not owner/name.
    """
    if args.upload_repo is not None:
        check_repository(args.upload_repo)
    source = find_adapter(Path(name))
    return source, load_adapter(source, alpha=args.alpha)


def publish_if_asked(
    args: argparse.Namespace,
    adapter: Adapter,
    source: Path,
    *,
    usage: Usage,
    files: Sequence[str],
    relation: str = "adapter",
) -> None:
    """Upload what was written at --out if --upload-repo asks for it; `files` as for `publish`."""
    if args.upload_repo is None:
        return
    out = Path(args.out)
    adapter = replace(adapter, base_model=name_base(args.model, adapter.base_model))
    card = make_card(args.upload_repo, usage, adapter, source, file=out.name, relation=relation)
    print(f"uploaded to {publish(out, card, files=files)}")
