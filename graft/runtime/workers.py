"""Data parallelism on one CPU: each worker process computes part of a batch on its own core.

MLX's CPU backend runs one operation at a time, and only the BLAS uses several cores for it. With
part of the batch on each core, and a single-threaded BLAS in each process, everything runs on all
cores. The first part is computed in the calling process and every other part in a worker process:
within one process MLX schedules so little work ahead, for all streams together, that the streams
keep waiting for each other. A worker is forked when it is first needed, so that it shares the
model's memory. Results are the same every time, and equal those of one worker up to rounding,
except for dropout.
"""

import ctypes
import os
import pickle
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from graft.errors import InputError, RunError
from graft.runtime import blas
from graft.runtime.cpu import runs_on_cpu

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_Item = TypeVar("_Item")


def choose_workers(asked: int | None, batch_size: int) -> int:
    """How many workers to use: by default one per core on a Linux CPU, and one elsewhere.

    Args:
        asked: the number the user asked for, if any.
        batch_size: rows to divide among them.

    Raises:
        InputError: several were asked for where there can only be one.
    """
    if sys.platform == "linux" and runs_on_cpu():
        return min(asked or len(os.sched_getaffinity(0)), batch_size)
    if asked not in (None, 1):
        raise InputError(f"--workers {asked}: only on a Linux CPU can there be several; give 1")
    return 1


def in_groups(items: Sequence[_Item], workers: int) -> list[Sequence[_Item]]:
    """The items in order, in groups of as many as there are workers."""
    return [items[start : start + workers] for start in range(0, len(items), workers)]


class Workers:
    """Calls a function on several items at the same time; a context that ends its processes.

    Args:
        function: maps an item to a tree of arrays. A worker process sees everything it uses as it
            was when the process started, so whatever changes later has to be in the items. Items
            are pickled; arrays in them may be in dicts, lists and tuples.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._called = False
        self._processes: list[_WorkerProcess] = []
        weakref.finalize(self, _end, self._processes)

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        """The function's results; evaluated, if there are several items.

        The random numbers of each of several items depend on its position and on MLX's random
        state before the call.

        Raises:
            RunError: a worker process ended, or none can be started.
        """
        if len(items) == 1:
            return [self._function(items[0])]
        seeds: Any = mx.random.randint(0, 2**31 - 1, (len(items),)).tolist()
        mine, *work = zip(items, seeds, strict=True)
        try:
            with blas.threads(1):
                # The first time, fork only after the function has run here and what it uses is
                # evaluated: a worker would wait for a thread that a fork does not copy.
                started = self._hand_out(work) if self._called else None
                first = _compute(self._function, *mine)
                self._called = True
                rest = [process.receive() for process in started or self._hand_out(work)]
        except BaseException:
            self.close()
            raise
        _note_peak(sum(process.peak for process in self._processes))
        return [first, *rest]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; another call starts new ones."""
        _end(self._processes)

    def _hand_out(self, work: Sequence[tuple[Any, int]]) -> "list[_WorkerProcess]":
        while len(self._processes) < len(work):
            self._processes.append(_fork(self._function))
        busy = self._processes[: len(work)]
        for process, (item, seed) in zip(busy, work, strict=True):
            process.send(item, seed)
        return busy


_peak = 0


def worker_peak_bytes() -> int:
    """Peak bytes of the worker processes beside what they share, since the last reset."""
    return _peak


def reset_worker_peak() -> None:
    """Start counting `worker_peak_bytes` again."""
    global _peak
    _peak = 0


def _note_peak(size: int) -> None:
    global _peak
    _peak = max(_peak, size)


@dataclass
class _WorkerProcess:
    """A worker process, as the process that started it sees it.

    Attributes:
        pid: its process id.
        parent: the process that started it.
        connection: a pipe to it.
        peak: peak bytes of its last item beside the memory it shares.
    """

    pid: int
    parent: int
    connection: "Connection"
    peak: int = 0

    def send(self, item: Any, seed: int) -> None:
        try:
            self.connection.send((_as_numpy(item), seed))
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Any:
        try:
            result, error, self.peak = self.connection.recv()
        except (EOFError, OSError) as failure:
            raise self._lost() from failure
        if error is not None:
            raise error
        return _as_arrays(result)

    def _lost(self) -> RunError:
        """The error to raise; its exit status is that of a process killed for lack of memory."""
        return RunError(
            "a worker process ended, perhaps for lack of memory; --workers 1 needs none",
            status=128 + signal.SIGKILL,
        )


# Signals are for the first process, which ends the others.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of <sys/prctl.h>: the signal that ends a process with the one that started it.
_PR_SET_PDEATHSIG = 1


def _fork(function: Callable[[Any], Any]) -> _WorkerProcess:
    from multiprocessing.connection import Pipe  # Slow to import, and not needed by --help.

    mx.synchronize()
    ours, theirs = Pipe()
    parent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn that a fork copies no threads. None is needed.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            ours.close()
            _serve(function, theirs, parent)
    except OSError as error:
        raise RunError(
            f"cannot start a worker process ({error}); --workers 1 needs none"
        ) from error
    finally:
        if os.getpid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _WorkerProcess(pid, parent, ours)


def _serve(function: Callable[[Any], Any], connection: "Connection", parent: int) -> NoReturn:
    """Compute items until the parent has gone."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    mx.set_default_stream(mx.new_stream(mx.cpu))
    shared = mx.get_active_memory()
    while os.getppid() == parent:
        try:
            item, seed = connection.recv()
        except (EOFError, OSError):
            break
        mx.reset_peak_memory()
        size, result, failure = _nbytes(item), None, None
        try:
            item = _as_arrays(item)
            result = _as_numpy(_compute(function, item, seed))
        except Exception as error:
            failure = _picklable(error)
        connection.send((result, failure, mx.get_peak_memory() - shared + size))
        # Otherwise they would be kept until the next item arrives.
        del item, result
    os._exit(0)


def _picklable(error: Exception) -> Exception:
    """The error with its traceback as a note; a `RunError` if it cannot be pickled."""
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RunError(f"{type(error).__name__} in a worker process: {error}")
    error.add_note(text)
    return error


def _compute(function: Callable[[Any], Any], item: Any, seed: int) -> Any:
    mx.random.seed(seed)
    result = function(item)
    mx.eval(result)
    return result


def _end(processes: list[_WorkerProcess]) -> None:
    while processes:
        process = processes.pop()
        process.connection.close()
        # Forked processes have a copy of this list, and may be about to drop it.
        if process.parent == os.getpid():
            with suppress(
                ProcessLookupError, ChildProcessError
            ):  # It may have been waited for elsewhere.
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)


def _nbytes(tree: Any) -> int:
    leaves: Any = tree_flatten(tree)
    return sum(leaf.nbytes for _, leaf in leaves if isinstance(leaf, np.ndarray))


def _as_numpy(tree: Any) -> Any:
    return tree_map(lambda leaf: np.array(leaf) if isinstance(leaf, mx.array) else leaf, tree)


def _as_arrays(tree: Any) -> Any:
    return tree_map(lambda leaf: mx.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)
