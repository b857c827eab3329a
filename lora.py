r"""Train a LoRA adapter on a model, evaluate it, and generate with it.

    python lora.py --train                          # the included model on datasets/mlx-docs
    python lora.py --test                           # its loss on test.jsonl, with the adapter
    python lora.py --prompt $'Q: What is relu in mlx?\nA:'

On a quantized model this is QLoRA, on an unquantized one LoRA. The training loop is `train_steps`
below; `graft.training.setup` sets up the run.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing

import graft  # noqa: F401  (loads a fast BLAS before MLX)
from graft.cli.command import command
from graft.cli.run_options import options_parser, parse_options
from graft.console import note
from graft.data.chat_template import ChatFormat
from graft.data.collate import Batch
from graft.data.conversations import ChatError
from graft.data.examples import Split
from graft.errors import InputError, RunError
from graft.pretrained.context_length import context_length
from graft.pretrained.load import load_model
from graft.pretrained.tokenizer import Tokenizer
from graft.runtime.interrupts import Interrupts
from graft.runtime.memory import frozen_gc
from graft.runtime.workers import choose_workers
from graft.training.check_options import check_options
from graft.training.checkpoints import Checkpoint
from graft.training.evaluate import evaluate_split
from graft.training.frozen_prefix import prefix_removed
from graft.training.messages import end_message, start_message
from graft.training.metrics import RunLog
from graft.training.objectives import get_objective
from graft.training.optimizers import set_learning_rate
from graft.training.options import Options
from graft.training.progress import ReportWindow
from graft.training.run import Run
from graft.training.setup import (
    load_data,
    make_run,
    resolve_options,
    use_adapter,
)
from graft.training.step import StepResult
from graft.training.supervisor import is_supervised, supervise_run

import mlx.core as mx
import mlx.nn as nn


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; the options are declared in `graft.training.options`."""
    return options_parser(__doc__.splitlines()[0])


def train_steps(run: Run, interrupts: Interrupts) -> None:
    """Train the adapter of `run` until it is finished or a signal is received.

    Raises:
        RunError: steps or the adapter were not finite, even after the run was rolled back.
    """
    if not run.progress.started:
        run.folder.clear()
        validate(run)
        run.progress.started = True
        run.save_checkpoint()
    while not (run.finished or interrupts.received):
        batches = next(run.batches)
        result = take_step(run, batches)
        if not result.finite and handle_nonfinite_step(run, batches, result):
            continue
        if run.is_due(run.options.steps_per_report):
            report(run)
        if run.is_due(run.options.steps_per_eval):
            validate(run)
        if run.is_due(run.options.save_every) and check_adapter(run):
            run.log.event(run.progress.step, "saved")
            save(run)
    if interrupts.received and check_adapter(run):
        save(run)


def take_step(run: Run, batches: Sequence[Batch]) -> StepResult:
    """Update the adapter from the micro-batches of one step."""
    start = time.perf_counter()
    run.progress.step += 1
    # Randomness is a function of the step alone, so a resumed run drops out the same inputs.
    mx.random.seed(run.options.seed * 1_000_003 + run.progress.step)
    set_learning_rate(run.optimizer, run.learning_rate, lora_plus_ratio=run.options.lora_plus_ratio)
    result = run.update([batch.to_mlx() for batch in batches])
    if result.finite:
        run.sample = batches[0]
    run.progress.add(result, seconds=time.perf_counter() - start)
    run.log.step(run.progress.step)
    return result


def handle_nonfinite_step(run: Run, batches: Sequence[Batch], result: StepResult) -> bool:
    """Report a step whose loss or gradient was not finite; roll back if there are too many.

    Returns:
        Whether the run was rolled back.
    """
    progress, rows = run.progress, [row for batch in batches for row in batch.rows]
    seen = f"loss {result.loss}, gradient norm {result.grad_norm}, rows {rows}"
    step, norm = progress.step, result.grad_norm
    run.log.event(step, "bad_step", loss=result.loss, grad_norm=norm, rows=rows)
    run.log.say(f"step {step:>5}  skipped, not finite: {seen}")
    if progress.nonfinite_steps < run.options.max_nonfinite_steps:
        return False
    reason = f"{progress.nonfinite_steps} steps in a row up to step {step} were not finite"
    roll_back(run, reason, details=f" (the last: {seen})")
    return True


def check_adapter(run: Run) -> bool:
    """Whether the adapter is fit to be saved; otherwise the run is rolled back.

    The guard of each step sees the adapter before its update only.
    """
    if run.has_finite_adapter():
        return True
    step = run.progress.step
    run.log.event(step, "bad_adapter")
    run.log.say(f"step {step:>5}  not saved: the loss of the adapter is not finite")
    roll_back(run, f"the loss of the adapter after step {step} is not finite")
    return False


def roll_back(run: Run, reason: str, *, details: str = "") -> None:
    """Restore the last checkpoint and halve the learning rate, once.

    Raises:
        RunError: it was rolled back before.
    """
    before = run.progress
    if before.rolled_back:
        if not run.has_finite_adapter():
            run.restore(run.folder.load_checkpoint())
        run.save_adapter()
        raise RunError(
            f"{reason}, even after rolling back and halving the learning rate{details}; "
            f"{run.folder.adapter} holds the last good adapter"
        )
    checkpoint = run.folder.load_checkpoint()
    run.restore(checkpoint)
    run.progress.rate_factor = before.rate_factor / 2
    run.progress.rolled_back = True
    run.log.event(before.step, "went_back", to_step=checkpoint.step)
    run.log.say(
        f"step {before.step:>5}  rolled back to step {checkpoint.step}, learning rate halved"
    )


def report(run: Run) -> None:
    """Report the training loss since the last report."""
    window = run.progress.window
    run.log.train(
        run.progress.step,
        loss=window.loss,
        tokens=run.progress.tokens,
        tokens_per_second=window.tokens / max(window.seconds, 1e-9),
        learning_rate=run.learning_rate,
        grad_norm=window.grad_norm,
        metrics=window.means,
    )
    run.progress.window = ReportWindow()
    traces, needed = run.update.traces
    if traces > needed and not run.reported_traces:
        run.reported_traces = True
        run.log.event(run.progress.step, "retraced", traces=traces, needed=needed)
        run.log.say(
            f"step {run.progress.step:>5}  slow: compiled {traces} times instead of {needed}"
        )


def validate(run: Run) -> None:
    """Evaluate on the validation rows, and keep the adapter if it is the best so far."""
    options, step = run.options, run.progress.step
    result = evaluate_split(
        run.model,
        run.valid,
        options.batch_size,
        objective=run.objective,
        num_batches=options.val_batches,
        seed=options.seed,
        workers=choose_workers(options.workers, run.plan.rows),
        rows_at_a_time=run.plan.rows,
        losses=run.update.losses,
    )
    run.log.evaluation(step, "valid", result)
    if step and run.progress.record_validation(result.loss):
        run.save_best_adapter()


def save(run: Run) -> None:
    """Save the adapter, and a checkpoint unless the last step was not finite."""
    run.save_adapter()
    if run.progress.nonfinite_steps == 0 or run.finished:
        run.save_checkpoint()


def run_training(
    model: nn.Module, splits: dict[str, Split], options: Options, checkpoint: Checkpoint | None
) -> tuple[Run, int]:
    """Run `--train`, and `--test` after it.

    Returns:
        The run, and the exit status: 0, or that of the signal that ended it.
    """
    run = make_run(model, splits, options, checkpoint)
    run.log.say(start_message(run))
    with run.folder.locked(), Interrupts() as interrupts, run.log, frozen_gc():
        run.folder.save_options(run.options)
        with closing(run.update):
            train_steps(run, interrupts)
        traces, needed = run.update.traces
        if traces:
            run.log.event(run.progress.step, "traced", traces=traces, needed=needed)
            run.log.say(f"compiled {traces} times, {needed} needed")
        run.log.say(end_message(run, interrupts.received))
        if options.test and not interrupts.received:
            run_test(model, splits["test"], options, run.log, run.plan.rows, run.progress.step)
    return run, interrupts.exit_status


def run_test(
    model: nn.Module, split: Split, options: Options, log: RunLog, rows: int, step: int | None
) -> None:
    """Evaluate on the test rows, `rows` at a time."""
    result = evaluate_split(
        model,
        split,
        options.batch_size,
        objective=get_objective(options.objective),
        num_batches=options.test_batches,
        seed=options.seed,
        workers=choose_workers(options.workers, rows),
        rows_at_a_time=rows,
    )
    log.evaluation(step, "test", result)


def print_answer(
    model: nn.Module, tokenizer: Tokenizer, options: Options, *, as_message: bool = False
) -> None:
    """Print the prompt and the answer of `--prompt`, flushing every `--write-every` tokens.

    Args:
        model: with the adapter that answers.
        tokenizer: of the model.
        options: the prompt, `-` for standard input, and how to generate.
        as_message: send the prompt as a user's message, with the model's chat template.

    Raises:
        InputError: the prompt is not text, or the template refuses it.
    """
    from graft.engine.engine import Engine

    text = read_prompt(options)
    prompt: str | list[int] = text
    if as_message:
        note("the adapter was trained on conversations: the prompt is sent as a user's message")
        prompt = message_ids(text, tokenizer)
    print(text, end="\n" if as_message else "", flush=True)
    # No other request waits while the prompt is processed, and none follows.
    limits = {"max_rows": 1, "prefill_tokens": 2048, "prompt_cache_bytes": 0}
    with Engine(model, tokenizer, **limits) as engine:
        pieces = engine.submit(
            prompt,
            max_tokens=options.num_tokens,
            temperature=options.temp,
            seed=options.seed,
        )
        for number, piece in enumerate(pieces, 1):
            print(piece.text, end="", flush=number % options.write_every == 0)
    print(flush=True)


def read_prompt(options: Options) -> str:
    """The text of `--prompt`, or of standard input without its last line end."""
    assert options.prompt is not None
    if options.prompt != "-":
        return options.prompt
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt -: standard input is not text: {error}") from error


def message_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation of one message, which the assistant is to answer."""
    try:
        return ChatFormat(tokenizer).prompt_ids([{"role": "user", "content": text}], None)
    except ChatError as error:
        raise InputError(f"--prompt: {error}") from error


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and generate, in this order, whichever is asked for."""
    arguments = sys.argv[1:] if argv is None else argv
    options, checkpoint = resolve_options(parse_options(build_parser(), arguments))
    check_options(options, resumes=checkpoint is not None)
    if options.train and options.restarts and not is_supervised():
        return supervise_run(options, arguments)
    model, tokenizer, _ = load_model(options.model)
    splits = load_data(options, tokenizer, context=context_length(model))
    if options.train:
        run, status = run_training(model, splits, options, checkpoint)
        if status:
            return status
        row_shapes = run.adapter_record["row_shapes"]
    else:
        row_shapes = use_adapter(model, options)
        if options.test:
            with RunLog() as log:
                run_test(model, splits["test"], options, log, options.batch_size, None)
    if options.prompt is not None:
        if prefix_removed(model):
            model, _, _ = load_model(options.model)
            use_adapter(model, options)
        print_answer(model, tokenizer, options, as_message=[*row_shapes] == ["chat"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
