"""Steps give every row a token, prompts are read a part at a time, and failures stay alone."""

from collections.abc import Iterator
from typing import Any

from graft.engine.adapter_bank import AdapterBank
from graft.engine.batcher import Batcher, _top
from graft.engine.request import Request, Sampling
from graft.engine.streams import Continuation, Stream
from graft.pretrained.tokenizer import Tokenizer, load_tokenizer

import numpy as np
import pytest

from support.tiny import LLAMA, make_model, write_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_sentencepiece(folder / "tokenizer.model")
    return load_tokenizer(folder)


class Harness:
    """A batcher with what it reported."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = make_model(LLAMA)
        self.tokenizer = tokenizer
        self.ended: list[Request] = []
        self.widths: list[tuple[int, int]] = []
        self.batcher = Batcher(
            model,
            tokenizer,
            AdapterBank(model, max_adapters=1, max_rank=8),
            max_rows=8,
            prefill_tokens=12,
            prompt_cache_bytes=0,
            on_end=self.ended.append,
        )
        model = self.batcher._model
        call = type(model).__call__

        class Watched(type(model)):  # type: ignore[misc]
            def __call__(watched, tokens: Any, cache: Any) -> Any:
                self.widths.append(tokens.shape)
                return call(watched, tokens, cache)

        model.__class__ = Watched

    def add(self, length: int, **sampling: Any) -> Request:
        ids = [5 + n % 300 for n in range(length)]
        settings = Sampling(**{"max_tokens": 5, **sampling})
        continuation = Continuation(self.tokenizer, ids, settings.stop)
        request = Request(Stream("1", length), ids, (), (), settings, continuation)
        self.batcher.add(request)
        return request


@pytest.fixture
def harness(tokenizer: Tokenizer) -> Iterator[Harness]:
    harness = Harness(tokenizer)
    yield harness
    harness.batcher.close()


def run(harness: Harness) -> None:
    for _ in range(200):
        if not len(harness.batcher):
            return
        harness.batcher.step()
    pytest.fail("the requests do not end")


def test_rows_are_generated_together(harness: Harness) -> None:
    requests = [harness.add(3) for _ in range(4)]
    assert len(harness.batcher) == 4
    run(harness)
    assert [len(request.stream.result().tokens) for request in requests] == [5] * 4
    assert harness.ended == requests
    assert harness.batcher.tokens == 20
    assert harness.batcher.step_rows / harness.batcher.steps == 4


def test_long_prompts_are_read_a_part_between_steps(harness: Harness) -> None:
    """12 tokens of prompts a step: those of one, or 4 of each of three."""
    running = harness.add(2, max_tokens=40)
    for _ in range(3):
        harness.batcher.step()
    harness.widths.clear()
    before = running.generated
    harness.add(40)
    while harness.batcher._unread:
        harness.batcher.step()
    assert max(width for _, width in harness.widths) == 12
    assert running.generated - before >= 4  # a token for each part of the other's prompt
    harness.widths.clear()
    for _ in range(3):
        harness.add(30)
    harness.batcher.step()
    assert (3, 4) in harness.widths
    run(harness)


def test_a_request_that_cannot_be_read_fails_alone(harness: Harness) -> None:
    class Broken:
        def add(self, token: int) -> tuple[str, bool]:
            raise ValueError(f"no text for {token}")

    good, bad = harness.add(3), harness.add(3)
    bad.continuation = Broken()  # type: ignore[assignment]
    run(harness)
    assert len(good.stream.result().tokens) == 5
    with pytest.raises(ValueError, match="no text for"):
        bad.stream.result()
    assert bad in harness.ended and good in harness.ended


def test_failing_ends_all_and_the_next_begin_anew(harness: Harness) -> None:
    requests = [harness.add(3), harness.add(40, echo=True), harness.add(3)]
    waiting = Request(Stream("4", 1), [5], (), (), Sampling(), requests[0].continuation)
    harness.batcher.step()
    harness.batcher.fail(RuntimeError("no memory"), [waiting])
    for request in (*requests, waiting):
        assert request.stream.state == "failed"
    assert len(harness.batcher) == 0
    after = harness.add(3)
    run(harness)
    assert len(after.stream.result().tokens) == 5


def test_prompts_are_scored_in_turn_and_in_parts(harness: Harness) -> None:
    first, second = (harness.add(length, echo=True, max_tokens=0) for length in (45, 20))
    ends = []
    while len(harness.batcher):
        harness.batcher.step()
        ends.append((first.stream.ended, second.stream.ended))
    assert ends.index((False, True)) < ends.index((True, True))
    assert [len(r.stream.prompt) for r in (first, second)] == [45, 20]
    assert all(rows == 1 and width <= 16 for rows, width in harness.widths)


def test_nothing_to_generate_ends_at_once(harness: Harness) -> None:
    request = harness.add(3, max_tokens=0)
    assert request.stream.finish_reason == "length" and len(harness.batcher) == 0


def test_the_largest_come_first_and_equal_ones_in_their_order() -> None:
    values = np.array([0.1, 0.7, 0.7, 0.9, 0.2], dtype=np.float32)
    assert _top(values, 3) == [3, 1, 2]
    assert _top(values, 0) == []
    assert _top(values, 9) == [3, 1, 2, 4, 0]
