"""A training run in progress: what the steps of the training loop share, and its checkpoints."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from graft.adapters.files import save_adapter
from graft.data.batches import TrainingBatches
from graft.data.collate import Batch
from graft.data.examples import Split
from graft.training.checkpoints import Checkpoint
from graft.training.memory_plan import MemoryPlan
from graft.training.metrics import RunLog
from graft.training.objectives import Objective
from graft.training.options import Options, record
from graft.training.progress import Progress
from graft.training.run_folder import RunFolder
from graft.training.saved_adapter import constant_arrays, layers_record, restore_constants
from graft.training.step import UpdateStep

import mlx.nn as nn
import mlx.optimizers as optim


@dataclass
class Run:
    """A training run.

    Attributes:
        model: with an adapter attached.
        objective: what is minimized.
        valid: the validation rows.
        batches: the training rows, batch by batch.
        update: the optimizer step.
        optimizer: the one in `update`.
        schedule: the learning rate as a function of the step, counted from 1.
        steps: steps of the whole run.
        options: of the run.
        plan: how many rows are computed at a time.
        progress: counts and scores so far.
        folder: the run's files.
        adapter_record: what the adapter file records besides its tensors.
        fingerprints: of model and data; a checkpoint is resumed only on the same ones.
        log: metrics and messages.
        reported_traces: whether needless compilation was reported.
        sample: a micro-batch of the last step whose loss was finite, if there was one.
    """

    model: nn.Module
    objective: Objective
    valid: Split
    batches: TrainingBatches
    update: UpdateStep
    optimizer: optim.MultiOptimizer
    schedule: Callable[[int], float]
    steps: int
    options: Options
    plan: MemoryPlan
    progress: Progress
    folder: RunFolder
    adapter_record: dict[str, Any]
    fingerprints: dict[str, Any]
    log: RunLog
    reported_traces: bool = False
    sample: Batch | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or early stopping ended the run."""
        return self.progress.step >= self.steps or self.progress.is_stale(self.options.early_stop)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the current step."""
        return self.schedule(self.progress.step) * self.progress.rate_factor

    def is_due(self, every: int) -> bool:
        """Whether to do now what is done every `every` steps and at the end."""
        return self.progress.step % every == 0 or self.finished

    def has_finite_adapter(self) -> bool:
        """Whether the adapter, its optimizer and its loss on rows that had one are finite."""
        return self.update.is_finite(None if self.sample is None else self.sample.to_mlx())

    def save_adapter(self) -> None:
        """Write the adapter as it is now."""
        save_adapter(self.folder.adapter, self.model, **self.adapter_record)

    def save_best_adapter(self) -> None:
        """Write the adapter as the best one so far."""
        save_adapter(self.folder.best, self.model, **self.adapter_record)

    def save_checkpoint(self) -> None:
        """Write everything that is needed to continue the run."""
        self.progress.seconds = self.log.seconds
        state = {
            "progress": self.progress.record(),
            "finished": self.finished,
            "batches": self.batches.state(),
            "metrics_bytes": self.log.size_bytes,
            "options": record(self.options),
            "plan": asdict(self.plan),
            "fixed": self.fingerprints,
            "adapter": layers_record(self.model),
            "report_id": self.log.run_id,
        }
        arrays = self.update.state() | constant_arrays(self.model)
        self.folder.store.save(self.progress.step, arrays, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint of this run was written.

        Raises:
            InputError: its arrays are those of another adapter or optimizer.
        """
        self.update.restore(restore_constants(self.model, checkpoint.arrays))
        self.batches.restore(checkpoint.state["batches"])
        self.progress = Progress.from_record(checkpoint.state["progress"])
