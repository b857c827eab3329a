"""Routes of OpenAI's interface: models, completions and chat completions.

Reference: https://platform.openai.com/docs/api-reference
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from typing import Any

from graft.data.conversations import ChatError
from graft.engine.streams import Stream
from graft.errors import InputError, RunError
from graft.server.adapter_choice import chosen_adapters, no_such_model, shown_path
from graft.server.errors import OPENAI_ERRORS, HttpError, http_error
from graft.server.requests import GenerationRequest, parse_chat, parse_completion
from graft.server.responses import (
    Answer,
    ChatCompletionFormat,
    CompletionFormat,
    ResponseFormat,
    chunk_response,
    response,
    usage_chunk,
)
from graft.server.routes import route
from graft.server.service import Service, StreamReader, read_body, service_of

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

LOG = logging.getLogger("uvicorn.error")
LAST_SECONDS = 5  # for sending the last event after the answer, or its time, has ended


@route("GET", "/v1/models")
async def models(request: Request) -> Response:
    """List the base model, and the adapters as its children."""
    return JSONResponse({"object": "list", "data": _models(service_of(request))})


@route("GET", "/v1/models/{name:path}")
async def model(request: Request) -> Response:
    """Describe one model."""
    name = request.path_params["name"]
    for description in _models(service_of(request)):
        if description["id"] == name:
            return JSONResponse(description)
    raise no_such_model(name)


@route("POST", "/v1/completions")
async def completions(request: Request) -> Response:
    """Continue a prompt."""
    wanted = parse_completion(await read_body(request))
    return await _generate(request, wanted, CompletionFormat())


@route("POST", "/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer the last message of a chat."""
    wanted = parse_chat(await read_body(request))
    return await _generate(request, wanted, ChatCompletionFormat())


async def _generate(request: Request, wanted: GenerationRequest, form: ResponseFormat) -> Response:
    service = service_of(request)
    max_tokens = _max_tokens(wanted, form, service)
    # In a thread, because tokenizing a long prompt takes time.
    answer, stream = await run_in_threadpool(_submit, service, wanted, max_tokens)
    if wanted.stream:
        return EventStream(form, answer, stream, service.settings.timeout_seconds)
    async with StreamReader(stream, request.receive, service.settings.timeout_seconds) as reader:
        piece = await reader.all()
    _add_prompt(answer, stream)
    choice = form.whole(answer, piece, str(stream.finish_reason))
    return JSONResponse(response(form, answer, choice, len(piece.tokens)))


class EventStream(Response):
    """An answer as server-sent events: one JSON chunk for each piece.

    An error after the first event is sent as an event, as OpenAI's clients expect.

    Args:
        form: the format of the chunks.
        answer: the answer's data besides its pieces.
        stream: the engine's stream; its row is free at the end, whatever happens.
        seconds: how long the answer may take.
    """

    def __init__(
        self, form: ResponseFormat, answer: Answer, stream: Stream, seconds: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._form, self._answer = form, answer
        self._stream, self._seconds = stream, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the end, or until the client disconnects."""
        async with StreamReader(self._stream, receive, self._seconds) as reader:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._send_all(reader, send)
            except ClientDisconnect:
                return
            except Exception as error:
                if not isinstance(error, HttpError | InputError | RunError):
                    LOG.exception("a stream failed")
                self._stream.cancel()
                await _send_last(send, OPENAI_ERRORS.body(http_error(error)))
            await _send_last(send)

    async def _send_all(self, reader: StreamReader, send: Send) -> None:
        form, answer, tokens = self._form, self._answer, 0

        async def send_choice(choice: dict[str, Any]) -> None:
            chunk = chunk_response(form, answer, choice)
            await reader.within_time(_send_event(send, chunk))

        piece = await reader.next()
        _add_prompt(answer, self._stream)
        for choice in form.opening(answer):
            await send_choice(choice)
        while piece is not None:
            if piece.text or piece.tokens:
                await send_choice(form.chunk(answer, piece))
            tokens += len(piece.tokens)
            piece = await reader.next()
        await send_choice(form.closing(str(self._stream.finish_reason)))
        if answer.request.include_usage:
            await _send_event(send, usage_chunk(form, answer, tokens))


async def _send_event(send: Send, content: dict[str, Any]) -> None:
    event = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": event, "more_body": True})


async def _send_last(send: Send, content: dict[str, Any] | None = None) -> None:
    """Send an event or the end mark to a client that may have stopped reading."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_SECONDS):
            if content is not None:
                await _send_event(send, content)
            else:
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _submit(service: Service, wanted: GenerationRequest, max_tokens: int) -> tuple[Answer, Stream]:
    """Submit a request to the engine.

    Raises:
        HttpError: an adapter does not exist, or the template refuses the messages.
        EngineError: the engine refuses the request.
    """
    adapters = chosen_adapters(service, wanted)
    ids = _prompt_ids(service, wanted)
    stream = service.engine.submit(
        ids,
        adapters=adapters,
        max_tokens=max_tokens,
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
            with service.engine.tokenizer_lock:
                return service.chat.prompt_ids(wanted.messages, wanted.tools)
        except ChatError as error:
            raise HttpError(400, str(error), param="messages") from None
    if isinstance(wanted.prompt, str):
        return service.engine.encode(wanted.prompt)
    return wanted.prompt


def _prompt_text(service: Service, wanted: GenerationRequest) -> str:
    if isinstance(wanted.prompt, str):
        return wanted.prompt
    with service.engine.tokenizer_lock:
        return service.tokenizer.decode(wanted.prompt)


def _add_prompt(answer: Answer, stream: Stream) -> None:
    """Copy what the stream reports about the prompt, which is complete at the first piece."""
    answer.add_prompt(stream.prompt, stream.cached_tokens)


def _max_tokens(wanted: GenerationRequest, form: ResponseFormat, service: Service) -> int:
    """The longest answer: as requested, or the interface's default.

    Raises:
        HttpError: more was requested than the server allows.
    """
    limit = service.settings.max_tokens
    if wanted.max_tokens is None:
        return min(form.default_tokens, limit)
    if wanted.max_tokens > limit:
        message = f"max_tokens is {wanted.max_tokens}: this server allows at most {limit}"
        raise HttpError(400, message, param="max_tokens")
    return wanted.max_tokens


def _models(service: Service) -> list[dict[str, Any]]:
    base = service.settings.model
    head = {"object": "model", "created": service.created, "owned_by": "graft"}
    children = [
        {"id": info.name, **head, "root": shown_path(service, info), "parent": base}
        for info in service.engine.adapters()
    ]
    base_fields = {"root": base, "parent": None, "has_chat_template": service.chat.has_template}
    return [{"id": base, **head, **base_fields}, *children]
