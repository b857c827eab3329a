"""Answers in the shapes of OpenAI's two interfaces, whole and in chunks.

Pure functions from pieces to JSON. Knows nothing of the engine or of HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from graft.engine.streams import Piece, TokenInfo
from graft.server.requests import GenerationRequest

Json = dict[str, Any]


@dataclass
class Answer:
    """What all shapes need to know of one answer.

    Attributes:
        id: of the response, after its kind's prefix.
        model: as the response names it.
        created: seconds since 1970.
        request: what was asked.
        prompt_text: what echo repeats.
        prompt_ids: token ids of the prompt.
        cached_tokens: of the prompt, taken from the prompt cache.
        prompt: tokens of the prompt with log-probabilities, where echo asked for them.
        offset: characters that were told so far, for `text_offset`.
    """

    id: str
    model: str
    created: int
    request: GenerationRequest
    prompt_text: str
    prompt_ids: list[int]
    cached_tokens: int = 0
    prompt: list[TokenInfo] = field(default_factory=list)
    offset: int = 0


class Shape(Protocol):
    """One of the two interfaces.

    Attributes:
        prefix: of the ids of its answers.
        kind: of a whole answer, as `object` tells it.
        chunk_kind: of a chunk.
        default_tokens: of an answer where the request tells no number.
    """

    prefix: str
    kind: str
    chunk_kind: str
    default_tokens: int

    def opening(self, answer: Answer) -> list[Json]:
        """The choices with which a stream opens, one a chunk."""
        ...

    def chunk(self, answer: Answer, piece: Piece) -> Json:
        """The choice that tells a piece."""
        ...

    def closing(self, finish_reason: str) -> Json:
        """The choice with which a stream closes."""
        ...

    def whole(self, answer: Answer, piece: Piece, finish_reason: str) -> Json:
        """The choice that tells everything at once."""
        ...


class CompletionShape:
    """Completions: https://platform.openai.com/docs/api-reference/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    default_tokens = 16  # OpenAI's

    def opening(self, answer: Answer) -> list[Json]:
        """The prompt, where echo asks for it."""
        if not answer.request.echo and not answer.request.return_token_ids:
            return []
        text = answer.prompt_text if answer.request.echo else ""
        return [self._choice(answer, text, answer.prompt) | _prompt_ids(answer)]

    def chunk(self, answer: Answer, piece: Piece) -> Json:
        """Text, log-probabilities."""
        return self._choice(answer, piece.text, piece.tokens) | _ids(answer, piece.tokens)

    def closing(self, finish_reason: str) -> Json:
        """No more text."""
        return {"index": 0, "text": "", "logprobs": None, "finish_reason": finish_reason}

    def whole(self, answer: Answer, piece: Piece, finish_reason: str) -> Json:
        """Text, after the prompt's where echo asks for it."""
        echo = answer.request.echo
        text = (answer.prompt_text if echo else "") + piece.text
        tokens = [*answer.prompt, *piece.tokens] if echo else piece.tokens
        choice = self._choice(answer, text, tokens, finish_reason)
        return choice | _prompt_ids(answer) | _ids(answer, piece.tokens)

    def _choice(
        self,
        answer: Answer,
        text: str,
        tokens: Sequence[TokenInfo],
        finish_reason: str | None = None,
    ) -> Json:
        told = answer.request.logprobs is not None
        logprobs = _completion_logprobs(answer, tokens) if told else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatShape:
    """Chat completions: https://platform.openai.com/docs/api-reference/chat."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    default_tokens = 512

    def opening(self, answer: Answer) -> list[Json]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return [choice | _prompt_ids(answer)]

    def chunk(self, answer: Answer, piece: Piece) -> Json:
        """Text, log-probabilities."""
        return {
            "index": 0,
            "delta": {"content": piece.text},
            "logprobs": _chat_logprobs(answer, piece.tokens),
            "finish_reason": None,
        } | _ids(answer, piece.tokens)

    def closing(self, finish_reason: str) -> Json:
        """No more text."""
        return {"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, answer: Answer, piece: Piece, finish_reason: str) -> Json:
        """The assistant's message."""
        return (
            {
                "index": 0,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": _chat_logprobs(answer, piece.tokens),
                "finish_reason": finish_reason,
            }
            | _prompt_ids(answer)
            | _ids(answer, piece.tokens)
        )


def response(shape: Shape, answer: Answer, choice: Json, tokens: int) -> Json:
    """A whole response around its choice."""
    head = _head(shape.prefix, shape.kind, answer)
    return {**head, "choices": [choice], "usage": usage(answer, tokens)}


def chunk_response(shape: Shape, answer: Answer, choice: Json) -> Json:
    """A chunk around its choice; `usage` is null where the last chunk will tell it."""
    chunk = {**_head(shape.prefix, shape.chunk_kind, answer), "choices": [choice]}
    return {**chunk, "usage": None} if answer.request.include_usage else chunk


def usage_chunk(shape: Shape, answer: Answer, tokens: int) -> Json:
    """The last chunk, where `include_usage` asks for it: no choices, and the usage."""
    head = _head(shape.prefix, shape.chunk_kind, answer)
    return {**head, "choices": [], "usage": usage(answer, tokens)}


def usage(answer: Answer, tokens: int) -> Json:
    """How many tokens went in and came out."""
    prompt = len(answer.prompt_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _head(prefix: str, kind: str, answer: Answer) -> Json:
    return {
        "id": f"{prefix}-{answer.id}",
        "object": kind,
        "created": answer.created,
        "model": answer.model,
    }


def _prompt_ids(answer: Answer) -> Json:
    return {"prompt_token_ids": answer.prompt_ids} if answer.request.return_token_ids else {}


def _ids(answer: Answer, tokens: Sequence[TokenInfo]) -> Json:
    asked = answer.request.return_token_ids
    return {"token_ids": [token.id for token in tokens]} if asked else {}


def _completion_logprobs(answer: Answer, tokens: Sequence[TokenInfo]) -> Json:
    """Four lists, a place for each token; the first token of all has no log-probability."""
    offsets = []
    for token in tokens:
        offsets.append(answer.offset)
        answer.offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {text: value for _, text, value in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def _chat_logprobs(answer: Answer, tokens: Sequence[TokenInfo]) -> Json | None:
    if answer.request.logprobs is None:
        return None
    content = [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.bytes),
            "top_logprobs": [
                {"token": text, "logprob": value, "bytes": list(text.encode())}
                for _, text, value in token.top
            ],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


SHAPES: dict[str, Shape] = {
    "/v1/completions": CompletionShape(),
    "/v1/chat/completions": ChatShape(),
}
