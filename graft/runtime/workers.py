"""Parts of a batch computed side by side, on the cores of a CPU.

MLX's CPU backend works on one operation at a time, and only the BLAS uses more than one core for
it. With a part of the batch for each core, each with a BLAS of one thread, everything else runs on
all cores, too. Each part but the first has a process of its own: within one, MLX hands out so
little work ahead, for all streams together, that they keep waiting for each other. A process is
forked when it is first needed, so that it shares the model's memory. Results are the same every
time, and those of one worker to rounding, but for what is dropped out at random.
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

Item = TypeVar("Item")


def choose_workers(asked: int | None, batch_size: int) -> int:
    """How many workers: by default one a core on Linux's CPU, and elsewhere always one.

    Args:
        asked: by the user.
        batch_size: rows that there are to divide.

    Raises:
        InputError: several were asked for elsewhere.
    """
    if sys.platform == "linux" and runs_on_cpu():
        return min(asked or len(os.sched_getaffinity(0)), batch_size)
    if asked not in (None, 1):
        raise InputError(f"--workers {asked}: only on a Linux CPU can there be several; give 1")
    return 1


def in_groups(items: Sequence[Item], workers: int) -> list[Sequence[Item]]:
    """The items in order, as many at a time as there are workers."""
    return [items[start : start + workers] for start in range(0, len(items), workers)]


class Workers:
    """Calls a function for several items at the same time; a context that ends its processes.

    Args:
        function: of an item, to a tree of arrays. Another process has all that it uses as it was
            when the process was started. What changes from then on has to be in the items, which
            are pickled, and trees of arrays where they hold any.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._called = False
        self._others: list[_Other] = []
        weakref.finalize(self, _end, self._others)

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        """The function's results, evaluated where there are several.

        Of several, each has random numbers by its place and by MLX's random state before.

        Raises:
            RunError: a process ended, or there can be no more of them.
        """
        if len(items) == 1:
            return [self._function(items[0])]
        seeds: Any = mx.random.randint(0, 2**31 - 1, (len(items),)).tolist()
        mine, *work = zip(items, seeds, strict=True)
        try:
            with blas.threads(1):
                # The first time only when all that the function uses is evaluated: what is not
                # would wait, in another process, for a thread that is not there.
                started = self._hand_out(work) if self._called else None
                first = _compute(self._function, *mine)
                self._called = True
                others = [other.receive() for other in started or self._hand_out(work)]
        except BaseException:
            self.close()
            raise
        _note_peak(sum(other.peak for other in self._others))
        return [first, *others]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other processes; calling again starts new ones."""
        _end(self._others)

    def _hand_out(self, work: Sequence[tuple[Any, int]]) -> "list[_Other]":
        while len(self._others) < len(work):
            self._others.append(_fork(self._function))
        busy = self._others[: len(work)]
        for other, (item, seed) in zip(busy, work, strict=True):
            other.send(item, seed)
        return busy


_peak = 0


def worker_peak_bytes() -> int:
    """Peak bytes of the worker processes beside what they share, since the last reset."""
    return _peak


def reset_worker_peak() -> None:
    """Begin anew with `worker_peak_bytes`."""
    global _peak
    _peak = 0


def _note_peak(size: int) -> None:
    global _peak
    _peak = max(_peak, size)


@dataclass
class _Other:
    """Another process.

    Attributes:
        pid: of it.
        parent: the process that started it.
        connection: to it.
        peak: bytes that its last item took at most beside what it shares.
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
        """What to raise: its status is that of a process which a lack of memory ends."""
        return RunError(
            "a worker process ended, perhaps for lack of memory; --workers 1 needs none",
            status=128 + signal.SIGKILL,
        )


# The first process decides when a signal ends the run.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of <sys/prctl.h>: the signal that ends a process with the one that started it.
_PR_SET_PDEATHSIG = 1


def _fork(function: Callable[[Any], Any]) -> _Other:
    from multiprocessing.connection import Pipe  # Not for --help, which it would slow down.

    mx.synchronize()
    ours, theirs = Pipe()
    parent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():
            # From Python 3.12 on, it warns that threads do not come along. None is needed.
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
    return _Other(pid, parent, ours)


def _serve(function: Callable[[Any], Any], connection: "Connection", parent: int) -> NoReturn:
    """Compute what comes until nothing can come any more."""
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
        # Or they would be kept until the next ones are there.
        del item, result
    os._exit(0)


def _picklable(error: Exception) -> Exception:
    """The error with where it came from, or a plain one that says as much."""
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RunError(f"{type(error).__name__} in another worker: {error}")
    error.add_note(text)
    return error


def _compute(function: Callable[[Any], Any], item: Any, seed: int) -> Any:
    mx.random.seed(seed)
    result = function(item)
    mx.eval(result)
    return result


def _end(others: list[_Other]) -> None:
    while others:
        other = others.pop()
        other.connection.close()
        # Other processes have this list, too, and may be about to forget it.
        if other.parent == os.getpid():
            with suppress(ProcessLookupError, ChildProcessError):  # Somebody else may have waited.
                os.kill(other.pid, signal.SIGKILL)
                os.waitpid(other.pid, 0)


def _nbytes(tree: Any) -> int:
    leaves: Any = tree_flatten(tree)
    return sum(leaf.nbytes for _, leaf in leaves if isinstance(leaf, np.ndarray))


def _as_numpy(tree: Any) -> Any:
    return tree_map(lambda leaf: np.array(leaf) if isinstance(leaf, mx.array) else leaf, tree)


def _as_arrays(tree: Any) -> Any:
    return tree_map(lambda leaf: mx.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)
