"""Counters and limits of memory."""

import gc

from graft.runtime import memory
from graft.runtime.memory import frozen_gc, machine_bytes, peak_during, set_memory_limits

import mlx.core as mx
import pytest


@pytest.mark.parametrize(
    "metal, budget, told",
    [
        (True, 500, {"wired": 500, "memory": 500, "cache": 380}),
        (True, 5000, {"wired": 1000, "memory": 5000, "cache": 880}),
        (True, None, {"wired": 1000, "cache": 880}),
        (False, 500, {"memory": 500, "cache": 380}),
        (False, 100, {"memory": 100, "cache": 0}),
        (False, None, {}),
    ],
)
def test_mlx_is_held_to_the_budget_and_metal_to_what_is_recommended(
    monkeypatch: pytest.MonkeyPatch, metal: bool, budget: int | None, told: dict[str, int]
) -> None:
    limits: dict[str, int] = {}
    monkeypatch.setattr(memory.mx.metal, "is_available", lambda: metal)
    info = {"max_recommended_working_set_size": 1000}
    monkeypatch.setattr(memory.mx, "device_info", lambda: info)
    for name in ("wired", "memory", "cache"):
        monkeypatch.setattr(
            memory.mx, f"set_{name}_limit", lambda size, name=name: limits.update({name: size})
        )
    set_memory_limits(budget, 120)
    assert limits == told


def test_a_peak_is_that_of_the_work_with_what_was_there_before() -> None:
    kept = mx.zeros(1000)
    mx.eval(kept)
    before = mx.get_active_memory()
    peak = peak_during(lambda: mx.eval(mx.ones((500, 500)) + kept[0]))
    assert before + 500 * 500 * 4 <= peak < before + 3 * 500 * 500 * 4


def test_the_machine_has_memory() -> None:
    assert 2**28 < machine_bytes() < 2**50


def test_what_was_there_is_not_collected_while_a_training_lasts() -> None:
    before = gc.get_freeze_count()
    with frozen_gc():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
