"""Ends untrusted Python code, such as a chat template, that takes too long or too much memory.

A thread watches the time and raises an exception in the thread that runs the code, between two of
its instructions: a loop ends, a single call into C does not.
"""

import ctypes
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
_CHECK_SECONDS = 0.05
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


class LimitExceeded(Exception):
    """The code was ended; the message says why."""


def run_limited(work: Callable[[], Result], *, seconds: float, growth_bytes: int) -> Result:
    """Run code, and end it if it takes too long or too much memory.

    Args:
        work: the code.
        seconds: that it may take.
        growth_bytes: that the peak memory of the process may grow by meanwhile.

    Raises:
        LimitExceeded: it took more.
    """
    watch = _Watch(seconds, growth_bytes)
    try:
        return _watcher.run(watch, work)
    except LimitExceeded:
        raise LimitExceeded(watch.reason) from None


class _Watch:
    """One run of code in this thread, and what it may take."""

    def __init__(self, seconds: float, growth_bytes: int) -> None:
        self.thread = ctypes.c_ulong(threading.get_ident())
        self.seconds, self.growth_bytes = seconds, growth_bytes
        self.start, self.peak = time.monotonic(), _peak_bytes()
        self.reason, self.left = "", False

    def end_if_exceeded(self) -> None:
        if time.monotonic() - self.start > self.seconds:
            self.reason = f"it takes more than {self.seconds:g} seconds"
        elif _peak_bytes() - self.peak > self.growth_bytes:
            self.reason = f"it takes more than {self.growth_bytes >> 20} MiB of memory"
        if self.reason:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self.thread, ctypes.py_object(LimitExceeded))


class _Watcher:
    """The thread that looks at all runs, started for the first."""

    def __init__(self) -> None:
        self.lock, self.busy = threading.Lock(), threading.Event()
        self.watches: list[_Watch] = []
        self.started = False

    def run(self, watch: _Watch, work: Callable[[], Result]) -> Result:
        self._add(watch)
        try:
            return work()
        finally:
            # The exception may come here, too; the next one comes a while later.
            while not watch.left:
                try:
                    self._leave(watch)
                except LimitExceeded:
                    continue

    def _add(self, watch: _Watch) -> None:
        with self.lock:
            self.watches.append(watch)
            self.busy.set()
            if not self.started:
                self.started = True
                threading.Thread(target=self._look, name="limits", daemon=True).start()

    def _leave(self, watch: _Watch) -> None:
        with self.lock:
            watch.left = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(watch.thread, None)

    def _look(self) -> None:
        while self.busy.wait():
            time.sleep(_CHECK_SECONDS)
            with self.lock:
                self.watches = [watch for watch in self.watches if not watch.left]
                if not self.watches:
                    self.busy.clear()
                # Again each time: code that runs when an object is freed swallows exceptions.
                for watch in self.watches:
                    watch.end_if_exceeded()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


_watcher = _Watcher()
# A forked process has the object and not its thread.
os.register_at_fork(after_in_child=_watcher.__init__)  # type: ignore[misc]
