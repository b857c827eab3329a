"""How fast an engine is just now: steps, tokens and requests, each a running average.

Knows nothing of what is computed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# How much the newest value counts.
NEW_SHARE = 0.1


class Counter(Protocol):
    """Something that counts the tokens it has generated."""

    tokens: int


class Pace:
    """Running averages of an engine.

    Attributes:
        step_seconds: of a step.
        tokens_per_second: generated while there was something to do.
        request_seconds: that a request has its row.
    """

    def __init__(self) -> None:
        self.step_seconds = self.tokens_per_second = self.request_seconds = 0.0

    @contextmanager
    def step(self, counter: Counter) -> Iterator[None]:
        """Measure a step; those that generate nothing tell nothing."""
        start, before = time.perf_counter(), counter.tokens
        yield
        seconds, tokens = time.perf_counter() - start, counter.tokens - before
        if tokens:
            self.step_seconds = _mix(self.step_seconds, seconds)
            self.tokens_per_second = _mix(self.tokens_per_second, tokens / seconds)

    def note_request(self, seconds: float) -> None:
        """Take a request in, which had its row for so long."""
        self.request_seconds = _mix(self.request_seconds, seconds)

    def seconds_until_free(self, rows: int) -> float:
        """When a place in a queue is likely to come free: 1 s at least, a minute at most.

        A row comes free every `request_seconds / rows`.
        """
        return min(max(self.request_seconds / rows, 1.0), 60.0)


def _mix(before: float, new: float) -> float:
    return new if before == 0 else before + NEW_SHARE * (new - before)
