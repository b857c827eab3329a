"""Running averages of step time, token rate and request time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Weight of the newest value.
NEWEST_WEIGHT = 0.1


class TokenCounter(Protocol):
    """Counts the tokens that it has generated."""

    tokens: int


class Throughput:
    """Running averages of an engine's speed.

    Attributes:
        step_seconds: duration of a step.
        tokens_per_second: rate of generated tokens while there are requests.
        request_seconds: how long a request keeps its row.
    """

    def __init__(self) -> None:
        self.step_seconds = self.tokens_per_second = self.request_seconds = 0.0

    @contextmanager
    def step(self, counter: TokenCounter) -> Iterator[None]:
        """Measure a step; one that generates no token is ignored."""
        start, tokens_before = time.perf_counter(), counter.tokens
        yield
        seconds, tokens = time.perf_counter() - start, counter.tokens - tokens_before
        if tokens:
            self.step_seconds = _mix(self.step_seconds, seconds)
            self.tokens_per_second = _mix(self.tokens_per_second, tokens / seconds)

    def add_request(self, seconds: float) -> None:
        """Add a request that had its row for some seconds."""
        self.request_seconds = _mix(self.request_seconds, seconds)

    def seconds_until_free(self, rows: int) -> float:
        """Estimate when a queued request will get a row: from 1 to 60 s.

        A row becomes free every `request_seconds / rows`.
        """
        return min(max(self.request_seconds / rows, 1.0), 60.0)


def _mix(average: float, newest: float) -> float:
    return newest if average == 0 else average + NEWEST_WEIGHT * (newest - average)
