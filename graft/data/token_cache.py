"""Arrays that were made once, on disk under a hash of what they were made from.

Entries lie in `tokens` of the folder that GRAFT_CACHE names, else of $XDG_CACHE_HOME/graft, else of
~/.cache/graft. They may be deleted at any time; those that were not used for longest go when all of
them take more than `LIMIT_BYTES`. GRAFT_CACHE=off turns the cache off. Knows nothing of what the
arrays mean.
"""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.atomic import new_file

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
LIMIT_BYTES = 4 * 2**30
_RECORD = "record"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)


def folder() -> Path | None:
    """Where entries lie; `None` where the cache is turned off."""
    named = os.environ.get("GRAFT_CACHE", "")
    if named.lower() == "off":
        return None
    if named:
        return Path(named) / "tokens"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared else Path.home() / ".cache") / "graft" / "tokens"


def read(key: str) -> tuple[Arrays, dict[str, Any]] | None:
    """An entry's arrays and record.

    A damaged entry is told on standard error and counts as missing.

    Args:
        key: a hash of what the entry is made from, in hexadecimal digits.
    """
    place = folder()
    path = place and place / f"{key}.npz"
    if path is None or not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
            arrays = {name: entry[name] for name in entry.files}
        text = arrays.pop(_RECORD).tobytes()
        record = json.loads(text)
        if record.pop("checksum") != _checksum(arrays, record):
            raise ValueError("its checksum differs")
        os.utime(path)  # Used now.
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"note: {path} is damaged and is made again: {reason}", file=sys.stderr)
        return None
    return arrays, record


def write(key: str, arrays: Arrays, record: Mapping[str, Any]) -> None:
    """Keep an entry; where that is not possible, say so and go on.

    Args:
        key: as for `read`.
        arrays: by name; none is named `record`.
        record: what JSON can hold.
    """
    place = folder()
    if place is None:
        return
    text = json.dumps({**record, "checksum": _checksum(arrays, record)})
    stored: Arrays = {**arrays, _RECORD: np.frombuffer(text.encode(), dtype=np.uint8)}
    try:
        with new_file(place / f"{key}.npz") as temporary:
            np.savez(temporary, **stored)  # type: ignore[arg-type]
        _prune(place)
    except (OSError, InputError) as error:
        print(f"note: the tokens are not kept for the next start: {error}", file=sys.stderr)


def _checksum(arrays: Arrays, record: Mapping[str, Any]) -> str:
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        checksum.update(f"{name} {array.dtype} {array.shape}".encode())
        checksum.update(np.ascontiguousarray(array).data)
    return checksum.hexdigest()


def _prune(place: Path) -> None:
    """Delete what was not used for longest, temporary files of killed runs too."""
    used = []
    for path in place.iterdir():
        try:
            used.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:  # Another process was faster.
            continue
    total = 0
    for number, (_, size, path) in enumerate(sorted(used, reverse=True)):
        total += size
        if number > 0 and total > LIMIT_BYTES:
            path.unlink(missing_ok=True)
