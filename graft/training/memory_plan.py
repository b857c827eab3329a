"""How much memory a training takes, and a plan by which it stays within a budget.

What is alive at the peak depends on architecture, method, backend and on how far MLX runs ahead of
its workers. So it is measured and not modelled: a rehearsal does all the work of an update on the
widest micro-batch and changes nothing. Under a budget rehearsals begin with part of a row and grow
while what they took so far says that the next one fits. Knows nothing of data, losses or files.
"""

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

from graft.errors import InputError
from graft.runtime.workers import peak_elsewhere, reset_peak_elsewhere

import mlx.core as mx

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# The first rehearsals take an eighth, a quarter and half of the tokens.
PARTS = (8, 4, 2, 1)
# Peaks of equal steps differ by a few percent, as workers are quick or slow.
VARIATION = 1.04
# What a budget allows besides that is told to be enough: whole weights that come back with it.
AMPLE = 1.08


@dataclass(frozen=True)
class Plan:
    """How the rows of a batch are computed.

    Attributes:
        rows: at a time; the others follow, and their gradients are added up.
        recompute: whether blocks compute again in the backward pass instead of keeping.
        peak_bytes: what that takes, as rehearsed; 0 where it was not tried.
    """

    rows: int
    recompute: bool
    peak_bytes: int = field(default=0, compare=False)


# (plan, part) -> peak bytes of an update by that plan, of 1 / part of the tokens of its rows.
Rehearse = Callable[[Plan, int], int]


def parse_size(text: str) -> int:
    """Bytes of a size such as 12GB, 900MB or 1.5GiB.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)", text.strip())
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise InputError(f"--memory-budget {text}: give a size such as 12GB, 900MB or 1.5GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size_text(size: int) -> str:
    """Bytes as a person reads them, to be given back to `parse_size`."""
    return f"{size / 1e9:.2f}GB" if size >= 1e9 else f"{size / 1e6:.0f}MB"


@contextmanager
def settled() -> Iterator[None]:
    """While this lasts, Python's garbage collector leaves alone what was there before.

    A loaded model stays, and looking through all of it takes as long as a small step.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def machine_bytes() -> int:
    """Memory that the default device can use: the GPU's, or the machine's for a CPU."""
    size = mx.device_info().get("memory_size")
    return int(size) if size else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int:
    """Bytes that were in use at most, as MLX counts them, and in lanes of other processes."""
    return int(mx.get_peak_memory()) + peak_elsewhere()


def reset_peak() -> None:
    """Begin anew with `peak_bytes`."""
    mx.reset_peak_memory()
    reset_peak_elsewhere()


def peak_of(work: Callable[[], object]) -> int:
    """Bytes in use at the peak of `work`, as MLX counts them, with all that was there before."""
    mx.reset_peak_memory()
    work()
    return int(mx.get_peak_memory())


def set_limits(budget: int | None, peak: int = 0) -> None:
    """Hold MLX to a budget, and on Metal to what the system recommends.

    Above the budget MLX waits for work that is under way before it starts more. What it keeps of
    freed memory is limited to what the peak leaves, and on Metal so is what stays resident.

    Args:
        budget: in bytes; `None` where there is none.
        peak: what is in use at most, as far as it is known.
    """
    limits = [] if budget is None else [budget]
    if mx.metal.is_available():
        limits.append(int(mx.device_info()["max_recommended_working_set_size"]))
        mx.set_wired_limit(min(limits))
    if budget is not None:
        mx.set_memory_limit(budget)
    if limits:
        mx.set_cache_limit(max(min(limits) - peak, 0))


def measure(plan: Plan, rehearse: Rehearse, available: int) -> Plan:
    """A plan with its peak, rehearsed unless parts of a row tell that it cannot fit.

    Args:
        plan: as asked for.
        rehearse: measures.
        available: bytes that there are.
    """
    first, second = PARTS[:2]
    small, more = (rehearse(Plan(1, plan.recompute), part) for part in (first, second))
    # All tokens take at least as much more for each part as the second took more than the first.
    if more + (more - small) * (plan.rows * first - 2) > available:
        return plan
    return replace(plan, peak_bytes=rehearse(plan, 1))


def choose_plan(
    asked: Plan,
    rehearse: Rehearse,
    *,
    budget: int,
    available: int,
    held: int = 0,
) -> Plan:
    """The fastest plan within a budget: the most rows at a time, recomputing only for lack of it.

    Args:
        asked: with the rows to divide, evenly, and whether to recompute in any case.
        rehearse: measures; once it was given a plan that recomputes, only such ones follow.
        budget: in bytes.
        available: bytes that there are; the least plan is rehearsed within them, to tell its peak.
        held: bytes of the budget that MLX does not count.

    Raises:
        InputError: no plan stays within the budget; the smallest that one does is told.
    """
    tried: list[Plan] = []
    limit = (budget - held) / VARIATION
    for recompute in [True] if asked.recompute else [False, True]:
        for_one_row = available if recompute else limit
        tried = list(_climb(Plan(asked.rows, recompute), rehearse, limit, for_one_row))
        fitting = [plan for plan in tried if plan.peak_bytes <= limit]
        if fitting:
            return fitting[-1]
    takes = f"more than the {size_text(available)} that there are"
    if tried:
        takes = f"at least {size_text(round(tried[0].peak_bytes * VARIATION * AMPLE) + held)}"
    raise InputError(
        f"--memory-budget {size_text(budget)}: with one row at a time and its blocks recomputed "
        f"this training takes {takes}; give as much, or shorter rows (--max-seq-length), fewer "
        "layers (--lora-layers) or a model of fewer bits"
    )


def _climb(most: Plan, rehearse: Rehearse, limit: float, for_one_row: float) -> Iterator[Plan]:
    """Plans of more and more rows, rehearsed from a part of one row upwards.

    The last of them may be above the limit, but none is tried that is expected to be; up to one
    row, another limit holds.
    """
    rows = [rows for rows in range(2, most.rows + 1) if most.rows % rows == 0]
    sizes: list[float] = []
    peaks: list[int] = []
    for number, part in [*((1, part) for part in PARTS), *((number, 1) for number in rows)]:
        if _expected(sizes, peaks, number / part) > (for_one_row if number == 1 else limit):
            return
        plan = Plan(number, most.recompute)
        sizes.append(number / part)
        peaks.append(rehearse(plan, part))
        if part == 1:
            yield replace(plan, peak_bytes=peaks[-1])
            if peaks[-1] > limit:
                return


def _expected(sizes: Sequence[float], peaks: Sequence[int], size: float) -> float:
    """What the next rehearsal takes, going by those before.

    Linear in rows, and quadratic in tokens, where attention keeps its weights: there slopes grow by
    twice as much each time as tokens double.
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
