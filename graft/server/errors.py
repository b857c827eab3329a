"""What the server says when it cannot do what was asked, in the shapes of three interfaces.

Knows the engine's refusals and the status code of each; knows nothing of routes.
"""

from collections.abc import Callable, Mapping
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

Body = dict[str, Any]


class HttpError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line for the person who asked.
        param: the field of the request that is at fault.
        code: a word for programs, as OpenAI's clients look for.
        headers: of the response.
        details: further fields of llama.cpp's shape.
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


def openai_body(error: HttpError) -> Body:
    """OpenAI's shape, in which `code` is a word or null.

    Reference: https://platform.openai.com/docs/guides/error-codes
    """
    kinds = {429: "rate_limit_error"}
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = kinds.get(error.status, default)
    content = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": content}


def vllm_body(error: HttpError) -> Body:
    """The shape of vLLM's adapter routes, in which `code` is the status."""
    kinds = {
        400: "InvalidUserInput",
        401: "AuthenticationError",
        403: "PermissionDeniedError",
        404: "NotFoundError",
        409: "ConflictError",
        503: "ServiceUnavailableError",
    }
    default = "InternalServerError" if error.status >= 500 else "BadRequestError"
    kind = kinds.get(error.status, default)
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.status,
        }
    }


def llama_cpp_body(error: HttpError) -> Body:
    """The shape of llama.cpp's server.

    Reference: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
    """
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "unavailable_error",
        503: "unavailable_error",
    }
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = kinds.get(error.status, default)
    content = {"code": error.status, "message": error.message, "type": kind, **error.details}
    return {"error": content}


SHAPES: dict[str, Callable[[HttpError], Body]] = {
    "/v1/load_lora_adapter": vllm_body,
    "/v1/unload_lora_adapter": vllm_body,
    "/lora-adapters": llama_cpp_body,
    "/health": llama_cpp_body,
}


def error_body(error: HttpError, path: str) -> Body:
    """The error in the shape of the interface that a path belongs to; OpenAI's by default."""
    return SHAPES.get(path, openai_body)(error)


# From refusal to status and code. Any other InputError is a bad request.
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
    """What any exception is in HTTP; one that is a bug tells nothing of itself."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, RunError):
        return HttpError(500, str(error))
    if not isinstance(error, InputError):
        return HttpError(500, "internal error; the server's log tells more")
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
