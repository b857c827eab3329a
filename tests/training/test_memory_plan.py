"""What is chosen for a budget, how sizes are read, and what MLX is told; with made-up peaks."""

import gc
import re
from collections.abc import Callable

from graft.errors import InputError
from graft.training import memory_plan as memory
from graft.training.memory_plan import (
    Plan,
    choose_plan,
    machine_bytes,
    measure,
    parse_size,
    peak_of,
    set_limits,
    settled,
    size_text,
)

import mlx.core as mx
import pytest

Cost = Callable[[float, float, bool], float]


class Machine:
    """Rehearses with a known cost of (rows, share of the tokens, recompute), and keeps count."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self.calls: list[tuple[Plan, int]] = []
        self.peaks: list[int] = []

    def __call__(self, plan: Plan, part: int) -> int:
        self.calls.append((plan, part))
        self.peaks.append(round(self._cost(plan.rows, 1 / part, plan.recompute)))
        return self.peaks[-1]


def linear(rows: float, share: float, recompute: bool) -> float:
    """100 a row, or 30 where blocks recompute, beside 50 that are always there."""
    return 50 + rows * share * (30 if recompute else 100)


def quadratic(rows: float, share: float, recompute: bool) -> float:
    """100 a row, all of it weights of attention."""
    return 50 + rows * share**2 * (30 if recompute else 100)


def choose(machine: Machine, budget: int, asked: Plan) -> Plan:
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
    plan = choose(Machine(cost), budget, Plan(6, False))
    assert plan == Plan(rows, recompute) and plan.peak_bytes == peak


def test_what_is_asked_to_recompute_does() -> None:
    machine = Machine(linear)
    assert choose(machine, 1000, Plan(4, True)) == Plan(4, True)
    assert all(plan.recompute for plan, _ in machine.calls)


@pytest.mark.parametrize("cost", [linear, quadratic])
@pytest.mark.parametrize("budget", [100, 140, 170, 200, 300, 420])
def test_rehearsals_stay_within_the_budget(cost: Cost, budget: int) -> None:
    machine = Machine(cost)
    choose(machine, budget, Plan(8, False))
    assert max(machine.peaks) <= budget


def test_a_budget_too_small_tells_one_that_is_not() -> None:
    machine = Machine(lambda *case: 1e6 * linear(*case))
    available = 10**10
    with pytest.raises(InputError) as caught:
        choose_plan(Plan(4, False), machine, budget=10, available=available)
    (told,) = re.findall(r"takes at least (\S+);", str(caught.value))
    enough = parse_size(told)
    found = choose_plan(Plan(4, False), machine, budget=enough, available=available)
    assert found == Plan(1, True)
    assert 80e6 <= enough < 91e6


def test_what_is_held_elsewhere_is_taken_from_the_budget_and_told() -> None:
    """By hand: 250 for two rows, 80 for one that recomputes and 7 for what peaks vary."""
    machine = Machine(linear)
    more = {"available": 1000}
    assert choose_plan(Plan(2, False), machine, budget=299, held=40, **more) == Plan(1, False)
    assert choose_plan(Plan(2, False), machine, budget=300, held=40, **more) == Plan(2, False)
    machine = Machine(lambda *case: 1e6 * linear(*case))
    more = {"available": 10**9}
    with pytest.raises(InputError, match=r"--memory-budget 90MB: .* at least 130MB;"):
        choose_plan(Plan(2, False), machine, budget=90 * 10**6, held=40 * 10**6, **more)


def test_more_than_the_machine_has_is_told_without_being_tried() -> None:
    machine = Machine(lambda *case: 1000 * linear(*case))
    with pytest.raises(InputError, match="takes more than the 0MB that there are"):
        choose_plan(Plan(1, False), machine, budget=10, available=60_000)
    # The smallest part of a row is always tried.
    assert max(machine.peaks) == 1000 * linear(1, 1 / 8, False)


def test_without_a_budget_only_what_can_fit_is_rehearsed_in_full() -> None:
    fits = Machine(linear)
    assert measure(Plan(4, False), fits, 500).peak_bytes == 450
    assert fits.calls[-1] == (Plan(4, False), 1)
    too_large = Machine(linear)
    assert measure(Plan(40, False), too_large, 500).peak_bytes == 0
    assert max(too_large.peaks) < 100


@pytest.mark.parametrize(
    "text, expected",
    [
        ("12GB", 12 * 10**9),
        ("900MB", 900 * 10**6),
        ("1.5GiB", 3 * 2**29),
        (" 2 tb ", 2 * 10**12),
        (".5KiB", 512),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "12", "GB", "-1GB", "0MB", "1,5GB", "12 parsecs", "nan GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--memory-budget {text}: give a size such as")):
        parse_size(text)


@pytest.mark.parametrize("size", [999_400_000, 12_340_000_000, 5_000_000])
def test_sizes_are_told_as_they_are_read(size: int) -> None:
    assert parse_size(size_text(size)) == pytest.approx(size, rel=0.01)


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
    set_limits(budget, 120)
    assert limits == told


def test_a_peak_is_that_of_the_work_with_what_was_there_before() -> None:
    kept = mx.zeros(1000)
    mx.eval(kept)
    before = mx.get_active_memory()
    peak = peak_of(lambda: mx.eval(mx.ones((500, 500)) + kept[0]))
    assert before + 500 * 500 * 4 <= peak < before + 3 * 500 * 500 * 4


def test_the_machine_has_memory() -> None:
    assert 2**28 < machine_bytes() < 2**50


def test_what_was_there_is_not_collected_while_a_training_lasts() -> None:
    before = gc.get_freeze_count()
    with settled():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
