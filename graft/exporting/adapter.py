"""Writes an adapter in another tool's format, and finds the base model that this may need."""

from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, apply_adapter, with_mlx_paths
from graft.adapters.formats import detect_format, writable_formats
from graft.errors import InputError
from graft.pretrained.base_config import BaseConfig, read_base_config
from graft.pretrained.hub import is_repo_name
from graft.pretrained.load import build_model


def export(
    adapter: Adapter,
    out: Path | str,
    *,
    to: str = "graft",
    base: BaseConfig | str | None = None,
    force: bool = False,
) -> list[str]:
    """Write an adapter; returns what was changed to fit, a line each.

    Args:
        adapter: to be written.
        out: a folder, or a file if the format is one file; either for Graft's own format.
        to: one of `graft.adapters.formats.writable_formats`.
        base: the base model, for formats that need to know it: its configuration, or a folder or
            Hub name.
        force: replace what exists at `out`.

    Raises:
        InputError: the format cannot hold the adapter, or the path cannot be written.
    """
    out, formats = Path(out), writable_formats()
    if to not in formats:
        raise InputError(f"no format {to!r} to write; there are {', '.join(formats)}")
    format = formats[to]
    if format.suffix and out.suffix != format.suffix:
        raise InputError(f"--out {out}: the name of a {to} file ends in {format.suffix}")
    if isinstance(base, str):
        base = read_base_config(base)
    if base is not None:
        adapter = with_mlx_paths(base.model, adapter)
    assert format.write is not None
    return format.write(adapter, out, base=base, force=force)


def find_base(source: Path, adapter: Adapter, name: str | None) -> BaseConfig | None:
    """The base model that is named, or else the recorded one if it is on this machine.

    Args:
        source: the adapter's file. If Graft's record names no base, it is the included model, or a
            model of the user's own.
        adapter: read from it.
        name: a folder or Hub name; `None` for the recorded one.

    Raises:
        InputError: there is no model of that name, or the adapter does not fit it.
    """
    base_model = adapter.base_model if name is None else name
    if name is None and base_model is not None and not Path(base_model).is_dir():
        return None
    if base_model is None and not detect_format(source).embedded_by_default:
        return None
    base = read_base_config(base_model)
    try:
        # The arrays are lazy: no weight of the model is ever computed.
        apply_adapter(build_model(dict(base.config)), adapter, name=str(source))
    except InputError as error:
        if base_model is None:
            return None
        raise InputError(
            f"base model {base_model}: {error}; --model names another base model"
        ) from error
    return base


def name_base(*names: Any) -> str | None:
    """Of several names of one model, the first on the Hub, or else the first that is a name."""
    known = [name for name in names if isinstance(name, str) and name]
    return next(filter(names_repository, known), next(iter(known), None))


def names_repository(name: str) -> bool:
    """Whether a name is a repository on the Hub and not a path on this machine."""
    return is_repo_name(name) and not Path(name).exists()
