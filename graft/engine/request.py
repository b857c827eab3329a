"""A request to the engine: what was asked for, checked, and how far its answer is.

Knows nothing of threads or batches.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.engine.adapter_bank import ScaledAdapters
from graft.engine.sampling import make_sampler
from graft.engine.streams import Continuation, Stream, TokenInfo
from graft.errors import InputError

import mlx.core as mx

MOST_ALTERNATIVES = 100


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and what is told of them.

    Attributes:
        max_tokens: how many to generate at most; 0 only reads the prompt.
        temperature: divides the log-probabilities; 0 takes the likeliest token.
        top_p: draw from the fewest of the likeliest tokens with this probability together.
        seed: of the draws; `None` draws one. A seed gives the same answer whatever else is in the
            batch.
        stop: strings to end before.
        logprobs: how many alternatives to tell at each token; `None` tells no log-probabilities.
        echo: whether to tell the prompt's tokens with their log-probabilities too.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    echo: bool = False

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            InputError: naming all of them.
        """
        problems = [
            f"{name} {value!r} must be {allowed}"
            for name, value, allowed, fits in (
                ("max_tokens", self.max_tokens, "0 or more", _whole(self.max_tokens, 0)),
                ("temperature", self.temperature, "0 or more", _within(self.temperature, math.inf)),
                ("top_p", self.top_p, "from 0 to 1", _within(self.top_p, 1)),
                ("seed", self.seed, "a whole number below 2**64", _optional(self.seed, 2**64 - 1)),
                (
                    "logprobs",
                    self.logprobs,
                    f"from 0 to {MOST_ALTERNATIVES}",
                    _optional(self.logprobs, MOST_ALTERNATIVES),
                ),
                (
                    "stop",
                    self.stop,
                    "a list of strings",
                    not isinstance(self.stop, str) and all(isinstance(s, str) for s in self.stop),
                ),
            )
            if not fits
        ]
        if problems:
            raise InputError("; ".join(problems))

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """What draws each token; the same function for all requests at temperature 0."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return make_sampler(self.temperature, seed=seed, top_p=self.top_p)


@dataclass(eq=False)
class Request:
    """One request on its way.

    Attributes:
        stream: where its answer goes.
        prompt: token ids.
        adapters: with what multiplies their own scales; those of scale 0 are left out.
        names: of the adapters, for counting.
        sampling: how tokens are chosen.
        continuation: from tokens to text.
        tokens: generated so far.
        started: when it got its row, in seconds of `time.perf_counter`.
    """

    stream: Stream
    prompt: list[int]
    adapters: ScaledAdapters
    names: tuple[str, ...]
    sampling: Sampling
    continuation: Continuation
    prompt_infos: list[TokenInfo] = field(default_factory=list)
    generated: int = 0
    started: float = 0.0

    @property
    def cache_key(self) -> frozenset[tuple[str, float]]:
        """The content of its adapters and their scales."""
        return frozenset((adapter.digest, scale) for adapter, scale in self.adapters)


def check_scales(adapters: Mapping[str, float]) -> None:
    """Refuse scales that are no finite numbers.

    Raises:
        InputError: naming all of them.
    """
    bad = [
        f"{name}={scale!r}"
        for name, scale in adapters.items()
        if not _is_number(scale) or not math.isfinite(scale)
    ]
    if bad:
        raise InputError(f"an adapter's scale must be a finite number, not {', '.join(bad)}")


def check_ids(prompt: Sequence[Any], vocabulary: int | None) -> list[int]:
    """A prompt of token ids.

    Raises:
        InputError: some are no ids of the vocabulary; the first few of them are named.
    """
    bad = [
        token
        for token in prompt
        if not _whole(token, 0) or (vocabulary is not None and token >= vocabulary)
    ]
    if bad:
        below = "" if vocabulary is None else f" below {vocabulary}"
        some = ", ".join(map(repr, bad[:5]))
        raise InputError(f"the prompt holds what is no token id{below}: {some}")
    return list(prompt)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _within(value: Any, most: float) -> bool:
    return _is_number(value) and math.isfinite(value) and 0 <= value <= most


def _optional(value: Any, most: int) -> bool:
    return value is None or (_whole(value, 0) and value <= most)
