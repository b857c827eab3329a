"""Reporters: other services that a run's metrics are sent to, each with its own package."""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from graft.errors import InputError

EVENT_FILES = "events.out.tfevents.*"


class Reporter(Protocol):
    """Receives the lines of metrics.jsonl as they are written.

    Attributes:
        run_id: what the service calls the run, kept in checkpoints; `None` if it has no name.
    """

    run_id: str | None

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin a run, or continue one that has these lines."""
        ...

    def write(self, line: Mapping[str, Any]) -> None:
        """Send one line."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoardReporter:
    """TensorBoard event files in the folder `tensorboard` of a run.

    They are written anew when a run starts or is resumed, from the lines that it keeps: an event
    cannot be taken back, and a resumed run repeats the steps after its checkpoint.

    Args:
        folder: the run's folder.
        options: the run's options; unused here.
        run_id: unused here.

    Raises:
        InputError: tensorboardX is not installed.
    """

    run_id: str | None = None

    def __init__(self, folder: Path, options: Mapping[str, Any], run_id: str | None = None) -> None:
        try:
            import tensorboardX
        except ImportError:
            raise _missing("tensorboard", "tensorboardX") from None
        self._package: Any = tensorboardX
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace the files of an earlier start by one with these lines."""
        for path in self._folder.glob(EVENT_FILES):
            path.unlink()
        self._writer = self._package.SummaryWriter(logdir=str(self._folder))
        began = time.time() - (lines[-1]["seconds"] if lines else 0.0)
        for line in lines:
            self._add(line, at=began + line["seconds"])

    def write(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of a line under `train/loss`, `valid/loss` and so on."""
        self._add(line, at=time.time())

    def close(self) -> None:
        """Write buffered values."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, line: Mapping[str, Any], *, at: float) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["step"], walltime=at)


class WandbReporter:
    """A run of Weights & Biases, configured by wandb's own settings.

    Args:
        folder: the run's folder.
        options: the run's options, stored as its configuration.
        run_id: of the run that is resumed; by default $WANDB_RUN_ID, or a new one.

    Raises:
        InputError: wandb is not installed.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], run_id: str | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb") from None
        self.run_id: str | None = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._package: Any = wandb
        self._folder = folder
        self._options = dict(options)
        self._run: Any = None

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin or continue the run; wandb itself passes over steps that it has already."""
        self._run = self._package.init(
            dir=str(self._folder), config=self._options, id=self.run_id, resume="allow"
        )

    def write(self, line: Mapping[str, Any]) -> None:
        """Log the numbers of a line."""
        self._run.log(numbers(line), step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


REPORTERS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Reporter]] = {
    "tensorboard": TensorBoardReporter,
    "wandb": WandbReporter,
}


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, named `train/loss`, `valid/loss` and so on."""
    if line["kind"] == "event" or line["step"] is None:
        return {}
    group = line.get("split", line["kind"])
    return {
        f"{group}/{name}": value
        for name, value in line.items()
        if isinstance(value, int | float) and name != "step"
    }


def _missing(name: str, package: str) -> InputError:
    return InputError(f"--report-to {name} needs {package}: pip install 'graft-mlx[{name}]'")
