"""A request to the engine: its checked settings, and the state of its answer."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.engine.adapter_bank import ScaledAdapters
from graft.engine.sampling import make_sampler
from graft.engine.streams import Continuation, Stream
from graft.errors import InputError

import mlx.core as mx

MOST_ALTERNATIVES = 100


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and what is reported about them.

    Attributes:
        max_tokens: most tokens to generate; 0 only processes the prompt.
        temperature: divides the log-probabilities; 0 takes the most likely token.
        top_p: sample from the smallest set of most likely tokens with this total probability.
        seed: seed of sampling; `None` chooses one. A seed gives the same answer whatever else is in
            the batch.
        stop: strings before which the answer ends.
        logprobs: number of alternatives for each token; `None` for no log-probabilities.
        echo: whether to report the prompt's tokens and their log-probabilities.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    echo: bool = False

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            InputError: values are invalid; all of them are named.
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
                    isinstance(self.stop, list | tuple)
                    and all(isinstance(s, str) for s in self.stop),
                ),
            )
            if not fits
        ]
        if problems:
            raise InputError("; ".join(problems))

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """The sampler of the tokens; the same function for all requests at temperature 0."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return make_sampler(self.temperature, seed=seed, top_p=self.top_p)


@dataclass(eq=False)
class Request:
    """A request that is queued or running.

    Attributes:
        stream: receives the answer.
        prompt: token ids of the prompt.
        adapters: adapters with factors on their scales; those of factor 0 are left out.
        names: names of the adapters, for statistics.
        sampling: how tokens are chosen.
        continuation: turns tokens into text.
        generated: number of tokens generated so far.
        started: when it got its row, in seconds of `time.perf_counter`.
    """

    stream: Stream
    prompt: list[int]
    adapters: ScaledAdapters
    names: tuple[str, ...]
    sampling: Sampling
    continuation: Continuation
    generated: int = 0
    started: float = 0.0

    @property
    def cache_key(self) -> frozenset[tuple[str, float]]:
        """The content and scale of each adapter."""
        return frozenset((adapter.digest, scale) for adapter, scale in self.adapters)


def check_scales(adapters: Mapping[str, float]) -> None:
    """Refuse scales that are not finite numbers.

    Raises:
        InputError: scales are invalid; all of them are named.
    """
    if not isinstance(adapters, Mapping):
        raise InputError(f"adapters must be scales by name, not {adapters!r}")
    bad = [
        f"{name}={scale!r}"
        for name, scale in adapters.items()
        if not _is_number(scale) or not math.isfinite(scale)
    ]
    if bad:
        raise InputError(f"an adapter's scale must be a finite number, not {', '.join(bad)}")


def check_ids(prompt: Sequence[Any], vocabulary: int | None) -> list[int]:
    """Check a prompt of token ids.

    Raises:
        InputError: some are not ids of the vocabulary; the first five are named.
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InputError(f"the prompt must be text or a list of token ids, not {prompt!r}")
    bad = [
        token
        for token in prompt
        if not _whole(token, 0) or (vocabulary is not None and token >= vocabulary)
    ]
    if bad:
        below = "" if vocabulary is None else f" below {vocabulary}"
        first = ", ".join(map(repr, bad[:5]))
        raise InputError(f"the prompt has values that are not token ids{below}: {first}")
    return list(prompt)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _within(value: Any, most: float) -> bool:
    return _is_number(value) and math.isfinite(value) and 0 <= value <= most


def _optional(value: Any, most: int) -> bool:
    return value is None or (_whole(value, 0) and value <= most)
