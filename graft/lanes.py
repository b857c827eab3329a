"""Parts of a batch computed side by side, on the cores of a CPU.

A stream of MLX's CPU backend has one worker, and only the BLAS uses more. With several streams,
each with a part of the batch and a BLAS of one thread, everything else runs on all cores, too. Each
stream belongs to a thread, since one evaluation hands out little work ahead: of several streams
it would keep one busy after the other. Results are the same every time, and those of one stream to
rounding.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, TypeVar

from graft import blas
from graft.backend import runs_on_cpu
from graft.errors import InputError

import mlx.core as mx

Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_lanes(asked: int | None, batch_size: int) -> int:
    """How many lanes: by default one a core on Linux's CPU, whose BLAS can be told to use one.

    Args:
        asked: by the user.
        batch_size: rows that there are to divide.

    Raises:
        InputError: several were asked for on a GPU.
    """
    if not runs_on_cpu():
        if asked not in (None, 1):
            raise InputError(f"--lanes {asked}: a GPU computes a batch as a whole; give 1")
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    return min(asked or cores, batch_size)


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each item, evaluated in a thread of its own where there are several.

    Args:
        function: builds arrays, from such as are evaluated; called one at a time, with random
            numbers that depend on the item's place alone.
        items: one for each lane.
    """
    if len(items) == 1:
        return [function(items[0])]
    seeds: Any = mx.random.randint(0, 2**31 - 1, (len(items),)).tolist()
    with blas.threads(1):
        waiting = [
            _lane(number).submit(partial(_compute, function, item, seed))
            for number, (item, seed) in enumerate(zip(items, seeds, strict=True))
        ]
        return [future.result() for future in waiting]


def groups(items: Sequence[Item], lanes: int) -> list[Sequence[Item]]:
    """The items in order, as many at a time as there are lanes."""
    return [items[start : start + lanes] for start in range(0, len(items), lanes)]


# A model is one object, which tracing changes for a while: one lane at a time builds its graph.
_building = threading.Lock()


def _compute(function: Callable[[Item], Result], item: Item, seed: int) -> Result:
    with _building:
        mx.random.seed(seed)
        result = function(item)
    mx.eval(result)
    return result


class _Lane:
    """A thread with a stream of its own.

    It never ends: MLX would ask for Python's lock in the thread's last moment, and abort the
    process where Python is ending, too.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="lane", daemon=True).start()

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Have `function` called there."""
        future: Future[Result] = Future()
        self._work.put((future, function))
        return future

    def _run(self) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            while True:
                future, function = self._work.get()
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
                del future, function


@lru_cache
def _lane(number: int) -> _Lane:
    return _Lane()
