"""Which token comes next, by temperature, top-p and seed."""

from collections.abc import Callable

import mlx.core as mx


def greedy(log_probabilities: mx.array) -> mx.array:
    """The likeliest token (rows,) of each row of log-probabilities (rows, vocabulary)."""
    return mx.argmax(log_probabilities, axis=-1)


def make_sampler(
    temperature: float, *, seed: int, top_p: float = 1.0
) -> Callable[[mx.array], mx.array]:
    """A function from log-probabilities (1, vocabulary) to a token (1,), repeatable for a seed.

    Args:
        temperature: divides the log-probabilities; 0 is `greedy`.
        seed: of the draws.
        top_p: draw from the fewest of the likeliest tokens that have this probability together.
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
        own = mx.softmax(likeliest, axis=-1)
        before = mx.cumsum(own, axis=-1) - own
        kept = (before < top_p) | (mx.arange(own.shape[-1]) == 0)
        place = mx.random.categorical(mx.where(kept, likeliest, -mx.inf), key=used)
        return mx.take_along_axis(order, place[:, None], axis=-1)[:, 0]

    return draw
