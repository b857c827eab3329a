"""Runs Graft and other tools on the same work, and collects speed, memory and time.

Each run is a separate process. The tools take turns, so that anything else the machine does affects
all of them alike. What is measured is in `graft.bench.work`; how other tools are run is in
`graft.bench.peers`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from graft.bench import work as bench_work
from graft.bench.measured_process import measure_process
from graft.bench.peers import BATCH, LEARNING_RATE, MAX_TOKENS, STEPS, WARM_UP
from graft.bench.results_table import GRAFT
from graft.bench.work import MODELS, WORKS, Figures, Work
from graft.errors import InputError
from graft.runtime import blas
from graft.storage.atomic import new_file

FEW_STEPS = 4


@dataclass(frozen=True)
class Peer:
    """Another tool to compare Graft with.

    Attributes:
        tool: what `graft.bench.peers` calls it.
        steps: training steps to measure.
        fast_blas: load Graft's BLAS before MLX.
        slow_if_quantized: on a CPU, measure few steps of a quantized model.
        whole_training_only: it neither trains quantized models nor generates.
        serves: it has a server.
        separate_python: it runs under the Python of `--peft-python`.
    """

    tool: str
    steps: int = STEPS
    fast_blas: bool = False
    slow_if_quantized: bool = False
    whole_training_only: bool = False
    serves: bool = False
    separate_python: bool = False


PEERS = {
    "mlx-lm": Peer("mlx-lm", fast_blas=True, slow_if_quantized=True, serves=True),
    "mlx-lm-as-installed": Peer("mlx-lm", FEW_STEPS, slow_if_quantized=True),
    "peft": Peer("peft", whole_training_only=True, separate_python=True),
}


@dataclass(frozen=True)
class BenchFolders:
    """Where a run finds its inputs and writes its outputs.

    Attributes:
        model: the model's folder.
        data: the dataset's folder.
        scratch: for adapters and logs.
    """

    model: Path
    data: Path
    scratch: Path


def measure_works(
    names: Sequence[str],
    peers: Sequence[str],
    *,
    repeats: int = 3,
    folder: Path | None = None,
    peft_python: str = sys.executable,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure works one after another; yields each one's name and results by tool and figure.

    Args:
        names: of `WORKS`; empty for all that need no server.
        peers: of `PEERS`.
        repeats: runs of each tool.
        folder: where models and data are kept; by default they are deleted at the end.
        peft_python: a Python that has torch and peft.

    Raises:
        InputError: a name is unknown, or a tool fails.
    """
    check_names(names, peers, repeats)
    # Serving needs an extra, so it is measured only on request.
    names = names or [name for name, work in WORKS.items() if not work.requests]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        materials = folder or scratch / "materials"
        bench_work.make_materials(materials, [WORKS[name].model for name in names])
        for name in names:
            work = WORKS[name]
            folders = BenchFolders(materials / work.model, materials / "data", scratch)
            runs = runs_of(work, peers, folders=folders, peft_python=peft_python)
            yield name, run_in_turns(runs, repeats)


def check_names(names: Sequence[str], peers: Sequence[str], repeats: int) -> None:
    """Check the names of works and tools.

    Raises:
        InputError: with all that is wrong.
    """
    problems = [f"--work {n}: give any of {', '.join(WORKS)}" for n in names if n not in WORKS]
    problems += [f"--against {n}: give any of {', '.join(PEERS)}" for n in peers if n not in PEERS]
    problems += [f"--repeats {repeats}: give at least 1"] if repeats < 1 else []
    if problems:
        raise InputError("; ".join(problems))


def run_in_turns(runs: Mapping[str, Callable[[], Figures]], repeats: int) -> dict[str, Any]:
    """The figures of every tool by name, each a list with one value per run."""
    results: dict[str, Any] = {name: {} for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            for figure, value in run().items():
                results[name].setdefault(figure, []).append(value)
    return results


def save_record(file: Path, results: Mapping[str, Any]) -> None:
    """Write all figures and what they depend on, as JSON."""
    machine = {"system": sys.platform, "processor": os.uname().machine, "cores": os.cpu_count()}
    with new_file(file) as temporary:
        record = {"machine": machine, "works": results}
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def runs_of(
    work: Work, peers: Sequence[str], *, folders: BenchFolders, peft_python: str
) -> dict[str, Callable[[], Figures]]:
    """How to run Graft, and those of the peers that can do the work."""
    if work.requests:
        tools = [GRAFT, *(name for name in peers if PEERS[name].serves)]
        return {tool: partial(_run_server, tool, work, folders) for tool in tools}
    run = partial(_run_tool, "graft-generation", fast_blas=True) if work.tokens else run_graft
    runs: dict[str, Callable[[], Figures]] = {GRAFT: partial(run, work, folders)}
    for name in peers:
        if (steps := _steps_of(PEERS[name], work)) is not None:
            runs[name] = _peer_run(
                PEERS[name], work, folders=folders, steps=steps, peft_python=peft_python
            )
    return runs


def _steps_of(peer: Peer, work: Work) -> int | None:
    """The training steps to measure of a peer; `None` if it cannot do the work in time."""
    from graft.runtime.cpu import runs_on_cpu

    quantized = "bits" in MODELS[work.model]
    if peer.whole_training_only and (quantized or work.tokens):
        return None
    slow = peer.slow_if_quantized and quantized and runs_on_cpu()
    steps = FEW_STEPS if slow else peer.steps
    if work.steps and steps < STEPS:
        return None
    return work.steps or steps


def _peer_run(
    peer: Peer, work: Work, *, folders: BenchFolders, steps: int, peft_python: str
) -> Callable[[], Figures]:
    return partial(
        _run_tool,
        f"{peer.tool}-generation" if work.tokens else peer.tool,
        work,
        folders,
        fast_blas=peer.fast_blas,
        steps=steps,
        python=peft_python if peer.separate_python else sys.executable,
    )


def run_graft(work: Work, folders: BenchFolders) -> Figures:
    """Train with `graft lora`, as a user would, and read its metrics."""
    adapter = folders.scratch / "graft" / "adapters.npz"
    steps = (work.steps or STEPS) + WARM_UP
    length = ["--epochs", str(work.epochs)] if work.epochs else ["--iters", str(steps)]
    never = str(10**9)
    validation = (
        [str(WARM_UP), "--val-batches", "-1"] if work.loss else [never, "--val-batches", "1"]
    )
    arguments = [
        *("--train", "--force", "--model", str(folders.model), "--data", str(folders.data)),
        *("--adapter-file", str(adapter), "--lora-layers", str(work.layers), *length),
        *("--batch-size", str(BATCH), "--max-seq-length", str(MAX_TOKENS)),
        *("--learning-rate", str(LEARNING_RATE), "--steps-per-report", str(WARM_UP)),
        *("--save-every", never, "--steps-per-eval", *validation),
    ]
    finished = measure_process([sys.executable, "-m", "graft", "lora", *arguments], name=GRAFT)
    text = (adapter.parent / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    return _training_figures(metrics, work, seconds=finished.figures["seconds"]) | finished.figures


def _training_figures(
    metrics: Sequence[Mapping[str, Any]], work: Work, *, seconds: float
) -> Figures:
    """Speed, memory and the time to the loss, from `metrics.jsonl` and the process's time."""
    reports = [line for line in metrics if line["kind"] == "train"]
    first, last = reports[0], reports[-1]
    if work.epochs:
        rate = last["tokens"] / seconds
    else:
        rate = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
    figures = {"tokens_per_second": rate, "peak_memory_bytes": last["peak_memory_bytes"]}
    reached = [line for line in metrics if line["kind"] == "eval" and line["loss"] <= work.loss]
    if reached:
        after = metrics[-1]["seconds"] - reached[0]["seconds"]
        figures["seconds_to_loss"] = seconds - after
    return figures


def _run_tool(
    tool: str,
    work: Work,
    folders: BenchFolders,
    *,
    fast_blas: bool,
    steps: int = STEPS,
    python: str = sys.executable,
) -> Figures:
    """Run `graft.bench.peers` under a Python that may have no Graft."""
    script = str(Path(__file__).with_name("peers.py"))
    # Running it as a file would put its folder first in the path and hide other modules.
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [tool, str(folders.model), str(folders.data), "--scratch", str(folders.scratch)]
    arguments += ["--steps", str(steps), "--layers", str(work.layers)]
    arguments += ["--tokens", str(work.tokens), "--loss", str(work.loss)]
    library = _blas_library() if fast_blas else None
    arguments += ["--blas", library] if library else []
    finished = measure_process([python, "-c", code, script, *arguments], name=tool)
    figures = _printed_figures(finished.output) | finished.figures
    if "reached_at" in figures:
        figures["seconds_to_loss"] = figures.pop("reached_at") - finished.started
    return figures


def _run_server(tool: str, work: Work, folders: BenchFolders) -> Figures:
    arguments = [tool, str(folders.model), str(folders.scratch / "served")]
    arguments += ["--requests", str(work.requests), "--blas", _blas_library() or ""]
    command = [sys.executable, "-m", "graft.bench.serving", *arguments]
    finished = measure_process(command, name=f"{tool}'s server")
    return _printed_figures(finished.output) | finished.figures


def _printed_figures(output: str) -> Figures:
    figures: Figures = json.loads(output.splitlines()[-1])
    return figures


def _blas_library() -> str | None:
    return blas.loaded() if sys.platform == "linux" else None
