"""Sets up the steps of a training, and rehearses them for its memory plan.

What is planned is `graft.training.memory_plan`'s to say, and what a step computes the caller's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from graft.data.batches import Batch, TrainingBatches
from graft.data.examples import Split
from graft.runtime.cpu import keep_whole_weights
from graft.runtime.workers import choose_lanes
from graft.training.activation_cache import bytes_in_memory
from graft.training.grad_checkpoint import checkpoint_blocks
from graft.training.memory_plan import (
    Plan,
    choose_plan,
    machine_bytes,
    measure,
    parse_size,
    peak_of,
    reset_peak,
    set_limits,
)
from graft.training.options import Options, record
from graft.training.step import Arrays, Loss, UpdateStep

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

# Of the budget or the machine's memory, for what a quantized model is dequantized to on a CPU.
KEPT_SHARE = 1 / 16
# What a plan was made for: with others, a run that is continued gets another.
ASKED = ("memory_budget", "batch_size", "grad_accumulation_steps")


@dataclass
class Preparation:
    """Sets up what a plan says.

    Attributes:
        model: with an adapter attached; made to recompute once a plan says so.
        splits: the rows; all but `train` are for measuring.
        options: of the run.
        optimizer: of the adapter.
        loss: as for `graft.training.step.UpdateStep`.
        evaluate: measures a split: (model, split, rows at a time).
        capacity: tokens of a packed row, which is then what a row of a plan is.
    """

    model: nn.Module
    splits: Mapping[str, Split]
    options: Options
    optimizer: optim.MultiOptimizer
    loss: Loss
    evaluate: Callable[..., object]
    capacity: int | None = None

    def __call__(self, plan: Plan) -> tuple[TrainingBatches, UpdateStep]:
        """The batches of a run and what learns from them."""
        if plan.recompute:
            checkpoint_blocks(self.model)
        clip, lanes = self.options.grad_clip, self._lanes(plan.rows)
        update = UpdateStep(self.model, self.loss, self.optimizer, grad_clip=clip, lanes=lanes)
        return self.batches(plan.rows), update

    def batches(self, rows: int) -> TrainingBatches:
        """The batches of a run, so many rows at a time."""
        options = self.options
        return TrainingBatches(
            self.splits["train"].examples,
            rows,
            accumulation=options.batch_size * options.grad_accumulation_steps // rows,
            lanes=self._lanes(rows),
            seed=options.seed,
            capacity=self.capacity,
        )

    def rehearse(self, plan: Plan, part: int) -> int:
        """Peak bytes of an update of the widest rows, and of measuring, where all tokens count.

        Lanes are processes: rehearsed one by one, what they take is added up.

        Args:
            plan: how to compute the rows.
            part: take only one of so many parts of their tokens.
        """
        batches, update = self(plan)
        widest = [_arrays(batch, part) for batch in batches.widest()]
        more = batches.step_size > plan.rows
        peaks = [peak_of(partial(update.rehearse, [one], more=more)) for one in widest]
        if part == 1:
            measured = peak_of(lambda: self._measure_longest(plan.rows))
            peaks = max(peaks, [measured] * self._lanes(plan.rows), key=sum)
        rest = int(mx.get_active_memory())
        return rest + sum(peak - rest for peak in peaks)

    def fit(self, saved: Mapping[str, Any] | None) -> Plan:
        """How to compute the rows of a batch, within `--memory-budget` where there is one.

        Args:
            saved: the state of the run that is continued; its plan is kept unless the options ask
                for another.

        Raises:
            InputError: no plan stays within the budget.
        """
        asked = Plan(self.options.batch_size, self.options.grad_checkpoint)
        kept = kept_plan(saved, self.options) if saved else None
        text, available = self.options.memory_budget, machine_bytes()
        budget = None if text is None else parse_size(text)
        held = sum(map(bytes_in_memory, self.splits.values()))
        keep_whole_weights(self.model, KEPT_SHARE * (budget or available))
        if budget is None or kept is not None:
            plan = measure(kept or asked, self.rehearse, available)
        else:
            plan = choose_plan(asked, self.rehearse, budget=budget, available=available, held=held)
        set_limits(None if budget is None else max(budget - held, 0), plan.peak_bytes)
        mx.clear_cache()
        reset_peak()
        return plan

    def _lanes(self, rows: int) -> int:
        return choose_lanes(self.options.lanes, rows)

    def _measure_longest(self, rows: int) -> None:
        for split in self.splits.values():
            longest = sorted(split.examples, key=len)[-rows:]
            self.evaluate(self.model, replace(split, examples=longest), rows)


def kept_plan(saved: Mapping[str, Any], options: Options) -> Plan | None:
    """The plan of a saved run, unless its rows or its budget are to be others now."""
    before, now = saved["options"], record(options)
    same = all(before.get(name) == now[name] for name in ASKED)
    return Plan(**saved["plan"]) if same and "plan" in saved else None


def _arrays(batch: Batch, part: int) -> Arrays:
    tokens = slice(-(-batch.loss_mask.shape[1] // part))
    arrays = (batch.inputs, batch.targets, batch.loss_mask, batch.documents)
    return tuple(mx.array(array[:, tokens]) for array in arrays if array is not None)
