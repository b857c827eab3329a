"""Prompts, solo runs to compare with, and an engine that stops between steps."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from graft.engine.engine import Engine
from graft.engine.streams import Stream

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from support.served import PLANS, Adapter, attached

NAMES = list(PLANS)
WAIT = 60.0  # seconds, after which a test fails instead of hanging


def prompt_of(number: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(number).integers(3, 500, length)]


def alone(
    model: nn.Module, prompt: Sequence[int], adapter: Adapter | None, count: int, scale: float = 1.0
) -> list[int]:
    """The greedy continuation by mlx-lm, up to an end token."""
    if adapter is not None:
        with attached(model, adapter, scale):
            return alone(model, prompt, None, count)
    tokens: list[int] = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=count):
        if int(token) == 2:
            break
        tokens.append(int(token))
    return tokens


def ids_of(stream: Stream) -> list[int]:
    return [token.id for token in stream.result().tokens]


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)


def held_up(engine: Engine) -> tuple[threading.Event, Callable[[], None]]:
    """Stop the engine before its next step: (set once it has stopped, lets it go on)."""
    stopped, go = threading.Event(), threading.Event()
    step = engine._loop.batcher.step

    def held() -> None:
        stopped.set()
        assert go.wait(WAIT)
        engine._loop.batcher.step = step  # type: ignore[method-assign]
        step()

    engine._loop.batcher.step = held  # type: ignore[method-assign]
    return stopped, go.set
