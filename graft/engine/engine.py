"""The engine: answers requests for one base model and many adapters, all in one batch.

`Engine` is what callers use from any thread: it keeps adapters, limits and requests, and hands the
work to the thread of `EngineLoop`. Adapter files are read on a third thread, always the same one,
because MLX keeps a worker for every thread that ever used it.
"""

import atexit
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graft.adapters.attach import lora_layers
from graft.console import note
from graft.engine.adapter_bank import AdapterBank, ScaledAdapters
from graft.engine.adapter_factors import BankFactors, check_bank_rank, read_factors
from graft.engine.errors import AdapterDoesNotFit, EngineClosed, PromptTooLong, QueueFull
from graft.engine.loop import EngineLoop
from graft.engine.registry import AdapterInfo, AdapterRegistry, LoadedAdapter
from graft.engine.request import Request, Sampling, check_ids, check_scales
from graft.engine.row_adapters import MultiAdapterModel, can_batch, try_rows
from graft.engine.stats import EngineStats, RequestCounts
from graft.engine.streams import Completion, Continuation, Stream
from graft.errors import InputError, first_line
from graft.pretrained.context_length import context_length
from graft.pretrained.tokenizer import Tokenizer, encode_text
from graft.pretrained.vocabulary import vocabulary_rows

import mlx.core as mx
import mlx.nn as nn


class Engine:
    """Serves requests for one model with many adapters, all in one batch.

    Every method may be called from any thread, and so may the `cancel` of a stream. The engine runs
    until `close`, the end of its `with` block, or the end of the program.

    Args:
        model: used by the engine alone until `close`, which restores it. A model with an adapter
            attached, of any method, is served as it is, and no adapter can be loaded.
        tokenizer: the model's tokenizer.
        max_adapters: most adapters loaded at a time.
        max_rank: highest adapter rank.
        max_rows: most requests in a step. If mlx-lm cannot batch the architecture, a note is
            printed and it is 1.
        max_queue: most requests waiting for a row.
        max_prompt_tokens: longest prompt; `None` for the model's context.
        prompt_cache_bytes: memory for the keys and values of earlier prompts.
        prefill_tokens: most prompt tokens processed between two steps. Smaller values delay running
            answers less, larger ones finish prompts sooner.

    Attributes:
        bank_bytes: most memory that adapters can take within the limits.
        tokenizer: the model's tokenizer.
        tokenizer_lock: hold it while using the tokenizer elsewhere.

    Raises:
        InputError: a limit is below 1, or mlx-lm fails to generate with the model.
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
        # Evaluate what is still lazy: it belongs to this thread, and the engine runs on another.
        mx.eval(model.state)
        self.tokenizer = tokenizer
        self.tokenizer_lock = threading.Lock()
        self._bank = AdapterBank(model, max_adapters=max_adapters, max_rank=max_rank)
        self._max_queue = max_queue
        self._max_rows = _possible_rows(model, self._bank, max_rows)
        self._context = context_length(model)
        self._vocabulary = vocabulary_rows(model)
        self._max_prompt = max_prompt_tokens or self._context
        self._tried: frozenset[str] = frozenset()  # layers whose adapters go to their rows
        self._has_attached_adapter = bool(lora_layers(model))
        self.bank_bytes = 0 if self._has_attached_adapter else self._bank.bank_bytes
        self._adapters = AdapterRegistry(max_adapters)
        self._users: dict[Request, list[LoadedAdapter]] = {}
        self._counts: dict[str, RequestCounts] = {}
        self._numbers = itertools.count(1)
        self._loop = EngineLoop(
            self._bank,
            tokenizer,
            max_rows=self._max_rows,
            prefill_tokens=prefill_tokens,
            prompt_cache_bytes=prompt_cache_bytes,
            on_end=self._end_request,
        )
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="graft-reader")
        atexit.register(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> AdapterInfo:
        """Load an adapter of any format that Graft reads, while requests run.

        Args:
            name: the name by which requests choose it.
            path: a file, a folder that contains one, or a Hub name.
            replace: whether to replace a loaded adapter of that name. Running requests finish with
                the old one.

        Raises:
            AdapterAlreadyLoaded, TooManyAdapters, AdapterBusy: see `AdapterRegistry.reserve`.
            AdapterNotFound: the file does not exist.
            AdapterDoesNotFit: it is for another base model, or adapts layers that cannot differ
                between the rows of a batch, or the model has an adapter attached.
            RankTooLarge: its rank is above the limit.
            InputError: the file is damaged.
            EngineClosed: the engine was closed.
        """
        with self._loop.changed:
            self._loop.check_open()
            if not isinstance(name, str) or not name:
                raise InputError(f"an adapter's name must be a string that is not empty: {name!r}")
            if not isinstance(path, str | Path):
                raise InputError(f"an adapter's path must be a string or a path, not {path!r}")
            if self._has_attached_adapter:
                raise AdapterDoesNotFit(
                    f"{name} cannot be loaded: the engine's model has an adapter attached; "
                    "detach it, and load both"
                )
            self._adapters.reserve(name, replace=replace)
        try:
            factors = self._read(Path(path))
            check_bank_rank(factors, self._bank.max_rank, name=name)
            infos: list[AdapterInfo] = []
            self._loop.change_bank(self._install(name, str(path), factors, infos.append))
            return infos[0]
        finally:
            with self._loop.changed:
                self._adapters.unreserve(name)

    def unload_adapter(
        self, name: str, *, wait: bool = False, timeout: float | None = None
    ) -> None:
        """Unload an adapter and free its memory.

        Args:
            name: the adapter's name.
            wait: whether to wait for the requests that use it; new ones are refused meanwhile.
            timeout: seconds to wait at most.

        Raises:
            AdapterNotFound: no adapter of that name is loaded.
            AdapterBusy: requests use it, even after `timeout`.
            EngineClosed: the engine was closed.
        """
        with self._loop.changed:
            self._loop.check_open()
            adapter = self._adapters.leave(name)
            try:
                if wait:
                    self._loop.changed.wait_for(lambda: not adapter.requests, timeout)
                self._adapters.check_idle(adapter)
            except BaseException:
                adapter.leaving = False
                raise
        self._loop.change_bank(self._remove(adapter))

    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters, ordered by id."""
        with self._loop.changed:
            return self._adapters.infos()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the start token; one thread at a time uses the tokenizer.

        Raises:
            InputError: the text is not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not UTF-8 at character {error.start + 1}") from error
        with self.tokenizer_lock:
            ids = encode_text(text, self.tokenizer)
        # Some tokenizers end every text with a token, but the prompt goes on.
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
        """Submit a prompt, and stream its continuation.

        Args:
            prompt: text, or token ids that are used as they are.
            adapters: factors on the adapters' scales, by name; 0 leaves an adapter out, a negative
                one subtracts its update.
            max_tokens: most tokens to generate; 0 with `echo` only scores the prompt.
            temperature: divides the log-probabilities; 0 takes the most likely token.
            top_p: sample from the smallest set of most likely tokens with this total probability.
            seed: seed of sampling; it gives the same answer whatever else is in the batch.
            stop: strings before which the answer ends.
            logprobs: number of alternatives for each token; `None` for no log-probabilities.
            echo: whether `Stream.prompt` has the prompt's tokens and their log-probabilities.

        Raises:
            AdapterNotFound: adapters are not loaded; all of them are named.
            PromptTooLong: the prompt is longer than the limit.
            QueueFull: the queue is full; the error says when to try again.
            EngineClosed: the engine is closed.
            InputError: other arguments are invalid; all of them are named.
        """
        sampling = Sampling(max_tokens, temperature, top_p, seed, stop, logprobs, echo)
        sampling.check()
        check_scales(adapters)
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        ids = check_ids(ids, self._vocabulary)
        self._check_length(ids)
        if self._context is not None:
            room = max(self._context - len(ids), 1)
            sampling = dataclasses.replace(sampling, max_tokens=min(max_tokens, room))
        with self._loop.changed:
            self._loop.check_open()
            self._check_queue()
            taken = self._adapters.take(adapters)
            return self._enqueue(ids, sampling, taken)

    def generate(self, prompt: str | Sequence[int], **settings: Any) -> Completion:
        """Like `submit`, but wait for the whole answer.

        Raises:
            EngineFailed: a step of the batch failed.
        """
        return self.submit(prompt, **settings).result()

    def check_open(self) -> None:
        """Check that the engine takes requests.

        Raises:
            EngineClosed: it is closed or closing, or its thread has ended.
        """
        with self._loop.changed:
            self._loop.check_open()

    def stats(self) -> EngineStats:
        """What the engine is doing, and has done since its start."""
        loop, batcher = self._loop, self._loop.batcher
        cache = batcher.prompt_cache
        with loop.changed:
            return EngineStats(
                running=len(batcher),
                queued=len(loop.queue),
                steps=batcher.steps,
                rows_per_step=batcher.step_rows / max(batcher.steps, 1),
                tokens=batcher.tokens,
                tokens_per_second=loop.throughput.tokens_per_second,
                prompt_cache_hits=cache.hits,
                prompt_cache_misses=cache.misses,
                prompt_cache_bytes=cache.nbytes,
                bank_bytes=loop.bank_bytes,
                bank_limit_bytes=self.bank_bytes,
                adapters=dict(self._counts),
            )

    def close(self, *, timeout: float | None = None) -> None:
        """Refuse new requests, end the running ones, and restore the model.

        Args:
            timeout: seconds that requests get to finish before they are cancelled; `None` cancels
                them at once.
        """
        with self._loop.changed:
            self._loop.closing = True
            if timeout is not None:
                self._loop.changed.wait_for(lambda: not self._users, timeout)
            self._loop.stop()
        atexit.unregister(self.close)
        self._reader.shutdown(cancel_futures=True)
        self._loop.join()

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
        waiting = len(self._loop.queue)
        if waiting >= self._max_queue:
            seconds = self._loop.throughput.seconds_until_free(self._max_rows)
            raise QueueFull(
                f"{waiting} requests are waiting, the limit; try again in {seconds:.0f} s", seconds
            )

    def _enqueue(
        self, ids: list[int], sampling: Sampling, taken: list[tuple[LoadedAdapter, float]]
    ) -> Stream:
        stream = Stream(f"{next(self._numbers)}", len(ids), lambda: self._loop.cancel(request))
        request = Request(
            stream,
            ids,
            tuple((adapter.factors, scale) for adapter, scale in taken),
            tuple(adapter.name for adapter, _ in taken),
            sampling,
            Continuation(self.tokenizer, ids, sampling.stop),
        )
        self._users[request] = [adapter for adapter, _ in taken]
        self._loop.submit(request)
        return stream

    def _read(self, path: Path) -> BankFactors:
        """Read an adapter's file on the reader's thread.

        Raises:
            EngineClosed: the engine was closed.
            InputError: as for `read_factors`.
        """
        with self._loop.changed:
            self._loop.check_open()
            reading = self._reader.submit(read_factors, path, self._bank.model, self._bank.modules)
        try:
            return reading.result()
        except CancelledError:
            raise EngineClosed("the engine was closed") from None

    # On the thread of the loop.

    def _install(
        self, name: str, path: str, factors: BankFactors, on_done: Callable[[AdapterInfo], None]
    ) -> Iterator[None]:
        # Only an update that is not zero shows whether it goes to its row.
        shown = {path for path, (_, b, *_) in factors.layers.items() if b.any()}
        yield from self._bank.install(factors)
        if not factors.paths <= self._tried:
            try:
                yield from self._try_adapter(name, factors)
            except InputError:
                yield from self._bank.remove(factors)
                raise
            self._tried |= shown
        with self._loop.changed:
            nbytes = self._bank.bytes_of(factors)
            info, replaced = self._adapters.register(name, path, factors, nbytes)
        on_done(info)
        if replaced is not None:
            yield from self._remove(replaced)

    def _try_adapter(self, name: str, factors: BankFactors) -> Iterator[None]:
        """Compute a row with the adapter and one without it, each alone and both in one batch.

        Raises:
            AdapterDoesNotFit: the architecture fails with it, or mixes the rows.
        """
        together = self._max_rows > 1
        model = MultiAdapterModel(self._bank.model, self._bank, single_row=not together)
        rows: list[ScaledAdapters] = [((factors, 1.0),), ()]
        passed = 0
        try:
            for _ in try_rows(model, rows, together=together):
                yield
                passed += 1
        except Exception as error:  # architectures fail in different ways
            advice = "; --max-rows 1 can serve it" if passed == len(rows) else ""
            raise AdapterDoesNotFit(
                f"adapter {name} cannot be served on mlx-lm's {_model_type(self._bank.model)}: "
                f"{first_line(error)}{advice}"
            ) from error

    def _remove(self, adapter: LoadedAdapter) -> Iterator[None]:
        yield from self._bank.remove(adapter.factors)
        self._loop.batcher.prompt_cache.forget(adapter.factors.digest)
        mx.clear_cache()
        with self._loop.changed:
            self._adapters.remove(adapter)

    def _end_request(self, request: Request) -> None:
        """Count a request that has ended, and release its adapters."""
        for name in request.names or ("",):
            counts = self._counts.get(name, RequestCounts())
            tokens = counts.tokens + request.generated
            self._counts[name] = RequestCounts(counts.requests + 1, tokens)
        for replaced in self._adapters.give_back(self._users.pop(request)):
            self._loop.change_bank_later(self._remove(replaced))


def _check_limits(**limits: int | None) -> None:
    wrong = [
        f"{name} {value!r}"
        for name, value in limits.items()
        if value is not None and not (type(value) is int and value >= 1)
    ]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: must be a whole number, 1 or more")


def _possible_rows(model: nn.Module, bank: AdapterBank, wanted: int) -> int:
    """The wanted number of rows in a step, or 1 if mlx-lm cannot batch the architecture."""
    try:
        for _ in try_rows(MultiAdapterModel(model, bank, single_row=True), [()], together=False):
            pass
    except Exception as error:  # architectures fail in different ways
        raise InputError(
            f"mlx-lm's {_model_type(model)} cannot generate: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if wanted == 1 or can_batch(MultiAdapterModel(model, bank)):
        return wanted
    note(
        f"mlx-lm's {_model_type(model)} cannot compute rows of different lengths together, so "
        "requests are answered one at a time"
    )
    return 1


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "args", None), "model_type", type(model).__name__))
