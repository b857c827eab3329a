"""The command that serves a model with many adapters over HTTP.

python -m graft serve --model build/sapling-4bit --adapters adapters
"""

import argparse
import asyncio
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.cli.command import Parser, command
from graft.errors import InputError, first_line
from graft.runtime.interrupts import Interrupts

if TYPE_CHECKING:
    from graft.engine.engine import Engine
    from graft.server.service import Service, Settings

    import uvicorn

KEY_VARIABLE = "GRAFT_API_KEY"
LOOPBACK = "127.0.0.1"
# Beyond the time that running requests get, for their last bytes to be sent.
SENDING_SECONDS = 5


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Serve one base model with many adapters over HTTP.")
    add = parser.add_argument
    whole, seconds = _at_least(1, int), _at_least(0, float)
    add("--model", metavar="BASE", help="folder or Hub name (default: the embedded base model)")
    add("--name", metavar="TEXT", help="the base's name in requests (default: that of its folder)")
    add("--adapters", metavar="DIR", help="folder of adapters, each a folder or file; or one such")
    add("--max-adapters", type=whole, default=8, metavar="N", help="loaded at a time (8)")
    add("--max-rank", type=whole, default=64, metavar="N", help="of an adapter (64)")
    add("--host", default=LOOPBACK, metavar="ADDRESS", help=f"to listen at ({LOOPBACK})")
    add("--port", type=_port, default=8080, metavar="N", help="to listen at, 0 for any (8080)")
    add(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"that clients must send; also from ${KEY_VARIABLE}, which `ps` does not show",
    )
    add("--allow-load", action="store_true", help="clients may load from --adapters, and unload")
    add("--max-rows", type=whole, default=32, metavar="N", help="requests in a step (32)")
    add("--max-queue", type=whole, default=256, metavar="N", help="requests that wait (256)")
    add(
        "--max-prompt-tokens",
        type=whole,
        metavar="N",
        help="of a request (default: the model's context)",
    )
    add("--max-tokens", type=whole, default=4096, metavar="N", help="of an answer (4096)")
    add("--max-body-mb", type=whole, default=4, metavar="N", help="of a request (4)")
    add(
        "--prompt-cache-mb",
        type=_at_least(0, int),
        default=1024,
        metavar="N",
        help="known prompts (1024)",
    )
    add("--timeout", type=seconds, default=600.0, metavar="S", help="of an answer, seconds (600)")
    add(
        "--shutdown-timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="for running answers at SIGTERM or Ctrl-C, seconds (30)",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it."""
    args = build_parser().parse_args(argv)
    check_reach(args.host, args.api_key)
    if args.allow_load and args.adapters is None:
        raise InputError("--allow-load needs --adapters DIR: clients load from below it alone")
    _check_extra()
    listener = listen(args.host, args.port)
    with listener, make_engine(args) as engine:
        for line in load_all(engine, args.adapters, limit=args.max_adapters):
            print(line)
        service = make_service(engine, args)
        server = make_server(service, shutdown_seconds=args.shutdown_timeout)
        print(describe(service, listener, args), flush=True)
        # uvicorn handles signals while it runs, and hands them on when it has ended.
        with Interrupts() as interrupts:
            server.run(sockets=[listener])
    print("stopped")
    return interrupts.exit_status


def check_reach(host: str, api_key: str | None) -> None:
    """Refuse to be reachable from elsewhere without a key.

    Raises:
        InputError: the host is not this machine alone and there is no key, or the key cannot be
            sent in a header.
    """
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip()
    ):
        raise InputError("--api-key must be printable ASCII: clients send it in a header")
    if api_key is None and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines: add --api-key KEY, or set "
            f"{KEY_VARIABLE}, or listen at {LOOPBACK}"
        )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before the model is loaded: a port that is taken is told at once.

    Raises:
        InputError: there is no such address, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error


def make_engine(args: argparse.Namespace) -> "Engine":
    """The engine for the model that the command line names.

    Raises:
        InputError: the model cannot be loaded or served.
    """
    from graft.engine.engine import Engine
    from graft.pretrained.load import load_model

    model, tokenizer, _ = load_model(args.model)
    return Engine(
        model,
        tokenizer,
        max_adapters=args.max_adapters,
        max_rank=args.max_rank,
        max_rows=args.max_rows,
        max_queue=args.max_queue,
        max_prompt_tokens=args.max_prompt_tokens,
        prompt_cache_bytes=args.prompt_cache_mb << 20,
    )


def load_all(engine: "Engine", folder: str | None, *, limit: int) -> list[str]:
    """Load what is in a folder of adapters.

    Args:
        engine: to load into.
        folder: holds adapters, each a folder or a file, or is one; `None` for none.
        limit: on how many are loaded; the rest is told.

    Returns:
        What was loaded and what was left out, a line each.

    Raises:
        InputError: there is no such folder, or not one adapter in it can be loaded.
    """
    if folder is None:
        return []
    found = find_adapters(Path(folder))
    lines: list[str] = []
    left_out: list[str] = []
    for name, path in found.items():
        if len(lines) == limit:
            left_out.append(f"not loaded: {name}: there is room for {limit} (--max-adapters)")
            continue
        try:
            info = engine.load_adapter(name, path)
        except InputError as error:
            left_out.append(f"not loaded: {name}: {first_line(error)}")
        else:
            lines.append(f"adapter {info.id}: {name}, rank {info.rank}")
    if found and not lines:
        raise InputError(f"no adapter in {folder} can be served: {'; '.join(left_out)}")
    return [*lines, *left_out]


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters in a folder by name: its own, or those of the folders and files in it.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"--adapters {folder} is no folder")
    if _is_adapter(folder):
        return {folder.resolve().name: folder.resolve()}
    inside = sorted(path for path in folder.resolve().iterdir() if not path.name.startswith("."))
    return {path.name if path.is_dir() else path.stem: path for path in inside if _is_adapter(path)}


def make_service(engine: "Engine", args: argparse.Namespace) -> "Service":
    """What the routes work with, as the command line says."""
    from graft.server.service import Service, Settings

    local = is_loopback(args.host)
    settings = Settings(
        model=args.name or model_name(args.model),
        adapters_folder=None if args.adapters is None else Path(args.adapters).resolve(),
        allow_load=args.allow_load,
        api_key=args.api_key,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", args.host}) if local else None,
        max_body_bytes=args.max_body_mb << 20,
        max_tokens=args.max_tokens,
        timeout_seconds=args.timeout,
    )
    return Service(engine, engine.tokenizer, settings)


def model_name(model: str | None) -> str:
    """What clients call the base: its name on the Hub, or that of its folder."""
    from graft.pretrained.load import EMBEDDED_MODEL

    if model is None:
        return EMBEDDED_MODEL.name
    return Path(model).resolve().name if Path(model).is_dir() else model


def make_server(service: "Service", *, shutdown_seconds: float) -> "uvicorn.Server":
    """A server that ends well: what runs may finish, what waits is refused.

    Args:
        service: to serve.
        shutdown_seconds: that running requests have when it is told to end.
    """
    from graft.server.app import make_app

    import uvicorn

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
        timeout_graceful_shutdown=int(shutdown_seconds) + SENDING_SECONDS,
    )
    return Server(config)


def describe(service: "Service", listener: socket.socket, args: argparse.Namespace) -> str:
    """What a person who started the server wants to know."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    settings = service.settings
    limit = service.engine.bank_bytes / 1e9
    lines = [
        f"adapters may take {limit:.2f} GB: {args.max_adapters} of rank {args.max_rank}",
        f"loading while it runs: {_loading(settings)}",
        f"API key: {'needed' if settings.api_key else 'none, this machine only'}",
        f"{settings.model} at http://{shown}:{port}/ and http://{shown}:{port}/v1",
    ]
    return "\n".join(lines)


def _loading(settings: "Settings") -> str:
    return f"from {settings.adapters_folder}" if settings.allow_load else "off (--allow-load)"


def _is_adapter(path: Path) -> bool:
    from graft.adapters.formats import find_file

    if path.is_file():
        return path.suffix in (".npz", ".safetensors", ".gguf")
    try:
        find_file(path)
    except InputError:
        return False
    return True


def _check_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"graft serve needs {error.name}: pip install 'graft-mlx[serve]'"
        ) from error


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: 0 to 65535")
    return number


def _at_least(least: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be {least:g} or more")
        return value

    return convert


if __name__ == "__main__":
    sys.exit(main())
