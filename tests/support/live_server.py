"""A real server on a local port, with a tiny model and random adapters."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach, detach, lora_layers
from graft.adapters.files import save_adapter
from graft.adapters.targets import plan
from graft.engine.engine import Engine
from graft.pretrained.load import load_model
from graft.server.launch import listen, make_server
from graft.server.service import ServerSettings, Service

import mlx.core as mx
import mlx.nn as nn

from support.tiny import LLAMA, write_model

ADAPTERS = {"small": ("q_proj", 1), "large": ("all-linear", 8)}
KEY = "a secret"
PROMPT = "The quick brown"


def write_adapter(folder: Path, model: nn.Module, targets: str, rank: int, seed: int) -> Path:
    """Write an adapter with random A and B, large enough to change every answer."""
    folder.mkdir(parents=True)
    attach(model, plan(model, targets, rank=rank))
    mx.random.seed(seed)
    for _, layer in lora_layers(model):
        tensors = layer.tensors()
        layer.load({name: 0.3 * mx.random.normal(old.shape) for name, old in tensors.items()})
    save_adapter(folder / "adapters.safetensors", model)
    detach(model)
    return folder


class Live:
    """A running server, and a plain HTTP client for it."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port = service, port
        self.engine = service.engine
        self.folder = service.settings.adapters_folder

    def call(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Returns status, headers (names in lower case) and content, parsed if it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, named)
        response = connection.getresponse()
        received = response.read()
        connection.close()
        fields = {name.lower(): value for name, value in response.getheaders()}
        is_json = fields.get("content-type", "").startswith("application/json")
        return response.status, fields, json.loads(received) if is_json else received.decode()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, content = self.call("POST", path, body, **headers)
        return status, content

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        status, _, content = self.call("GET", path, **headers)
        return status, content

    def connect(self, path: str, body: Any) -> socket.socket:
        """Send a request without reading the response."""
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(sent)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + sent)
        return connection

    def wait_until(self, holds: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait until another thread has made a condition true."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.005)

    def idle(self) -> bool:
        stats = self.engine.stats()
        return stats.running == stats.queued == 0


@contextmanager
def serve(
    folder: Path,
    *,
    adapters: dict[str, tuple[str, int]] = ADAPTERS,
    engine_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Live]:
    """Serve a tiny model with adapters from `folder/adapters`."""
    model, tokenizer, _ = load_model(write_model(folder / "model", LLAMA))
    place = folder / "adapters"
    place.mkdir()
    for seed, (name, (targets, rank)) in enumerate(adapters.items(), 1):
        write_adapter(place / name, model, targets, rank, seed)
    with Engine(model, tokenizer, **(engine_settings or {})) as engine:
        for name in adapters:
            engine.load_adapter(name, place / name)
        named = {"model": "tiny", "adapters_folder": place.resolve(), **settings}
        with run(Service(engine, tokenizer, ServerSettings(**named))) as live:
            yield live


@contextmanager
def run(service: Service) -> Iterator[Live]:
    """Run a server for a service in a thread."""
    listener = listen("127.0.0.1", 0)
    server = make_server(service, shutdown_seconds=10)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Live(service, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
