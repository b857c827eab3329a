"""Limits on bodies and time, and rows that are free when their client is gone."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.live_server import PROMPT, Live, serve

LONG = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("server")
    with serve(folder, max_body_bytes=1000, body_seconds=0.3) as live:
        yield live


def test_a_body_that_is_too_long_is_refused_before_it_is_read(live: Live) -> None:
    status, content = live.post("/v1/completions", b'{"prompt": "' + b"x" * 2000)
    assert status == 413
    assert content["error"]["message"] == "the body is longer than 1,000 bytes"
    assert content["error"]["code"] == "body_too_large"


def test_a_body_that_hides_its_length_is_refused_too(live: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
        connection.sendall(head + (b"400\r\n" + b"x" * 1024 + b"\r\n"))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for(live: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
        connection.sendall(head + b"{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(live: Live, stream: bool) -> None:
    connection = live.connect("/v1/completions", {**LONG, "stream": stream})
    live.wait_until(lambda: live.engine.stats().running == 1)
    before = live.engine.stats().tokens
    connection.close()
    live.wait_until(live.idle)
    assert live.engine.stats().tokens - before < LONG["max_tokens"]


def test_a_client_that_goes_away_frees_its_place_in_the_queue(tmp_path: Path) -> None:
    with serve(tmp_path, engine_settings={"max_rows": 1}) as live:
        first = live.connect("/v1/completions", LONG)
        live.wait_until(lambda: live.engine.stats().running == 1)
        second = live.connect("/v1/completions", {**LONG, "stream": True})
        live.wait_until(lambda: live.engine.stats().queued == 1)
        second.close()
        live.wait_until(lambda: live.engine.stats().queued == 0)
        assert live.engine.stats().running == 1
        first.close()


def test_a_full_queue_tells_when_to_try_again(tmp_path: Path) -> None:
    with serve(tmp_path, engine_settings={"max_rows": 1, "max_queue": 1}) as live:
        first = live.connect("/v1/completions", LONG)
        live.wait_until(lambda: live.engine.stats().running == 1)
        second = live.connect("/v1/completions", LONG)
        live.wait_until(lambda: live.engine.stats().queued == 1)
        status, headers, content = live.call("POST", "/v1/completions", LONG)
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert content["error"]["type"] == "rate_limit_error"
        assert content["error"]["code"] == "rate_limit_exceeded"
        assert content["error"]["param"] is None
        first.close()
        second.close()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_ended(tmp_path: Path, stream: bool) -> None:
    with serve(tmp_path, timeout_seconds=0.1) as hasty:
        body = {**LONG, "max_tokens": 4000, "stream": stream}
        status, content = hasty.post("/v1/completions", body)
        if stream:
            assert status == 200
            assert '"code": "timeout"' in content.split("\n\n")[-3]
            assert content.endswith("data: [DONE]\n\n")
        else:
            assert status == 504
            assert content["error"]["message"] == "the answer took longer than 0.1 s"
        hasty.wait_until(hasty.idle)
