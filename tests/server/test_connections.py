"""Clients that never finish a request neither stop the server nor fill its log."""

import contextlib
import logging
import resource
import socket
import threading
import time
from pathlib import Path

from graft.server import connections
from graft.server.connections import LimitedProtocol, OncePerSecond, connection_limit

import pytest

from support.live_server import Live, serve


def half_open(port: int, count: int) -> list[socket.socket]:
    """Connections that have sent half a head, or of every third half a body."""
    sockets = []
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    for number in range(count):
        with contextlib.suppress(OSError):  # the server may close it, or be slow
            connection = socket.create_connection(("127.0.0.1", port), timeout=1)
            sockets.append(connection)
            connection.sendall(head + b"Content-Length: 9\r\n\r\n{" * (number % 3 == 0))
    return sockets


def answers_in_time(live: Live) -> bool:
    start = time.monotonic()
    return live.get("/health")[0] == 200 and time.monotonic() - start < 1.0


def test_the_oldest_unfinished_request_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 50)
    with serve(tmp_path, adapters={}) as live:
        sockets = half_open(live.port, 150)
        assert answers_in_time(live)
        # Those beyond the limit were closed, oldest first.
        sockets[0].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert sockets[0].recv(1) == b""
        sockets[-1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            sockets[-1].recv(1)
        for connection in sockets:
            connection.close()
    assert not caplog.records


def test_a_head_has_a_deadline_also_on_a_connection_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LimitedProtocol, "head_seconds", 0.3)
    request = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    with serve(tmp_path, adapters={}) as live:
        for sent in (b"GET /health HT", request + b"\r\n" + request):
            with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
                connection.sendall(sent)
                start, received = time.monotonic(), b""
                with contextlib.suppress(ConnectionResetError):
                    while part := connection.recv(4096):
                        received += part
                assert 0.2 < time.monotonic() - start < 5
                assert received.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_requests_that_are_not_http_fill_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    with serve(tmp_path, adapters={}) as live:
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
                connection.sendall(b"\x00\x01 nonsense\r\n\r\n")
                assert b"400" in connection.recv(4096)
        assert answers_in_time(live)
    assert len(caplog.records) <= 1 + time.monotonic() - start


def test_a_record_a_second_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("a", logging.WARNING, "a", 1, "text", (), None)
    now = [10.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    once = OncePerSecond()
    assert [once.filter(record) for _ in range(3)] == [True, False, False]
    now[0] += 1.0
    assert once.filter(record)


def test_the_limit_fits_into_the_open_files_of_the_process() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 1 <= connection_limit() <= connections.MOST_CONNECTIONS
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft


@pytest.mark.slow
def test_thousands_of_half_requests_leave_the_server_in_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many connections as the process may have, up to 3,000, again and again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(3000, (min(hard, 1 << 20) - 500) // 2)
    start = time.monotonic()
    try:
        with serve(tmp_path, adapters={}) as live:
            done = threading.Event()

            def attack() -> None:
                while not done.is_set():
                    for connection in half_open(live.port, count):
                        connection.close()

            attacker = threading.Thread(target=attack)
            attacker.start()
            try:
                while time.monotonic() - start < 8:
                    assert answers_in_time(live)
                    time.sleep(0.2)
            finally:
                done.set()
                attacker.join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(caplog.records) <= 1 + time.monotonic() - start
