"""Reporters: other services that a run's metrics are sent to, each with its own package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from graft.errors import InputError


class Reporter(Protocol):
    """Receives the lines of metrics.jsonl as they are written."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Send one line."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoardReporter:
    """TensorBoard event files in the folder `tensorboard` of a run.

    Args:
        folder: the run's folder.
        options: the run's options; unused here.

    Raises:
        InputError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "tensorboardX") from None
        self._writer = SummaryWriter(logdir=str(folder / "tensorboard"))

    def write(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of a line under `train/loss`, `valid/loss` and so on."""
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write buffered values."""
        self._writer.close()


class WandbReporter:
    """A run of Weights & Biases, configured by wandb's own settings.

    Args:
        folder: the run's folder.
        options: the run's options, stored as its configuration.

    Raises:
        InputError: wandb is not installed.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb") from None
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(folder), config=dict(options))

    def write(self, line: Mapping[str, Any]) -> None:
        """Log the numbers of a line."""
        self._run.log(numbers(line), step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


REPORTERS: dict[str, Callable[[Path, Mapping[str, Any]], Reporter]] = {
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
