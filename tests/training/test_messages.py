"""What a person reads before the first step and after the last."""

import re
import signal
from types import SimpleNamespace
from typing import cast

from graft.console import bytes_text, parse_bytes
from graft.data.batches import TrainingBatches
from graft.data.examples import Example
from graft.runtime.memory import machine_bytes
from graft.training.memory_plan import MemoryPlan
from graft.training.messages import end_message, memory_message, start_message
from graft.training.options import Options
from graft.training.progress import Progress
from graft.training.run import Run
from graft.training.run_folder import RunFolder

import numpy as np
import pytest


def rows(*lengths: int) -> list[Example]:
    return [Example(np.zeros(n, dtype=np.int32), np.ones(n, dtype=np.bool_)) for n in lengths]


def message_before(
    batches: TrainingBatches, options: Options, plan: MemoryPlan, *, steps: int, step: int
) -> str:
    named = {"batches": batches, "options": options, "plan": plan, "steps": steps}
    run = SimpleNamespace(**named, progress=Progress(step=step), finished=False)
    return start_message(cast(Run, run))


def message_after(progress: Progress, options: Options, received: signal.Signals | None) -> str:
    run = SimpleNamespace(progress=progress, folder=RunFolder(options), options=options)
    return end_message(cast(Run, run), received)


def test_before_the_first_step() -> None:
    """By hand: of two rows in one batch, one is half as long as the other."""
    batches = TrainingBatches(rows(129, 65), 2, accumulation=2)
    options = Options(batch_size=2, grad_accumulation_steps=2)
    plan = MemoryPlan(2, False, 1_230_000_000)
    said = message_before(batches, options, plan, steps=1000, step=0).splitlines()
    assert (
        said[0] == "training: 1,000 steps of 4 rows in 2 micro-batches, 1 per epoch, 25.0% padding"
    )
    assert said[1:] == [f"memory: about 1.23 GB of {bytes_text(machine_bytes())}"]


def test_packed_rows_are_told_with_what_is_in_them() -> None:
    """By hand: rows that predict 99, 99 and 50 tokens stand in two of 200."""
    batches = TrainingBatches(rows(100, 100, 51), 2, capacity=200)
    said = message_before(
        batches, Options(batch_size=2), MemoryPlan(2, False), steps=9, step=0
    ).splitlines()
    assert said[:2] == [
        "packing: 3 rows in 2 of at most 200 tokens",
        "training: 9 steps of 2 packed rows, 1 per epoch, 38.0% padding",
    ]


def test_what_was_chosen_for_a_budget_is_told() -> None:
    batches = TrainingBatches(rows(65, 65), 2, accumulation=4)
    options = Options(batch_size=4, grad_accumulation_steps=2, memory_budget="1.5GiB")
    said = message_before(batches, options, MemoryPlan(2, True, 1_230_000_000), steps=9, step=0)
    assert "9 steps of 8 rows in 4 micro-batches" in said
    assert said.endswith(
        "memory: micro-batch 2 of 4, gradient checkpointing on, about 1.23 GB of 1.5GiB"
    )


def test_what_cannot_fit_names_the_way_out() -> None:
    said = memory_message(MemoryPlan(4, False), Options())
    assert said.startswith("memory: more than the ")
    (budget,) = re.findall(r"--memory-budget (\S+) may fit", said)
    assert parse_bytes(budget) == pytest.approx(machine_bytes(), rel=0.01)


def test_a_resumed_run_says_where_it_goes_on() -> None:
    batches, plan = TrainingBatches(rows(65, 65), 2), MemoryPlan(2, False, 10**9)
    said = message_before(batches, Options(batch_size=2), plan, steps=9, step=4).splitlines()
    assert said[0] == "training: 9 steps of 2 rows, 1 per epoch, 0.0% padding"
    assert said[-1] == "resuming after step 4"


def test_after_the_last_step() -> None:
    options = Options(adapter_file="my run/a.npz", model="a model")
    progress = Progress(step=1200, best_loss=1.25, best_step=1000)
    called = "graft lora --model 'a model' --adapter-file 'my run/a.npz'"
    assert message_after(progress, options, None).splitlines() == [
        "adapter my run/a.npz, metrics my run/metrics.jsonl, options my run/run.yaml",
        "best validation loss 1.250 at step 1,000: my run/a.best.npz",
        f"evaluate it: {called} --test",
        f"talk to it: {called} --prompt TEXT",
    ]


def test_after_an_early_stop_and_after_a_signal() -> None:
    options = Options(adapter_file="run/a.npz", early_stop=2)
    progress = Progress(step=7, best_loss=1.0, best_step=1, stale_evaluations=2)
    files = RunFolder(options)
    said = message_after(progress, options, None)
    assert said.startswith("stopped: 2 validations without improvement\n")
    said = message_after(progress, options, signal.SIGINT)
    assert said == f"stopped after step 7; continue with: {files.resume_command}"
