"""Metrics of a run: `metrics.jsonl` in its folder, and reports on the terminal.

On a terminal, one live line stays under the reports; elsewhere the reports are plain lines.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from graft.console import bytes_text
from graft.runtime.memory import peak_bytes
from graft.storage.atomic import errors_name
from graft.training.evaluate import Evaluation
from graft.training.reporters import Reporter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunLog:
    """Writes a run's metrics to a file, line by line, and prints them; a context manager.

    Args:
        path: of metrics.jsonl; `None` writes no file.
        steps: steps of training, for the live line; 0 shows none.
        console: where to print; standard output by default.
        resume_at: bytes of the file to keep: those of the run that is resumed.
        seconds: time that this run had taken before.
        reporter: gets each line too; from `graft.training.reporters`.
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
                self._file.truncate(whole_lines(self._path, self._resume_at))
        if self._reporter is not None:
            self._reporter.start(self._lines())
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
    def run_id(self) -> str | None:
        """What the reporter's service calls this run."""
        return None if self._reporter is None else self._reporter.run_id

    @property
    def size_bytes(self) -> int:
        """Bytes of the file so far, for `resume_at`."""
        return self._file.tell() if self._file is not None else 0

    @property
    def seconds(self) -> float:
        """Time since the run started."""
        return time.perf_counter() - self._start

    def step(self, step: int) -> None:
        """Update the live line."""
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
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Report the training loss, and the objective's further metrics, since the last report."""
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
            **(metrics or {}),
        )
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {bytes_text(memory)}"
        self._progress.update(self._task, status=status)
        self.say(f"step {step:>5}  train {status}  lr {learning_rate:.2e}")

    def evaluation(self, step: int | None, split: str, result: Evaluation) -> None:
        """Report the loss over a split; `step` is `None` outside of training."""
        self._write(
            "eval",
            split=split,
            step=step,
            loss=result.loss,
            perplexity=result.perplexity,
            tokens=result.tokens,
            **result.metrics,
        )
        prefix = "" if step is None else f"step {step:>5}  "
        self.say(
            f"{prefix}{split} loss {result.loss:.3f}  perplexity {result.perplexity:.2f}"
            f"  ({result.tokens:,} tokens, {result.seconds:.1f} s)"
        )

    def event(self, step: int, event: str, **details: Any) -> None:
        """Record an event."""
        self._write("event", step=step, event=event, **details)

    def say(self, text: str) -> None:
        """Print a line above the live line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _lines(self) -> list[dict[str, Any]]:
        if self._path is None:
            return []
        text = self._path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

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


def whole_lines(path: Path, most: int) -> int:
    """The bytes of a file's lines before one that a crash tore, among its first `most` bytes."""
    with path.open("rb") as file:
        content = file.read(most)
    size = content.rfind(b"\n") + 1
    while size and not _is_json(content[content.rfind(b"\n", 0, size - 1) + 1 : size]):
        size = content.rfind(b"\n", 0, size - 1) + 1
    return size


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
