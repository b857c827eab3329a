"""The memory plan of a training run: how many rows to compute at a time, within a budget.

Peak memory depends on the architecture, the adapter method, the backend and how far ahead MLX
schedules work, so it is measured and not modelled: a dry run does all the work of an update on the
widest micro-batch and changes nothing. Under a budget, dry runs begin with part of a row and grow
as long as the measured peaks predict that the next one fits. Knows nothing of data or losses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from graft.console import bytes_text, parse_bytes
from graft.errors import InputError

# The first dry runs take an eighth, a quarter and half of the tokens.
PARTS = (8, 4, 2, 1)
# Peaks of equal steps differ by a few percent, depending on how workers are scheduled.
VARIATION = 1.04
# Added to the smallest budget that is suggested: it also has to hold dequantized weights.
MARGIN = 1.08


@dataclass(frozen=True)
class MemoryPlan:
    """How the rows of a batch are computed.

    Attributes:
        rows: rows at a time; the gradients of the others are added one after another.
        recompute: whether blocks recompute their activations in the backward pass.
        peak_bytes: peak memory of a dry run; 0 if there was none.
    """

    rows: int
    recompute: bool
    peak_bytes: int = field(default=0, compare=False)


# (plan, part) -> peak bytes of an update by that plan, with 1 / part of the tokens of its rows.
DryRun = Callable[[MemoryPlan, int], int]


def parse_budget(text: str) -> int:
    """The bytes of `--memory-budget`.

    Raises:
        InputError: the text is not a size.
    """
    try:
        return parse_bytes(text)
    except InputError as error:
        raise InputError(f"--memory-budget {error}") from error


def measure(plan: MemoryPlan, dry_run: DryRun, available: int) -> MemoryPlan:
    """A plan with its peak, measured unless parts of a row show that it cannot fit.

    Args:
        plan: as asked for.
        dry_run: measures a plan.
        available: bytes of the machine.
    """
    first, second = PARTS[:2]
    small, more = (dry_run(MemoryPlan(1, plan.recompute), part) for part in (first, second))
    # Every further part takes at least as much as the second took beyond the first.
    if more + (more - small) * (plan.rows * first - 2) > available:
        return plan
    return replace(plan, peak_bytes=dry_run(plan, 1))


def choose_plan(
    asked: MemoryPlan,
    dry_run: DryRun,
    *,
    budget: int,
    available: int,
    held: int = 0,
    may_recompute: bool = True,
) -> MemoryPlan:
    """The fastest plan within a budget: the most rows, recomputing only if one row is too much.

    Args:
        asked: the rows to divide evenly, and whether to recompute in any case.
        dry_run: measures a plan; after one that recomputes, only such plans follow.
        budget: in bytes.
        available: bytes of the machine; the smallest plan is measured within them.
        held: bytes of the budget that MLX does not count.
        may_recompute: whether recomputing leaves the gradients as they are.

    Raises:
        InputError: no plan fits the budget; the message gives the smallest budget that would.
    """
    tried: list[MemoryPlan] = []
    limit = (budget - held) / VARIATION
    ways = [False, True][asked.recompute : 1 + may_recompute]
    for recompute in ways:
        for_one_row = available if recompute == ways[-1] else limit
        tried = list(_climb(MemoryPlan(asked.rows, recompute), dry_run, limit, for_one_row))
        fitting = [plan for plan in tried if plan.peak_bytes <= limit]
        if fitting:
            return fitting[-1]
    needs = f"more than the {bytes_text(available)} of this machine"
    if tried:
        needs = f"at least {bytes_text(round(tried[0].peak_bytes * VARIATION * MARGIN) + held)}"
    least = "one row at a time" + " and gradient checkpointing" * may_recompute
    raise InputError(
        f"--memory-budget {bytes_text(budget)}: even with {least} this run needs "
        f"{needs}; raise the budget, or use shorter rows (--max-seq-length), fewer layers "
        "(--lora-layers) or a model with fewer bits"
    )


def _climb(
    most: MemoryPlan, dry_run: DryRun, limit: float, for_one_row: float
) -> Iterator[MemoryPlan]:
    """Plans with more and more rows, measured from a part of one row upwards.

    The last one may exceed the limit, but none is tried that is expected to. Up to one row, another
    limit applies.
    """
    rows = [rows for rows in range(2, most.rows + 1) if most.rows % rows == 0]
    sizes: list[float] = []
    peaks: list[int] = []
    for number, part in [*((1, part) for part in PARTS), *((number, 1) for number in rows)]:
        if _expected(sizes, peaks, number / part) > (for_one_row if number == 1 else limit):
            return
        plan = MemoryPlan(number, most.recompute)
        sizes.append(number / part)
        peaks.append(dry_run(plan, part))
        if part == 1:
            yield replace(plan, peak_bytes=peaks[-1])
            if peaks[-1] > limit:
                return


def _expected(sizes: Sequence[float], peaks: Sequence[int], size: float) -> float:
    """The peak expected of the next dry run, extrapolated from the previous ones.

    Linear in rows. In tokens it is quadratic where attention keeps its weights: slopes then grow by
    twice as much each time the tokens double.
    """
    if len(peaks) < 2:
        return max(peaks, default=0)
    pairs = pairwise(zip(sizes, peaks, strict=True))
    before, last = [0.0, *((q - p) / (b - a) for (a, p), (b, q) in pairs)][-2:]
    if size <= 1:
        last += 2 * max(last - before, 0)
    elif sizes[-1] == 1:
        last = (before + last) / 2
    return peaks[-1] + last * (size - sizes[-1])
