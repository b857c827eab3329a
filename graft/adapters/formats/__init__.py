"""Adapter formats: each module of this folder reads, writes and describes one tool's files.

A module calls `register_format`, and that is all: `--to`, `graft inspect`, the readers and the
model card follow from `FORMATS`. Every reader returns an `Adapter` and every writer takes one.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter
from graft.errors import InputError
from graft.storage.json_file import read_json_file
from graft.storage.plain_file import read_start

RECORD_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Usage:
    """How the files on the Hub are used, for a model card.

    Attributes:
        tool: that loads them.
        library: the Hub's `library_name`.
        text: Markdown; `{base}`, `{name}`, `{folder}` and `{file}` become the base model, the
            repository, its name without the owner and the file with the weights.
    """

    tool: str
    library: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """One tool's files of an adapter.

    Attributes:
        name: in `--to` and in what `graft inspect` prints.
        files: names or globs of a folder's file with the tensors.
        magic: the first bytes of a file that needs no record to be recognized.
        recognizes: (first four bytes, content of adapter_config.json beside the file) -> whether
            the file has this format; true for one format at most.
        read: (path, alpha or `None`) -> the adapter; alpha is for files that record none.
        write: (adapter, path, *, base, force) -> what had to be changed to fit, a line each; `base`
            is the base model's configuration or `None`, `force` replaces what exists. `None` if
            the format is only read.
        usage: for a model card, if the format is written.
        aliases: other names that `--to` takes.
        suffix: of the file that is written; empty if a folder is written.
        companions: files beside the file of tensors that belong to it.
        embedded_by_default: whether no base model in the record means the included one.
    """

    name: str
    files: Sequence[str]
    read: Callable[[Path, float | None], Adapter]
    magic: bytes = b""
    recognizes: Callable[[bytes, Mapping[str, Any]], bool] = lambda start, config: False
    write: Callable[..., list[str]] | None = None
    usage: Usage | None = None
    aliases: Sequence[str] = ()
    suffix: str = ""
    companions: Sequence[str] = ()
    embedded_by_default: bool = False


FORMATS: dict[str, Format] = {}


def register_format(format: Format) -> None:
    """Make a format available, for `--to` and to the readers.

    Raises:
        ValueError: the name is taken.
    """
    if format.name in FORMATS:
        raise ValueError(f"format {format.name!r} is registered already")
    FORMATS[format.name] = format


def import_formats() -> None:
    """Import the modules of this folder, which registers their formats."""
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{name}")


def writable_formats() -> dict[str, Format]:
    """The formats that `--to` takes, by all their names."""
    return {
        name: format
        for format in FORMATS.values()
        if format.write is not None
        for name in (format.name, *format.aliases)
    }


def file_patterns() -> list[str]:
    """Names and globs of all formats' files with tensors, globs last."""
    patterns = dict.fromkeys(pattern for format in FORMATS.values() for pattern in format.files)
    return sorted(patterns, key=lambda pattern: "*" in pattern)


def file_suffixes() -> set[str]:
    """Suffixes of all formats' files with tensors."""
    return {Path(pattern).suffix for pattern in file_patterns()}


def find_file(path: Path) -> Path:
    """The file with the tensors: `path` itself, or the one in the folder that it names.

    A format may have several names for its file; of a folder's files of one format, the first in
    that order counts, such as PEFT's .safetensors before its .bin.

    Raises:
        InputError: the folder holds no adapter, or more than one.
    """
    if not path.is_dir():
        return path
    patterns = file_patterns()
    named = [
        [path / name for name in format.files if (path / name).is_file()]
        for format in FORMATS.values()
    ]
    files = list(dict.fromkeys(of_format[0] for of_format in named if of_format))
    files = files or sorted(file for pattern in patterns for file in path.glob(pattern))
    if not files:
        expected = f"{', '.join(patterns[:-1])} or {patterns[-1]}"
        raise InputError(f"{path} holds no adapter: none of {expected}")
    if len(files) > 1:
        raise InputError(f"{path} holds {', '.join(file.name for file in files)}: name one of them")
    return files[0]


def detect_format(path: Path) -> Format:
    """The format of an adapter file, by its content and the configuration beside it.

    Raises:
        InputError: it has no format that Graft knows.
    """
    start = read_start(path, 4)
    for format in FORMATS.values():
        if format.magic and start.startswith(format.magic):
            return format
    record = path.with_name(RECORD_NAME)
    config = read_json_file(record) if record.is_file() else {}
    for format in FORMATS.values():
        if format.recognizes(start, config):
            return format
    if not config:
        raise InputError(f"{path} does not say what it is, and {record} is missing")
    raise InputError(f"{record} describes no adapter that Graft knows: {', '.join(FORMATS)}")


import_formats()
