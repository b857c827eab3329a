"""Each error in each interface's own shape."""

from graft.engine.errors import (
    AdapterAlreadyLoaded,
    AdapterBusy,
    AdapterDoesNotFit,
    AdapterNotFound,
    EngineClosed,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    RankTooLarge,
    TooManyAdapters,
)
from graft.errors import InputError, RunError
from graft.server.errors import (
    LLAMA_CPP_ERRORS,
    OPENAI_ERRORS,
    VLLM_ERRORS,
    HttpError,
    http_error,
)

import pytest

NOT_FOUND = HttpError(404, "there is none", param="model", code="model_not_found")


def test_openai_tells_a_kind_a_field_and_a_word() -> None:
    assert OPENAI_ERRORS.body(NOT_FOUND) == {
        "error": {
            "message": "there is none",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(
    "status, kind",
    [(400, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")],
)
def test_openai_s_kinds_follow_the_status(status: int, kind: str) -> None:
    error = OPENAI_ERRORS.body(HttpError(status, "no"))["error"]
    assert error == {"message": "no", "type": kind, "param": None, "code": None}


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "InvalidUserInput"),
        (403, "PermissionDeniedError"),
        (404, "NotFoundError"),
        (409, "ConflictError"),
        (500, "InternalServerError"),
    ],
)
def test_vllm_s_code_is_the_status(status: int, kind: str) -> None:
    error = HttpError(status, "no", param="lora_name", code="a_word")
    assert VLLM_ERRORS.body(error) == {
        "error": {"message": "no", "type": kind, "param": "lora_name", "code": status}
    }


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (500, "server_error"),
        (503, "unavailable_error"),
    ],
)
def test_llama_cpp_s_code_is_the_status(status: int, kind: str) -> None:
    assert LLAMA_CPP_ERRORS.body(HttpError(status, "no")) == {
        "error": {"code": status, "message": "no", "type": kind}
    }


@pytest.mark.parametrize(
    "refusal, status, code",
    [
        (AdapterNotFound("x"), 404, "model_not_found"),
        (AdapterAlreadyLoaded("x"), 400, "adapter_already_loaded"),
        (AdapterBusy("x"), 409, "adapter_busy"),
        (TooManyAdapters("x"), 409, "too_many_adapters"),
        (RankTooLarge("x"), 400, None),
        (AdapterDoesNotFit("x"), 400, None),
        (EngineFailed("x"), 500, None),
        (InputError("x"), 400, None),
        (RunError("x"), 500, None),
    ],
)
def test_each_refusal_has_a_status(refusal: Exception, status: int, code: str | None) -> None:
    error = http_error(refusal)
    assert (error.status, error.code, error.message) == (status, code, "x")


def test_a_bug_tells_nothing_of_itself() -> None:
    error = http_error(ZeroDivisionError("a secret"))
    assert (error.status, error.message) == (500, "internal error; see the server's log")


def test_who_may_come_back_is_told_when() -> None:
    full = http_error(QueueFull("full", 2.6))
    assert (full.status, full.headers) == (429, {"Retry-After": "3"})
    assert http_error(QueueFull("full", 0.0)).headers == {"Retry-After": "1"}
    assert http_error(EngineClosed("closing")).headers == {"Retry-After": "10"}


def test_a_long_prompt_tells_its_tokens_and_the_limit() -> None:
    error = http_error(PromptTooLong("too long", tokens=700, limit=512))
    assert LLAMA_CPP_ERRORS.body(error)["error"] == {
        "code": 400,
        "message": "too long",
        "type": "invalid_request_error",
        "n_prompt_tokens": 700,
        "n_ctx": 512,
    }
    assert OPENAI_ERRORS.body(error)["error"]["code"] == "context_length_exceeded"
