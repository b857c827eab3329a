"""Continuous batching: requests share every step of the model, each with its own adapters.

mlx-lm's `BatchGenerator` computes the steps. `Batcher` puts requests into it, sends their tokens to
their streams, and scores and caches prompts. Everything runs on the engine's thread.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.engine.adapter_bank import AdapterBank
from graft.engine.prompt_cache import PromptCache
from graft.engine.request import Request
from graft.engine.row_adapters import MultiAdapterModel
from graft.engine.streams import Alternative, FinishReason, Piece, State, TokenInfo
from graft.errors import RunError, first_line
from graft.pretrained.token_bytes import TokenBytes
from graft.pretrained.tokenizer import Tokenizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

# Most memory for the logits of a prompt that is scored in chunks.
SCORED_BYTES = 1 << 26
PREFILL_ROWS = 8


@dataclass(eq=False)
class _Scoring:
    """A prompt that is scored chunk by chunk before its answer begins."""

    request: Request
    cache: list[Any]
    done: int = 0
    infos: list[TokenInfo] = field(default_factory=list)


class Batcher:
    """The batch of one model.

    Args:
        model: the base model.
        tokenizer: the model's tokenizer.
        bank: the model's adapters.
        max_rows: most requests in a step.
        prefill_tokens: most prompt tokens processed between two steps.
        prompt_cache_bytes: memory for cached prompts.
        on_end: called when a request has ended, before its stream ends.

    Attributes:
        prompt_cache: the cached prompts.
        steps: number of steps.
        step_rows: total number of rows in all steps.
        tokens: number of generated tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        bank: AdapterBank,
        *,
        max_rows: int,
        prefill_tokens: int,
        prompt_cache_bytes: int,
        on_end: Callable[[Request], None],
    ) -> None:
        self._model = MultiAdapterModel(model, bank, single_row=max_rows == 1)
        self._token_bytes = TokenBytes(tokenizer)
        self._ends = [[token] for token in sorted(tokenizer.eos_token_ids)]
        self._max_rows, self._prefill_tokens = max_rows, prefill_tokens
        self._on_end = on_end
        self._rows: dict[int, Request] = {}
        self._unread: set[int] = set()  # rows whose prompts are not processed yet
        self._scoring: deque[_Scoring] = deque()
        self.prompt_cache = PromptCache(prompt_cache_bytes)
        self.steps = self.step_rows = self.tokens = 0
        self._generator = self._make_generator()

    def __len__(self) -> int:
        return len(self._rows) + len(self._scoring)

    @property
    def stream(self) -> Any:
        """The MLX stream of the batch."""
        return self._generator.stream

    def add(self, request: Request) -> None:
        """Give a request a row; an error ends only this request."""
        request.stream.state = "running"
        try:
            self._add(request)
        except Exception as error:
            self._end(request, "failed", error=error)

    def cancel(self, request: Request) -> None:
        """Free a request's row and end its stream."""
        self._remove(request)
        self._end(request, "cancelled")

    def step(self) -> None:
        """Generate a token for every row, and process a chunk of the new prompts.

        Raises:
            Exception: the model failed; call `fail`.
        """
        self._score_some()
        if not self._rows:
            return
        waiting = max(1, min(len(self._unread), PREFILL_ROWS))
        self._generator.prefill_step_size = max(1, self._prefill_tokens // waiting)
        prompts, responses = self._generator.next()
        self.steps += bool(responses)
        self.step_rows += len(responses)
        for response in responses:
            try:
                self._receive(response)
            except Exception as error:
                request = self._rows[response.uid]
                self._remove(request)
                self._end(request, "failed", error=error)
        for prompt in prompts:
            if prompt.end_of_prompt and prompt.uid in self._rows:
                self._unread.discard(prompt.uid)
                self._keep_prompt(prompt.uid)

    def fail(self, error: Exception, waiting: Sequence[Request] = ()) -> None:
        """End all requests, and those in `waiting`, with an error; the batch is empty then."""
        requests = [*self.requests(), *waiting]
        self._rows.clear()
        self._unread.clear()
        self._scoring.clear()
        self._generator.close()
        self._generator = self._make_generator()
        for request in requests:
            self._end(request, "failed", error=error)

    def requests(self) -> list[Request]:
        """The requests that have a row."""
        return [*self._rows.values(), *(scoring.request for scoring in self._scoring)]

    def close(self) -> None:
        """Free the batch, which must be empty."""
        self._generator.close()
        self.prompt_cache.clear()

    def _make_generator(self) -> Any:
        from mlx_lm.generate import BatchGenerator

        return BatchGenerator(
            self._model,  # type: ignore[arg-type]
            stop_tokens=self._ends,
            completion_batch_size=self._max_rows,
            prefill_batch_size=min(PREFILL_ROWS, self._max_rows),
            prefill_step_size=self._prefill_tokens,
        )

    def _add(self, request: Request) -> None:
        if request.sampling.echo:
            cache = self._model.make_cache(request.adapters)
            infos = [self._info(request.prompt[0])]
            self._scoring.append(_Scoring(request, cache, infos=infos))
        elif request.sampling.max_tokens == 0:
            self._end(request, "finished", finish_reason="length")
        else:
            caches, known = self.prompt_cache.find(request.cache_key, request.prompt)
            cache = self._model.make_cache(request.adapters)
            request.stream.cached_tokens = known
            self._insert(request, [cache[0], *caches] if known else cache, known)

    def _insert(self, request: Request, cache: list[Any], known: int) -> None:
        """Start generating; the cache has the first `known` tokens of the prompt."""
        (uid,) = self._generator.insert(
            [request.prompt[known:]],
            [request.sampling.max_tokens],
            caches=[cache],
            all_tokens=[request.prompt[:known]],
            samplers=[request.sampling.sampler()],
        )
        self._rows[uid] = request
        self._unread.add(uid)

    def _receive(self, response: Any) -> None:
        """Send a token to its request's stream, and end the request after its last token."""
        request = self._rows[response.uid]
        reason: FinishReason | None = response.finish_reason
        if reason == "stop":  # the end token, which is not part of the answer
            text, stopped, tokens = "", False, []
        else:
            self.tokens += 1
            request.generated += 1
            text, stopped = request.continuation.add(response.token)
            alternatives = request.sampling.logprobs
            tokens = [self._info(response.token, response.logprobs, alternatives)]
        if reason is not None and not stopped:
            held_text, stopped = request.continuation.finish()
            text += held_text
        if stopped:
            reason = "stop"
        piece = Piece(text, tokens)
        if reason is None:
            request.stream.put(piece)
        else:
            self._finish(response, reason, piece)

    def _finish(self, response: Any, reason: FinishReason, piece: Piece) -> None:
        request = self._rows.pop(response.uid)
        caches, tokens = response.prompt_cache, response.all_tokens
        if caches is None:  # ended by a stop string, which the generator does not know
            removed = self._generator.remove([response.uid], return_prompt_caches=True)
            caches, tokens = removed[response.uid]
        self.prompt_cache.keep(request.cache_key, tokens, caches[1:])
        self._end(request, "finished", finish_reason=reason, piece=piece)

    def _keep_prompt(self, uid: int) -> None:
        """Cache a prompt as soon as it is processed, for requests with the same prefix."""
        caches, tokens = self._generator.extract_cache([uid])[uid]
        self.prompt_cache.keep(self._rows[uid].cache_key, tokens, caches[1:])

    def _remove(self, request: Request) -> None:
        uids = [uid for uid, row in self._rows.items() if row is request]
        if uids:
            del self._rows[uids[0]]
            self._unread.discard(uids[0])
            self._generator.remove(uids)
        self._scoring = deque(item for item in self._scoring if item.request is not request)

    def _end(
        self,
        request: Request,
        state: State,
        *,
        finish_reason: FinishReason | None = None,
        error: Exception | None = None,
        piece: Piece | None = None,
    ) -> None:
        self._on_end(request)
        if piece is not None:
            request.stream.put(piece)
        request.stream.end(state, finish_reason=finish_reason, error=error)

    def _score_some(self) -> None:
        """Score the next chunk of one prompt; prompts take turns."""
        if not self._scoring:
            return
        scoring = self._scoring.popleft()
        request = scoring.request
        try:
            if not self._score(scoring):
                self._scoring.append(scoring)
            elif request.sampling.max_tokens == 0:
                self._end(request, "finished", finish_reason="length")
            else:
                self._insert(request, scoring.cache, len(request.prompt) - 1)
        except Exception as error:
            failure = RunError(f"scoring the prompt failed: {first_line(error)}")
            self._end(request, "failed", error=failure)

    def _score(self, scoring: _Scoring) -> bool:
        """Score a chunk of a prompt; returns whether the whole prompt is scored."""
        prompt, alternatives = scoring.request.prompt, scoring.request.sampling.logprobs
        if scoring.done < len(prompt) - 1:
            end = min(scoring.done + self._scored_tokens(), len(prompt) - 1)
            with mx.stream(self._generator.stream):
                logits = self._model(mx.array([prompt[scoring.done : end]]), scoring.cache)[0]
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                mx.eval(logprobs, [cache.state for cache in scoring.cache])
            for position, row in enumerate(np.array(logprobs), scoring.done + 1):
                scoring.infos.append(self._info(prompt[position], row, alternatives or 0))
            self._vocabulary = logits.shape[-1]
            scoring.done = end
        if scoring.done < len(prompt) - 1:
            return False
        scoring.request.stream.prompt = scoring.infos
        return True

    _vocabulary = 0

    def _scored_tokens(self) -> int:
        """Tokens in a chunk: few in the first, which shows the size of the vocabulary."""
        if not self._vocabulary:
            return 16
        return max(16, min(self._prefill_tokens, SCORED_BYTES // (4 * self._vocabulary)))

    def _info(self, token: int, logprobs: Any = None, alternatives: int | None = None) -> TokenInfo:
        """Describe a token; `logprobs` is (vocabulary,)."""
        token_bytes = self._token_bytes.of(token)
        text = token_bytes.decode("utf-8", "replace")
        if alternatives is None or logprobs is None:
            return TokenInfo(token, text, token_bytes)
        values = np.asarray(logprobs)
        likeliest = _top(values, alternatives)
        if alternatives and token not in likeliest:
            likeliest.append(token)
        of = self._token_bytes
        top = [Alternative(n, of.text(n), float(values[n]), of.of(n)) for n in likeliest]
        return TokenInfo(token, text, token_bytes, float(values[token]), top)


def _top(values: NDArray[np.float32], count: int) -> list[int]:
    """The indices of the largest values, largest first; ties by index."""
    if count == 0:
        return []
    count = min(count, len(values))
    largest = np.argpartition(-values, count - 1)[:count]
    return sorted(map(int, largest), key=lambda index: (-values[index], index))
