"""The server as an ASGI app: routes, access control, and how errors are answered."""

import hmac
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

from graft.errors import InputError, RunError
from graft.server.errors import OPENAI_ERRORS, HttpError, http_error
from graft.server.routes import Route, all_routes, find_route
from graft.server.service import CLIENT_GONE, Service

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as AppRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def make_app(service: Service) -> Starlette:
    """The app for a service, which holds all of its state."""
    routes = all_routes()
    app = Starlette(
        routes=[AppRoute(route.path, route.handler, methods=[route.method]) for route in routes],
        middleware=[Middleware(Gate, service=service, routes=routes)],
        exception_handlers={
            HttpError: _answer_error,
            InputError: _answer_error,
            RunError: _answer_error,
            Exception: _answer_error,  # Starlette then logs it
            ClientDisconnect: _answer_nobody,
            HTTPException: _answer_routing_error,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.routes = routes
    return app


class Gate:
    """Middleware that checks who may call, and counts responses.

    Args:
        app: the app behind the gate.
        service: has the API key and the allowed hosts.
        routes: all routes of the server.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: Sequence[Route]) -> None:
        self._app = app
        self._service = service
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        route = find_route(self._routes, scope["path"])
        path = "other" if route is None or "{" in route.path else route.path

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.responses[path, message["status"]] += 1
            await send(message)

        try:
            self._check(Headers(scope=scope), needs_key=route is None or route.needs_key)
        except HttpError as error:
            response = _error_response(error, Request(scope))
            return await response(scope, receive, count_and_send)
        try:
            await self._app(scope, receive, count_and_send)
        except Exception:
            # The app has no answer for it, so Starlette sends one, outside of this middleware.
            self._service.responses[path, 500] += 1
            raise

    def _check(self, headers: Headers, *, needs_key: bool) -> None:
        settings = self._service.settings
        if settings.api_key is not None:
            if needs_key:
                _check_key(headers.get("authorization", ""), settings.api_key)
        elif settings.hosts is not None:
            _check_host(headers, settings.hosts)


def _check_key(header: str, key: str) -> None:
    """Check an API key, in a time that does not depend on how much of a wrong key is right."""
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
    """Refuse pages of other sites: cross-origin requests, and DNS rebinding."""
    host = headers.get("host", "")
    if _name_of(host) not in hosts:
        raise HttpError(403, f"this server does not answer to the name {host!r}")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise HttpError(403, f"pages of {origin!r} may not call this server")


def _name_of(host: str) -> str | None:
    """The name in a Host header, without the port; `None` if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _error_response(error: HttpError, request: Request) -> JSONResponse:
    route = find_route(request.app.state.routes, request.url.path)
    errors = OPENAI_ERRORS if route is None else route.errors
    return JSONResponse(errors.body(error), error.status, headers=error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    return _error_response(http_error(error), request)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    call = f"{request.method} {request.url.path}"
    messages = {404: f"Invalid URL ({call})", 405: f"Method not allowed ({call})"}
    message = messages.get(error.status_code, HTTPStatus(error.status_code).phrase)
    return _error_response(HttpError(error.status_code, message, headers=error.headers), request)
