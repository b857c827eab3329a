"""Code that takes too long is ended, and nothing else is."""

import functools
import threading
import time
from typing import Any

from graft.runtime.limits import LimitExceeded, run_limited

import pytest

BRIEF: dict[str, Any] = {"seconds": 0.1, "growth_bytes": 1 << 40}


def endless() -> None:
    while True:
        pass


class Swallows:
    """Loses the exception that comes while it is freed."""

    def __del__(self) -> None:
        endless()


def test_an_endless_loop_ends() -> None:
    start = time.monotonic()
    with pytest.raises(LimitExceeded, match=r"0.1 seconds"):
        run_limited(endless, **BRIEF)
    assert time.monotonic() - start < 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_code_that_loses_exceptions_ends_too() -> None:
    def work() -> None:
        Swallows()
        endless()

    with pytest.raises(LimitExceeded):
        run_limited(work, **BRIEF)


def test_memory_is_limited() -> None:
    kept = []

    def work() -> None:
        while True:
            kept.append(bytearray(b"1") * (1 << 22))
            time.sleep(0.001)

    with pytest.raises(LimitExceeded, match="more than 64 MiB"):
        run_limited(work, seconds=60, growth_bytes=1 << 26)


def test_results_other_errors_and_other_threads_are_left_alone() -> None:
    ended = threading.Event()
    work = functools.partial(ended.wait, 60)
    thread = threading.Thread(
        target=run_limited, args=(work,), kwargs={"seconds": 60, "growth_bytes": 1 << 40}
    )
    thread.start()
    with pytest.raises(LimitExceeded):
        run_limited(endless, **BRIEF)
    with pytest.raises(KeyError):
        run_limited(lambda: {}[1], **BRIEF)
    assert run_limited(lambda: 5, **BRIEF) == 5
    time.sleep(0.3)  # nothing is ended after it has returned
    assert thread.is_alive()
    ended.set()
    thread.join()
