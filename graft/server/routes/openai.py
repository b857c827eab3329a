"""The routes of OpenAI's interface: models, completions and chat completions.

Reference: https://platform.openai.com/docs/api-reference
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from typing import Any

from graft.data.chat_template import ChatError
from graft.engine.streams import Stream
from graft.errors import InputError, RunError
from graft.server.errors import HttpError, http_error, openai_body
from graft.server.requests import GenerationRequest, parse_chat, parse_completion
from graft.server.responses import (
    SHAPES,
    Answer,
    Shape,
    chunk_response,
    response,
    usage_chunk,
)
from graft.server.routes.adapters import chosen_adapters, shown_path
from graft.server.service import Follower, Service, read_json, service_of

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

LOG = logging.getLogger("uvicorn.error")
LAST_SECONDS = 5  # for what is sent after the answer, or its time, has ended
CLIENT_GONE = 499  # nobody reads it; the count of responses tells it


async def models(request: Request) -> Response:
    """GET /v1/models: the base, and the adapters as its children."""
    return JSONResponse({"object": "list", "data": _models(service_of(request))})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    name = request.path_params["name"]
    for one in _models(service_of(request)):
        if one["id"] == name:
            return JSONResponse(one)
    message = f"The model `{name}` does not exist."
    raise HttpError(404, message, param="model", code="model_not_found")


async def completions(request: Request) -> Response:
    """POST /v1/completions and /v1/chat/completions."""
    service, shape = service_of(request), SHAPES[request.url.path]
    chat = request.url.path == "/v1/chat/completions"
    body = await read_json(request)
    wanted = parse_chat(body) if chat else parse_completion(body)
    length = _length(wanted, shape, service)
    # In a thread, for a long prompt takes its time to tokenize.
    answer, stream = await run_in_threadpool(_submit, service, wanted, length)
    if wanted.stream:
        return EventStream(shape, answer, stream, service.settings.timeout_seconds)
    async with Follower(stream, request.receive, service.settings.timeout_seconds) as follower:
        piece = await follower.all()
    _take_prompt(answer, stream)
    choice = shape.whole(answer, piece, str(stream.finish_reason))
    return JSONResponse(response(shape, answer, choice, len(piece.tokens)))


class EventStream(Response):
    """An answer in server-sent events, one a piece, each a chunk in JSON.

    What goes wrong after the first event is told in an event, as OpenAI's clients expect.

    Args:
        shape: of the chunks.
        answer: what they tell besides the pieces.
        stream: of the engine; whatever happens, its row is free afterwards.
        seconds: until it must have ended.
    """

    def __init__(self, shape: Shape, answer: Answer, stream: Stream, seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._shape, self._answer = shape, answer
        self._stream, self._seconds = stream, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the end, or until the client is gone."""
        async with Follower(self._stream, receive, self._seconds) as follower:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._send_all(follower, send)
            except ClientDisconnect:
                return
            except Exception as error:
                if not isinstance(error, HttpError | InputError | RunError):
                    LOG.exception("a stream failed")
                self._stream.cancel()
                await _send_last(send, openai_body(http_error(error)))
            await _send_last(send)

    async def _send_all(self, follower: Follower, send: Send) -> None:
        shape, answer, tokens = self._shape, self._answer, 0

        async def tell(choice: dict[str, Any]) -> None:
            chunk = chunk_response(shape, answer, choice)
            await follower.within_time(_send_event(send, chunk))

        piece = await follower.next()
        _take_prompt(answer, self._stream)
        for choice in shape.opening(answer):
            await tell(choice)
        while piece is not None:
            if piece.text or piece.tokens:
                await tell(shape.chunk(answer, piece))
            tokens += len(piece.tokens)
            piece = await follower.next()
        await tell(shape.closing(str(self._stream.finish_reason)))
        if answer.request.include_usage:
            await _send_event(send, usage_chunk(shape, answer, tokens))


async def _send_event(send: Send, content: dict[str, Any]) -> None:
    event = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": event, "more_body": True})


async def _send_last(send: Send, content: dict[str, Any] | None = None) -> None:
    """Send an event, or the end, to a client that may have ceased to read."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_SECONDS):
            if content is not None:
                await _send_event(send, content)
            else:
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _submit(service: Service, wanted: GenerationRequest, length: int) -> tuple[Answer, Stream]:
    """Hand a request to the engine.

    Raises:
        HttpError: it names an adapter that there is not, or messages that the template refuses.
        EngineError: the engine refuses it.
    """
    adapters = chosen_adapters(service, wanted)
    ids = _prompt_ids(service, wanted)
    stream = service.engine.submit(
        ids,
        adapters=adapters,
        max_tokens=length,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        seed=None if wanted.seed is None else wanted.seed % 2**64,
        stop=wanted.stop,
        logprobs=wanted.logprobs,
        echo=wanted.echo,
    )
    text = _prompt_text(service, wanted) if wanted.echo else ""
    name = wanted.model or service.settings.model
    answer = Answer(uuid.uuid4().hex, name, int(time.time()), wanted, text, ids)
    return answer, stream


def _prompt_ids(service: Service, wanted: GenerationRequest) -> list[int]:
    if wanted.messages:
        try:
            with service.engine.encoding:
                return service.chat.prompt_ids(wanted.messages, wanted.tools)
        except ChatError as error:
            raise HttpError(400, str(error), param="messages") from None
    if isinstance(wanted.prompt, str):
        return service.engine.encode(wanted.prompt)
    return wanted.prompt


def _prompt_text(service: Service, wanted: GenerationRequest) -> str:
    if isinstance(wanted.prompt, str):
        return wanted.prompt
    with service.engine.encoding:
        return service.tokenizer.decode(wanted.prompt)


def _take_prompt(answer: Answer, stream: Stream) -> None:
    """What the engine tells of the prompt from the first piece on."""
    answer.cached_tokens = stream.cached_tokens
    answer.prompt = stream.prompt


def _length(wanted: GenerationRequest, shape: Shape, service: Service) -> int:
    """How many tokens an answer may have: what was asked for, or the interface's default."""
    limit = service.settings.max_tokens
    if wanted.max_tokens is None:
        return min(shape.default_tokens, limit)
    if wanted.max_tokens > limit:
        message = f"max_tokens is {wanted.max_tokens}: this server gives at most {limit}"
        raise HttpError(400, message, param="max_tokens")
    return wanted.max_tokens


def _models(service: Service) -> list[dict[str, Any]]:
    base = service.settings.model
    head = {"object": "model", "created": service.created, "owned_by": "graft"}
    children = [
        {"id": info.name, **head, "root": shown_path(service, info), "parent": base}
        for info in service.engine.adapters()
    ]
    own = {"root": base, "parent": None, "has_chat_template": service.chat.has_template}
    return [{"id": base, **head, **own}, *children]
