"""Streams: the answer to a request, piece by piece.

The engine's thread writes a `Stream`, and any other thread reads it. `Continuation` turns tokens
into text: it holds back incomplete characters and what may become a stop string.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from graft.pretrained.tokenizer import StreamingDecoder, Tokenizer

State = Literal["queued", "running", "finished", "cancelled", "failed"]
FinishReason = Literal["stop", "length", "cancelled"]


class Alternative(NamedTuple):
    """A token that was possible at a position; attributes as in `TokenInfo`."""

    id: int
    text: str
    logprob: float
    bytes: bytes


@dataclass(frozen=True)
class TokenInfo:
    """One token.

    Attributes:
        id: index in the vocabulary.
        text: text of the token alone, with U+FFFD for bytes that are not a whole character.
        bytes: bytes of the token alone.
        logprob: natural logarithm of its probability at temperature 1; `None` if not requested, and
            for the first token of a prompt.
        top: most likely tokens at its position, most likely first; the token itself is last if it
            is not among them.
    """

    id: int
    text: str
    bytes: bytes
    logprob: float | None = None
    top: list[Alternative] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer.

    Attributes:
        text: new text; empty while part of a character or of a stop string is held back.
        tokens: new tokens; a token's text may come with a later token, or with none.
    """

    text: str
    tokens: list[TokenInfo]


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        text: text without the stop string that ended it.
        tokens: generated tokens without the end token.
        finish_reason: "stop" after a stop string or an end token, "length" at the limit,
            "cancelled" if the text is not all of the answer.
        prompt_tokens: number of tokens in the prompt.
        cached_tokens: number of them found in the prompt cache.
        prompt: the prompt's tokens, if `echo` was requested.
    """

    text: str
    tokens: list[TokenInfo]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    prompt: list[TokenInfo] = field(default_factory=list)


class Stream:
    """The answer to a request while it is generated; iterating yields its pieces.

    Args:
        request_id: id of the request in logs.
        prompt_tokens: number of tokens in the prompt.
        on_cancel: called by `cancel`.

    Attributes:
        state: "queued", "running", and at the end "finished", "cancelled" or "failed".
        finish_reason: "stop", "length" or "cancelled" once ended, unless it failed.
        cached_tokens: number of prompt tokens found in the prompt cache.
        prompt: the prompt's tokens, complete before the first piece, if `echo` was requested.
    """

    def __init__(
        self, request_id: str, prompt_tokens: int, on_cancel: Callable[[], None] = lambda: None
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.prompt: list[TokenInfo] = []
        self.state: State = "queued"
        self.finish_reason: FinishReason | None = None
        self._error: Exception | None = None
        self._pieces: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []
        self._on_cancel = on_cancel

    @property
    def ended(self) -> bool:
        """Whether no more pieces will come; some may still be unread."""
        return self.state in ("finished", "cancelled", "failed")

    def get(self, timeout: float | None = None) -> Piece | None:
        """The next piece, or `None` at the end.

        Args:
            timeout: seconds to wait; `None` waits without limit, 0 not at all.

        Raises:
            TimeoutError: no piece came in time.
            Exception: the request failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self.ended, timeout):
                raise TimeoutError(f"request {self.request_id}: no piece in {timeout:g} s")
            if self._pieces:
                return self._pieces.popleft()
            if self._error is not None:
                raise self._error
            return None

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self.get()) is not None:
            yield piece

    def cancel(self) -> None:
        """Cancel the request, which frees its row within a step; no effect once it has ended."""
        if not self.ended:
            self._on_cancel()

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `get` will not block: after each piece, and at the end.

        It is called on the engine's thread, so it must return quickly; and once right away, if
        there is a piece or the end already.
        """
        with self._changed:
            self._callbacks.append(callback)
            due = bool(self._pieces) or self.ended
        if due:
            _call(callback)

    def result(self) -> Completion:
        """Wait for the end; returns all pieces that were not read before, as one answer.

        Raises:
            Exception: the request failed.
        """
        pieces = list(self)
        return Completion(
            "".join(piece.text for piece in pieces),
            [token for piece in pieces for token in piece.tokens],
            self.finish_reason or "cancelled",
            self.prompt_tokens,
            self.cached_tokens,
            self.prompt,
        )

    def put(self, piece: Piece) -> None:
        """Add a piece; for the engine."""
        with self._changed:
            self._pieces.append(piece)
        self._notify()

    def end(
        self,
        state: State,
        *,
        finish_reason: FinishReason | None = None,
        error: Exception | None = None,
    ) -> None:
        """End the stream, once; for the engine."""
        with self._changed:
            if self.ended:
                return
            self.finish_reason = "cancelled" if state == "cancelled" else finish_reason
            self._error = error
            self.state = state
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            _call(callback)


def _call(callback: Callable[[], None]) -> None:
    """Call a subscriber, whose errors must not affect other requests."""
    with contextlib.suppress(Exception):
        callback()


class StopStrings:
    """Finds the first of several stop strings in text that comes in pieces.

    Text that may be the start of a stop string is held back, so no part of one is ever returned. If
    several end in the same piece, the one that ends first counts, so that the result does not
    depend on how the text is divided.

    Args:
        strings: the stop strings; empty ones are ignored.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Returns the text that is certain now, and whether a stop string follows it."""
        held = self._held + text
        ends = [(held.find(s) + len(s), -len(s)) for s in self._strings if s in held]
        if ends:
            end, length = min(ends)
            self._held = ""
            return held[: end + length], True
        kept = max((_overlap(held, string) for string in self._strings), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept], False

    def finish(self) -> str:
        """Returns the text that was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that starts `string` and is not all of it."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class Continuation:
    """The text of an answer, token by token.

    Args:
        tokenizer: the model's tokenizer.
        prompt: token ids of the prompt.
        stop: stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decoder = StreamingDecoder(tokenizer, prompt)
        self._stop = StopStrings(stop)

    def add(self, token: int) -> tuple[str, bool]:
        """Returns the text that is certain after `token`, and whether a stop string ends it."""
        return self._stop.add(self._decoder.add(token))

    def finish(self) -> tuple[str, bool]:
        """Returns the text that was held back, and whether a stop string ends it."""
        text, stopped = self._stop.add(self._decoder.finish())
        return (text, True) if stopped else (text + self._stop.finish(), False)
