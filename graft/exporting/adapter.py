"""Writes an adapter in the form of another tool.

python -m graft export adapters/adapters.npz --to peft --out peft-adapter
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.files import (
    SUFFIXES,
    AdapterRecord,
    apply_adapter,
    find_adapter,
    load_adapter,
    write_adapter,
)
from graft.adapters.formats import WRITERS, Adapter, detect
from graft.cli.command import Parser, command
from graft.errors import InputError
from graft.exporting.model_card import Card, read_losses, write_card
from graft.pretrained.base_config import BaseModel, read_base_model
from graft.pretrained.hub import check_repository, is_repo_name, upload_folder
from graft.pretrained.load import build_model
from graft.storage.atomic import check_writable

import mlx.core as mx

FORMS = ("npz", *WRITERS)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Write an adapter in the form of another tool.")
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="file, folder or Hub name, of any tool")
    add("--to", required=True, choices=FORMS, help="the form to write")
    add("--out", required=True, metavar="PATH", help="folder to write; a file for gguf")
    add("--model", metavar="BASE", help="base model, folder or Hub name (default: as recorded)")
    add_shared_options(parser)
    return parser


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What every command has that reads an adapter and writes what can go to the Hub."""
    add = parser.add_argument
    add("--alpha", type=float, metavar="X", help="alpha of an npz file that tells none")
    add("--upload-repo", metavar="NAME", help="put it on the Hub as owner/name, with a model card")
    add("--force", action="store_true", help="replace what stands at --out")


def open_source(
    name: str, args: argparse.Namespace
) -> tuple[Path, dict[str, mx.array], AdapterRecord]:
    """The file, the tensors and the record of an adapter, with the shared options heeded.

    Raises:
        InputError: the adapter is missing or damaged, or the repository has no possible name.
    """
    if args.upload_repo is not None:
        check_repository(args.upload_repo)
    source = find_adapter(Path(name))
    return source, *load_adapter(source, alpha=args.alpha)


def publish(args: argparse.Namespace, form: str, record: AdapterRecord, source: Path) -> None:
    """Put what was written at --out on the Hub, if --upload-repo asks for it."""
    if args.upload_repo is not None:
        record = replace(record, base_model=name_base(args.model, record.base_model))
        card = make_card(args.upload_repo, form, record, source, Path(args.out))
        print(f"uploaded to {upload(Path(args.out), card)}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says."""
    args = build_parser().parse_args(argv)
    source, tensors, record = open_source(args.adapter, args)
    out, base = Path(args.out), find_base(source, tensors, record, args.model)
    theirs = None if base is None else base.config.get("_name_or_path")
    record = replace(record, base_model=name_base(args.model, record.base_model, theirs))
    for note in export(as_adapter(tensors, record), out, form=args.to, base=base, force=args.force):
        print(note)
    print(f"wrote {out}: {len(record.layers)} layers; as base model it names {_told(record)}")
    publish(args, args.to, record, source)
    return 0


def export(
    adapter: Adapter, out: Path, *, form: str, base: BaseModel | None, force: bool = False
) -> list[str]:
    """Write an adapter; returns what was changed to fit, a line each.

    Args:
        adapter: in memory.
        out: a folder, or a file for "gguf"; for "npz" either.
        form: one of `FORMS`.
        base: the base model, where the form needs to know it.
        force: replace what stands at `out`.

    Raises:
        InputError: the form cannot hold the adapter, or the place cannot be written.
    """
    if form == "gguf" and out.suffix != ".gguf":
        raise InputError(f"--out {out}: the name of a GGUF file ends in .gguf")
    if form in WRITERS:
        return WRITERS[form](adapter, out, base=base, force=force)
    file = out if out.suffix in SUFFIXES else out / "adapters.npz"
    if file.exists() and not force:
        raise InputError(f"{file} exists; name another place or add --force to replace it")
    check_writable(file)
    record = AdapterRecord(
        adapter.layers, adapter.base_model, adapter.dropout, rotary=adapter.rotary
    )
    write_adapter(file, adapter.tensors, record)
    return []


def as_adapter(tensors: dict[str, mx.array], record: AdapterRecord) -> Adapter:
    """What `load_adapter` gave, as the formats take it."""
    return Adapter(tensors, record.layers, record.base_model, record.dropout, record.rotary)


def find_base(
    source: Path, tensors: dict[str, mx.array], record: AdapterRecord, name: str | None
) -> BaseModel | None:
    """The base model that was named, or else the recorded one where it is at hand.

    Args:
        source: the adapter's file. Where Graft's record names no base, it is the embedded one, or a
            model that no folder holds.
        tensors: of the adapter.
        record: of the adapter.
        name: as given on the command line.

    Raises:
        InputError: there is no model of that name, or the adapter does not fit it.
    """
    named = record.base_model if name is None else name
    if name is None and named is not None and not Path(named).is_dir():
        return None
    if named is None and detect(source) != "graft":
        return None
    base = read_base_model(named)
    try:
        # Lazy arrays: of the model, no weight is ever computed.
        apply_adapter(build_model(dict(base.config)), tensors, record, name=str(source))
    except InputError as error:
        if named is None:
            return None
        raise InputError(f"base model {named}: {error}; --model names another") from error
    return base


def name_base(*names: Any) -> str | None:
    """Of several names of one model the first that is the Hub's, or else the first there is."""
    told = [name for name in names if isinstance(name, str) and name]
    return next(filter(on_hub, told), next(iter(told), None))


def on_hub(name: str) -> bool:
    """Whether a name is the Hub's, owner/name, and no place on this machine."""
    return is_repo_name(name) and not Path(name).exists()


def _told(record: AdapterRecord) -> str:
    if record.base_model is None:
        return "none"
    if on_hub(record.base_model):
        return record.base_model
    return f"{record.base_model}, a place on this machine (--model OWNER/NAME names one for all)"


def describe_methods(record: AdapterRecord) -> str:
    """Such as "lora, rank 8, 21 layers"."""
    groups: dict[tuple[str, int], int] = {}
    for setting in record.layers.values():
        key = setting.method, setting.rank
        groups[key] = groups.get(key, 0) + 1
    return "; ".join(f"{m}, rank {rank}, {count} layers" for (m, rank), count in groups.items())


def make_card(
    repository: str, form: str, record: AdapterRecord, source: Path, out: Path | None = None
) -> Card:
    """The card of an adapter, or of a model with it inside; losses from beside its file."""
    base = record.base_model
    if base is not None and not on_hub(base):
        base = None  # a place on this machine tells nobody anything
    losses = read_losses(source.with_name("metrics.jsonl"))
    methods, file = describe_methods(record), out.name if out is not None else ""
    return Card(repository, form, base, methods, record.options, losses, file)


def upload(out: Path, card: Card) -> str:
    """Put a folder, or a file, on the Hub with a model card; returns the commit's address."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "upload"
        if out.is_dir():
            shutil.copytree(out, folder)
        else:
            folder.mkdir()
            shutil.copy(out, folder)
            config = out.with_name("adapter_config.json")
            if card.form == "npz" and config.is_file():
                shutil.copy(config, folder)
        (folder / "README.md").write_text(write_card(card), encoding="utf-8")
        return upload_folder(folder, card.repository)
