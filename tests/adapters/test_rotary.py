"""graft/adapters/rotary.py: the two orders of rows."""

import graft  # noqa: F401
from graft.adapters.rotary import interleave, to_halves

import mlx.core as mx


def test_the_two_orders_undo_each_other() -> None:
    # Two heads of four: the first half of a head beside the second.
    rows = mx.arange(8)
    assert interleave(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_halves(interleave(rows, 2), 2).tolist() == rows.tolist()
