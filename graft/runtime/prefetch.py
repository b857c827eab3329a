"""Items made while those before them are in use."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_END: Any = object()


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order, each made in another thread while the one before is in use.

    Nothing is made before the first is asked for. What fails in making one is raised where it is
    asked for.
    """
    from concurrent.futures import ThreadPoolExecutor  # Not for --help, which it would slow down.

    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as maker:
        coming = maker.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = maker.submit(next, iterator, _END)
            yield item
