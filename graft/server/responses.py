"""Responses in the formats of OpenAI's two interfaces, whole and in chunks.

Pure functions from pieces of an answer to JSON.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from graft.engine.streams import Piece, TokenInfo
from graft.server.requests import GenerationRequest

Json = dict[str, Any]


@dataclass
class Answer:
    """An answer's data besides its pieces.

    Attributes:
        id: the response's id, without the format's prefix.
        model: the model's name in the response.
        created: seconds since 1970.
        request: the request.
        prompt_text: the text that `echo` repeats.
        prompt_ids: token ids of the prompt.
        cached_tokens: number of prompt tokens found in the prompt cache.
        prompt: tokens of the prompt with log-probabilities, if `echo` asks for them.
        offset: where the next token begins in the text, for `text_offset`.
        decoder: of the tokens so far; it holds the bytes of an incomplete character.
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
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def add_prompt(self, prompt: list[TokenInfo], cached_tokens: int) -> None:
        """Add what is known of the prompt once it is processed."""
        self.prompt, self.cached_tokens = prompt, cached_tokens
        written = b"".join(token.bytes for token in prompt)
        # SentencePiece adds a space before a text, which the text does not have.
        if written == b" " + self.prompt_text.encode():
            self.offset = -1


class ResponseFormat(Protocol):
    """The response format of an interface.

    Attributes:
        prefix: prefix of response ids.
        kind: `object` of a whole response.
        chunk_kind: `object` of a chunk.
        default_tokens: longest answer if the request sets none.
    """

    prefix: str
    kind: str
    chunk_kind: str
    default_tokens: int

    def opening(self, answer: Answer) -> list[Json]:
        """The choices of a stream's first chunks."""
        ...

    def chunk(self, answer: Answer, piece: Piece) -> Json:
        """The choice for a piece of the answer."""
        ...

    def closing(self, finish_reason: str) -> Json:
        """The choice of a stream's last chunk."""
        ...

    def whole(self, answer: Answer, piece: Piece, finish_reason: str) -> Json:
        """The choice for a whole answer."""
        ...


class CompletionFormat:
    """Completions: https://platform.openai.com/docs/api-reference/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    default_tokens = 16  # OpenAI's

    def opening(self, answer: Answer) -> list[Json]:
        """The prompt, if `echo` asks for it."""
        if not answer.request.echo and not answer.request.return_token_ids:
            return []
        text = answer.prompt_text if answer.request.echo else ""
        return [self._choice(answer, text, answer.prompt) | _prompt_ids(answer)]

    def chunk(self, answer: Answer, piece: Piece) -> Json:
        """Text and log-probabilities."""
        return self._choice(answer, piece.text, piece.tokens) | _ids(answer, piece.tokens)

    def closing(self, finish_reason: str) -> Json:
        """Only the reason for the end."""
        return {"index": 0, "text": "", "logprobs": None, "finish_reason": finish_reason}

    def whole(self, answer: Answer, piece: Piece, finish_reason: str) -> Json:
        """The text, after the prompt if `echo` asks for it."""
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
        wanted = answer.request.logprobs is not None
        logprobs = _completion_logprobs(answer, tokens) if wanted else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatCompletionFormat:
    """Chat completions: https://platform.openai.com/docs/api-reference/chat."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    default_tokens = 512

    def opening(self, answer: Answer) -> list[Json]:
        """The assistant's role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return [choice | _prompt_ids(answer)]

    def chunk(self, answer: Answer, piece: Piece) -> Json:
        """Text and log-probabilities."""
        return {
            "index": 0,
            "delta": {"content": piece.text},
            "logprobs": _chat_logprobs(answer, piece.tokens),
            "finish_reason": None,
        } | _ids(answer, piece.tokens)

    def closing(self, finish_reason: str) -> Json:
        """Only the reason for the end."""
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


def response(form: ResponseFormat, answer: Answer, choice: Json, tokens: int) -> Json:
    """A whole response with its choice."""
    head = _head(form.prefix, form.kind, answer)
    return {**head, "choices": [choice], "usage": usage(answer, tokens)}


def chunk_response(form: ResponseFormat, answer: Answer, choice: Json) -> Json:
    """A chunk with its choice; `usage` is null if the last chunk will contain it."""
    chunk = {**_head(form.prefix, form.chunk_kind, answer), "choices": [choice]}
    return {**chunk, "usage": None} if answer.request.include_usage else chunk


def usage_chunk(form: ResponseFormat, answer: Answer, tokens: int) -> Json:
    """The last chunk if `include_usage` asks for it: no choices, only the usage."""
    head = _head(form.prefix, form.chunk_kind, answer)
    return {**head, "choices": [], "usage": usage(answer, tokens)}


def usage(answer: Answer, tokens: int) -> Json:
    """The numbers of prompt tokens and generated tokens."""
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
    if not answer.request.return_token_ids:
        return {}
    return {"token_ids": [token.id for token in tokens]}


def _completion_logprobs(answer: Answer, tokens: Sequence[TokenInfo]) -> Json:
    """Four lists with a value for each token; the first prompt token has no log-probability.

    A token that continues a character has the offset of that character.
    """
    offsets = []
    for token in tokens:
        offsets.append(max(0, answer.offset))
        answer.offset += len(answer.decoder.decode(token.bytes))
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [None if token.logprob is None else _by_text(token) for token in tokens],
        "text_offset": offsets,
    }


def _by_text(token: TokenInfo) -> dict[str, float]:
    """Log-probabilities by text; other tokens of a text that is taken are written as in vLLM.

    The token itself comes first, so that its text is its own.
    """
    by_text: dict[str, float] = {}
    for each in sorted(token.top, key=lambda each: each.id != token.id):
        by_text[f"token_id:{each.id}" if each.text in by_text else each.text] = each.logprob
    return dict(sorted(by_text.items(), key=lambda item: -item[1]))


def _chat_logprobs(answer: Answer, tokens: Sequence[TokenInfo]) -> Json | None:
    if answer.request.logprobs is None:
        return None
    content = [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.bytes),
            "top_logprobs": [
                {"token": each.text, "logprob": each.logprob, "bytes": list(each.bytes)}
                for each in token.top
            ],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}
