"""What is chosen for a budget, how sizes are read, and what MLX is told; with made-up peaks."""

import re
from collections.abc import Callable

from graft.console import parse_bytes
from graft.errors import InputError
from graft.training.memory_plan import (
    MemoryPlan,
    choose_plan,
    measure,
)

import pytest

Cost = Callable[[float, float, bool], float]


class Machine:
    """Rehearses with a known cost of (rows, share of the tokens, recompute), and keeps count."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self.calls: list[tuple[MemoryPlan, int]] = []
        self.peaks: list[int] = []

    def __call__(self, plan: MemoryPlan, part: int) -> int:
        self.calls.append((plan, part))
        self.peaks.append(round(self._cost(plan.rows, 1 / part, plan.recompute)))
        return self.peaks[-1]


def linear(rows: float, share: float, recompute: bool) -> float:
    """100 a row, or 30 where blocks recompute, beside 50 that are always there."""
    return 50 + rows * share * (30 if recompute else 100)


def quadratic(rows: float, share: float, recompute: bool) -> float:
    """100 a row, all of it weights of attention."""
    return 50 + rows * share**2 * (30 if recompute else 100)


def choose(machine: Machine, budget: int, asked: MemoryPlan) -> MemoryPlan:
    return choose_plan(asked, machine, budget=budget, available=10_000)


@pytest.mark.parametrize("cost", [linear, quadratic])
@pytest.mark.parametrize(
    "budget, rows, recompute, peak",
    [
        (1000, 6, False, 650),
        (600, 3, False, 350),
        (300, 2, False, 250),
        (200, 1, False, 150),
        (140, 2, True, 110),
        (100, 1, True, 80),
    ],
)
def test_the_most_rows_are_taken_before_anything_is_recomputed(
    cost: Cost, budget: int, rows: int, recompute: bool, peak: int
) -> None:
    """Of the divisors of 6; by hand from the costs."""
    plan = choose(Machine(cost), budget, MemoryPlan(6, False))
    assert plan == MemoryPlan(rows, recompute) and plan.peak_bytes == peak


def test_without_recomputing_one_row_is_the_least() -> None:
    """By hand: 150 for one row and 7 for what peaks vary, within a machine of 1000."""
    machine = Machine(linear)
    with pytest.raises(InputError, match=r"with one row at a time this run needs at least 168"):
        choose_plan(MemoryPlan(4, False), machine, budget=100, available=1000, may_recompute=False)
    assert not any(plan.recompute for plan, _ in machine.calls)


def test_what_is_asked_to_recompute_does() -> None:
    machine = Machine(linear)
    assert choose(machine, 1000, MemoryPlan(4, True)) == MemoryPlan(4, True)
    assert all(plan.recompute for plan, _ in machine.calls)


@pytest.mark.parametrize("cost", [linear, quadratic])
@pytest.mark.parametrize("budget", [100, 140, 170, 200, 300, 420])
def test_rehearsals_stay_within_the_budget(cost: Cost, budget: int) -> None:
    machine = Machine(cost)
    choose(machine, budget, MemoryPlan(8, False))
    assert max(machine.peaks) <= budget


def test_a_budget_too_small_tells_one_that_is_not() -> None:
    machine = Machine(lambda *case: 1e6 * linear(*case))
    available = 10**10
    with pytest.raises(InputError) as caught:
        choose_plan(MemoryPlan(4, False), machine, budget=10, available=available)
    (told,) = re.findall(r"needs at least (.+?);", str(caught.value))
    enough = parse_bytes(told)
    found = choose_plan(MemoryPlan(4, False), machine, budget=enough, available=available)
    assert found == MemoryPlan(1, True)
    assert 80e6 <= enough < 91e6


def test_what_is_held_elsewhere_is_taken_from_the_budget_and_told() -> None:
    """By hand: 250 for two rows, 80 for one that recomputes and 7 for what peaks vary."""
    machine = Machine(linear)
    more = {"available": 1000}
    assert choose_plan(MemoryPlan(2, False), machine, budget=299, held=40, **more) == MemoryPlan(
        1, False
    )
    assert choose_plan(MemoryPlan(2, False), machine, budget=300, held=40, **more) == MemoryPlan(
        2, False
    )
    machine = Machine(lambda *case: 1e6 * linear(*case))
    more = {"available": 10**9}
    with pytest.raises(InputError, match=r"--memory-budget 90.0 MB: .* at least 130 MB;"):
        choose_plan(MemoryPlan(2, False), machine, budget=90 * 10**6, held=40 * 10**6, **more)


def test_more_than_the_machine_has_is_told_without_being_tried() -> None:
    machine = Machine(lambda *case: 1000 * linear(*case))
    with pytest.raises(InputError, match=r"needs more than the 60\.0 kB of this machine"):
        choose_plan(MemoryPlan(1, False), machine, budget=10, available=60_000)
    # The smallest part of a row is always tried.
    assert max(machine.peaks) == 1000 * linear(1, 1 / 8, False)


def test_without_a_budget_only_what_can_fit_is_rehearsed_in_full() -> None:
    fits = Machine(linear)
    assert measure(MemoryPlan(4, False), fits, 500).peak_bytes == 450
    assert fits.calls[-1] == (MemoryPlan(4, False), 1)
    too_large = Machine(linear)
    assert measure(MemoryPlan(40, False), too_large, 500).peak_bytes == 0
    assert max(too_large.peaks) < 100
