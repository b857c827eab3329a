"""The routes: every function marked with `@route` in a module of this folder is served.

The mark declares all that the server knows of a route: its method and path, whether it needs the
API key, and the format of its errors. Authentication, metrics and errors read the declarations.
"""

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from graft.server.errors import OPENAI_ERRORS, ErrorFormat

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """A route of the server.

    Attributes:
        method: `GET` or `POST`.
        path: in Starlette's syntax, where `{name}` is a parameter.
        handler: answers a request.
        errors: the format of its errors.
        needs_key: whether the API key is required, if the server has one.
    """

    method: str
    path: str
    handler: Handler
    errors: ErrorFormat
    needs_key: bool

    def matches(self, path: str) -> bool:
        """Whether a request's path is this route's."""
        return compile_path(self.path)[0].fullmatch(path) is not None


_ROUTES: list[Route] = []


def route(
    method: str, path: str, *, errors: ErrorFormat = OPENAI_ERRORS, needs_key: bool = True
) -> Callable[[Handler], Handler]:
    """Mark a function as the handler of a route; the arguments are those of `Route`."""

    def register(handler: Handler) -> Handler:
        _ROUTES.append(Route(method, path, handler, errors, needs_key))
        return handler

    return register


def find_route(routes: Iterable[Route], path: str) -> Route | None:
    """The first route that a request's path matches, whatever its method."""
    return next((route for route in routes if route.matches(path)), None)


def all_routes() -> list[Route]:
    """All routes of this folder's modules."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return list(_ROUTES)
