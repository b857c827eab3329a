"""Items that are made while those before them are in use."""

import threading
from collections.abc import Iterator

from graft.runtime.prefetch import prefetch

import pytest


def test_items_come_in_order_and_end() -> None:
    assert list(prefetch(range(5))) == [0, 1, 2, 3, 4]
    assert list(prefetch([])) == []


def test_the_next_is_made_while_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(3)]

    def make() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    coming = prefetch(make())
    assert not made[0].is_set()
    assert next(coming) == 0
    assert made[1].wait(60)
    assert not made[2].is_set()
    assert next(coming) == 1
    assert made[2].wait(60)


def test_a_failure_is_raised_where_its_item_is_asked_for() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise OSError("the file is gone")

    coming = prefetch(make())
    assert next(coming) == 1
    with pytest.raises(OSError, match="gone"):
        next(coming)


def test_what_is_left_halfway_ends_its_thread_and_does_not_wait_for_it() -> None:
    left = threading.Event()

    def make() -> Iterator[int]:
        yield 1
        left.wait()
        yield 2

    before = set(threading.enumerate())
    coming = prefetch(make())
    next(coming)
    [thread] = set(threading.enumerate()) - before
    del coming
    assert thread.is_alive()
    left.set()
    thread.join(60)
    assert not thread.is_alive()
