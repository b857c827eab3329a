"""Connections: how many there are, and how long a client may take to begin a request.

A server has few file descriptors, and a client that never finishes a request costs one. So the head
of a request has a deadline, and at the limit the oldest connection whose client has not sent a
whole request makes room for a new one. Bodies have a deadline in `graft.server.service`.
"""

import asyncio
import logging
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
MOST_CONNECTIONS = 1000
# Connections that asyncio accepts at a time, before any of them can be closed.
ACCEPTED_AT_ONCE = 128
# Descriptors for everything else: models, adapters, libraries, threads.
OTHER_DESCRIPTORS = 256


def connection_limit() -> int:
    """Most connections that fit into the process's limit of open files, which is raised for it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST_CONNECTIONS
    needed = MOST_CONNECTIONS + ACCEPTED_AT_ONCE + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        needed = max(soft, allowed)
    return max(1, min(MOST_CONNECTIONS, needed - ACCEPTED_AT_ONCE - OTHER_DESCRIPTORS))


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with a limit on connections and a deadline for a request's head.

    Attributes:
        most_connections: of a server.
        head_seconds: how long a client may take to send a request's head.
    """

    most_connections = MOST_CONNECTIONS
    head_seconds = HEAD_SECONDS
    _deadline: asyncio.TimerHandle | None = None
    _began = 0.0

    def connection_made(self, transport: Any) -> None:
        """Begin the deadline, and make room if there are too many connections."""
        super().connection_made(transport)
        self._await_head()
        of_class = [one for one in self.connections if isinstance(one, LimitedProtocol)]
        alive = [one for one in of_class if not one.transport.is_closing()]
        if len(alive) > self.most_connections:
            waiting = [one for one in alive if one.is_waiting]
            min(waiting, key=lambda one: one._began).transport.abort()

    @property
    def is_waiting(self) -> bool:
        """Whether the client has not sent a whole request."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def data_received(self, data: bytes) -> None:
        """Read what has arrived; the deadline ends with the request's head."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_deadline()

    def on_response_complete(self) -> None:
        """Begin the deadline of the next request."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._forget_deadline()
        self._began = self.loop.time()
        self._deadline = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class OncePerSecond(logging.Filter):
    """Passes on one record of each level a second, so that clients cannot fill the log."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[int, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record."""
        now = time.monotonic()
        if now < self._next.get(record.levelno, 0.0):
            return False
        self._next[record.levelno] = now + 1.0
        return True


ONCE_PER_SECOND = OncePerSecond()
