"""A prompt's beginning is found by content, trimmed to what is shared, within a bound."""

from typing import Any

from graft.engine.prompt_cache import FEWEST_TOKENS, MOST_ENTRIES, PromptCache

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

BASE: frozenset[Any] = frozenset()
ONE = frozenset({("digest", 1.0)})
LONG = list(range(100, 140))
# A layer of keys and values, one head of two dims, float32.
TOKEN_BYTES = 2 * 2 * 4


def caches_of(tokens: list[int], layers: int = 1) -> list[Any]:
    """Keys and values that are the tokens themselves."""
    made = []
    for _ in range(layers):
        cache = KVCache()
        values = mx.array(tokens, dtype=mx.float32)[None, None, :, None] * mx.ones((1, 1, 1, 2))
        cache.keys, cache.values, cache.offset = values, values + 0.5, len(tokens)
        made.append(cache)
    return made


def held(caches: list[Any]) -> list[int]:
    keys, _ = caches[0].keys_and_values()
    return [int(value) for value in keys[0, 0, :, 0].tolist()]


def test_the_longest_common_beginning_is_found_and_trimmed_to() -> None:
    cache = PromptCache(1 << 20)
    cache.keep(BASE, LONG, caches_of(LONG))
    other = [*LONG[:20], 1, 2, 3]
    cache.keep(BASE, other, caches_of(other))
    caches, known = cache.find(BASE, [*LONG[:30], 7, 8, 9])
    assert known == 30 and held(caches) == LONG[:30]
    caches, known = cache.find(BASE, [*LONG[:20], 1, 2, 3, 4])
    assert known == 23 and held(caches) == [*LONG[:20], 1, 2, 3]
    assert (cache.hits, cache.misses) == (2, 0)


def test_one_token_is_left_to_go_on_from() -> None:
    cache = PromptCache(1 << 20)
    cache.keep(BASE, LONG, caches_of(LONG))
    assert cache.find(BASE, LONG)[1] == len(LONG) - 1


def test_what_is_found_may_be_changed() -> None:
    cache = PromptCache(1 << 20)
    cache.keep(BASE, LONG, caches_of(LONG))
    for _ in range(2):
        caches, _ = cache.find(BASE, [*LONG, 1])
        assert held(caches) == LONG
        caches[0].update_and_fetch(mx.zeros((1, 1, 1, 2)), mx.zeros((1, 1, 1, 2)))
        caches[0].keys[:] = 0


def test_other_adapters_and_other_scales_find_nothing() -> None:
    cache = PromptCache(1 << 20)
    cache.keep(ONE, LONG, caches_of(LONG))
    for others in (BASE, frozenset({("digest", 0.5)}), frozenset({("other", 1.0)})):
        assert cache.find(others, LONG) == ([], 0)
    assert cache.find(ONE, LONG)[1] == len(LONG) - 1


def test_short_beginnings_are_not_worth_it() -> None:
    cache = PromptCache(1 << 20)
    cache.keep(BASE, LONG[: FEWEST_TOKENS - 1], caches_of(LONG[: FEWEST_TOKENS - 1]))
    assert len(cache) == 0
    cache.keep(BASE, LONG, caches_of(LONG))
    assert cache.find(BASE, [*LONG[: FEWEST_TOKENS - 1], 1, 2]) == ([], 0)
    assert cache.misses == 1


def test_the_least_recently_used_go_first_at_the_bound() -> None:
    cache = PromptCache(3 * 40 * TOKEN_BYTES)
    prompts = [[n, *LONG[1:]] for n in range(4)]
    for prompt in prompts[:3]:
        cache.keep(BASE, prompt, caches_of(prompt))
    assert cache.find(BASE, prompts[0])[1] == 39  # the first is used again
    cache.keep(BASE, prompts[3], caches_of(prompts[3]))
    assert cache.nbytes == 3 * 40 * TOKEN_BYTES and len(cache) == 3
    assert [cache.find(BASE, prompt)[1] for prompt in prompts] == [39, 0, 39, 39]


def test_there_is_a_bound_on_their_number() -> None:
    cache = PromptCache(1 << 30)
    for number in range(MOST_ENTRIES + 5):
        cache.keep(BASE, [number, *LONG], caches_of([number, *LONG]))
    assert len(cache) == MOST_ENTRIES
    assert [cache.find(BASE, [n, *LONG])[1] for n in (4, 5)] == [0, 40]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    cache = PromptCache(39 * TOKEN_BYTES)
    cache.keep(BASE, LONG, caches_of(LONG))
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_longer_prompt_takes_the_place_of_its_beginnings() -> None:
    cache = PromptCache(1 << 20)
    cache.keep(BASE, LONG[:20], caches_of(LONG[:20]))
    cache.keep(BASE, LONG, caches_of(LONG))
    cache.keep(BASE, LONG[:30], caches_of(LONG[:30]))  # known already
    assert (len(cache), cache.nbytes) == (1, 40 * TOKEN_BYTES)
    cache.keep(ONE, LONG[:20], caches_of(LONG[:20]))
    assert len(cache) == 2


def test_states_that_cannot_be_trimmed_serve_whole_beginnings_only() -> None:
    def state() -> list[Any]:
        cache = ArraysCache(1)
        cache[0] = mx.ones((1, 4))
        return [cache]

    cache = PromptCache(1 << 20)
    cache.keep(BASE, LONG[:30], state())
    cache.keep(BASE, LONG, state())
    assert cache.find(BASE, [*LONG[:35], 1])[1] == 30
    assert cache.find(BASE, [*LONG, 1])[1] == 40
    assert cache.find(BASE, [*LONG[:20], 1])[1] == 0


def test_what_was_computed_with_an_adapter_can_be_given_up() -> None:
    cache = PromptCache(1 << 20)
    both = frozenset({("digest", -2.0), ("other", 1.0)})
    for adapters in (BASE, ONE, both):
        cache.keep(adapters, LONG, caches_of(LONG))
    cache.forget("digest")
    assert len(cache) == 1 and cache.nbytes == 40 * TOKEN_BYTES
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


@pytest.mark.parametrize("layers", [1, 3])
def test_all_layers_count(layers: int) -> None:
    cache = PromptCache(1 << 20)
    cache.keep(BASE, LONG, caches_of(LONG, layers))
    assert cache.nbytes == layers * 40 * TOKEN_BYTES
