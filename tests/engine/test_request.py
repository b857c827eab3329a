"""What is asked for is checked, all of it at once."""

from typing import Any

from graft.engine.request import Sampling, check_ids, check_scales
from graft.errors import InputError

import mlx.core as mx
import pytest


def test_every_bad_value_is_named() -> None:
    with pytest.raises(InputError) as error:
        Sampling(-1, float("nan"), 1.5, -3, "x", 101).check()
    said = str(error.value)
    for name in (
        "max_tokens -1",
        "temperature nan",
        "top_p 1.5",
        "seed -3",
        "logprobs 101",
        "stop",
    ):
        assert name in said


@pytest.mark.parametrize(
    "values", [{}, {"max_tokens": 0}, {"seed": 2**64 - 1}, {"logprobs": 0}, {"stop": ("a", "b")}]
)
def test_values_at_the_border_are_allowed(values: dict[str, Any]) -> None:
    Sampling(**values).check()


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), "1", True, None])
def test_a_scale_is_a_finite_number(scale: Any) -> None:
    with pytest.raises(InputError, match="finite number, not b="):
        check_scales({"a": -1, "b": scale})


def test_ids_are_of_the_vocabulary() -> None:
    assert check_ids((1, 2, 511), 512) == [1, 2, 511]
    assert check_ids([10**6], None) == [10**6]
    with pytest.raises(InputError, match=r"not token ids below 512: -1, 512, 1\.5, True, 'x'"):
        check_ids([-1, 512, 1.5, True, "x", 3, None], 512)


def test_requests_at_temperature_0_share_a_sampler() -> None:
    assert Sampling(seed=1).sampler() is Sampling(seed=2).sampler()
    first, second = (Sampling(temperature=1.0).sampler() for _ in range(2))
    even = mx.zeros((1, 1000))
    draws = [[one(even).item() for _ in range(5)] for one in (first, second)]
    assert draws[0] != draws[1]
