"""The loss of a model over a split."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.data.batches import group_rows, sample_rows
from graft.data.collate import collate
from graft.data.examples import Split
from graft.pretrained.vocabulary import check_token_ids
from graft.runtime.prefetch import prefetch
from graft.runtime.workers import Workers, in_groups
from graft.training.objectives import BatchArrays, Objective, get_objective
from graft.training.step import mean_loss

import mlx.nn as nn


@dataclass(frozen=True)
class Evaluation:
    """The loss over a split.

    Attributes:
        loss: mean over its tokens, in nats.
        tokens: how many tokens those are.
        seconds: how long it took.
        metrics: the objective's further means, by name.
    """

    loss: float
    tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite if that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate_split(
    model: nn.Module,
    split: Split,
    batch_size: int,
    *,
    objective: Objective | None = None,
    num_batches: int = -1,
    seed: int = 0,
    workers: int = 1,
    rows_at_a_time: int | None = None,
    losses: Callable[[Sequence[BatchArrays]], list[Any]] | None = None,
) -> Evaluation:
    """The mean loss over a split; every token has the same weight, whatever the batch size.

    Args:
        model: with or without an adapter.
        split: the rows.
        batch_size: rows per batch.
        objective: what to compute; by default supervised fine-tuning's cross-entropy.
        num_batches: use a fixed sample of this many batches of rows; -1 uses every row.
        seed: of that sample.
        workers: batches computed at a time.
        rows_at_a_time: rows in each of them; by default a batch.
        losses: computes them, as `graft.training.step.UpdateStep.losses` does; by default in new
            worker processes.

    Raises:
        InputError: rows have token ids that the model's embedding has no row for.
    """
    start = time.perf_counter()
    model.eval()
    rows = len(split) if num_batches == -1 else num_batches * batch_size
    examples = sample_rows(split.examples, rows, seed=seed)
    check_token_ids(model, (row.tokens for row in examples if row.states is None))
    groups = in_groups(group_rows(examples, rows_at_a_time or batch_size), workers)
    compute = mean_loss(objective or get_objective("sft"))
    total, tokens = 0.0, 0
    metrics: dict[str, float] = {}
    with Workers(lambda batch: compute(model, batch)) as own_losses:
        for batches in prefetch([collate(examples, rows) for rows in group] for group in groups):
            for mean, count, sums in (losses or own_losses)([b.to_mlx() for b in batches]):
                total += float(mean.item()) * int(count.item())
                tokens += int(count.item())
                for name, value in sums.items():
                    metrics[name] = metrics.get(name, 0.0) + float(value.item())
    weight = max(tokens, 1)
    means = {name: value / weight for name, value in metrics.items()}
    return Evaluation(total / weight, tokens, time.perf_counter() - start, means)
