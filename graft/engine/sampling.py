"""Sampling: chooses the next token by temperature, top-p and seed."""

from collections.abc import Callable

import mlx.core as mx


def greedy(log_probabilities: mx.array) -> mx.array:
    """The most likely token (rows,) of each row of log-probabilities (rows, vocabulary)."""
    return mx.argmax(log_probabilities, axis=-1)


def make_sampler(
    temperature: float, *, seed: int, top_p: float = 1.0
) -> Callable[[mx.array], mx.array]:
    """A reproducible function from log-probabilities (1, vocabulary) to a token (1,).

    Args:
        temperature: divides the log-probabilities; 0 is `greedy`.
        seed: seed of the random numbers.
        top_p: sample from the smallest set of most likely tokens with this total probability.
            Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019),
            https://arxiv.org/abs/1904.09751, section 3.1.
    """
    if temperature == 0:
        return greedy
    key = mx.random.key(seed)

    def draw(log_probabilities: mx.array) -> mx.array:
        nonlocal key
        key, used = mx.random.split(key)
        scaled = log_probabilities / temperature
        if top_p >= 1:
            return mx.random.categorical(scaled, key=used)
        order = mx.argsort(-scaled, axis=-1)
        likeliest = mx.take_along_axis(scaled, order, axis=-1)
        probabilities = mx.softmax(likeliest, axis=-1)
        preceding = mx.cumsum(probabilities, axis=-1) - probabilities
        kept = (preceding < top_p) | (mx.arange(probabilities.shape[-1]) == 0)
        index = mx.random.categorical(mx.where(kept, likeliest, -mx.inf), key=used)
        return mx.take_along_axis(order, index[:, None], axis=-1)[:, 0]

    return draw
