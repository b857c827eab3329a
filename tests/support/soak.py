"""A soak test: valid, malformed and impatient clients at once, while adapters come and go."""

import gc
import json
import random
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from support.live_server import Live, serve

ADAPTERS = {
    "one": ("q_proj", 1),
    "two": ("q_proj,v_proj", 4),
    "three": ("all-linear", 8),
    "four": ("mlp.up_proj,mlp.down_proj", 16),
}
# Loaded and unloaded during the test, from the same folder as the adapter above.
COMING = {f"coming-{name}": name for name in ("one", "three")}
PROMPTS = ("The quick brown fox", "def relu(x):", "Applies the", "日本語 and 🙂")
LENGTHS = (1, 7, 24)
SCALES = (1.0, -0.5)
MALFORMED = (
    b"",
    b"{",
    b"\xff\xfe",
    b"[1]",
    b'{"prompt": 5}',
    b'{"prompt": "Hi", "temperature": "hot"}',
    b'{"prompt": "Hi", "max_tokens": -1}',
    b'{"prompt": "Hi", "lora": [{"id": "x"}]}',
    b'{"prompt": "' + b"x" * 9000 + b'"}',
    b'{"prompt": [999999]}',
    b'{"prompt": "\\ud800"}',
)


class Soak:
    """A server and its clients.

    Args:
        folder: folder for the model and adapters.
        seed: seed of all random choices.

    Attributes:
        problems: wrong responses.
        done: number of requests of each kind.
    """

    PROMPT_CACHE_BYTES = 1 << 18
    KINDS: ClassVar[tuple[str, ...]] = (
        *("answer", "stream", "score", "unknown", "malformed", "hang_up", "cancel"),
        *("load", "unload", "coming"),
    )
    WEIGHTS: ClassVar[tuple[int, ...]] = (8, 8, 3, 2, 3, 3, 3, 2, 2, 2)

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.problems: list[str] = []
        self.done: Counter[str] = Counter()
        self._folder = folder
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._before = set(threading.enumerate())

    def __enter__(self) -> "Soak":
        self._stack = ExitStack()
        engine = {"max_rows": 6, "max_queue": 1000, "prompt_cache_bytes": self.PROMPT_CACHE_BYTES}
        settings = {"allow_load": True, "max_body_bytes": 8000}
        self.live: Live = self._stack.enter_context(
            serve(self._folder, adapters=ADAPTERS, engine_settings=engine, **settings)
        )
        self._expected = self._answer_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def work(self, requests: int) -> None:
        """Send requests, eight at a time, and wait until the engine is idle."""
        kinds = self._random.choices(self.KINDS, self.WEIGHTS, k=requests)
        seeds = [self._random.random() for _ in kinds]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._one, kinds, seeds))
        self.live.wait_until(self.live.idle)

    def memory(self) -> int:
        """Bytes in use by MLX after unloading the adapters that come and go."""
        for name in COMING:
            self._post("/v1/unload_lora_adapter?wait=true", {"lora_name": name})
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    def threads_left(self) -> list[threading.Thread]:
        """Threads started since the beginning that do not end within some seconds."""
        left = [thread for thread in threading.enumerate() if thread not in self._before]
        for thread in left:
            thread.join(5)
        return [thread for thread in left if thread.is_alive()]

    def _answer_all(self) -> dict[tuple[str, str, float, int], str]:
        """The expected answer to each request, computed alone."""
        return {
            (prompt, name, scale, length): self.live.engine.generate(
                prompt, adapters={name: scale} if name else {}, max_tokens=length
            ).text
            for prompt in PROMPTS
            for name in ("", *ADAPTERS)
            for scale in (SCALES if name else (1.0,))
            for length in LENGTHS
        }

    def _one(self, kind: str, seed: float) -> None:
        try:
            getattr(self, f"_{kind}")(random.Random(seed))
        except Exception as error:
            self._blame(f"{kind}: {type(error).__name__}: {error}")
        with self._lock:
            self.done[kind] += 1

    def _blame(self, problem: str) -> None:
        with self._lock:
            self.problems.append(problem)

    def _post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.live.post(path, body)

    def _expect(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self._blame(f"{what}: {found!r} is not {expected!r}")

    def _choose(self, chance: random.Random) -> tuple[dict[str, Any], str]:
        """A random request and its expected answer."""
        prompt, name = chance.choice(PROMPTS), chance.choice(["", *ADAPTERS])
        scale = chance.choice(SCALES) if name else 1.0
        length = chance.choice(LENGTHS)
        body = {"prompt": prompt, "max_tokens": length, "temperature": 0}
        if name and scale == 1.0 and chance.random() < 0.5:
            body["model"] = name
        else:
            body["adapters"] = {name: scale} if name else {}
        return body, self._expected[prompt, name, scale, length]

    def _answer(self, chance: random.Random) -> None:
        body, expected = self._choose(chance)
        status, content = self._post("/v1/completions", body)
        found = content["choices"][0]["text"] if status == 200 else content
        self._expect(f"answer to {body}", found, expected)

    def _stream(self, chance: random.Random) -> None:
        body, expected = self._choose(chance)
        status, content = self._post("/v1/completions", {**body, "stream": True})
        parts = content.split("\n\n")[:-2] if status == 200 else []
        chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
        found = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        self._expect(f"stream for {body}", found, expected)

    def _score(self, chance: random.Random) -> None:
        body, _ = self._choose(chance)
        body |= {"max_tokens": 0, "echo": True, "logprobs": 1}
        status, content = self._post("/v1/completions", body)
        self._expect("status of scoring", status, 200)
        count = len(self.live.engine.encode(body["prompt"]))
        self._expect("scored", len(content["choices"][0]["logprobs"]["tokens"]), count)

    def _unknown(self, chance: random.Random) -> None:
        body, _ = self._choose(chance)
        body.pop("adapters", None)
        status, content = self._post("/v1/completions", {**body, "model": "nobody"})
        self._expect("unknown model", (status, content["error"]["code"]), (404, "model_not_found"))

    def _malformed(self, chance: random.Random) -> None:
        path = chance.choice(["/v1/completions", "/v1/chat/completions", "/lora-adapters"])
        status, content = self._post(path, chance.choice(MALFORMED))
        if path == "/lora-adapters" and status == 404:
            return
        self._expect("malformed", status in (400, 413) and "message" in content["error"], True)

    def _hang_up(self, chance: random.Random) -> None:
        body, _ = self._choose(chance)
        connection = self.live.connect("/v1/completions", {**body, "max_tokens": 400})
        connection.close()

    def _cancel(self, chance: random.Random) -> None:
        body, _ = self._choose(chance)
        body |= {"max_tokens": 400, "stream": True}
        with self.live.connect("/v1/completions", body) as connection:
            connection.recv(chance.choice([1, 500, 2000]))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *[0] * 7]))

    def _load(self, chance: random.Random) -> None:
        name = chance.choice(list(COMING))
        body = {"lora_name": name, "lora_path": COMING[name], "load_inplace": chance.random() < 0.3}
        status, content = self._post("/v1/load_lora_adapter", body)
        self._expect("load", status in (200, 400, 409), True)
        if status != 200:
            self._expect("load's error", content["error"]["code"], status)

    def _unload(self, chance: random.Random) -> None:
        wait = chance.choice(["", "?wait=true"])
        name = chance.choice(list(COMING))
        status, content = self._post(f"/v1/unload_lora_adapter{wait}", {"lora_name": name})
        self._expect("unload", status in (200, 404, 409), True)
        if status != 200:
            self._expect("unload's error", content["error"]["code"], status)

    def _coming(self, chance: random.Random) -> None:
        """Name an adapter that may not be loaded: its answer or a 404, never the base model's."""
        name, prompt, length = chance.choice(list(COMING)), chance.choice(PROMPTS), LENGTHS[1]
        body = {"prompt": prompt, "model": name, "max_tokens": length, "temperature": 0}
        status, content = self._post("/v1/completions", body)
        if status == 200:
            expected = self._expected[prompt, COMING[name], 1.0, length]
            self._expect(f"answer of {name}", content["choices"][0]["text"], expected)
        else:
            self._expect("coming", (status, content["error"]["code"]), (404, "model_not_found"))
