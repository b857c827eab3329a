"""What the engine refuses, each reason a type of its own.

All are `InputError`s, whose one line is meant for the person who asked; the types are for servers,
which map them to status codes. Knows nothing of models or HTTP.
"""

from graft.errors import InputError


class EngineError(InputError):
    """Something that the engine was asked for and does not do."""


class AdapterNotFound(EngineError):
    """No adapter of that name is loaded, or there is none where it was to be loaded from."""


class AdapterAlreadyLoaded(EngineError):
    """An adapter of that name is loaded, and was not to be replaced."""


class AdapterBusy(EngineError):
    """Requests still run with the adapter."""


class TooManyAdapters(EngineError):
    """As many adapters are loaded as the engine was started for."""


class RankTooLarge(EngineError):
    """The adapter's rank is above the one that the engine was started for."""


class AdapterDoesNotFit(EngineError):
    """The adapter is for another base, or for kinds of layers that cannot be mixed in a batch."""


class QueueFull(EngineError):
    """As many requests wait as may wait.

    Args:
        message: what is said.
        retry_after_seconds: when to try again: the time in which a place is likely to come free.
    """

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class PromptTooLong(EngineError):
    """The prompt has more tokens than the engine takes.

    Args:
        message: what is said.
        tokens: of the prompt.
        limit: on the tokens of a prompt.
    """

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class EngineClosed(EngineError):
    """The engine takes no more requests."""


class EngineFailed(EngineError):
    """A step of the batch failed, through no fault of the request; it may be sent again."""
