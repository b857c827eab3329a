"""Measures a server once for `graft bench` and prints its figures as one line of JSON.

Graft's server and mlx-lm's get the same requests for several adapters, first all at once, then one
after another. For Graft's engine, without HTTP, it also measures how much slower a step is if every
row uses a different adapter, and how long a token is delayed while an adapter is loaded.
"""

import argparse
import http.client
import itertools
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.bench.peers import RANK
from graft.bench.work import Figures

MIXED_ROWS = 16
START_SECONDS = 120.0
PROMPTS = [f"Q: What is {name}?\nA:" for name in ("read", "an iterator of rows", "join", "a lock")]
MLX_LM = (
    "import ctypes, sys\n"
    "if sys.argv[1]: ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)\n"
    "del sys.argv[1]\n"
    "from mlx_lm.server import main\n"
    "main()"
)


def main() -> None:
    """Run the tool named by the first argument."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=list(COMMANDS))
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path, help="folder for the adapters")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--blas", default="", help="BLAS library to load before MLX")
    arguments = parser.parse_args()
    paths = write_adapters(arguments.model, arguments.scratch / "adapters", MIXED_ROWS)
    served = list(paths.values())[: arguments.adapters]
    tokens = arguments.tokens
    command = COMMANDS[arguments.tool](arguments.model, served, blas=arguments.blas)
    with serving(command) as port:
        bodies = [
            body_for(arguments.tool, number, adapters=served, tokens=tokens)
            for number in range(arguments.requests)
        ]
        figures = server_figures(port, bodies)
    if arguments.tool == "graft":
        figures |= decode_figures(arguments.model, paths, tokens=2 * tokens)
    print(json.dumps(figures))


def write_adapters(model: Path, folder: Path, count: int) -> dict[str, Path]:
    """Write random adapters of every linear layer, each to a folder; returns these by name."""
    from graft.adapters.attach import attach, lora_layers
    from graft.adapters.files import save_adapter
    from graft.adapters.targets import plan
    from graft.pretrained.load import read_model

    import mlx.core as mx

    base: Any = read_model(model)[0]
    attach(base, plan(base, rank=RANK, num_layers=-1))
    names = [f"adapter-{number:02}" for number in range(count)]  # sorted, as a folder lists them
    paths = {name: folder / name for name in names}
    for number, path in enumerate(paths.values()):
        path.mkdir(parents=True, exist_ok=True)
        keys = mx.random.split(mx.random.key(number), len(lora_layers(base)))
        for (_, layer), key in zip(lora_layers(base), keys, strict=True):
            tensors = layer.tensors()
            noise = 0.02 * mx.random.normal(tensors["lora_b"].shape, key=key)
            layer.load({**tensors, "lora_b": noise})
        save_adapter(path / "adapters.safetensors", base)
    return paths


def graft_command(model: Path, adapters: Sequence[Path], *, blas: str) -> list[str]:
    """The command line of Graft's server, which finds the BLAS itself."""
    del blas
    folder = str(adapters[0].parent)
    limits = ["--max-adapters", str(len(adapters)), "--max-rank", str(RANK)]
    arguments = ["--model", str(model), "--adapters", folder, *limits]
    return [sys.executable, "-m", "graft", "serve", *arguments]


def mlx_lm_command(model: Path, adapters: Sequence[Path], *, blas: str) -> list[str]:
    """The command line of mlx-lm's server with Graft's BLAS; it loads adapters on request."""
    del adapters
    return [sys.executable, "-c", MLX_LM, blas, "--model", str(model), "--log-level", "ERROR"]


COMMANDS = {"graft": graft_command, "mlx-lm": mlx_lm_command}


def body_for(tool: str, number: int, *, adapters: Sequence[Path], tokens: int) -> dict[str, Any]:
    """The request with a number; the adapters take turns."""
    path = adapters[number % len(adapters)]
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": tokens, "temperature": 0}
    return {**body, "model": path.name} if tool == "graft" else {**body, "adapters": str(path)}


@contextmanager
def serving(command: Sequence[str]) -> Iterator[int]:
    """Run a server on a free port until the block ends; yields the port.

    Raises:
        RuntimeError: the server does not answer.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    child = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not answer: {' '.join(command[:4])}")
            time.sleep(0.05)
        yield port
    finally:
        child.terminate()
        child.wait()


def server_figures(port: int, bodies: Sequence[Mapping[str, Any]]) -> Figures:
    """Tokens per second of all requests at once, and of the same requests one after another."""
    _post(port, bodies[0])
    with ThreadPoolExecutor(len(bodies)) as pool:
        start = time.perf_counter()
        together = sum(pool.map(lambda body: _post(port, body), bodies))
        rate = together / (time.perf_counter() - start)
    start = time.perf_counter()
    alone = sum(_post(port, body) for body in bodies)
    return {
        "tokens_per_second": rate,
        "one_by_one_tokens_per_second": alone / (time.perf_counter() - start),
    }


def decode_figures(model: Path, adapters: Mapping[str, Path], *, tokens: int) -> Figures:
    """How much mixed adapters slow a step down, and how much loading an adapter does.

    Args:
        model: the base model's folder.
        adapters: one for each row, by name.
        tokens: the length of each answer.

    Returns:
        `mixed_over_single`: the speed with a different adapter in each row, relative to the speed
        with the same adapter in all rows. `longest_step_while_loading`: the longest step while an
        adapter is loaded, relative to the median step.
    """
    from graft.engine.engine import Engine
    from graft.pretrained.load import load_model

    names = list(adapters)
    base, tokenizer, _ = load_model(model)
    limits = {"max_adapters": len(names) + 1, "max_rows": len(names), "prompt_cache_bytes": 0}
    with Engine(base, tokenizer, **limits) as engine:
        for name, path in adapters.items():
            engine.load_adapter(name, path)
        single, mixed = [names[0]] * len(names), names
        steps: dict[str, list[float]] = {"single": [], "mixed": []}
        for _ in range(3):
            for kind, rows in (("single", single), ("mixed", mixed)):
                steps[kind].append(statistics.median(step_seconds(engine, rows, tokens)))

        def swap() -> None:
            for _ in range(3):
                engine.load_adapter("new", adapters[names[0]])
                engine.unload_adapter("new")

        longest = max(step_seconds(engine, mixed, 3 * tokens, meanwhile=swap))
    ordinary = statistics.median(steps["mixed"])
    return {
        "mixed_over_single": statistics.median(steps["single"]) / ordinary,
        "longest_step_while_loading": longest / ordinary,
    }


def step_seconds(
    engine: Any, rows: Sequence[str], tokens: int, *, meanwhile: Callable[[], None] | None = None
) -> list[float]:
    """Seconds between the tokens of one row, after the first few, while all rows generate."""
    streams = [
        engine.submit([5 + n] * 16, adapters={name: 1.0}, max_tokens=tokens)
        for n, name in enumerate(rows)
    ]
    stamps = [time.perf_counter() for _ in range(4) if streams[0].get()][3:]
    thread = threading.Thread(target=meanwhile or (lambda: None))
    thread.start()
    stamps += [time.perf_counter() for _ in streams[0]]
    thread.join()
    for stream in streams[1:]:
        stream.result()
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _post(port: int, body: Mapping[str, Any]) -> int:
    """Send a request; returns the number of tokens generated.

    A refused connection is retried: mlx-lm's server queues only 5.
    """
    headers = {"Content-Type": "application/json"}
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
            break
        except ConnectionResetError:
            time.sleep(0.02)
        finally:
            connection.close()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {answer}")
    tokens: int = answer["usage"]["completion_tokens"]
    return tokens


if __name__ == "__main__":
    main()
