"""What all routes share: the engine, the settings, reading bodies, and following a stream.

A stream is followed until its end, until the client goes away or until its time is up; in the last
two cases its row is freed. Knows nothing of routes and shapes.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from graft.data.chat_template import ChatFormat
from graft.engine.engine import Engine
from graft.engine.errors import EngineClosed
from graft.engine.streams import Piece, Stream
from graft.pretrained.tokenizer import Tokenizer
from graft.server.errors import HttpError
from graft.server.requests import parse_json

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

Result = TypeVar("Result")
ADAPTER_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the server is set up.

    Attributes:
        model: the base's name in requests and answers.
        adapters_folder: below which adapters may be loaded, links resolved; `None` for nowhere.
        allow_load: whether clients may load and unload.
        api_key: that clients must send; `None` for none.
        hosts: names by which clients may call a server without a key, so that no page of another
            site can reach it through its visitor's browser; `None` for any.
        max_body_bytes: of a request.
        max_tokens: that a request may ask for.
        timeout_seconds: from the arrival of a request to the end of its answer.
        body_seconds: for a body to arrive.
    """

    model: str
    adapters_folder: Path | None = None
    allow_load: bool = False
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    max_body_bytes: int = 4 << 20
    max_tokens: int = 4096
    timeout_seconds: float = 600.0
    body_seconds: float = 30.0


@dataclass
class Service:
    """What routes work with.

    Attributes:
        engine: that answers.
        tokenizer: of its model.
        settings: of the server.
        scales: of adapters by name, for requests that name none, as llama.cpp keeps them.
        responses: how many there were by path and status.
    """

    engine: Engine
    tokenizer: Tokenizer
    settings: ServerSettings
    scales: dict[str, float] = field(default_factory=dict)
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.chat = ChatFormat(self.tokenizer)
        self.created = int(time.time())
        self.adapter_threads = anyio.CapacityLimiter(ADAPTER_THREADS)

    async def change_adapters(self, work: Callable[[], Result]) -> Result:
        """Load or unload in a thread; apart from those of requests, for it can wait long."""
        return await anyio.to_thread.run_sync(work, limiter=self.adapter_threads)


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    service: Service = request.app.state.service
    return service


async def read_json(request: Request) -> Any:
    """The JSON of a request's body.

    Raises:
        HttpError: the body is too long, too slow or no JSON.
        ClientDisconnect: the client went away.
    """
    settings = service_of(request).settings
    limit = settings.max_body_bytes
    too_long = HttpError(413, f"the body is longer than {limit:,} bytes", code="body_too_large")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        late = f"the body did not arrive within {settings.body_seconds:g} s"
        raise HttpError(408, late, code="timeout", headers={"Connection": "close"}) from None
    return parse_json(bytes(body))


class Follower:
    """Takes the pieces of a stream as they come, on behalf of a client.

    A context: on leaving it the stream is cancelled, which does nothing to one that has ended.

    Args:
        stream: of the engine.
        receive: tells when the client goes away; the request's body must have been read.
        seconds: until the answer must have ended.
    """

    def __init__(self, stream: Stream, receive: Receive, seconds: float) -> None:
        self._stream = stream
        self._receive = receive
        self._seconds = seconds
        self._ready = asyncio.Event()

    async def __aenter__(self) -> "Follower":
        loop = asyncio.get_running_loop()
        self._end = loop.time() + self._seconds

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed since
                loop.call_soon_threadsafe(self._ready.set)

        self._stream.subscribe(wake)
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        self._stream.cancel()

    async def next(self) -> Piece | None:
        """The next piece, or `None` at the end.

        Raises:
            HttpError: the time is up, or the server shuts down.
            ClientDisconnect: the client went away.
            EngineError: what the request failed of.
        """
        while True:
            self._ready.clear()
            try:
                piece = self._stream.get(timeout=0)
            except TimeoutError:
                await self.within_time(self._ready.wait())
                continue
            if piece is None and self._stream.state == "cancelled":
                raise (
                    ClientDisconnect
                    if self._watcher.done()
                    else EngineClosed("the server shuts down before the answer was complete")
                )
            return piece

    async def all(self) -> Piece:
        """All pieces as one."""
        pieces = []
        while (piece := await self.next()) is not None:
            pieces.append(piece)
        text = "".join(piece.text for piece in pieces)
        return Piece(text, [token for piece in pieces for token in piece.tokens])

    async def within_time(self, work: Awaitable[Result]) -> Result:
        """Await something no longer than the answer may take.

        Raises:
            HttpError: the time is up.
        """
        try:
            async with asyncio.timeout_at(self._end):
                return await work
        except TimeoutError:
            message = f"the answer took longer than {self._seconds:g} s"
            raise HttpError(504, message, code="timeout") from None

    async def _watch(self) -> None:
        """Cancel the stream when the client goes away."""
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self._stream.cancel()
