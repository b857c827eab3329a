"""What a run reports: `metrics.jsonl` beside the adapter, and a display for the person who waits.

On a terminal the display is one live line under the reports; elsewhere the reports are plain lines.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from graft.storage.atomic import errors_name
from graft.training.memory_plan import peak_bytes
from graft.training.reporters import Reporter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Evaluation:
    """The loss over a split.

    Attributes:
        loss: mean over trained tokens, in nats.
        tokens: how many those are.
        seconds: how long it took.
    """

    loss: float
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class RunLog:
    """Writes a run's metrics to a file, line by line, and shows them; a context manager.

    Args:
        path: of metrics.jsonl; `None` writes none.
        steps: how many steps of training are to be shown in a live line.
        console: where to show it; standard output by default.
        resume_at: keep so many bytes of the file, those of the run that is resumed.
        seconds: that this run had taken before.
        reporter: is given each line too; of `graft.training.reporters`.
    """

    def __init__(
        self,
        path: Path | None = None,
        steps: int = 0,
        console: Console | None = None,
        *,
        resume_at: int = 0,
        seconds: float = 0.0,
        reporter: Reporter | None = None,
    ) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._resume_at = resume_at
        self._start = time.perf_counter() - seconds
        self._reporter = reporter
        self._console = console or Console(highlight=False)
        self._progress = Progress(
            TextColumn("  training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=steps == 0 or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=steps, status="")

    def __enter__(self) -> "RunLog":
        if self._path is not None:
            with errors_name(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
                self._file.truncate(min(self._resume_at, self._file.tell()))
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if self._path is not None and self._file is not None:
            with errors_name(self._path):
                self._file.close()
        if self._reporter is not None:
            self._reporter.close()

    @property
    def size_bytes(self) -> int:
        """How much of the file is written: what `resume_at` takes."""
        return self._file.tell() if self._file is not None else 0

    @property
    def seconds(self) -> float:
        """Since the run started."""
        return time.perf_counter() - self._start

    def step(self, step: int) -> None:
        """Move the display on."""
        self._progress.update(self._task, completed=step)

    def train(
        self,
        step: int,
        *,
        loss: float,
        tokens: int,
        tokens_per_second: float,
        learning_rate: float,
        grad_norm: float,
    ) -> None:
        """Report the training loss since the last report."""
        memory = peak_bytes()
        self._write(
            "train",
            step=step,
            loss=loss,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            peak_memory_bytes=memory,
        )
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {memory / 1e9:.2f} GB"
        self._progress.update(self._task, status=status)
        self.say(f"step {step:>5}  train {status}  lr {learning_rate:.2e}")

    def evaluation(self, step: int | None, split: str, result: Evaluation) -> None:
        """Report the loss over a split; `step` is `None` outside a training."""
        self._write(
            "eval",
            split=split,
            step=step,
            loss=result.loss,
            perplexity=result.perplexity,
            tokens=result.tokens,
        )
        after = "" if step is None else f"step {step:>5}  "
        self.say(
            f"{after}{split} loss {result.loss:.3f}  perplexity {result.perplexity:.2f}"
            f"  ({result.tokens:,} tokens, {result.seconds:.1f} s)"
        )

    def event(self, step: int, event: str, **details: Any) -> None:
        """Report that something happened."""
        self._write("event", step=step, event=event, **details)

    def say(self, text: str) -> None:
        """Print a line without disturbing the live display."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _write(self, kind: str, **values: Any) -> None:
        line = {"kind": kind, **values, "seconds": round(self.seconds, 3)}
        # JSON has no NaN and no infinity.
        line = {name: None if _not_finite(value) else value for name, value in line.items()}
        if self._path is not None and self._file is not None:
            with errors_name(self._path):
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
        if self._reporter is not None:
            self._reporter.write(line)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
