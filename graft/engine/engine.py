"""One base model, many adapters, one batch: requests of any thread, computed by one.

`Engine` keeps the names, limits and queue, and a thread that owns all evaluation: between two steps
of the batch it admits requests, and takes adapters in or gives them up, a layer at a time. Files
are read on another, always the same, as MLX keeps a worker for every thread that ever used it.
Knows nothing of HTTP.
"""

import atexit
import dataclasses
import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graft.adapters.attach import lora_layers
from graft.engine.adapter_bank import AdapterBank
from graft.engine.adapter_factors import BankFactors, check_rank, read_factors
from graft.engine.batcher import Batcher
from graft.engine.errors import (
    AdapterDoesNotFit,
    EngineClosed,
    EngineFailed,
    PromptTooLong,
    QueueFull,
)
from graft.engine.registry import AdapterInfo, AdapterRegistry, LoadedAdapter
from graft.engine.request import Request, Sampling, check_ids, check_scales
from graft.engine.row_adapters import RidingModel, shares_batches
from graft.engine.stats import Counts, EngineStats
from graft.engine.streams import Completion, Continuation, Stream
from graft.engine.throughput import Pace
from graft.errors import InputError, first_line
from graft.pretrained.tokenizer import Tokenizer

import mlx.core as mx
import mlx.nn as nn


@dataclass(eq=False)
class _Chore:
    """Something done to the bank, a little between every two steps."""

    work: Iterator[None]
    done: "Future[None]" = field(default_factory=Future)


class Engine:
    """Serves requests for one model with many adapters, all in one batch.

    It ends with the program, or by `close`, or as a context manager.

    Every method may be called from any thread; a stream's `cancel` too.

    Args:
        model: belongs to the engine until `close`, which leaves it as it was. With an adapter
            attached, of any kind, it is served as it is, and no adapter can be loaded beside.
        tokenizer: of the model.
        max_adapters: loaded at a time.
        max_rank: of an adapter.
        max_rows: requests in one step; 1 where mlx-lm cannot batch the architecture, which is said.
        max_queue: requests that wait for a row.
        max_prompt_tokens: of a request; `None` is the model's context.
        prompt_cache_bytes: what the keys and values of earlier prompts may take.
        prefill_tokens: of all prompts together that are processed between two steps: fewer delay
            the answers that are being generated less, more finish prompts sooner.

    Attributes:
        bank_bytes: what adapters can take in memory within the limits.
        tokenizer: of the model.
        tokenizer_lock: hold it while using the tokenizer elsewhere.

    Raises:
        InputError: a limit is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        max_adapters: int = 8,
        max_rank: int = 64,
        max_rows: int = 32,
        max_queue: int = 256,
        max_prompt_tokens: int | None = None,
        prompt_cache_bytes: int = 1 << 30,
        prefill_tokens: int = 512,
    ) -> None:
        _check_limits(
            max_adapters=max_adapters,
            max_rank=max_rank,
            max_rows=max_rows,
            max_queue=max_queue,
            max_prompt_tokens=max_prompt_tokens,
            prefill_tokens=prefill_tokens,
        )
        # What is left to compute belongs to this thread, and the engine has another.
        mx.eval(model.state)
        self.tokenizer = tokenizer
        self._bank = AdapterBank(model, max_adapters=max_adapters, max_rank=max_rank)
        self._max_queue = max_queue
        self._max_rows = _possible_rows(model, self._bank, max_rows)
        self._context: int | None = getattr(
            getattr(model, "args", None), "max_position_embeddings", None
        )
        self._vocabulary: int | None = getattr(getattr(model, "args", None), "vocab_size", None)
        self._max_prompt = max_prompt_tokens or self._context
        self._adapted = bool(lora_layers(model))
        self.bank_bytes = 0 if self._adapted else self._bank.bank_bytes
        self._adapters = AdapterRegistry(max_adapters)
        self._users: dict[Request, list[LoadedAdapter]] = {}
        self._counts: dict[str, Counts] = {}
        self._queue: deque[Request] = deque()
        self._chores: deque[_Chore] = deque()
        self._cancelled: deque[Request] = deque()
        self._pace = Pace()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.tokenizer_lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._closing = self._stopping = False
        self._held_bytes = 0
        self._batcher = Batcher(
            model,
            tokenizer,
            self._bank,
            max_rows=self._max_rows,
            prefill_tokens=prefill_tokens,
            prompt_cache_bytes=prompt_cache_bytes,
            on_end=self._on_end,
        )
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="graft-reader")
        self._thread = threading.Thread(target=self._run, name="graft-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> AdapterInfo:
        """Load an adapter of any format that Graft reads, while others generate.

        Args:
            name: by which requests will ask for it.
            path: a file, a folder with one, or a Hub name.
            replace: whether to take the place of an adapter of that name. Requests that run with
                the old one end with it; new ones get the new one.

        Raises:
            AdapterAlreadyLoaded, TooManyAdapters, AdapterBusy: see `AdapterRegistry.reserve`.
            AdapterNotFound: there is no such file.
            AdapterDoesNotFit: it is for another base, or adapts what rows cannot have of their own,
                or the model has an adapter attached.
            RankTooLarge: its rank is above the limit.
            InputError: the file is damaged.
            EngineClosed: the engine was closed.
        """
        with self._lock:
            self._check_open()
            if not name:
                raise InputError("an adapter needs a name that is not empty")
            if self._adapted:
                raise AdapterDoesNotFit(
                    f"{name} cannot be loaded beside the adapter that is attached to the engine's "
                    "model; detach that one, and load both"
                )
            self._adapters.reserve(name, replace=replace)
        try:
            factors = self._read(Path(path))
            check_rank(factors, self._bank.max_rank, name=name)
            infos: list[AdapterInfo] = []
            self._do(self._install(name, str(path), factors, infos.append))
            return infos[0]
        finally:
            with self._lock:
                self._adapters.unreserve(name)

    def unload_adapter(
        self, name: str, *, wait: bool = False, timeout: float | None = None
    ) -> None:
        """Unload an adapter, which gives its memory back.

        Args:
            name: of the adapter.
            wait: for the requests that run or wait with it; new ones do not find it meanwhile.
            timeout: seconds to wait at most.

        Raises:
            AdapterNotFound: there is none of that name.
            AdapterBusy: requests run or wait with it, still after `timeout`.
            EngineClosed: the engine was closed.
        """
        with self._lock:
            self._check_open()
            adapter = self._adapters.leave(name)
            try:
                if wait:
                    self._changed.wait_for(lambda: not adapter.requests, timeout)
                self._adapters.check_idle(adapter)
            except BaseException:
                adapter.leaving = False
                raise
        self._do(self._remove(adapter))

    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters in the order of their ids."""
        with self._lock:
            return self._adapters.infos()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, start token included; tokenizers do not like several threads.

        Raises:
            InputError: the text is not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not UTF-8 at character {error.start + 1}") from error
        with self.tokenizer_lock:
            ids = self.tokenizer.encode(text)
        # Some tokenizers end every text, which this one is not to be.
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        adapters: Mapping[str, float] = MappingProxyType({}),
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        echo: bool = False,
    ) -> Stream:
        """Ask for the continuation of a prompt.

        Args:
            prompt: text, or token ids as they are.
            adapters: names with what multiplies each one's own scale; 0 is as none, and below 0
                takes away.
            max_tokens: to generate at most; 0 with `echo` only scores the prompt.
            temperature: divides the log-probabilities; 0 takes the likeliest token.
            top_p: draw from the fewest of the likeliest tokens with this probability together.
            seed: of the draws; the same one draws the same, whatever else is in the batch.
            stop: strings to end before.
            logprobs: how many alternatives to tell at each token; `None` tells no log-probability.
            echo: tell the prompt's tokens and their log-probabilities too, in `Stream.prompt`.

        Raises:
            AdapterNotFound: naming all that are not there.
            PromptTooLong: telling its tokens and the limit.
            QueueFull: telling when to try again.
            EngineClosed: the engine takes no more requests.
            InputError: another argument is at fault; all of them are named.
        """
        sampling = Sampling(max_tokens, temperature, top_p, seed, stop, logprobs, echo)
        sampling.check()
        check_scales(adapters)
        ids = (
            self.encode(prompt) if isinstance(prompt, str) else check_ids(prompt, self._vocabulary)
        )
        self._check_length(ids)
        if self._context is not None:
            room = max(self._context - len(ids), 1)
            sampling = dataclasses.replace(sampling, max_tokens=min(max_tokens, room))
        with self._lock:
            self._check_open()
            self._check_queue()
            taken = self._adapters.take(adapters)
            return self._enqueue(ids, sampling, taken)

    def generate(self, prompt: str | Sequence[int], **settings: Any) -> Completion:
        """The same, waiting for the whole answer.

        Raises:
            EngineFailed: a step of the batch failed.
        """
        return self.submit(prompt, **settings).result()

    def stats(self) -> EngineStats:
        """What the engine is doing, and has done since it was started."""
        batcher, cache = self._batcher, self._batcher.prompt_cache
        with self._lock:
            return EngineStats(
                running=len(batcher),
                queued=len(self._queue),
                steps=batcher.steps,
                rows_per_step=batcher.step_rows / max(batcher.steps, 1),
                tokens=batcher.tokens,
                tokens_per_second=self._pace.tokens_per_second,
                prompt_cache_hits=cache.hits,
                prompt_cache_misses=cache.misses,
                prompt_cache_bytes=cache.nbytes,
                bank_bytes=self._held_bytes,
                bank_limit_bytes=self.bank_bytes,
                adapters=dict(self._counts),
            )

    def close(self, *, timeout: float | None = None) -> None:
        """Refuse new requests, end those that there are, and give the model back as it was.

        Args:
            timeout: seconds that requests may take to end on their own; `None` cancels them at
                once, as the end of the time does.
        """
        with self._lock:
            self._closing = True
            if timeout is not None:
                self._changed.wait_for(lambda: not self._users, timeout)
            self._stopping = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        self._reader.shutdown(cancel_futures=True)
        self._thread.join()
        _await_exit(self._thread)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine is closed, or about to be")

    def _check_length(self, ids: Sequence[int]) -> None:
        if not ids:
            raise InputError("the prompt is empty, and this model has no token to start with")
        if self._max_prompt is not None and len(ids) > self._max_prompt:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; shorten it to {self._max_prompt}",
                tokens=len(ids),
                limit=self._max_prompt,
            )

    def _check_queue(self) -> None:
        if len(self._queue) >= self._max_queue:
            seconds = self._pace.seconds_until_free(self._max_rows)
            raise QueueFull(
                f"{len(self._queue)} requests wait, and no more may; try again in {seconds:.0f} s",
                seconds,
            )

    def _enqueue(
        self, ids: list[int], sampling: Sampling, taken: list[tuple[LoadedAdapter, float]]
    ) -> Stream:
        stream = Stream(f"{next(self._numbers)}", len(ids), lambda: self._wish_to_cancel(request))
        request = Request(
            stream,
            ids,
            tuple((one.factors, scale) for one, scale in taken),
            tuple(one.name for one, _ in taken),
            sampling,
            Continuation(self.tokenizer, ids, sampling.stop),
        )
        self._users[request] = [one for one, _ in taken]
        self._queue.append(request)
        self._changed.notify_all()
        return stream

    def _wish_to_cancel(self, request: Request) -> None:
        with self._lock:
            self._cancelled.append(request)
            self._changed.notify_all()

    def _read(self, path: Path) -> BankFactors:
        """Read an adapter's file, one at a time.

        Raises:
            EngineClosed: the engine was closed.
            InputError: as for `read_factors`.
        """
        with self._lock:
            self._check_open()
            reading = self._reader.submit(read_factors, path, self._bank.model, self._bank.modules)
        try:
            return reading.result()
        except CancelledError:
            raise EngineClosed("the engine was closed meanwhile") from None

    def _do(self, work: Iterator[None]) -> None:
        """Have the engine's thread work on the bank, and wait for it.

        Raises:
            EngineClosed: the engine was closed before it came to it.
        """
        chore = _Chore(work)
        with self._lock:
            if self._stopping:
                raise EngineClosed("the engine is closed")
            self._chores.append(chore)
            self._changed.notify_all()
        chore.done.result()

    def _install(
        self, name: str, path: str, factors: BankFactors, tell: Callable[[AdapterInfo], None]
    ) -> Iterator[None]:
        yield from self._bank.install(factors)
        with self._lock:
            nbytes = self._bank.bytes_of(factors)
            info, replaced = self._adapters.register(name, path, factors, nbytes)
        tell(info)
        if replaced is not None:
            yield from self._remove(replaced)

    def _remove(self, adapter: LoadedAdapter) -> Iterator[None]:
        yield from self._bank.remove(adapter.factors)
        self._batcher.prompt_cache.forget(adapter.factors.digest)
        mx.clear_cache()
        with self._lock:
            self._adapters.remove(adapter)

    # From here on: the engine's thread.

    def _run(self) -> None:
        """What the engine's thread does until it is told to stop."""
        error: Exception | None = None
        try:
            while self._await_work():
                self._cancel_unwanted()
                self._admit()
                with mx.stream(self._batcher.stream):
                    self._work_on_bank()
                self._step()
        except Exception as found:
            error = _failure("the engine failed", found)
        self._wind_up(error)

    def _step(self) -> None:
        try:
            with self._pace.step(self._batcher):
                self._batcher.step()
        except Exception as error:
            self._batcher.fail(_failure("a step of the batch failed", error))

    def _await_work(self) -> bool:
        """Sleep while there is nothing to do; whether to go on."""

        def due() -> Any:
            waiting = self._queue or self._chores or self._cancelled
            return self._stopping or waiting or len(self._batcher)

        with self._lock:
            self._changed.wait_for(due)
            return not self._stopping

    def _cancel_unwanted(self) -> None:
        with self._lock:
            unwanted = [request for request in self._cancelled if request in self._users]
            self._cancelled.clear()
            waiting = [request for request in unwanted if request in self._queue]
            for request in waiting:
                self._queue.remove(request)
        for request in unwanted:
            self._batcher.cancel(request)

    def _admit(self) -> None:
        """Give rows to the requests that have waited longest."""
        while len(self._batcher) < self._max_rows:
            with self._lock:
                if not self._queue:
                    return
                request = self._queue.popleft()
            request.started = time.perf_counter()
            self._batcher.add(request)

    def _work_on_bank(self) -> None:
        """Take adapters in or give them up, for no longer than a step where requests wait."""
        until = time.perf_counter() + self._pace.step_seconds
        while self._chores:
            chore = self._chores[0]
            try:
                next(chore.work)
            except StopIteration:
                self._end_chore(None)
            except Exception as error:
                self._end_chore(_failure("the change of adapters failed", error))
            if (len(self._batcher) or self._queue) and time.perf_counter() > until:
                return

    def _end_chore(self, error: Exception | None) -> None:
        self._held_bytes = self._bank.nbytes
        done = self._chores.popleft().done
        done.set_result(None) if error is None else done.set_exception(error)

    def _on_end(self, request: Request) -> None:
        """Give back what a request held, before its stream tells that it has ended."""
        with self._lock:
            for name in request.names or ("",):
                before = self._counts.get(name, Counts())
                tokens = before.tokens + request.generated
                self._counts[name] = Counts(before.requests + 1, tokens)
            for replaced in self._adapters.give_back(self._users.pop(request)):
                self._chores.append(_Chore(self._remove(replaced)))
            if request.started:
                self._pace.note_request(time.perf_counter() - request.started)
            self._changed.notify_all()

    def _wind_up(self, error: Exception | None) -> None:
        """End everything that is left, and give the model back as it was."""
        with self._lock:
            self._closing = self._stopping = True
            queued, chores = list(self._queue), list(self._chores)
            self._queue.clear()
            self._chores.clear()
        if error is not None:
            self._batcher.fail(error, queued)
        else:
            for request in [*queued, *self._batcher.requests()]:
                self._batcher.cancel(request)
        for chore in chores:
            chore.done.set_exception(error or EngineClosed("the engine was closed meanwhile"))
        self._bank.clear()
        self._batcher.close()


def _check_limits(**limits: int | None) -> None:
    low = [f"{name} {value}" for name, value in limits.items() if value is not None and value < 1]
    if low:
        raise InputError(f"{', '.join(low)}: must be 1 or more")


def _possible_rows(model: nn.Module, bank: AdapterBank, wanted: int) -> int:
    """As many rows in a step as are wanted, or 1 where the model cannot share a step."""
    if wanted == 1 or shares_batches(RidingModel(model, bank)):
        return wanted
    name = getattr(getattr(model, "args", None), "model_type", type(model).__name__)
    print(
        f"note: mlx-lm's {name} cannot compute rows of different lengths together: requests are "
        "answered one after another",
        file=sys.stderr,
    )
    return 1


def _failure(what: str, error: Exception) -> EngineFailed:
    return EngineFailed(f"{what}: {type(error).__name__}: {first_line(error)}")


def _await_exit(thread: threading.Thread) -> None:
    """Wait for the system to end a thread that Python counts as ended.

    In between, MLX gives up what it keeps for each thread, and takes the interpreter's lock for it.
    If the interpreter ends just then, glibc ends the process with an error.
    """
    task = Path(f"/proc/self/task/{thread.native_id}")
    while task.exists():
        time.sleep(0.001)
