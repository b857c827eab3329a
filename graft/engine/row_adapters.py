"""Carries each row's adapters through mlx-lm's continuous batching.

mlx-lm's `BatchGenerator` has no notion of adapters, but it keeps the entries of a row's cache
together with the row. `MultiAdapterModel` therefore adds an entry before those of the layers:
`RowAdapters`, which holds the adapters of the rows. The generator needs no change.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from graft.engine.adapter_bank import AdapterBank, RowSlots, ScaledAdapters
from graft.errors import RunError
from graft.runtime.agreement import agrees
from graft.runtime.overriding import override, variant

import mlx.core as mx


class RowAdapters:
    """The adapters of a batch's rows, as an entry of its cache.

    Args:
        rows: the adapters of each row, with their scales.
    """

    state: tuple[()] = ()
    nbytes = 0

    def __init__(self, rows: Sequence[ScaledAdapters]) -> None:
        self.rows = list(rows)
        self._slots: tuple[int, list[RowSlots]] | None = None

    def slots(self, bank: AdapterBank) -> list[RowSlots]:
        """The rows' slots in a bank, updated when the rows or the bank have changed."""
        if self._slots is None or self._slots[0] != bank.version:
            self._slots = bank.version, bank.row_slots(self.rows)
        return self._slots[1]

    @classmethod
    def merge(cls, caches: Iterable["RowAdapters"]) -> "RowAdapters":
        """Join several batches."""
        return cls([row for cache in caches for row in cache.rows])

    def extend(self, other: "RowAdapters") -> None:
        """Add the rows of another batch."""
        self._set([*self.rows, *other.rows])

    def filter(self, keep: Iterable[int]) -> None:
        """Keep some of the rows, in the given order."""
        self._set([self.rows[number] for number in keep])

    def extract(self, index: int) -> "RowAdapters":
        """A single row."""
        return RowAdapters([self.rows[index]])

    def prepare(self, **_: Any) -> None:
        """Do nothing: padding does not change the adapters."""

    def finalize(self) -> None:
        """Do nothing."""

    def empty(self) -> bool:
        """Whether the entry is empty: never."""
        return False

    def size(self) -> int:
        """Number of tokens in the entry: none."""
        return 0

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be removed."""
        return True

    def trim(self, count: int) -> int:
        """Remove the last tokens."""
        return count

    def __deepcopy__(self, _: Any) -> "RowAdapters":
        return RowAdapters(self.rows)

    def _set(self, rows: list[ScaledAdapters]) -> None:
        self.rows, self._slots = rows, None


class MultiAdapterModel:
    """A model for `BatchGenerator` that applies to each row the adapters in its cache.

    Args:
        model: the base model.
        bank: its adapters.
        single_row: whether batches have one row, which can then use any cache that the model makes,
            without padding and its masks.

    Attributes:
        dtype: the precision of the model's last logits.
    """

    def __init__(self, model: Any, bank: AdapterBank, *, single_row: bool = False) -> None:
        self._model = model
        self._bank = bank
        self._single_row = single_row
        self.dtype: mx.Dtype = mx.float32

    def make_cache(self, adapters: ScaledAdapters = ()) -> list[Any]:
        """An empty cache for one row with these adapters."""
        from mlx_lm.models.cache import make_prompt_cache

        layers = make_prompt_cache(self._model)
        if self._single_row:
            override(layers, _single_row)
        return [RowAdapters([adapters]), *layers]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits (rows, tokens, vocabulary) in float32 of token ids (rows, tokens)."""
        row_adapters, *layers = cache
        with self._bank.applied(row_adapters.slots(self._bank), len(row_adapters.rows)):
            logits: mx.array = self._model(tokens, cache=layers)
        self.dtype = logits.dtype
        return logits.astype(mx.float32)


class _SingleRow:
    """The methods that `BatchGenerator` expects of a cache, for a batch of one row."""

    @staticmethod
    def merge(caches: Sequence["_SingleRow"]) -> "_SingleRow":
        (only,) = caches
        return only

    def filter(self, keep: Sequence[int]) -> None:
        """Keep the row: without rows, the generator drops the caches."""

    def extract(self, _: int) -> "_SingleRow":
        return copy.deepcopy(self)

    def is_trimmable(self) -> bool:
        # ChunkedKVCache returns true even after it has dropped its first tokens.
        cache: Any = super()
        return bool(cache.is_trimmable()) and not getattr(self, "start_position", 0)


@functools.cache
def _single_row(cache: type) -> type:
    """A class of caches as batches of one row."""
    return variant(cache, _SingleRow)


def can_batch(model: MultiAdapterModel) -> bool:
    """Whether rows of different lengths get the same logits in one batch as alone.

    Some architectures of mlx-lm fail with the masks of such batches, so this is measured.
    """
    try:
        for _ in try_rows(model, [(), ()], together=True):
            pass
    except Exception:  # architectures fail in different ways
        return False
    return True


def try_rows(
    model: MultiAdapterModel, rows: Sequence[ScaledAdapters], *, together: bool
) -> Iterator[None]:
    """Compute rows of different lengths, a pass of the model for each item.

    Each row has a prompt, of more tokens than mlx-lm leaves in the order of their rows, and then a
    token.

    Args:
        model: to try.
        rows: the adapters of each row.
        together: whether to compute them in one batch too, and compare.

    Raises:
        RunError: rows have other logits in the batch.
        Exception: the model fails.
    """
    prompts = [[1 + (5 * row + n) % 9 for n in range(37 - 14 * row)] for row in range(len(rows))]
    following = [9 - row for row in range(len(rows))]
    alone = []
    for prompt, token, adapters in zip(prompts, following, rows, strict=True):
        cache = model.make_cache(adapters)
        logits = [model(mx.array([ids]), cache)[:, -1] for ids in (prompt, [token])]
        mx.eval(logits)
        alone.append(mx.stack(logits))
        yield
    if not together:
        return
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    caches = [model.make_cache(adapters) for adapters in rows]
    batch = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
    for entry in batch:
        entry.prepare(lengths=list(map(len, prompts)), right_padding=padding)
    padded = [prompt + [0] * count for prompt, count in zip(prompts, padding, strict=True)]
    read = model(mx.array(padded), batch)
    ends = mx.stack([read[row, len(prompt) - 1] for row, prompt in enumerate(prompts)])
    for entry in batch:
        entry.finalize()
    generated = model(mx.array(following)[:, None], batch)[:, -1]
    if not agrees(mx.stack([ends, generated]), mx.concatenate(alone, axis=1), dtype=model.dtype):
        raise RunError("this architecture mixes the rows of a batch")
