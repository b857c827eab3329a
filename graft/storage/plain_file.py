"""Opens files that the user or another file names: regular files only, never a pipe or a device.

A pipe can block forever and a device can be endless, so neither is opened.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from graft.errors import InputError

# Settings and records are far smaller. A larger file was made to fill the memory.
LARGEST_SETTINGS_BYTES = 1 << 28


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        InputError: it is missing, cannot be read, or is a folder, a pipe, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise InputError(f"cannot read {path}: it is {kind}, not a file")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise InputError(f"cannot read {str(path)!r}: {error}") from error


def read_start(path: Path, count: int) -> bytes:
    """The first bytes of a regular file.

    Raises:
        InputError: it cannot be read.
    """
    with open_plain(path) as file, _errors_name(path):
        return file.read(count)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_plain_bytes(path: Path, *, most_bytes: int | None = None) -> bytes:
    """The content of a regular file.

    Raises:
        InputError: it cannot be read, or is larger than `most_bytes`.
    """
    with open_plain(path) as file, _errors_name(path):
        size = os.fstat(file.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            raise InputError(f"cannot read {path}: {size:,} bytes are more than {most_bytes:,}")
        return file.read()


def read_plain_text(path: Path, *, most_bytes: int | None = None) -> str:
    """The text of a regular UTF-8 file, without a byte order mark, lines ending in a line feed.

    Raises:
        InputError: it cannot be read, is larger than `most_bytes`, or is not UTF-8.
    """
    content = read_plain_bytes(path, most_bytes=most_bytes)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
