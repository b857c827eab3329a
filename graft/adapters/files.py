"""Finds, loads and saves adapters: a file, a folder or a repository on the Hub, of any tool.

What the files hold is for `graft.adapters.formats` to know.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, adapter_of
from graft.adapters.formats import detect_format, file_patterns, file_suffixes, find_file
from graft.adapters.formats.graft import check_suffix, write_adapter
from graft.console import note
from graft.errors import InputError
from graft.pretrained.hub import fetch_from_hub, is_repo_name

import mlx.nn as nn


def save_adapter(
    path: Path | str,
    model: nn.Module,
    *,
    base_model: str | None = None,
    dropout: float = 0.0,
    options: Mapping[str, Any] | None = None,
    row_shapes: Sequence[str] = (),
) -> None:
    """Write a model's adapter and its record; each file appears whole or not at all.

    Args:
        path: ends in .npz or .safetensors.
        model: with an adapter attached.
        base_model: the folder or Hub name to record; `None` is the included base model.
        dropout: the probability used in training.
        options: of the run, to record.
        row_shapes: the names of the shapes of the rows that it was trained on, to record.

    Raises:
        InputError: the suffix is neither .npz nor .safetensors, or the path cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    adapter = adapter_of(
        model, base_model=base_model, dropout=dropout, options=options, row_shapes=row_shapes
    )
    write_adapter(path, adapter)


def load_adapter(path: Path | str, *, alpha: float | None = None) -> Adapter:
    """Read an adapter of any tool; prints a note for everything that had to be assumed.

    Args:
        path: a file, a folder with one, or a Hub name.
        alpha: numerator of the scale, for a file that records none.

    Raises:
        InputError: a file is missing or damaged, its record does not describe the tensors, or the
            adapter asks for what Graft does not do.
    """
    adapter = read_adapter(find_adapter(Path(path)), alpha=alpha)
    for text in adapter.notes:
        note(text)
    return adapter


def read_adapter(path: Path, *, alpha: float | None = None) -> Adapter:
    """Read an adapter's file in whatever format it has; arguments and errors as `load_adapter`."""
    try:
        return detect_format(path).read(path, alpha)
    except InputError as error:
        if str(path.parent) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


def find_adapter(path: Path) -> Path:
    """The file that an adapter's name means: itself, the one in a folder, or one from the Hub.

    Raises:
        InputError: there is no such adapter.
    """
    check_exists(path)
    if not path.exists():
        path = fetch_from_hub(str(path), ("adapter*", *file_patterns(), "README.md"))
    return find_file(path)


def is_missing(path: Path) -> bool:
    """Whether an adapter is neither here nor possibly on the Hub.

    A name that ends like an adapter file means a file here.
    """
    names_file = path.suffix in file_suffixes()
    return not path.exists() and (names_file or not is_repo_name(str(path)))


def check_exists(path: Path) -> None:
    """Refuse a path without an adapter; what may be on the Hub is looked up when it is loaded.

    Raises:
        InputError: there is no such file or folder.
    """
    if is_missing(path):
        raise InputError(f"there is no adapter {path}; train one with --train, or name another")
