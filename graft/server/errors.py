"""Errors over HTTP: the status of each error, and its body in the formats of three interfaces.

Does not know the routes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.engine.errors import (
    AdapterAlreadyLoaded,
    AdapterBusy,
    AdapterNotFound,
    EngineClosed,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    TooManyAdapters,
)
from graft.errors import InputError, RunError


class HttpError(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        message: one line for the person who sent the request.
        param: the request's field that is wrong.
        code: a word for programs, which OpenAI's clients read.
        headers: headers of the response.
        details: further fields, which llama.cpp's format includes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.details = dict(details or {})


@dataclass(frozen=True)
class ErrorFormat:
    """How an interface writes errors.

    Attributes:
        types: the error's type by status.
        client_error: its type for the other statuses below 500.
        server_error: its type for the others from 500 on.
        code_is_status: whether `code` is the status, or a word or null.
        with_details: whether further fields follow instead of `param`.
    """

    types: Mapping[int, str]
    client_error: str
    server_error: str
    code_is_status: bool
    with_details: bool = False

    def body(self, error: HttpError) -> dict[str, Any]:
        """The JSON body of an error."""
        default = self.server_error if error.status >= 500 else self.client_error
        content = {
            "message": error.message,
            "type": self.types.get(error.status, default),
            "code": error.status if self.code_is_status else error.code,
        }
        return {"error": content | (error.details if self.with_details else {"param": error.param})}


# https://platform.openai.com/docs/guides/error-codes
OPENAI_ERRORS = ErrorFormat(
    {429: "rate_limit_error"}, "invalid_request_error", "server_error", code_is_status=False
)
# vLLM's routes for adapters.
VLLM_ERRORS = ErrorFormat(
    {
        400: "InvalidUserInput",
        401: "AuthenticationError",
        403: "PermissionDeniedError",
        404: "NotFoundError",
        409: "ConflictError",
        503: "ServiceUnavailableError",
    },
    "BadRequestError",
    "InternalServerError",
    code_is_status=True,
)
# https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
LLAMA_CPP_ERRORS = ErrorFormat(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "unavailable_error",
        503: "unavailable_error",
    },
    "invalid_request_error",
    "server_error",
    code_is_status=True,
    with_details=True,
)


# The status and code of each error of the engine. Any other InputError is a bad request.
_STATUS: dict[type[InputError], tuple[int, str | None]] = {
    AdapterNotFound: (404, "model_not_found"),
    AdapterAlreadyLoaded: (400, "adapter_already_loaded"),
    AdapterBusy: (409, "adapter_busy"),
    TooManyAdapters: (409, "too_many_adapters"),
    PromptTooLong: (400, "context_length_exceeded"),
    QueueFull: (429, "rate_limit_exceeded"),
    EngineClosed: (503, "shutting_down"),
    EngineFailed: (500, None),
}


def http_error(error: Exception) -> HttpError:
    """The error response for an exception; that of a bug reveals nothing about it."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, RunError):
        return HttpError(500, str(error))
    if not isinstance(error, InputError):
        return HttpError(500, "internal error; see the server's log")
    status, code = _STATUS.get(type(error), (400, None))
    headers: dict[str, str] = {}
    details: dict[str, Any] = {}
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(max(1, round(error.retry_after_seconds)))}
    if isinstance(error, EngineClosed):
        headers = {"Retry-After": "10"}
    if isinstance(error, PromptTooLong):
        details = {"n_prompt_tokens": error.tokens, "n_ctx": error.limit}
    return HttpError(status, str(error), code=code, headers=headers, details=details)
