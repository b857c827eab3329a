"""Files and folders that appear whole or not at all.

Everything Graft writes is made beside its place, flushed to disk and renamed, so that a crash, a
full disk or Ctrl-C leaves what stood there before.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graft.errors import InputError


@contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it becomes `path`.

    The temporary name keeps the suffix, since some writers choose the format by it.

    Raises:
        InputError: the place cannot be written. A full disk stays an `OSError` that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with errors_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path`.

    Args:
        path: the folder to make.
        replace: put the new folder in the place of an existing one.

    Raises:
        InputError: `path` exists and `replace` is false, or the place cannot be written.
    """
    path = Path(path)
    check_free(path, replace=replace)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with errors_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for each in (temporary, *temporary.rglob("*")):
                _flush(each)
            _swap_in(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder that no other process writes to."""
    for pattern in (".tmp-*", ".old-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_free(path: Path, *, replace: bool) -> None:
    """Refuse early, before any work, to write over something that exists."""
    if path.exists() and not replace:
        raise InputError(f"{path} exists; name another place or add --force to replace it")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; a folder is to be written there: name another place")


def check_writable(path: Path) -> None:
    """Refuse early, before any work, a file that could not be written in the end.

    Raises:
        InputError: a folder stands there, or there is no way to make one above it.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        reason = "it is a folder"
    elif not above.is_dir():
        reason = f"{above} is a file, not a folder"
    else:
        try:
            tempfile.TemporaryFile(dir=above).close()  # permissions tell root nothing
            return
        except OSError as error:
            reason = f"{above} takes no new file ({error.strerror})"
    raise InputError(f"cannot write {path}: {reason}; name another place")


def _swap_in(temporary: Path, path: Path) -> None:
    aside = path.with_name(f".old-{os.getpid()}-{path.name}")
    if path.exists():
        os.replace(path, aside)
    os.replace(temporary, path)
    _flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Turn an operating-system refusal into a message that names the file the user asked for.

    Raises:
        InputError: the place cannot be written. A full disk stays an `OSError` that names `path`.
    """
    try:
        yield
    except RuntimeError as error:
        if "Unable to write" not in str(error):
            raise
        # What MLX's own writers say of a full disk.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
        if error.errno not in (*refusals, errno.EEXIST, errno.ENAMETOOLONG):
            raise
        raise InputError(f"cannot write {path}: {error.strerror}; name another place") from error
