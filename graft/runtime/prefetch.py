"""Prefetching: makes the next item in a background thread while the current one is used."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_Item = TypeVar("_Item")

_END: Any = object()


def prefetch(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items in order, each made in another thread while the previous one is in use.

    Nothing is made before the first item is asked for. An exception in making an item is raised
    where that item is asked for.
    """
    from concurrent.futures import ThreadPoolExecutor  # Slow to import, and not needed by --help.

    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        following = thread.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, iterator, _END)
            yield item
