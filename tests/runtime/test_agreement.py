"""What counts as the same result, by precision."""

from graft.runtime.agreement import agrees, difference

import mlx.core as mx
import pytest


@pytest.mark.parametrize(
    ("dtype", "error", "same"),
    [
        (mx.float32, 0.9e-3, True),
        (mx.float32, 1.1e-3, False),
        (mx.bfloat16, 4e-2, True),
        (mx.bfloat16, 6e-2, False),
    ],
)
def test_differences_are_measured_against_the_largest_value(
    dtype: mx.Dtype, error: float, same: bool
) -> None:
    expected = mx.array([0.0, 1.0, -4.0])
    found = expected + mx.array([4 * error, 0.0, 0.0])
    assert agrees(found, expected, dtype=dtype) is same


def test_other_shapes_never_agree() -> None:
    assert not agrees(mx.zeros((2, 1)), mx.zeros((2,)))


def test_nan_never_agrees() -> None:
    assert not agrees(mx.array([float("nan")]), mx.array([1.0]))


def test_what_is_rounding_beside_the_largest_array_is_no_difference() -> None:
    """As the gradient of a key's bias, which is zero but for rounding."""
    expected = {"large": mx.array([1.0]), "zero": mx.array([1e-9])}
    assert difference(lambda: expected | {"zero": mx.array([-1e-8])}, expected) == ""
    assert difference(lambda: expected | {"zero": mx.array([1e-4])}, expected)


def test_other_names_and_exceptions_are_differences() -> None:
    expected = {"a": mx.array([1.0])}
    assert "results" in difference(dict, expected)
    assert difference(lambda: [][0], expected) == "this model fails with it: IndexError"
