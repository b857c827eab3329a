"""Arrays of many types, and what a writer is given for them."""

from graft.storage.lazy_tensors import ComputedTensor, Output, blocks

import mlx.core as mx

mx.random.seed(0)
ARRAYS = {
    "bfloat16": mx.random.normal((6, 5)).astype(mx.bfloat16),
    "float16 scalar": mx.array(3.5, mx.float16),
    "empty": mx.zeros((0, 4)),
    "uint32": mx.arange(7, dtype=mx.uint32),
    "bool": mx.array([True, False, True]),
    "float32 cube": mx.random.normal((2, 3, 4)),
    "int8": mx.array([-1, 127], mx.int8),
    "int64": mx.array([-(2**40)], mx.int64),
}


def outputs() -> list[Output]:
    """All arrays, in blocks of rows."""
    return [
        Output(name, array.dtype, tuple(array.shape), blocks(ComputedTensor(array)))
        for name, array in ARRAYS.items()
    ]


def assert_equal(found: dict[str, mx.array]) -> None:
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert mx.array_equal(found[name], array), name
