"""What a request gives, piece by piece, and how it ends.

A `Stream` is written by the engine's thread and read from any other. `Continuation` turns tokens
into text: it holds back characters that are not complete and what may become a stop string. Knows
nothing of models or batches.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from graft.pretrained.tokenizer import StreamingDecoder, Tokenizer

State = Literal["queued", "running", "finished", "cancelled", "failed"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenInfo:
    """One token.

    Attributes:
        id: in the vocabulary.
        text: of the token alone; U+FFFD for bytes that are no whole character.
        bytes: of the token alone.
        logprob: natural logarithm of its probability at temperature 1; `None` where not asked for,
            and for the first token of a prompt, which nothing precedes.
        top: the likeliest tokens at its place, as (id, text, log-probability), likeliest first.
    """

    id: int
    text: str
    bytes: bytes
    logprob: float | None = None
    top: list[tuple[int, str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer.

    Attributes:
        text: may be empty, while part of a character or of a stop string is held back.
        tokens: that were generated; text may come with a later token than its own, or with none.
    """

    text: str
    tokens: list[TokenInfo]


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        text: without the stop string or the token that ended it.
        tokens: that were generated, the ending one not among them.
        finish_reason: "stop" after a stop string or an ending token, "length" at the limit.
        prompt_tokens: how many the prompt has.
        cached_tokens: how many of those were taken from the prompt cache.
        prompt: the prompt's tokens, where the request asked for `echo`.
    """

    text: str
    tokens: list[TokenInfo]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    prompt: list[TokenInfo] = field(default_factory=list)


class Stream:
    """The answer to one request as it comes; iterating gives its pieces.

    Args:
        request_id: by which logs know it.
        prompt_tokens: how many the prompt has.
        on_cancel: told that nobody waits for the rest.

    Attributes:
        state: "queued", "running", and at the end "finished", "cancelled" or "failed".
        finish_reason: of a finished one, "stop" or "length".
        cached_tokens: of the prompt, taken from the prompt cache.
        prompt: the prompt's tokens, there before the first piece where `echo` was asked for.
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
        """Whether no more pieces will come; some may still be waiting to be taken."""
        return self.state in ("finished", "cancelled", "failed")

    def get(self, timeout: float | None = None) -> Piece | None:
        """The next piece, or `None` at the end.

        Args:
            timeout: seconds to wait; `None` waits as long as it takes, 0 not at all.

        Raises:
            TimeoutError: no piece came in time.
            Exception: what the request failed of.
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
        """Want no more: the row is freed within a step. Without effect on what has ended."""
        if not self.ended:
            self._on_cancel()

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever `get` will not block: after a piece, and at the end.

        It is called from the engine's thread, so it must return at once; and once now, if there is
        something already.
        """
        with self._changed:
            self._callbacks.append(callback)
            due = bool(self._pieces) or self.ended
        if due:
            _call(callback)

    def result(self) -> Completion:
        """Wait for the end; the whole answer, where no piece was taken before.

        Raises:
            Exception: what the request failed of.
        """
        pieces = list(self)
        return Completion(
            "".join(piece.text for piece in pieces),
            [token for piece in pieces for token in piece.tokens],
            self.finish_reason or "stop",
            self.prompt_tokens,
            self.cached_tokens,
            self.prompt,
        )

    def put(self, piece: Piece) -> None:
        """Hand on a piece; for the engine."""
        with self._changed:
            self._pieces.append(piece)
        self._tell()

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
            self.finish_reason, self._error = finish_reason, error
            self.state = state
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            _call(callback)


def _call(callback: Callable[[], None]) -> None:
    """Call a subscriber; what goes wrong with one must not harm the other requests."""
    with contextlib.suppress(Exception):
        callback()


class StopStrings:
    """Finds the first of several strings in text that comes in pieces.

    What may be the beginning of one is held back, so nothing of a stop string is ever given out.
    Where several end in the same piece the one that ends first counts, so that the result does not
    depend on how the text is cut.

    Args:
        strings: to stop at; empty ones are none.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string followed it."""
        held = self._held + text
        found = [(held.find(s) + len(s), -len(s)) for s in self._strings if s in held]
        if found:
            end, length = min(found)
            self._held = ""
            return held[: end + length], True
        kept = max((_overlap(held, string) for string in self._strings), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept], False

    def finish(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` begin `string`, all of it excepted."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class Continuation:
    """The text of an answer, token by token.

    Args:
        tokenizer: of the model.
        prompt: ids that come before.
        stop: strings to end at.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decoder = StreamingDecoder(tokenizer, prompt)
        self._stop = StopStrings(stop)

    def add(self, token: int) -> tuple[str, bool]:
        """The text that `token` made certain, and whether a stop string ends the answer here."""
        return self._stop.add(self._decoder.add(token))

    def finish(self) -> tuple[str, bool]:
        """What was held back, and whether there was a stop string in it."""
        text, stopped = self._stop.add(self._decoder.finish())
        return (text, True) if stopped else (text + self._stop.finish(), False)
