"""How far a training run is: what a checkpoint keeps besides arrays and the place in the data.

Knows nothing of models or files.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.training.step import StepResult


@dataclass
class Window:
    """The steps since the last report.

    Attributes:
        loss_sum: of the losses, each times its tokens.
        tokens: trained in them.
        grad_norm: of the last one.
        seconds: that they took.
    """

    loss_sum: float = 0.0
    tokens: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean over the tokens, in nats; not a number where every step was bad."""
        return self.loss_sum / self.tokens if self.tokens else math.nan


@dataclass
class Progress:
    """Counts and scores of a run.

    Attributes:
        started: whether the base model was measured, before the first step.
        step: updates tried so far, bad ones too.
        tokens: trained so far.
        seconds: spent so far, over all processes of the run.
        window: what the next report will tell.
        bad_steps: in a row, with a loss or gradient that was not finite.
        rate_factor: on the learning rate; halved when the run went back to a checkpoint.
        went_back: whether it has.
        best_loss: of the validations so far.
        best_step: where that was.
        stale_evaluations: validations since then.
    """

    started: bool = False
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)
    bad_steps: int = 0
    rate_factor: float = 1.0
    went_back: bool = False
    best_loss: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Progress":
        """What `record` gave."""
        return cls(**{**record, "window": Window(**record["window"])})

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    def add(self, result: StepResult, *, seconds: float) -> None:
        """Take in the update of the present step, which took so long."""
        self.window.seconds += seconds
        self.bad_steps = 0 if result.good else self.bad_steps + 1
        if result.good:
            self.tokens += result.tokens
            self.window.loss_sum += result.loss * result.tokens
            self.window.tokens += result.tokens
            self.window.grad_norm = result.grad_norm

    def validated(self, loss: float) -> bool:
        """Take note of a validation and its loss; whether it was the best so far."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.stale_evaluations = loss, self.step, 0
            return True
        self.stale_evaluations += 1
        return False

    def is_stale(self, patience: int) -> bool:
        """Whether so many validations in a row were no better than one before; 0 never are."""
        return 0 < patience <= self.stale_evaluations
