"""Who may call, what the page may load, and errors that are nobody's answer."""

import contextlib
import hashlib
import re
import socket
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

from graft.server.routes.page import PAGE

import pytest

from support.live_server import KEY, PROMPT, Live, serve

BODY = {"prompt": PROMPT, "max_tokens": 2}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    hosts = frozenset({"localhost", "127.0.0.1"})
    with serve(tmp_path_factory.mktemp("server"), hosts=hosts) as live:
        yield live


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(tmp_path_factory.mktemp("locked"), api_key=KEY, adapters={}) as locked:
        yield locked


# The key


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/metrics"),
        ("GET", "/lora-adapters"),
        ("POST", "/lora-adapters"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/nowhere"),
        ("GET", "//v1/models"),
    ],
)
def test_nothing_is_told_without_the_key(locked: Live, method: str, path: str) -> None:
    status, headers, content = locked.call(method, path, BODY if method == "POST" else None)
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert "send the header Authorization: Bearer KEY" in content["error"]["message"]


@pytest.mark.parametrize(
    "header", [f"Bearer {KEY}x", "Bearer a", f"Bearer {KEY.upper()}", "Bearer \xfc"]
)
def test_a_wrong_key_is_refused(locked: Live, header: str) -> None:
    status, content = locked.get("/v1/models", Authorization=header)
    assert status == 401
    assert content["error"] == {
        "message": "Incorrect API key provided.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_the_key_opens(locked: Live) -> None:
    assert locked.get("/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
    assert locked.get("/v1/models", Authorization=f"bearer {KEY}")[0] == 200


def test_the_page_and_the_health_need_no_key(locked: Live) -> None:
    assert locked.get("/")[0] == 200
    assert locked.get("/health") == (200, {"status": "ok"})


def test_llama_cpp_s_clients_get_their_shape_of_a_missing_key(locked: Live) -> None:
    error = locked.get("/lora-adapters")[1]["error"]
    assert (error["code"], error["type"]) == (401, "authentication_error")


# Other sites


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1"])
def test_a_name_that_was_made_to_lead_here_is_refused(live: Live, host: str) -> None:
    status, content = live.get("/v1/models", Host=host)
    assert status == 403
    assert "does not answer to the name" in content["error"]["message"]


def test_a_page_of_another_site_is_refused(live: Live) -> None:
    assert live.post("/v1/completions", BODY, Origin="https://evil.example")[0] == 403
    assert live.post("/v1/completions", BODY, Origin="null")[0] == 403
    assert live.post("/v1/completions", BODY, Origin=f"http://127.0.0.1:{live.port}")[0] == 200


# Routes


def test_what_is_not_there_is_told_in_openai_s_shape(live: Live) -> None:
    status, content = live.get("/v1/nothing")
    assert status == 404
    assert content["error"] == {
        "message": "Invalid URL (GET /v1/nothing)",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


def test_a_wrong_method_is_told(live: Live) -> None:
    status, headers, content = live.call("GET", "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    assert content["error"]["message"] == "Method not allowed (GET /v1/completions)"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_is_answered_and_ends_nothing(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(live.engine, "submit", fail)
        status, content = live.post("/v1/completions", BODY)
    assert status == 500
    assert content["error"]["type"] == "server_error"
    assert "a bug" not in content["error"]["message"]
    assert live.service.responses["/v1/completions", 500] == 1
    assert live.post("/v1/completions", BODY)[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\0" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
    ],
    ids=["zeros", "version", "length", "header", "path", "half"],
)
def test_what_is_no_request_ends_nothing(live: Live, sent: bytes) -> None:
    answer = b""
    with socket.create_connection(("127.0.0.1", live.port), 30) as connection:
        with contextlib.suppress(OSError):  # refused before it was all sent
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(4096)
    assert answer[:10] in (b"HTTP/1.1 4", b"")
    assert live.get("/health")[0] == 200


# The page


def test_the_page_loads_nothing_from_elsewhere(live: Live) -> None:
    status, headers, page = live.call("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?!data:)(?:https?:)?//""", page) == []
    assert "<style></style>" not in page and "<script></script>" not in page


def test_the_page_s_policy_lets_its_own_script_run_and_no_other(live: Live) -> None:
    _, headers, page = live.call("GET", "/")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("css", "js"):
        text = (PAGE / f"page.{kind}").read_text(encoding="utf-8")
        digest = b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert text in page
        assert f"'sha256-{digest}'" in policy
