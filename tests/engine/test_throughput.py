"""Running averages of an engine."""

from types import SimpleNamespace

from graft.engine.throughput import Throughput

import pytest


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("graft.engine.throughput.time", clock)
    return clock


def test_steps_that_generate_count_and_the_newest_a_tenth(clock: Clock) -> None:
    pace, counter = Throughput(), SimpleNamespace(tokens=0)
    for seconds, tokens in ((2.0, 4), (5.0, 0), (1.0, 12)):
        with pace.step(counter):
            clock.now += seconds
            counter.tokens += tokens
    assert pace.step_seconds == pytest.approx(2.0 + 0.1 * (1.0 - 2.0))
    assert pace.tokens_per_second == pytest.approx(2.0 + 0.1 * (12.0 - 2.0))


def test_a_place_comes_free_once_a_row_does() -> None:
    pace = Throughput()
    assert pace.seconds_until_free(4) == 1.0
    pace.add_request(20.0)
    assert pace.seconds_until_free(4) == 5.0
    assert pace.seconds_until_free(100) == 1.0
    pace.add_request(20_000.0)
    assert pace.seconds_until_free(1) == 60.0
