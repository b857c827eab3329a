"""Progress of a training run: counts and scores that a checkpoint keeps.

Knows nothing of models or files.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.training.step import StepResult

# Names in the records of earlier versions.
FORMER_NAMES = {"bad_steps": "nonfinite_steps", "went_back": "rolled_back"}


@dataclass
class ReportWindow:
    """The steps since the last report.

    Attributes:
        loss_sum: sum of the losses, each times its tokens.
        tokens: tokens trained.
        grad_norm: norm of the last gradient.
        seconds: time taken.
        sums: sums of the objective's further metrics, each times its tokens.
    """

    loss_sum: float = 0.0
    tokens: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean over the tokens, in nats; NaN if no step was finite."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def means(self) -> dict[str, float]:
        """The objective's further metrics, averaged over the tokens."""
        return {name: value / self.tokens for name, value in self.sums.items()}


@dataclass
class Progress:
    """Counts and scores of a run.

    Attributes:
        started: whether the model was validated before the first step.
        step: updates so far, skipped ones included.
        tokens: tokens trained so far.
        seconds: time spent so far, over all processes of the run.
        window: what the next report will cover.
        nonfinite_steps: steps in a row with a non-finite loss or gradient.
        rate_factor: factor on the learning rate; halved when the run was rolled back.
        rolled_back: whether it was.
        best_loss: lowest validation loss so far.
        best_step: the step of that validation.
        stale_evaluations: validations since then.
    """

    started: bool = False
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window: ReportWindow = field(default_factory=ReportWindow)
    nonfinite_steps: int = 0
    rate_factor: float = 1.0
    rolled_back: bool = False
    best_loss: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Progress":
        """The progress that `record` returned, also of an earlier version."""
        current = {FORMER_NAMES.get(name, name): value for name, value in record.items()}
        return cls(**{**current, "window": ReportWindow(**record["window"])})

    def record(self) -> dict[str, Any]:
        """The progress as JSON holds it."""
        return dataclasses.asdict(self)

    def add(self, result: StepResult, *, seconds: float) -> None:
        """Count the update of the current step and its time."""
        self.window.seconds += seconds
        self.nonfinite_steps = 0 if result.finite else self.nonfinite_steps + 1
        if result.finite:
            self.tokens += result.tokens
            self.window.loss_sum += result.loss * result.tokens
            self.window.tokens += result.tokens
            self.window.grad_norm = result.grad_norm
            for name, value in result.metrics.items():
                total = self.window.sums.get(name, 0.0)
                self.window.sums[name] = total + value * result.tokens

    def record_validation(self, loss: float) -> bool:
        """Count a validation; return whether its loss is the best so far."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.stale_evaluations = loss, self.step, 0
            return True
        self.stale_evaluations += 1
        return False

    def is_stale(self, patience: int) -> bool:
        """Whether `patience` validations in a row brought no improvement; never if it is 0."""
        return 0 < patience <= self.stale_evaluations
