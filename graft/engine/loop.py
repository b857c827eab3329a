"""The engine's thread: steps the batch, admits requests, and changes the adapter bank in between.

MLX evaluates on the thread that owns a stream, so everything that touches the model, the bank or
the batch runs here. Callers on other threads queue their work under `changed`, a lock and condition
in one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.engine.adapter_bank import AdapterBank
from graft.engine.batcher import Batcher
from graft.engine.errors import EngineClosed, EngineFailed
from graft.engine.request import Request
from graft.engine.throughput import Throughput
from graft.errors import InputError, first_line
from graft.pretrained.tokenizer import Tokenizer

import mlx.core as mx


@dataclass(eq=False)
class _BankChange:
    """A change of the bank, made in small pieces between steps."""

    work: Iterator[None]
    done: "Future[None]" = field(default_factory=Future)


class EngineLoop:
    """The thread of an engine, and the queues that other threads fill.

    Args:
        bank: the adapters, with their model.
        tokenizer: the model's tokenizer.
        max_rows: most requests in a step.
        prefill_tokens: most prompt tokens processed between two steps.
        prompt_cache_bytes: memory for cached prompts.
        on_end: called with `changed` held when a request has ended, before its stream ends.

    Attributes:
        changed: guards all that several threads share; notified whenever any of it changes.
        batcher: the batch.
        queue: requests that wait for a row.
        throughput: running averages of speed.
        bank_bytes: memory that the adapters take.
        closing: whether new requests are refused.
    """

    def __init__(
        self,
        bank: AdapterBank,
        tokenizer: Tokenizer,
        *,
        max_rows: int,
        prefill_tokens: int,
        prompt_cache_bytes: int,
        on_end: Callable[[Request], None],
    ) -> None:
        self.changed = threading.Condition()
        self.queue: deque[Request] = deque()
        self.throughput = Throughput()
        self.bank_bytes = 0
        self.closing = self._stopping = False
        self._bank = bank
        self._max_rows = max_rows
        self._on_end = on_end
        self._bank_changes: deque[_BankChange] = deque()
        self._cancelled: deque[Request] = deque()
        self.batcher = Batcher(
            bank.model,
            tokenizer,
            bank,
            max_rows=max_rows,
            prefill_tokens=prefill_tokens,
            prompt_cache_bytes=prompt_cache_bytes,
            on_end=self._end_request,
        )
        self._thread = threading.Thread(target=self._run, name="graft-engine", daemon=True)
        self._thread.start()

    # Called by other threads.

    def check_open(self) -> None:
        """Refuse new work once the engine is closing.

        Raises:
            EngineClosed: it is, or its thread has ended.
        """
        if self.closing or not self._thread.is_alive():
            raise EngineClosed("the engine is closed or closing")

    def submit(self, request: Request) -> None:
        """Queue a request."""
        with self.changed:
            self.queue.append(request)
            self.changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Cancel a request before the next step; has no effect on one that has ended."""
        with self.changed:
            self._cancelled.append(request)
            self.changed.notify_all()

    def change_bank(self, work: Iterator[None]) -> None:
        """Change the bank between steps, one item of `work` at a time, and wait for the end.

        Raises:
            EngineClosed: the engine was closed first.
            InputError: the change was refused.
            EngineFailed: the change failed.
        """
        change = _BankChange(work)
        with self.changed:
            if self._stopping:
                raise EngineClosed("the engine is closed")
            self._bank_changes.append(change)
            self.changed.notify_all()
        change.done.result()

    def stop(self) -> None:
        """End the thread, and cancel what is left."""
        with self.changed:
            self.closing = self._stopping = True
            self.changed.notify_all()

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()
        _await_exit(self._thread)

    # Called by the engine's thread only.

    def change_bank_later(self, work: Iterator[None]) -> None:
        """Change the bank between steps, without waiting for it."""
        self._bank_changes.append(_BankChange(work))

    def _run(self) -> None:
        error: Exception | None = None
        try:
            while self._await_work():
                self._cancel_unwanted()
                self._admit()
                with mx.stream(self.batcher.stream):
                    self._work_on_bank()
                self._step()
        except Exception as cause:
            error = _failure("the engine failed", cause)
        self._wind_up(error)

    def _await_work(self) -> bool:
        """Sleep while there is nothing to do; returns whether to go on."""

        def is_due() -> Any:
            waiting = self.queue or self._bank_changes or self._cancelled
            return self._stopping or waiting or len(self.batcher)

        with self.changed:
            self.changed.wait_for(is_due)
            return not self._stopping

    def _cancel_unwanted(self) -> None:
        with self.changed:
            unwanted = [request for request in self._cancelled if not request.stream.ended]
            self._cancelled.clear()
            for request in unwanted:
                if request in self.queue:
                    self.queue.remove(request)
        for request in unwanted:
            if not request.stream.ended:  # it may have been cancelled twice
                self.batcher.cancel(request)

    def _admit(self) -> None:
        """Give free rows to the requests that have waited longest."""
        while len(self.batcher) < self._max_rows:
            with self.changed:
                if not self.queue:
                    return
                request = self.queue.popleft()
            request.started = time.perf_counter()
            self.batcher.add(request)

    def _work_on_bank(self) -> None:
        """Change the bank, for no longer than a step takes while requests wait."""
        until = time.perf_counter() + self.throughput.step_seconds
        while self._bank_changes:
            change = self._bank_changes[0]
            try:
                next(change.work)
            except StopIteration:
                self._end_bank_change(None)
            except InputError as error:
                self._end_bank_change(error)
            except Exception as error:
                self._end_bank_change(_failure("changing the adapters failed", error))
            if (len(self.batcher) or self.queue) and time.perf_counter() > until:
                return

    def _end_bank_change(self, error: Exception | None) -> None:
        self.bank_bytes = self._bank.nbytes
        done = self._bank_changes.popleft().done
        done.set_result(None) if error is None else done.set_exception(error)

    def _step(self) -> None:
        try:
            with self.throughput.step(self.batcher):
                self.batcher.step()
        except Exception as error:
            self.batcher.fail(_failure("a step of the batch failed", error))

    def _end_request(self, request: Request) -> None:
        """Account for a request before its stream ends."""
        with self.changed:
            self._on_end(request)
            if request.started:
                self.throughput.add_request(time.perf_counter() - request.started)
            self.changed.notify_all()

    def _wind_up(self, error: Exception | None) -> None:
        """End everything that is left, and restore the model."""
        with self.changed:
            self.closing = self._stopping = True
            queued, changes = list(self.queue), list(self._bank_changes)
            self.queue.clear()
            self._bank_changes.clear()
        if error is not None:
            self.batcher.fail(error, queued)
        else:
            for request in [*queued, *self.batcher.requests()]:
                self.batcher.cancel(request)
        for change in changes:
            change.done.set_exception(error or EngineClosed("the engine was closed"))
        self._bank.clear()
        self.batcher.close()


def _failure(action: str, error: Exception) -> EngineFailed:
    return EngineFailed(f"{action}: {type(error).__name__}: {first_line(error)}")


def _await_exit(thread: threading.Thread) -> None:
    """Wait until the system has ended a thread that Python already counts as ended.

    Before that, MLX frees its per-thread state, for which it takes the interpreter's lock. If the
    interpreter exits at that moment, glibc aborts the process.
    """
    task = Path(f"/proc/self/task/{thread.native_id}")
    while task.exists():
        time.sleep(0.001)
