"""Builds the training step and measures its peak memory with a dry run.

`graft.training.memory_plan` decides which plans are measured and which one is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from graft.data.batches import TrainingBatches
from graft.data.examples import Split
from graft.runtime.cpu import keep_whole_weights
from graft.runtime.memory import machine_bytes, peak_during, reset_peak, set_memory_limits
from graft.runtime.workers import choose_workers
from graft.training.activation_cache import cached_bytes
from graft.training.evaluate import evaluate_split
from graft.training.grad_checkpoint import can_checkpoint, checkpoint_blocks
from graft.training.memory_plan import MemoryPlan, choose_plan, measure, parse_budget
from graft.training.objectives import Objective
from graft.training.options import Options, from_mapping
from graft.training.plan_cache import kept_plan
from graft.training.step import UpdateStep

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

# The share of the budget, or of the machine's memory, for dequantized weights on a CPU.
KEPT_SHARE = 1 / 16
# The options that a plan was made for: if they change, a resumed run makes another plan.
PLAN_OPTIONS = ("memory_budget", "batch_size", "grad_accumulation_steps")


@dataclass
class MemoryTrial:
    """Builds the step of a memory plan, and measures plans.

    Attributes:
        model: with an adapter attached; recomputes its blocks once a plan says so.
        splits: the rows; all but `train` are for evaluation.
        options: of the run.
        optimizer: of the adapter.
        objective: what is trained.
        capacity: tokens of a packed row, if rows are packed; a plan then counts packed rows.
    """

    model: nn.Module
    splits: Mapping[str, Split]
    options: Options
    optimizer: optim.MultiOptimizer
    objective: Objective
    capacity: int | None = None

    def build(self, plan: MemoryPlan) -> tuple[TrainingBatches, UpdateStep]:
        """The batches of a run and its update step."""
        if plan.recompute:
            checkpoint_blocks(self.model)
        update = UpdateStep(
            self.model,
            self.objective,
            self.optimizer,
            grad_clip=self.options.grad_clip,
            workers=self._workers(plan.rows),
        )
        return self.batches(plan.rows), update

    def batches(self, rows: int) -> TrainingBatches:
        """The batches of a run with this many rows at a time."""
        options = self.options
        return TrainingBatches(
            self.splits["train"].examples,
            rows,
            accumulation=options.batch_size * options.grad_accumulation_steps // rows,
            workers=self._workers(rows),
            seed=options.seed,
            capacity=self.capacity,
        )

    def dry_run(self, plan: MemoryPlan, part: int) -> int:
        """Peak bytes of updating on the widest rows, and of evaluating if all tokens count.

        Workers are processes: they are measured one by one, and their peaks are added up.

        Args:
            plan: how to compute the rows.
            part: take only 1 / part of their tokens.
        """
        batches, update = self.build(plan)
        widest = batches.widest()
        tokens = slice(-(-widest[0]["loss_mask"].shape[1] // part))
        more = batches.step_size > plan.rows
        peaks = [
            peak_during(partial(update.dry_run, [batch.to_mlx(tokens=tokens)], more=more))
            for batch in widest
        ]
        if part == 1:
            peak = peak_during(lambda: self._evaluate_longest(plan.rows))
            peaks = max(peaks, [peak] * self._workers(plan.rows), key=sum)
        idle = int(mx.get_active_memory())
        return idle + sum(peak - idle for peak in peaks)

    def choose(self, saved: Mapping[str, Any] | None, key: str | None = None) -> MemoryPlan:
        """The plan of a run, within `--memory-budget` if one is given.

        Args:
            saved: the state of the run that is resumed; its plan is kept unless the options ask for
                another.
            key: of `graft.training.plan_cache`, where the plan for a budget is kept.

        Raises:
            InputError: no plan fits the budget.
        """
        asked = MemoryPlan(self.options.batch_size, self.options.grad_checkpoint)
        kept = saved_plan(saved, self.options) if saved else None
        text, available = self.options.memory_budget, machine_bytes()
        budget = None if text is None else parse_budget(text)
        # Neither the options nor a plan of an earlier version may change the gradients.
        recomputes = (kept or asked).recompute or (budget is not None and kept is None)
        may_recompute = recomputes and can_checkpoint(self.model, self.objective)
        if not may_recompute:
            asked = replace(asked, recompute=False)
            kept = None if kept is None or kept.recompute else kept
        held = sum(map(cached_bytes, self.splits.values()))
        keep_whole_weights(self.model, KEPT_SHARE * (budget or available))
        if budget is None or kept is not None:
            plan = measure(kept or asked, self.dry_run, available)
        else:
            choose = partial(
                choose_plan,
                asked,
                self.dry_run,
                budget=budget,
                available=available,
                held=held,
                may_recompute=may_recompute,
            )
            plan = choose() if key is None else kept_plan(f"{key}-{may_recompute:d}", choose)
        set_memory_limits(None if budget is None else max(budget - held, 0), plan.peak_bytes)
        mx.clear_cache()
        reset_peak()
        return plan

    def _workers(self, rows: int) -> int:
        return choose_workers(self.options.workers, rows)

    def _evaluate_longest(self, rows: int) -> None:
        for split in self.splits.values():
            longest = replace(split, examples=sorted(split.examples, key=len)[-rows:])
            evaluate_split(self.model, longest, rows, objective=self.objective)


def saved_plan(saved: Mapping[str, Any], options: Options) -> MemoryPlan | None:
    """The plan of a saved run, unless its options ask for another one now."""
    before = from_mapping(saved["options"])
    same = all(getattr(before, name) == getattr(options, name) for name in PLAN_OPTIONS)
    return MemoryPlan(**saved["plan"]) if same and "plan" in saved else None
