"""Prefetching: makes the next item in a background thread while the current one is used."""

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

_Item = TypeVar("_Item")

_END: Any = object()


def prefetch(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items in order, each made in another thread while the previous one is in use.

    Nothing is made before the first item is asked for. An exception in making an item is raised
    where that item is asked for. The thread ends after the item that it is making when the iterator
    is closed or freed. That does not wait for it: the garbage collector may free the iterator in a
    thread that is just starting, which others wait for.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    arguments = iter(items), wanted, made
    threading.Thread(target=_make, args=arguments, name="prefetch", daemon=True).start()
    try:
        wanted.put(True)
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            wanted.put(True)
            yield item
    finally:
        wanted.put(False)


def _make(
    iterator: Iterator[Any],
    wanted: SimpleQueue[bool],
    made: SimpleQueue[tuple[Any, BaseException | None]],
) -> None:
    while wanted.get():
        try:
            made.put((next(iterator, _END), None))
        except BaseException as error:
            made.put((None, error))
