from collections import Counter

import graft  # noqa: F401
from graft.engine.sampling import make_sampler

import mlx.core as mx
import numpy as np
import pytest


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_tempered_probabilities_say(temperature: float) -> None:
    logits = mx.array([[0.0, 1.0, 2.0, -1.0]])
    draw = make_sampler(temperature, seed=0)
    counts = Counter(int(draw(logits)) for _ in range(4000))
    expected = np.array(mx.softmax(logits / temperature))[0]
    for token, probability in enumerate(expected):
        # Three standard deviations of a binomial.
        assert abs(counts[token] / 4000 - probability) < 3 * np.sqrt(probability / 4000)


def test_at_temperature_zero_the_likeliest_token_is_taken() -> None:
    assert make_sampler(0.0, seed=0)(mx.array([[0.0, 3.0, 2.0]])).tolist() == [1]


def test_top_p_draws_from_the_likeliest_alone() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05: the first two make up 0.6, the first three 0.9."""
    logprobs = mx.log(mx.array([[0.05, 0.5, 0.15, 0.3]]))
    for top_p, allowed in (
        (0.0, {1}),
        (0.4, {1}),
        (0.6, {1, 3}),
        (0.9, {1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        sampler = make_sampler(1.0, seed=0, top_p=top_p)
        assert {sampler(logprobs).item() for _ in range(200)} == allowed


def test_top_p_is_of_the_probabilities_at_the_temperature() -> None:
    """Their square roots are as 1 : 0.58: at temperature 2 the first has less than 0.65."""
    logprobs = mx.log(mx.array([[0.75, 0.25]]))
    cold, warm = (make_sampler(t, seed=0, top_p=0.65) for t in (1.0, 2.0))
    assert {cold(logprobs).item() for _ in range(100)} == {0}
    assert {warm(logprobs).item() for _ in range(100)} == {0, 1}


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_draws_are_a_function_of_the_seed_alone(top_p: float) -> None:
    logits = mx.zeros((1, 50))

    def drawn(seed: int) -> list[int]:
        draw = make_sampler(1.0, seed=seed, top_p=top_p)
        return [int(draw(logits)) for _ in range(8)]

    first = drawn(1)
    mx.random.seed(99)
    mx.eval(mx.random.uniform(shape=(7,)))
    assert drawn(1) == first
    assert drawn(2) != first
