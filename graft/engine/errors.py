"""Errors of the engine: one type for each reason to refuse a request.

All are `InputError`s, so a command prints them as one line. Servers map the types to status codes.
"""

from graft.errors import InputError


class EngineError(InputError):
    """The engine refuses or fails a request."""


class AdapterNotFound(EngineError):
    """No adapter of this name is loaded, or no file exists at its path."""


class AdapterAlreadyLoaded(EngineError):
    """An adapter of this name is loaded already."""


class AdapterBusy(EngineError):
    """Requests still use the adapter."""


class TooManyAdapters(EngineError):
    """The engine has reached its limit of adapters."""


class RankTooLarge(EngineError):
    """The adapter's rank is above the engine's limit."""


class AdapterDoesNotFit(EngineError):
    """The adapter is for another base model, or for layers that a batch cannot mix."""


class QueueFull(EngineError):
    """The queue is full.

    Args:
        message: the message.
        retry_after_seconds: estimated time until the queue has room.
    """

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class PromptTooLong(EngineError):
    """The prompt is longer than the limit.

    Args:
        message: the message.
        tokens: number of tokens in the prompt.
        limit: most tokens in a prompt.
    """

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class EngineClosed(EngineError):
    """The engine is closed or closing."""


class EngineFailed(EngineError):
    """The engine failed, through no fault of the request, which can be sent again."""
