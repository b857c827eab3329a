"""What a person reads before the first step of a training and after the last."""

import shlex
import signal

from graft.data.batches import TrainingBatches
from graft.training.memory_plan import Plan, machine_bytes, size_text
from graft.training.options import Options
from graft.training.progress import Progress
from graft.training.run_folder import RunFiles, program


def before(batches: TrainingBatches, options: Options, plan: Plan, *, steps: int, step: int) -> str:
    """How long the training is, how much of it is padding, and what memory it will take."""
    accumulated = batches.step_size // plan.rows
    parts = f" in {accumulated} parts" if accumulated > 1 else ""
    rows = "rows" if batches.capacity is None else "packed rows"
    lines = [
        f"training: {steps:,} steps of {batches.step_size} {rows}{parts}, "
        f"{batches.steps_per_epoch:,} to an epoch, {batches.padding_share:.1%} padding",
        memory(plan, options),
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


def memory(plan: Plan, options: Options) -> str:
    """What memory the training will take, and what was chosen for a budget."""
    available = machine_bytes()
    if not plan.peak_bytes:
        there = f"more than the {available / 1e9:.0f} GB that there are"
        return f"memory: {there}; --memory-budget {size_text(available)} chooses what fits"
    if options.memory_budget is None:
        return f"memory: about {plan.peak_bytes / 1e9:.2f} GB of {available / 1e9:.0f} GB"
    rows = f"{plan.rows} of {options.batch_size} rows at a time"
    blocks = "recomputed" if plan.recompute else "kept"
    return (
        f"memory: {rows}, the inside of blocks {blocks}: about {size_text(plan.peak_bytes)} of "
        f"{options.memory_budget}"
    )


def after(
    progress: Progress, files: RunFiles, options: Options, received: signal.Signals | None
) -> str:
    """Where everything is and what to type next."""
    if received is not None:
        return f"stopped after step {progress.step:,}; go on with: {files.resume_command}"
    lines = []
    if progress.is_stale(options.early_stop):
        lines.append(f"stopped: {progress.stale_evaluations} validations without a better one")
    lines.append(f"adapter {files.adapter}, metrics {files.metrics}, options {files.options}")
    if progress.best_loss is not None:
        best = f"best validation loss {progress.best_loss:.3f} at step {progress.best_step:,}"
        lines.append(f"{best}: {files.best}")
    model = f" --model {shlex.quote(options.model)}" if options.model else ""
    shown = f"{program()}{model} --adapter-file {shlex.quote(str(files.adapter))}"
    lines += [f"measure it: {shown} --test", f"talk to it: {shown} --prompt TEXT"]
    return "\n".join(lines)
