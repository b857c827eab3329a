"""`graft serve`: serves a base model and many adapters over HTTP.

python -m graft serve --model build/sapling-4bit --adapters adapters
"""

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.cli.command import Parser, command
from graft.console import bytes_text, say
from graft.errors import InputError
from graft.runtime.interrupts import Interrupts
from graft.server.launch import (
    KEY_VARIABLE,
    LOOPBACK,
    allowed_hosts,
    check_extra,
    check_reach,
    listen,
    make_server,
    model_name,
)

if TYPE_CHECKING:
    from graft.engine.engine import Engine
    from graft.server.service import Service


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Serve a base model and many adapters over HTTP.")
    add = parser.add_argument
    count, seconds = _at_least(1, int), _at_least(0, float)
    add("--model", metavar="BASE", help="folder or Hub name (default: the included base model)")
    add(
        "--name",
        metavar="NAME",
        help="the base model's name in requests (default: its Hub name or its folder's name)",
    )
    add("--adapters", metavar="DIR", help="load the adapters in this folder, or this one adapter")
    add("--max-adapters", type=count, default=8, metavar="N", help="adapters loaded at a time")
    add("--max-rank", type=count, default=64, metavar="N", help="highest adapter rank accepted")
    add("--host", default=LOOPBACK, metavar="ADDRESS", help="address to listen on")
    add("--port", type=_port, default=8080, metavar="N", help="port to listen on; 0 picks one")
    add(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send (default: ${KEY_VARIABLE}, which `ps` does not show)",
    )
    add(
        "--allow-load",
        action="store_true",
        help="let clients load adapters from the --adapters folder, and unload them",
    )
    add("--max-rows", type=count, default=32, metavar="N", help="requests computed in one step")
    add("--max-queue", type=count, default=256, metavar="N", help="requests waiting at most")
    add(
        "--max-prompt-tokens",
        type=count,
        metavar="N",
        help="most tokens in a prompt (default: the model's context)",
    )
    add("--max-tokens", type=count, default=4096, metavar="N", help="most tokens in an answer")
    add("--max-body-mb", type=count, default=4, metavar="N", help="largest request body, in MB")
    add(
        "--prompt-cache-mb",
        type=_at_least(0, int),
        default=1024,
        metavar="N",
        help="memory for cached prompts, in MB",
    )
    add("--timeout", type=seconds, default=600.0, metavar="S", help="seconds an answer may take")
    add(
        "--shutdown-timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="seconds that running answers get after SIGTERM or Ctrl-C",
    )
    return parser


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; the API key may also come from the environment."""
    args = build_parser().parse_args(argv)
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE)
    return args


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal stops the server."""
    args = read_arguments(argv)
    check_reach(args.host, args.api_key)
    if args.allow_load and args.adapters is None:
        raise InputError(
            "--allow-load needs --adapters DIR: clients may load from that folder only"
        )
    check_extra()
    from graft.engine.adapter_folder import load_all

    listener = listen(args.host, args.port)
    with listener, _make_engine(args) as engine:
        for line in load_all(engine, args.adapters, limit=args.max_adapters):
            say(line)
        service = _make_service(engine, args)
        server = make_server(service, shutdown_seconds=args.shutdown_timeout)
        print(_describe(service, listener, args), flush=True)
        # uvicorn handles signals while it runs, and raises them again when it has shut down.
        with Interrupts() as interrupts:
            server.run(sockets=[listener])
    say("stopped")
    return interrupts.exit_status


def _make_engine(args: argparse.Namespace) -> "Engine":
    """The engine for the model on the command line.

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


def _make_service(engine: "Engine", args: argparse.Namespace) -> "Service":
    from graft.server.service import ServerSettings, Service

    settings = ServerSettings(
        model=args.name or model_name(args.model),
        adapters_folder=None if args.adapters is None else Path(args.adapters).resolve(),
        allow_load=args.allow_load,
        api_key=args.api_key,
        hosts=allowed_hosts(args.host),
        max_body_bytes=args.max_body_mb << 20,
        max_tokens=args.max_tokens,
        timeout_seconds=args.timeout,
    )
    return Service(engine, engine.tokenizer, settings)


def _describe(service: "Service", listener: socket.socket, args: argparse.Namespace) -> str:
    """What to print once the server is ready."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    settings = service.settings
    limit = bytes_text(service.engine.bank_bytes)
    source = f"from {settings.adapters_folder}" if settings.allow_load else "off (--allow-load)"
    lines = [
        f"adapters: up to {args.max_adapters} of rank {args.max_rank}, at most {limit}",
        f"loading by clients: {source}",
        f"API key: {'required' if settings.api_key else 'none, this machine only'}",
        f"{settings.model} at http://{shown}:{port}/ and http://{shown}:{port}/v1",
    ]
    return "\n".join(lines)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: 0 to 65535")
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
