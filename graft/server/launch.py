"""Starts the HTTP server: checks who can reach it, opens the port, runs uvicorn."""

import asyncio
import ipaddress
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from graft.errors import InputError

if TYPE_CHECKING:
    from graft.server.service import Service

    import uvicorn

KEY_VARIABLE = "GRAFT_API_KEY"
LOOPBACK = "127.0.0.1"
# After the time that running requests get: for sending their last bytes.
SENDING_SECONDS = 5


def check_extra() -> None:
    """Refuse to start if the packages of the `serve` extra are not installed.

    Raises:
        InputError: naming the missing package.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"graft serve needs {error.name}: pip install 'graft-mlx[serve]'"
        ) from error


def check_reach(host: str, api_key: str | None) -> None:
    """Refuse to listen on an address that other machines can reach without an API key.

    Raises:
        InputError: the host is not a loopback address and there is no key, or the key cannot be
            sent in a header.
    """
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip()
    ):
        raise InputError("--api-key must be printable ASCII: clients send it in a header")
    if api_key is None and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines: add --api-key KEY, set "
            f"{KEY_VARIABLE}, or listen on {LOOPBACK}"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(host: str) -> frozenset[str] | None:
    """The names by which a server on a loopback address may be called; `None` allows any."""
    return frozenset({"localhost", "127.0.0.1", "::1", host}) if is_loopback(host) else None


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, before the model is loaded, so that a taken port fails at once.

    Raises:
        InputError: the address does not exist, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error


def model_name(model: str | None) -> str:
    """The base model's name in requests: its Hub name, or the name of its folder."""
    from graft.pretrained.folder import EMBEDDED_MODEL

    if model is None:
        return EMBEDDED_MODEL.name
    return Path(model).resolve().name if Path(model).is_dir() else model


def make_server(service: "Service", *, shutdown_seconds: float) -> "uvicorn.Server":
    """A server that shuts down gracefully: running requests may finish, queued ones are refused.

    Args:
        service: what it serves.
        shutdown_seconds: how long running requests may take after a signal.
    """
    from graft.server.app import make_app
    from graft.server.connections import (
        ACCEPTED_AT_ONCE,
        ONCE_PER_SECOND,
        LimitedProtocol,
        connection_limit,
    )

    import uvicorn

    class Protocol(LimitedProtocol):
        most_connections = connection_limit()

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            closing = asyncio.to_thread(service.engine.close, timeout=shutdown_seconds)
            await asyncio.gather(closing, super().shutdown(sockets))

    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        http=Protocol,
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=int(shutdown_seconds) + SENDING_SECONDS,
    )
    for name in ("uvicorn.error", "asyncio"):  # clients can make both of them log
        logging.getLogger(name).addFilter(ONCE_PER_SECOND)
    return Server(config)
