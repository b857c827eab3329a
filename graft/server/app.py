"""The server as an ASGI app: its routes, who may call them, and what becomes of errors."""

import base64
import hashlib
import hmac
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from graft.errors import InputError, RunError
from graft.server.errors import HttpError, error_body, http_error
from graft.server.routes.adapters import (
    list_lora_adapters,
    load_lora_adapter,
    scale_lora_adapters,
    unload_lora_adapter,
)
from graft.server.routes.monitoring import health, metrics
from graft.server.routes.openai import CLIENT_GONE, completions, model, models
from graft.server.service import Service

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = Path(__file__).parent / "page"
# What tells nothing that a key would protect.
OPEN_PATHS = ("/", "/health")
ROUTES = [
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", completions),
    ("POST", "/v1/load_lora_adapter", load_lora_adapter),
    ("POST", "/v1/unload_lora_adapter", unload_lora_adapter),
    ("GET", "/lora-adapters", list_lora_adapters),
    ("POST", "/lora-adapters", scale_lora_adapters),
]


def make_app(service: Service) -> Starlette:
    """The app around a service, which keeps nothing else."""
    page = read_page()

    async def show_page(request: Request) -> Response:
        return page

    routes = [Route("/", show_page)]
    routes += [Route(path, endpoint, methods=[verb]) for verb, path, endpoint in ROUTES]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, service=service)],
        exception_handlers={
            HttpError: _answer_error,
            InputError: _answer_error,
            RunError: _answer_error,
            Exception: _answer_error,  # and then to the log
            ClientDisconnect: _answer_nobody,
            HTTPException: _answer_routing_error,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Gate:
    """Lets in who may call, and counts what they were answered.

    Args:
        app: behind the gate.
        service: with the key and the hosts.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._paths = {path for _, path, _ in ROUTES if "{" not in path} | {"/"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.responses[path, message["status"]] += 1
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
        except HttpError as error:
            return await _error_response(error, scope["path"])(scope, receive, counting)
        await self._app(scope, receive, counting)

    def _check(self, headers: Headers, path: str) -> None:
        settings = self._service.settings
        if settings.api_key is not None:
            if path not in OPEN_PATHS:
                _check_key(headers.get("authorization", ""), settings.api_key)
        elif settings.hosts is not None:
            _check_host(headers, settings.hosts)


def _check_key(header: str, key: str) -> None:
    """Compare in a time that tells nothing of how much of a wrong key is right."""
    scheme, _, given = header.partition(" ")
    if not given or scheme.lower() != "bearer":
        raise HttpError(
            401,
            "this server needs an API key: send the header Authorization: Bearer KEY",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise HttpError(
            401,
            "Incorrect API key provided.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _check_host(headers: Headers, hosts: frozenset[str]) -> None:
    """Keep out other sites' pages: those that call across sites, and names made to lead here."""
    host = headers.get("host", "")
    if _name_of(host) not in hosts:
        raise HttpError(403, f"this server does not answer to the name {host!r}")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise HttpError(403, f"pages of {origin!r} may not call this server")


def _name_of(host: str) -> str | None:
    """The name in a Host header, without the port; `None` where it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def read_page() -> HTMLResponse:
    """The page, with style and script inside, and a policy that lets nothing else in."""
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    hashes = {}
    for kind, tag in (("css", "style"), ("js", "script")):
        text = (PAGE / f"page.{kind}").read_text(encoding="utf-8")
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>{text}</{tag}>")
        digest = hashlib.sha256(text.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return HTMLResponse(
        html,
        headers={
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        },
    )


def _error_response(error: HttpError, path: str) -> JSONResponse:
    return JSONResponse(error_body(error, path), error.status, headers=error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    return _error_response(http_error(error), request.url.path)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    messages = {404: f"Invalid URL ({what})", 405: f"Method not allowed ({what})"}
    message = messages.get(error.status_code, HTTPStatus(error.status_code).phrase)
    told = HttpError(error.status_code, message, headers=error.headers)
    return _error_response(told, request.url.path)
