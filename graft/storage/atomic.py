"""Writes files and folders atomically: they appear complete or not at all.

Everything Graft writes is written under a temporary name in the same folder, flushed to disk and
renamed, so a crash, a full disk or Ctrl-C leaves the previous content untouched.
"""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graft.errors import InputError

_RESERVED_AT_ONCE = 2**20


@contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is renamed to `path`.

    The temporary name keeps the suffix, since some writers choose the format by it.

    Raises:
        InputError: `path` cannot be written. A full disk remains an `OSError` that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with errors_name(path), _folder_of(path):
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`; on success it is renamed to `path`.

    Args:
        path: the folder to make.
        replace: replace an existing folder.

    Raises:
        InputError: `path` exists and `replace` is false, or it cannot be written.
    """
    path = Path(path)
    check_free(path, replace=replace)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with errors_name(path), _folder_of(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for each in (temporary, *temporary.rglob("*")):
                _flush(each)
            _swap_in(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """Make the folder of a path, without what killed processes left there of it.

    Folders that were made for nothing are removed again.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name))
        yield
    finally:
        for parent in made:
            with suppress(OSError):  # It is not empty, and stays.
                parent.rmdir()


def remove_leftovers(folder: Path, pattern: str = "*", *, of_anyone: bool = False) -> None:
    """Remove the temporary files that killed processes left in a folder.

    Args:
        folder: where they are.
        pattern: of the names of the files that they would have become.
        of_anyone: remove those of running processes too: nobody else writes to this folder.
    """
    for kind in ("tmp", "old"):
        for path in folder.glob(f".{kind}-*-{pattern}"):
            pid = path.name.split("-")[1]
            if not of_anyone and (not pid.isdigit() or _is_alive(int(pid))):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # It is another user's.
        return True
    return True


def reserve(path: Path) -> None:
    """Take the space of a sparse file from the disk, before it is mapped into memory.

    A disk that is full under a mapped file ends the process with SIGBUS.

    Raises:
        OSError: the disk is full.
    """
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        while part := file.read(_RESERVED_AT_ONCE):
            file.seek(-len(part), os.SEEK_CUR)
            file.write(part)


def check_free(path: Path, *, replace: bool) -> None:
    """Check before any work that a folder can be made without overwriting anything.

    Raises:
        InputError: `path` exists and `replace` is false, or it is a file.
    """
    if path.exists() and not replace:
        raise InputError(f"{path} exists; choose another path, or add --force to replace it")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder; choose another path")


def check_writable(path: Path) -> None:
    """Check before any work that a file can be written.

    Raises:
        InputError: `path` is a folder, or its folder cannot be made or written to.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        reason = "it is a folder"
    elif not above.is_dir():
        reason = f"{above} is a file, not a folder"
    else:
        try:
            tempfile.TemporaryFile(dir=above).close()  # permission bits do not apply to root
            return
        except OSError as error:
            reason = f"{above} is not writable ({error.strerror})"
    raise InputError(f"cannot write {path}: {reason}; choose another path")


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
    """Turn the operating system's refusals into a message that names the path the user gave.

    Raises:
        InputError: `path` cannot be written. A full disk remains an `OSError` that names `path`.
    """
    try:
        yield
    except RuntimeError as error:
        if "Unable to write" not in str(error):
            raise
        # How MLX's own writers report a full disk.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
        if error.errno not in (*refusals, errno.EEXIST, errno.ENAMETOOLONG):
            if error.filename is None:  # What a write or a flush reports names no file.
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        raise InputError(f"cannot write {path}: {error.strerror}; choose another path") from error
