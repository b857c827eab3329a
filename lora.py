r"""Train a LoRA adapter on a model, measure it, and generate with it.

    python lora.py --train                          # the embedded model on datasets/mlx-docs
    python lora.py --test                           # its loss on test.jsonl, with the adapter
    python lora.py --prompt "Q: What is relu in mlx?\nA:"

On a quantized model this is QLoRA, on a whole one LoRA. The training loop is `train` below, to be
read.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import graft  # noqa: F401  (loads a fast BLAS before MLX)
from graft.adapters.adapter import apply_adapter
from graft.adapters.attach import count_parameters, lora_layers
from graft.adapters.files import (
    load_adapter,
    save_adapter,
)
from graft.cli.command import command
from graft.data.batches import Batch, TrainingBatches, group_rows, pad, sample_rows
from graft.data.examples import Split, describe_split, load_splits
from graft.errors import RunError
from graft.pretrained.load import fingerprint, load_model
from graft.pretrained.tokenizer import Tokenizer
from graft.runtime.interrupts import Interrupts
from graft.runtime.prefetch import ahead
from graft.runtime.workers import Lanes, choose_lanes, groups
from graft.training import messages as summary
from graft.training import options as run_options
from graft.training.activation_cache import cache_trunk, is_cut
from graft.training.checkpoints import Checkpoint
from graft.training.chunked_loss import avoid_whole_logits
from graft.training.dry_run import Preparation
from graft.training.memory_plan import Plan, parse_size, settled
from graft.training.metrics import Evaluation, RunLog
from graft.training.optimizers import make_optimizer, make_schedule, set_learning_rate
from graft.training.options import DEFAULT_ADAPTER, DEFAULT_ITERS, NO_ADAPTER, Options
from graft.training.packing import find_capacity, forward
from graft.training.progress import Progress, Window
from graft.training.reporters import REPORTERS
from graft.training.run_folder import RunFiles, check_options, check_same
from graft.training.setup import attach_new_adapter
from graft.training.step import StepResult, UpdateStep
from graft.training.supervisor import is_supervised, supervise_run

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

RUN_SPLITS = ("train", "valid")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; the options are declared in `graft.training.options`."""
    return run_options.build_parser(__doc__.splitlines()[0])


def load(options: Options, tokenizer: Tokenizer, *, context: int | None) -> dict[str, Split]:
    """Read and tokenize the splits that a run needs.

    Args:
        options: tells the data and whether to train or test.
        tokenizer: the model's.
        context: the longest row that the model was made for, in tokens, where that is known.

    Raises:
        InputError: data is missing, empty or broken, or has nothing to train on.
    """
    needed = ["train", "valid"] if options.train else []
    needed += ["test"] if options.test else []
    limit = min(options.max_seq_length, context or options.max_seq_length)
    splits = load_splits(
        options.data,
        tokenizer,
        needed,
        max_length=limit,
        overlap=options.overlap,
        mask_prompt=options.mask_prompt,
        add_eos=bool(options.add_eos_token),
        valid_fraction=options.valid_fraction,
    )
    for name, split in splits.items():
        print(f"{name}: {describe_split(split, limit)}")
    return splits


def loss(
    model: nn.Module,
    inputs: mx.array,
    targets: mx.array,
    loss_mask: mx.array,
    documents: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy over the trained tokens.

    Args:
        model: maps token ids (rows, tokens) to logits (rows, tokens, vocabulary).
        inputs: (rows, tokens) token ids.
        targets: (rows, tokens) the ids that follow.
        loss_mask: (rows, tokens) bool; false where a target does not count, as on padding.
        documents: (rows, tokens) which document of a packed row a token belongs to.

    Returns:
        The loss in nats, and the number of trained tokens.
    """
    if (head := getattr(model, "loss_head", None)) is not None:
        total = head.cross_entropy(model, inputs, targets, loss_mask, documents)
    else:
        logits = forward(model, inputs, documents).astype(mx.float32)
        total = (nn.losses.cross_entropy(logits, targets) * loss_mask).sum()
    tokens = loss_mask.sum()
    return total / mx.maximum(tokens, 1), tokens


def evaluate(
    model: nn.Module,
    split: Split,
    batch_size: int,
    *,
    num_batches: int = -1,
    seed: int = 0,
    lanes: int = 1,
    at_a_time: int | None = None,
    side_by_side: Callable[[Sequence[Any]], list[Any]] | None = None,
) -> Evaluation:
    """The loss over a split, every token weighing the same whatever the batch size.

    Args:
        model: with or without an adapter.
        split: what to measure on.
        batch_size: rows of a batch.
        num_batches: take a fixed sample of this many batches' worth of rows; -1 takes every row.
        seed: of that sample.
        lanes: how much is computed side by side.
        at_a_time: rows in each lane; by default a batch.
        side_by_side: computes the losses; by default lanes of its own.
    """
    start = time.perf_counter()
    model.eval()
    rows = len(split) if num_batches == -1 else num_batches * batch_size
    examples = sample_rows(split.examples, rows, seed=seed)
    total, tokens = 0.0, 0
    parts = groups(group_rows(examples, at_a_time or batch_size), lanes)
    with Lanes(lambda arrays: loss(model, *arrays)) as own:
        for batches in ahead([pad(examples, rows) for rows in part] for part in parts):
            for mean, count in (side_by_side or own)([_arrays(batch) for batch in batches]):
                total += mean.item() * count.item()
                tokens += int(count.item())
    return Evaluation(total / max(tokens, 1), tokens, time.perf_counter() - start)


@dataclass
class Run:
    """A training in progress: what the steps of `train` share.

    Attributes:
        model: with an adapter attached.
        valid: what to measure on.
        batches: what to learn from.
        update: changes the adapter.
        optimizer: the one in `update`.
        schedule: the learning rate as a function of the step.
        steps: how many there are to be.
        options: how often to report, validate and save.
        plan: how rows are computed.
        progress: how far it is.
        files: where everything is kept.
        record: what is recorded with the adapter, see `save_adapter`.
        fixed: fingerprints of model and data, by which a checkpoint knows its run.
        log: where to report.
        retraced: whether needless traces were told.
    """

    model: nn.Module
    valid: Split
    batches: TrainingBatches
    update: UpdateStep
    optimizer: optim.MultiOptimizer
    schedule: Callable[[int], float]
    steps: int
    options: Options
    plan: Plan
    progress: Progress
    files: RunFiles
    record: dict[str, Any]
    fixed: dict[str, Any]
    log: RunLog
    retraced: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        stale = self.progress.is_stale(self.options.early_stop)
        return self.progress.step >= self.steps or stale

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is to be done now."""
        return self.progress.step % every == 0 or self.finished

    @property
    def learning_rate(self) -> float:
        """Of the step that is next or was last, as `progress` stands."""
        return self.schedule(self.progress.step) * self.progress.rate_factor


def train(run: Run, interrupts: Interrupts) -> None:
    """Train the adapter of `run` until it is finished or a signal came.

    Raises:
        RunError: too many steps in a row were not finite.
    """
    if not run.progress.started:
        run.files.clear()
        validate(run)
        run.progress.started = True
        save_checkpoint(run)
    while not (run.finished or interrupts.received):
        batches = next(run.batches)
        result = take_step(run, batches)
        if not result.good and meet_bad_step(run, batches, result):
            continue
        if run.due(run.options.steps_per_report):
            report(run)
        if run.due(run.options.steps_per_eval):
            validate(run)
        if run.due(run.options.save_every):
            run.log.event(run.progress.step, "saved")
            save(run)
    if interrupts.received:
        save(run)


def take_step(run: Run, batches: Sequence[Batch]) -> StepResult:
    """Update the adapter from the micro-batches of one step."""
    start = time.perf_counter()
    run.progress.step += 1
    # Randomness is a function of the step alone, so a resumed run drops out the same inputs.
    mx.random.seed(run.options.seed * 1_000_003 + run.progress.step)
    set_learning_rate(run.optimizer, run.learning_rate, lora_plus_ratio=run.options.lora_plus_ratio)
    result = run.update([_arrays(batch) for batch in batches])
    run.progress.add(result, seconds=time.perf_counter() - start)
    run.log.step(run.progress.step)
    return result


def meet_bad_step(run: Run, batches: Sequence[Batch], result: StepResult) -> bool:
    """Report a step that was not finite; after too many, go back to the last checkpoint, once.

    Returns:
        Whether the run went back.

    Raises:
        RunError: it has gone back before.
    """
    progress, rows = run.progress, [row for batch in batches for row in batch.rows]
    seen = f"loss {result.loss}, gradient norm {result.grad_norm}, rows {rows}"
    step, norm = progress.step, result.grad_norm
    run.log.event(step, "bad_step", loss=result.loss, grad_norm=norm, rows=rows)
    run.log.say(f"step {step:>5}  not finite, so nothing was changed: {seen}")
    if progress.bad_steps < run.options.max_bad_steps:
        return False
    if progress.went_back:
        save_adapter(run.files.adapter, run.model, **run.record)
        raise RunError(
            f"{progress.bad_steps} steps in a row up to step {progress.step} were not finite, also "
            f"after going back with half the learning rate (the last: {seen}); "
            f"{run.files.adapter} holds the last good adapter"
        )
    go_back(run)
    return True


def go_back(run: Run) -> None:
    """Restore the last checkpoint and halve the learning rate."""
    before = run.progress
    checkpoint = run.files.load_checkpoint()
    restore(run, checkpoint)
    run.progress.rate_factor = before.rate_factor / 2
    run.progress.went_back = True
    run.log.event(before.step, "went_back", to_step=checkpoint.step)
    run.log.say(
        f"step {before.step:>5}  back to step {checkpoint.step} with half the learning rate"
    )


def report(run: Run) -> None:
    """Tell the training loss since the last report."""
    window = run.progress.window
    run.log.train(
        run.progress.step,
        loss=window.loss,
        tokens=run.progress.tokens,
        tokens_per_second=window.tokens / max(window.seconds, 1e-9),
        learning_rate=run.learning_rate,
        grad_norm=window.grad_norm,
    )
    run.progress.window = Window()
    traces, needed = run.update.traces
    if traces > needed and not run.retraced:
        run.retraced = True
        run.log.event(run.progress.step, "retraced", traces=traces, needed=needed)
        run.log.say(
            f"step {run.progress.step:>5}  slow: compiled {traces} times, {needed} were needed"
        )


def validate(run: Run) -> None:
    """Measure on the validation rows, and keep the adapter if it is the best so far."""
    options, step = run.options, run.progress.step
    result = evaluate(
        run.model,
        run.valid,
        options.batch_size,
        num_batches=options.val_batches,
        seed=options.seed,
        lanes=choose_lanes(options.lanes, run.plan.rows),
        at_a_time=run.plan.rows,
        side_by_side=run.update.losses,
    )
    run.log.evaluation(step, "valid", result)
    if step and run.progress.validated(result.loss):
        save_adapter(run.files.best, run.model, **run.record)


def save(run: Run) -> None:
    """Keep the adapter, and a checkpoint to continue from unless the last step was bad."""
    save_adapter(run.files.adapter, run.model, **run.record)
    if run.progress.bad_steps == 0 or run.finished:
        save_checkpoint(run)


def save_checkpoint(run: Run) -> None:
    """Keep everything that the continuation of the run needs."""
    run.progress.seconds = run.log.seconds
    state = {
        "progress": run.progress.record(),
        "finished": run.finished,
        "batches": run.batches.state(),
        "metrics_bytes": run.log.size_bytes,
        "options": run_options.record(run.options),
        "plan": asdict(run.plan),
        "fixed": run.fixed,
    }
    run.files.store.save(run.progress.step, run.update.state(), state)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a run where a checkpoint of it was."""
    run.update.restore(checkpoint.arrays)
    run.batches.restore(checkpoint.state["batches"])
    run.progress = Progress.from_record(checkpoint.state["progress"])


def generate(model: nn.Module, tokenizer: Tokenizer, options: Options) -> None:
    """Print the prompt and the model's answer, every `--write-every` tokens."""
    from graft.engine.engine import Engine

    assert options.prompt is not None
    print(options.prompt, end="", flush=True)
    # No other answer waits while a prompt is processed, nor comes after it.
    limits = {"max_rows": 1, "prefill_tokens": 2048, "prompt_cache_bytes": 0}
    with Engine(model, tokenizer, **limits) as engine:
        pieces = engine.submit(
            options.prompt,
            max_tokens=options.num_tokens,
            temperature=options.temp,
            seed=options.seed,
        )
        for number, piece in enumerate(pieces, 1):
            print(piece.text, end="", flush=number % options.write_every == 0)
    print(flush=True)


def start_adapter(model: nn.Module, options: Options) -> dict[str, Any]:
    """Attach the adapter to train, a new one or a loaded one; returns what is to be recorded."""
    if options.resume_adapter_file is not None:
        name = options.resume_adapter_file
        adapter = load_adapter(Path(name), alpha=options.alpha)
        apply_adapter(model, replace(adapter, dropout=options.dropout), name=name)
        print(f"starting from {name}, with its layers, ranks and alphas")
    else:
        attach_new_adapter(model, options)
    if not options.whole_logits:
        avoid_whole_logits(model)
    trained, total = count_parameters(model)
    print(
        f"adapter: {len(lora_layers(model))} layers, {trained:,} of {total:,} parameters "
        f"({trained / total:.2%}) are trained"
    )
    return {
        "base_model": options.model,
        "dropout": options.dropout,
        "options": run_options.record(options),
    }


def use_adapter(model: nn.Module, options: Options) -> None:
    """Load the adapter that is to be measured or talked to, or say that it is the base model."""
    name = options.adapter_file or DEFAULT_ADAPTER
    if options.adapter_file == NO_ADAPTER:
        print("no adapter: this is the base model", file=sys.stderr)
    elif options.adapter_file is None and not Path(name).is_file():
        print(f"no adapter at {name}: this is the base model", file=sys.stderr)
    else:
        adapter = load_adapter(Path(name), alpha=options.alpha)
        apply_adapter(model, adapter, name=name)
        if adapter.base_model != options.model:
            base = adapter.base_model or "the embedded base model"
            print(f"note: {name} was trained on {base}", file=sys.stderr)
    if options.test and not options.whole_logits:
        avoid_whole_logits(model)
    model.eval()


def make_run(
    model: nn.Module, splits: dict[str, Split], options: Options, checkpoint: Checkpoint | None
) -> Run:
    """Attach the adapter and set everything up for `train`, or for going on from `checkpoint`.

    Raises:
        InputError: the checkpoint is of another model or other data, an unfinished run is in the
            way, or the options do not fit the model.
    """
    files = RunFiles(options)
    fixed: dict[str, Any] = {"model": fingerprint(model)}
    fixed["data"] = {n: splits[n].fingerprint for n in RUN_SPLITS}
    if checkpoint is None:
        files.check_room(force=options.force)
    else:
        check_same(checkpoint.state["fixed"], fixed)
    record = start_adapter(model, options)
    optimizer = make_optimizer(options.optimizer, weight_decay=options.weight_decay)
    capacity = find_capacity(model, options.max_seq_length) if options.pack else None
    prepare = Preparation(model, splits, options, optimizer, loss, evaluate, capacity)
    batches = prepare.batches(options.batch_size)
    steps = count_steps(options, batches)
    splits |= cache_trunk(
        model,
        splits,
        loss,
        mode=options.trunk_cache,
        repeated=steps > batches.steps_per_epoch,
        folder=files.adapter.parent,
        model_key=fixed["model"],
        lanes=choose_lanes(options.lanes, options.batch_size),
        budget=parse_size(options.memory_budget) if options.memory_budget else None,
    )
    plan = prepare.fit(checkpoint.state if checkpoint is not None else None)
    batches, update = prepare(plan)
    course, rate = options.lr_schedule, options.learning_rate
    run = Run(
        model=model,
        valid=splits["valid"],
        batches=batches,
        update=update,
        optimizer=optimizer,
        schedule=make_schedule(course, rate, steps=steps, warmup_steps=options.warmup_steps),
        steps=steps,
        options=options,
        plan=plan,
        progress=Progress(),
        files=files,
        record=record,
        fixed=fixed,
        log=make_log(options, files, steps, checkpoint),
    )
    if checkpoint is not None:
        restore(run, checkpoint)
    return run


def make_log(
    options: Options, files: RunFiles, steps: int, checkpoint: Checkpoint | None
) -> RunLog:
    """The log of a run, cut back to what `checkpoint` knew of it."""
    state = checkpoint.state if checkpoint is not None else None
    values = run_options.record(options)
    name = options.report_to
    return RunLog(
        files.metrics,
        steps,
        resume_at=state["metrics_bytes"] if state else 0,
        seconds=state["progress"]["seconds"] if state else 0.0,
        reporter=REPORTERS[name](files.adapter.parent, values) if name else None,
    )


def count_steps(options: Options, batches: TrainingBatches) -> int:
    """How many steps `--iters` or `--epochs` mean."""
    if options.epochs is not None:
        return batches.steps_in(options.epochs)
    return options.iters or DEFAULT_ITERS


def run_training(
    model: nn.Module, splits: dict[str, Split], options: Options, checkpoint: Checkpoint | None
) -> int:
    """`--train`, and `--test` after it: everything that `metrics.jsonl` tells.

    Returns:
        The exit status: 0, or that of the signal that ended the training.
    """
    run = make_run(model, splits, options, checkpoint)
    if run.finished:
        print(f"this run is finished: {run.progress.step} of {run.steps} steps are done")
    else:
        print(
            summary.before(run.batches, options, run.plan, steps=run.steps, step=run.progress.step)
        )
    with Interrupts() as interrupts, run.log, settled():
        run.files.save_options(options)
        with closing(run.update):
            train(run, interrupts)
        traces, needed = run.update.traces
        if traces:
            run.log.event(run.progress.step, "traced", traces=traces, needed=needed)
            run.log.say(f"compiled {traces} times, {needed} were needed")
        run.log.say(summary.after(run.progress, run.files, options, interrupts.received))
        if options.test and not interrupts.received:
            run_test(model, splits["test"], options, run.log, run.plan.rows, run.progress.step)
    return interrupts.exit_status


def run_test(
    model: nn.Module, split: Split, options: Options, log: RunLog, rows: int, step: int | None
) -> None:
    """`--test`: measure on the test rows, so many at a time."""
    result = evaluate(
        model,
        split,
        options.batch_size,
        num_batches=options.test_batches,
        seed=options.seed,
        lanes=choose_lanes(options.lanes, rows),
        at_a_time=rows,
    )
    log.evaluation(step, "test", result)


def resolve(given: Mapping[str, Any]) -> tuple[Options, Checkpoint | None]:
    """The options of a command, and the checkpoint that it resumes from.

    Raises:
        InputError: the options are wrong, or there is nothing to resume, or it was another run.
    """
    options = run_options.from_mapping(given)
    if not options.resume:
        return options, None
    checkpoint = RunFiles(options).load_checkpoint()
    options, changes = run_options.resumed(checkpoint.state["options"], given)
    for change in changes:
        print(f"changed: {change}")
    return options, checkpoint


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and generate, in this order, whichever of them is asked for."""
    arguments = sys.argv[1:] if argv is None else argv
    options, checkpoint = resolve(run_options.parse(build_parser(), arguments))
    check_options(options)
    if options.train and options.restarts and not is_supervised():
        return supervise_run(options, arguments)
    model, tokenizer, config = load_model(options.model)
    splits = load(options, tokenizer, context=config.get("max_position_embeddings"))
    if options.train:
        status = run_training(model, splits, options, checkpoint)
        if status:
            return status
    else:
        use_adapter(model, options)
        if options.test:
            with RunLog() as log:
                run_test(model, splits["test"], options, log, options.batch_size, None)
    if options.prompt is not None:
        if is_cut(model):
            model, _, _ = load_model(options.model)
            use_adapter(model, options)
        generate(model, tokenizer, options)
    return 0


def _arrays(batch: Batch) -> tuple[mx.array, ...]:
    parts = (batch.inputs, batch.targets, batch.loss_mask, batch.documents)
    return tuple(mx.array(part) for part in parts if part is not None)


if __name__ == "__main__":
    sys.exit(main())
