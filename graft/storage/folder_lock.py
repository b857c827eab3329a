"""A lock on a folder that ends with the process that holds it, however it ends."""

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

from graft.errors import InputError

# Processes that a killed process had started hold its lock for a moment longer.
PATIENCE_SECONDS = 2.0


class FolderLock:
    """A lock that one process has at a time; held until `release`, or until the object is gone.

    File systems without locks, as some on a network, let everybody in.

    Args:
        folder: to be locked; nothing is written into it.
        busy: the error's text if another process holds the lock.
    """

    def __init__(self, folder: Path, *, busy: str) -> None:
        self._folder = folder
        self._busy = busy
        self._finalizer: weakref.finalize[..., FolderLock] | None = None

    def acquire(self) -> None:
        """Take the lock, unless it is held already or there is no such folder yet.

        Raises:
            InputError: another process holds it.
        """
        if self._finalizer is not None or not self._folder.is_dir():
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return
                if time.monotonic() > end:
                    self.release()
                    raise InputError(self._busy) from error
                time.sleep(0.05)
            else:
                return

    def release(self) -> None:
        """Give the lock back."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
