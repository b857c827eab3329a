"""The token cache: arrays on disk, under a hash of what they were made from.

Entries are in the folder `tokens` of $GRAFT_CACHE, else of $XDG_CACHE_HOME/graft, else of
~/.cache/graft. They may be deleted at any time; when together they take more than `LIMIT_BYTES`,
the least recently used are. GRAFT_CACHE=off turns the cache off. Knows nothing of what the arrays
mean.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.console import note, one_line
from graft.errors import InputError
from graft.storage.atomic import new_file

import numpy as np
from numpy.typing import NDArray

LIMIT_BYTES = 4 * 2**30
_RECORD = "record"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)


def cache_folder(kind: str = "tokens") -> Path | None:
    """The folder with the entries of a kind; `None` if the cache is turned off."""
    graft_cache = os.environ.get("GRAFT_CACHE", "")
    if graft_cache.lower() == "off":
        return None
    if graft_cache:
        return Path(graft_cache) / kind
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "graft", kind)


def read_entry(key: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """The arrays and the record of an entry, or `None` if there is none.

    A damaged entry is reported on standard error and counts as missing.

    Args:
        key: a hash of what the entry is made from, in hexadecimal digits.
    """
    folder = cache_folder()
    path = folder and folder / f"{key}.npz"
    if path is None or not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
            arrays = {name: entry[name] for name in entry.files}
        record = json.loads(arrays.pop(_RECORD).tobytes())
        if record.pop("checksum") != _checksum(arrays, record):
            raise ValueError("its checksum differs")
        os.utime(path)  # It is the most recently used now.
    except _DAMAGE as error:
        note(f"{path} is damaged and will be rebuilt: {one_line(error)}")
        return None
    return arrays, record


def write_entry(key: str, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
    """Store an entry; if that fails, report it and continue.

    Args:
        key: as for `read_entry`.
        arrays: by name; none is named `record`.
        record: values that JSON can hold.
    """
    folder = cache_folder()
    if folder is None:
        return
    text = json.dumps({**record, "checksum": _checksum(arrays, record)})
    stored: dict[str, Any] = {**arrays, _RECORD: np.frombuffer(text.encode(), dtype=np.uint8)}
    try:
        with new_file(folder / f"{key}.npz") as temporary:
            np.savez(temporary, **stored)
        _prune(folder)
    except (OSError, InputError) as error:
        note(f"the tokens are not cached: {one_line(error)}")


def _checksum(arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> str:
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        checksum.update(f"{name} {array.dtype} {array.shape}".encode())
        checksum.update(np.ascontiguousarray(array).data)
    return checksum.hexdigest()


def _prune(folder: Path) -> None:
    """Delete the least recently used files, temporary ones of killed runs too."""
    files = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # Another process deleted it.
            continue
        files.append((status.st_mtime, status.st_size, path))
    total = 0
    for number, (_, size, path) in enumerate(sorted(files, reverse=True)):
        total += size
        if number > 0 and total > LIMIT_BYTES:
            path.unlink(missing_ok=True)
