"""Messages printed before the first training step and after the last."""

import dataclasses
import shlex
import signal

from graft.console import bytes_text
from graft.data.sources import find_split_sources
from graft.errors import InputError
from graft.runtime.memory import machine_bytes
from graft.training.memory_plan import MemoryPlan
from graft.training.options import DATA, Options, flag
from graft.training.run import Run
from graft.training.run_folder import program


def start_message(run: Run) -> str:
    """How long the run is, how much of it is padding, and what memory it will take."""
    batches, step = run.batches, run.progress.step
    if run.finished:
        return f"this run is finished: {step} of {run.steps} steps are done"
    parts = batches.step_size // run.plan.rows
    divided = f" in {parts} micro-batches" if parts > 1 else ""
    rows = "rows" if batches.capacity is None else "packed rows"
    lines = [
        f"training: {run.steps:,} steps of {batches.step_size} {rows}{divided}, "
        f"{batches.steps_per_epoch:,} per epoch, {batches.padding_share:.1%} padding",
        memory_message(run.plan, run.options),
    ]
    if batches.capacity is not None:
        lines.insert(
            0,
            f"packing: {len(batches.examples):,} rows in {batches.pack_count:,} "
            f"of at most {batches.capacity:,} tokens",
        )
    if step:
        lines.append(f"resuming after step {step:,}")
    return "\n".join(lines)


def memory_message(plan: MemoryPlan, options: Options) -> str:
    """What memory the run will take, and what was chosen for a budget."""
    machine = bytes_text(machine_bytes())
    if not plan.peak_bytes:
        size = machine.replace(" ", "")
        return f"memory: more than the {machine} of this machine; --memory-budget {size} may fit"
    if options.memory_budget is None:
        return f"memory: about {bytes_text(plan.peak_bytes)} of {machine}"
    checkpointing = "on" if plan.recompute else "off"
    return (
        f"memory: micro-batch {plan.rows} of {options.batch_size}, gradient checkpointing "
        f"{checkpointing}, about {bytes_text(plan.peak_bytes)} of {options.memory_budget}"
    )


def end_message(run: Run, received: signal.Signals | None) -> str:
    """Where the results are and what to type next."""
    progress, folder = run.progress, run.folder
    if received is not None:
        return f"stopped after step {progress.step:,}; continue with: {folder.resume_command}"
    lines = []
    if progress.is_stale(run.options.early_stop):
        lines.append(f"stopped: {progress.stale_evaluations} validations without improvement")
    lines.append(f"adapter {folder.adapter}, metrics {folder.metrics}, options {folder.options}")
    if progress.best_loss is not None:
        best = f"best validation loss {progress.best_loss:.3f} at step {progress.best_step:,}"
        lines.append(f"{best}: {folder.best}")
    call = _call(run.options, str(folder.adapter))
    if _has_test_split(run.options):
        lines.append(f"evaluate it: {call}{_data_options(run.options)} --test")
    return "\n".join([*lines, f"talk to it: {call} --prompt TEXT"])


def _call(options: Options, adapter: str) -> str:
    """The command with a run's model and adapter, without what to do."""
    model = f" --model {shlex.quote(options.model)}" if options.model else ""
    return f"{program()}{model} --adapter-file {shlex.quote(adapter)}"


def _data_options(options: Options) -> str:
    """The options of a run that decide which tokens are evaluated, where they are not the usual."""
    text = ""
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        decides = field.metadata["group"] == DATA or field.name == "objective"
        if decides and value != field.default:
            text += f" {flag(field.name)}"
            text += "" if value is True else f" {shlex.quote(str(value))}"
    return text


def _has_test_split(options: Options) -> bool:
    try:
        find_split_sources(options.data, ["test"], valid_fraction=options.valid_fraction)
    except InputError:
        return False
    return True
