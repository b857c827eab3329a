"""Measures training, generation and serving, beside other tools on the same work.

Each run is a process of its own. Runs of all tools take turns, so that what else the machine does
meets all of them; the medians and their spread are told. What is measured is `graft.bench.work`'s
to say, and how other tools are run `graft.bench.peers`'s.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.bench import work as bench_work
from graft.bench.peers import BATCH, LEARNING_RATE, MAX_TOKENS, STEPS, WARM_UP
from graft.bench.work import WORKS, Work
from graft.errors import InputError
from graft.runtime import blas

ROOT = Path(__file__).resolve().parents[2]
GRAFT = "graft"
FEW_STEPS = 4
# How to run each tool: whether with Graft's BLAS, and how many steps are worth waiting for.
PEERS: dict[str, tuple[str, bool, int]] = {
    "mlx-lm": ("mlx-lm", True, STEPS),
    "mlx-lm-as-installed": ("mlx-lm", False, FEW_STEPS),
    "peft": ("peft", False, STEPS),
}
NOT_QUANTIZED_ONLY = ("peft",)
SLOW_IF_QUANTIZED = ("mlx-lm",)
SERVERS = ("mlx-lm",)

Figures = dict[str, float]


@dataclass(frozen=True)
class Done:
    """A process that ended well.

    Attributes:
        figures: how many seconds it took, and how many bytes were resident at most.
        output: what it printed.
        started: when, in seconds since the epoch.
    """

    figures: Figures
    output: str
    started: float


def check(names: Sequence[str], peers: Sequence[str], repeats: int) -> None:
    """Refuse what is not known.

    Raises:
        InputError: with all that is wrong.
    """
    problems = [f"--work {n}: give any of {', '.join(WORKS)}" for n in names if n not in WORKS]
    problems += [f"--against {n}: give any of {', '.join(PEERS)}" for n in peers if n not in PEERS]
    problems += [f"--repeats {repeats}: give at least 1"] if repeats < 1 else []
    if problems:
        raise InputError("; ".join(problems))


def interleave(runs: Mapping[str, Callable[[], Figures]], repeats: int) -> dict[str, Any]:
    """The figures of every tool by name, each a list with one value a run."""
    results: dict[str, Any] = {name: {} for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            for figure, value in run().items():
                results[name].setdefault(figure, []).append(value)
    return results


def runs_of(
    work: Work, peers: Sequence[str], folder: Path, scratch: Path, peft_python: str
) -> dict[str, Callable[[], Figures]]:
    """How to run Graft and the peers that can do a work."""
    from graft.runtime.cpu import runs_on_cpu

    model, data = folder / work.model, folder / "data"
    quantized = "bits" in bench_work.MODELS[work.model]
    if work.requests:
        tools = [GRAFT, *(peer for peer in peers if peer in SERVERS)]
        return {tool: _server(tool, work, model, scratch / "served") for tool in tools}
    if work.tokens:
        runs = {
            GRAFT: lambda: _run_peer("graft-generation", work, model, data, scratch, fast_blas=True)
        }
    else:
        runs = {GRAFT: lambda: run_graft(work, model, data, scratch)}
    for peer in peers:
        tool, with_blas, steps = PEERS[peer]
        if peer in NOT_QUANTIZED_ONLY and (quantized or work.tokens):
            continue
        if tool in SLOW_IF_QUANTIZED and quantized and runs_on_cpu():
            steps = FEW_STEPS
        if work.steps and steps < STEPS:
            continue
        runs[peer] = _peer(
            f"{tool}-generation" if work.tokens else tool,
            *(work, model, data, scratch),
            fast_blas=with_blas,
            steps=work.steps or steps,
            python=peft_python if peer == "peft" else sys.executable,
        )
    return runs


def run_graft(work: Work, model: Path, data: Path, scratch: Path) -> Figures:
    """Train with `lora.py` as a person would, and read its metrics."""
    adapter = scratch / "graft" / "adapters.npz"
    steps = (work.steps or STEPS) + WARM_UP
    length = ["--epochs", str(work.epochs)] if work.epochs else ["--iters", str(steps)]
    never = str(10**9)
    validation = (
        [str(WARM_UP), "--val-batches", "-1"] if work.loss else [never, "--val-batches", "1"]
    )
    arguments = [
        *("--train", "--force", "--model", str(model), "--data", str(data)),
        *("--adapter-file", str(adapter), "--lora-layers", str(work.layers), *length),
        *("--batch-size", str(BATCH), "--max-seq-length", str(MAX_TOKENS)),
        *("--learning-rate", str(LEARNING_RATE), "--steps-per-report", str(WARM_UP)),
        *("--save-every", never, "--steps-per-eval", *validation),
    ]
    done = _measure([sys.executable, str(ROOT / "lora.py"), *arguments])
    text = (adapter.parent / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    reports = [line for line in lines if line["kind"] == "train"]
    first, last = reports[0], reports[-1]
    figures = dict(done.figures)
    reached = [line for line in lines if line["kind"] == "eval" and line["loss"] <= work.loss]
    if reached:
        left = lines[-1]["seconds"] - reached[0]["seconds"]
        figures["seconds_to_loss"] = figures["seconds"] - left
    if work.epochs:
        rate = last["tokens"] / figures["seconds"]
    else:
        rate = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
    return {
        "tokens_per_second": rate,
        "peak_memory_bytes": last["peak_memory_bytes"],
        **figures,
    }


def table(name: str, results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A work's medians with their spread, and Graft's speed over each tool's."""
    lines = [f"\n{name}: {WORKS[name].about}"]
    ours = statistics.median(results[GRAFT]["tokens_per_second"])
    for tool, figures in results.items():
        speeds = figures["tokens_per_second"]
        median = statistics.median(speeds)
        told = f"  {tool:<20} {median:>8,.0f} tokens/s  ({min(speeds):,.0f} to {max(speeds):,.0f})"
        told += f"  {statistics.median(figures['resident_bytes']) / 1e6:>7,.0f} MB resident"
        if "peak_memory_bytes" in figures:
            peak = statistics.median(figures["peak_memory_bytes"]) / 1e6
            told += f"  {peak:>7,.0f} MB in MLX"
        lines.append(told + (f"  graft x {ours / median:.2f}" if tool != GRAFT else ""))
        if WORKS[name].loss:
            lines.append(f"    {_time_to_loss(figures, results[GRAFT])}")
        lines += _serving_lines({name: statistics.median(own) for name, own in figures.items()})
    return "\n".join(lines)


def _time_to_loss(figures: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """How long it took to the loss, and how many times Graft's time that is."""
    if "seconds_to_loss" not in figures:
        return "the loss was not reached"
    times = figures["seconds_to_loss"]
    median = statistics.median(times)
    told = f"the loss after {median:,.1f} s  ({min(times):,.1f} to {max(times):,.1f})"
    if figures is ours or "seconds_to_loss" not in ours:
        return told
    return f"{told}  graft x {median / statistics.median(ours['seconds_to_loss']):.2f}"


def _serving_lines(figures: Mapping[str, float]) -> list[str]:
    """What is told of a server beside its speed, from medians."""
    lines = []
    if "one_by_one_tokens_per_second" in figures:
        alone = figures["one_by_one_tokens_per_second"]
        times = figures["tokens_per_second"] / alone
        lines.append(f"    {times:.1f} times as fast as one after another ({alone:,.0f} tokens/s)")
    if "mixed_over_single" in figures:
        lines.append(
            f"    16 rows of 16 adapters at {figures['mixed_over_single']:.2f} of the speed of one "
            f"adapter's; the longest step while one is loaded: "
            f"{figures['longest_step_while_loading']:.1f} ordinary ones"
        )
    return lines


def machine() -> dict[str, Any]:
    """What the figures depend on, in general words."""
    return {"system": sys.platform, "processor": os.uname().machine, "cores": os.cpu_count()}


def _peer(*arguments: Any, **settings: Any) -> Callable[[], Figures]:
    return lambda: _run_peer(*arguments, **settings)


def _run_peer(
    tool: str,
    work: Work,
    model: Path,
    data: Path,
    scratch: Path,
    *,
    fast_blas: bool,
    steps: int = STEPS,
    python: str = sys.executable,
) -> Figures:
    script = str(ROOT / "graft" / "bench" / "peers.py")
    # Not run as a file: its folder would stand first in the path, and hide others' modules.
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [tool, str(model), str(data), "--steps", str(steps), "--scratch", str(scratch)]
    arguments += ["--layers", str(work.layers), "--tokens", str(work.tokens)]
    arguments += ["--loss", str(work.loss)]
    library = _library() if fast_blas else None
    arguments += ["--blas", library] if library else []
    done = _measure([python, "-c", code, script, *arguments])
    figures = json.loads(done.output.splitlines()[-1]) | done.figures
    if "reached_at" in figures:
        figures["seconds_to_loss"] = figures.pop("reached_at") - done.started
    return figures


def _server(tool: str, work: Work, model: Path, scratch: Path) -> Callable[[], Figures]:
    arguments = [tool, str(model), str(scratch), "--requests", str(work.requests)]
    arguments += ["--blas", _library() or ""]

    def run() -> Figures:
        done = _measure([sys.executable, "-m", "graft.bench.serving", *arguments])
        return json.loads(done.output.splitlines()[-1]) | done.figures

    return run


def _library() -> str | None:
    return blas.loaded() if sys.platform == "linux" else None


def _measure(arguments: Sequence[str]) -> Done:
    """Run a process to its end.

    Raises:
        InputError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    start, started = time.perf_counter(), time.time()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(arguments, stdout=output, stderr=errors, env=environment)
        with _Watch(child.pid) as watch:
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            told = errors.read().decode(errors="replace").strip().splitlines() or ["nothing said"]
            raise InputError(f"{' '.join(arguments[3:5])} failed: {told[-1]}")
        # Only where nothing better is known: it counts the process that started this one, too.
        resident = watch.most or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        figures = {"seconds": seconds, "resident_bytes": float(resident)}
        return Done(figures, output.read().decode(), started)


class _Watch(threading.Thread):
    """While in its context, asks twice a second what a process and its children take (Linux).

    Attributes:
        most: bytes resident: the process's own peak, and what its children had to themselves.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._pid, self._ended = pid, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            sizes = (_value(pid, "smaps_rollup", "Private_Dirty:") for pid in _children(self._pid))
            self.most = max(self.most, _value(self._pid, "status", "VmHWM:") + sum(sizes))

    def __enter__(self) -> "_Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def _value(pid: int, file: str, name: str) -> int:
    """A size in bytes that the system tells of a process; 0 where it does not."""
    with suppress(OSError):
        for line in Path("/proc", str(pid), file).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def _children(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found: list[int] = []
    for path in Path("/proc", str(pid)).glob("task/*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found + [other for child in found for other in _children(child)]
