"""What the routes share: the engine, the settings, reading bodies and reading streams.

A stream is read until it ends, the client disconnects or the time is up; in the last two cases its
row is freed. Does not know the routes or the response formats.
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
from graft.server.requests import parse_body

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

_Result = TypeVar("_Result")
ADAPTER_THREADS = 4
CLIENT_GONE = 499  # a status that nobody reads, for the count of responses


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The server's settings.

    Attributes:
        model: the base model's name in requests and responses.
        adapters_folder: the folder that adapters may be loaded from, with links resolved; `None` if
            none may be.
        allow_load: whether clients may load and unload adapters.
        api_key: the key that clients must send; `None` if none is required.
        hosts: the host names that a server without a key answers to, so that a page of another site
            cannot reach it through a visitor's browser; `None` for any.
        max_body_bytes: largest request body.
        max_tokens: longest answer that a request may ask for.
        timeout_seconds: how long an answer may take, from the request's arrival to its end.
        body_seconds: how long a body may take to arrive.
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
    """The state that all routes share.

    Attributes:
        engine: the engine that answers.
        tokenizer: the model's tokenizer.
        settings: the server's settings.
        scales: scales by adapter for requests that name no adapter, as in llama.cpp's server.
        responses: number of responses by path and status.
        chat: formats chats for the model.
        created: when the server started, in seconds since 1970.
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

    async def change_adapters(self, work: Callable[[], _Result]) -> _Result:
        """Load or unload an adapter in a separate pool of threads, because it can take long."""
        return await anyio.to_thread.run_sync(work, limiter=self.adapter_threads)


def service_of(request: Request) -> Service:
    """The service of the app that received a request."""
    service: Service = request.app.state.service
    return service


async def read_body(request: Request) -> Any:
    """Read a request's body as JSON.

    Raises:
        HttpError: the body is too long, too slow or not JSON.
        ClientDisconnect: the client disconnected.
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
        message = f"the body did not arrive within {settings.body_seconds:g} s"
        raise HttpError(408, message, code="timeout", headers={"Connection": "close"}) from None
    return parse_body(bytes(body))


class StreamReader:
    """Reads the pieces of a stream for a client, as they come.

    A context manager that cancels the stream at the end, which has no effect if it has ended.

    Args:
        stream: the engine's stream.
        receive: reports that the client disconnects; the request's body must have been read.
        seconds: how long the answer may take.
    """

    def __init__(self, stream: Stream, receive: Receive, seconds: float) -> None:
        self._stream = stream
        self._receive = receive
        self._seconds = seconds
        self._ready = asyncio.Event()

    async def __aenter__(self) -> "StreamReader":
        loop = asyncio.get_running_loop()
        self._end = loop.time() + self._seconds

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may be closed by now
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
            HttpError: the time is up.
            ClientDisconnect: the client disconnected.
            EngineError: the request failed, or the server is shutting down.
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
                    else EngineClosed("the server shut down before the answer was complete")
                )
            return piece

    async def all(self) -> Piece:
        """All pieces, joined."""
        pieces = []
        while (piece := await self.next()) is not None:
            pieces.append(piece)
        text = "".join(piece.text for piece in pieces)
        return Piece(text, [token for piece in pieces for token in piece.tokens])

    async def within_time(self, work: Awaitable[_Result]) -> _Result:
        """Await something for as long as the answer may take.

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
        """Cancel the stream when the client disconnects."""
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self._stream.cancel()
