"""Memory counters and limits of this machine."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from graft.runtime.workers import reset_worker_peak, worker_peak_bytes

import mlx.core as mx


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Keep Python's garbage collector from looking at the objects that exist now.

    A loaded model stays, and looking through all of it takes as long as a small training step.
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
    """Peak bytes in use as MLX counts them, worker processes included, since `reset_peak`."""
    return int(mx.get_peak_memory()) + worker_peak_bytes()


def reset_peak() -> None:
    """Start counting `peak_bytes` again."""
    mx.reset_peak_memory()
    reset_worker_peak()


def peak_during(work: Callable[[], object]) -> int:
    """Peak bytes in use while `work` runs, as MLX counts them, with all that was in use before."""
    mx.reset_peak_memory()
    work()
    return int(mx.get_peak_memory())


def set_memory_limits(budget: int | None, peak: int = 0) -> None:
    """Hold MLX to a budget, and on Metal to what the system recommends.

    Above the budget MLX waits for running work before it starts more. Its cache of freed memory is
    limited to what the peak leaves, and so, on Metal, is the memory that stays resident.

    Args:
        budget: in bytes; `None` for no budget.
        peak: expected peak in bytes, as far as known.
    """
    limits = [] if budget is None else [budget]
    if mx.metal.is_available():
        limits.append(int(mx.device_info()["max_recommended_working_set_size"]))
        mx.set_wired_limit(min(limits))
    if budget is not None:
        mx.set_memory_limit(budget)
    if limits:
        mx.set_cache_limit(max(min(limits) - peak, 0))
