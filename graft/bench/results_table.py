"""The results of a benchmark as text: medians, spread, and Graft's speed over each other tool's."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from graft.bench.serving import MIXED_ROWS
from graft.bench.work import WORKS

GRAFT = "graft"
_Results = Mapping[str, Sequence[float]]


def results_table(name: str, results: Mapping[str, _Results]) -> str:
    """The results of one work.

    Args:
        name: one of `WORKS`.
        results: by tool, the values of each figure, one per run.
    """
    lines = [f"\n{name}: {WORKS[name].about}"]
    ours = results[GRAFT]
    for tool, figures in results.items():
        lines.append(_speed_line(tool, figures, ours))
        if WORKS[name].loss:
            lines.append(f"    {_time_to_loss(figures, ours)}")
        lines += _serving_lines({key: statistics.median(values) for key, values in figures.items()})
    return "\n".join(lines)


def _speed_line(tool: str, figures: _Results, ours: _Results) -> str:
    speeds = figures["tokens_per_second"]
    median = statistics.median(speeds)
    line = f"  {tool:<20} {median:>8,.0f} tokens/s  ({min(speeds):,.0f} to {max(speeds):,.0f})"
    line += f"  {statistics.median(figures['resident_bytes']) / 1e6:>7,.0f} MB resident"
    if "peak_memory_bytes" in figures:
        line += f"  {statistics.median(figures['peak_memory_bytes']) / 1e6:>7,.0f} MB in MLX"
    if tool == GRAFT:
        return line
    return f"{line}  graft x {statistics.median(ours['tokens_per_second']) / median:.2f}"


def _time_to_loss(figures: _Results, ours: _Results) -> str:
    """The time until the validation loss was reached, and its ratio to Graft's."""
    if "seconds_to_loss" not in figures:
        return "the loss was not reached"
    times = figures["seconds_to_loss"]
    median = statistics.median(times)
    line = f"the loss was reached after {median:,.1f} s  ({min(times):,.1f} to {max(times):,.1f})"
    if figures is ours or "seconds_to_loss" not in ours:
        return line
    return f"{line}  graft x {median / statistics.median(ours['seconds_to_loss']):.2f}"


def _serving_lines(medians: Mapping[str, float]) -> Iterator[str]:
    """What is measured of a server besides its speed."""
    if "one_by_one_tokens_per_second" in medians:
        alone = medians["one_by_one_tokens_per_second"]
        times = medians["tokens_per_second"] / alone
        yield f"    {times:.1f} times as fast as one after another ({alone:,.0f} tokens/s)"
    if "mixed_over_single" in medians:
        yield (
            f"    {MIXED_ROWS} rows with {MIXED_ROWS} adapters run at "
            f"{medians['mixed_over_single']:.2f} of the speed with one adapter; the longest step "
            "while an adapter is loaded, in ordinary steps: "
            f"{medians['longest_step_while_loading']:.1f}"
        )
