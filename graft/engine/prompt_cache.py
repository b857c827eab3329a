"""Prompt cache: keys and values of processed prompts, for requests with the same prefix.

They depend on the adapters as well as on the tokens, so an entry is found by the content of the
adapters and their scales, never by a name or a path. When the limit on memory or entries is
reached, the least recently used entries are deleted.
"""

import copy
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

# Computing shorter prompts is faster than copying them from the cache.
FEWEST_TOKENS = 16
MOST_ENTRIES = 256


@dataclass(eq=False)
class _Entry:
    adapters: frozenset[Hashable]
    tokens: NDArray[np.int64]
    caches: list[Any]
    nbytes: int


class PromptCache:
    """Cached prompts of a model; must be used on one thread.

    Args:
        limit_bytes: most memory of all entries.

    Attributes:
        hits: number of lookups that found a prefix.
        misses: number of lookups that found none.
        nbytes: memory of all entries.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapters: frozenset[Hashable], tokens: Sequence[int]) -> tuple[list[Any], int]:
        """Find the longest cached prefix of a prompt.

        At least one token is left out, because the model needs one to continue from.

        Args:
            adapters: the content and scale of each adapter.
            tokens: tokens of the whole prompt.

        Returns:
            A copy of the caches, one for each layer, and the length of the prefix in tokens; `[]`
            and 0 if there is none.
        """
        wanted = np.asarray(tokens[:-1], dtype=np.int64)
        lengths = [
            (_usable_tokens(entry, wanted), number)
            for number, entry in self._entries.items()
            if entry.adapters == adapters
        ]
        length, number = max(lengths, default=(0, -1))
        if length < FEWEST_TOKENS:
            self.misses += 1
            return [], 0
        self.hits += 1
        self._entries.move_to_end(number)
        entry = self._entries[number]
        caches = copy.deepcopy(entry.caches)
        if length < len(entry.tokens):
            for cache in caches:
                cache.trim(len(entry.tokens) - length)
        return caches, length

    def keep(
        self, adapters: frozenset[Hashable], tokens: Sequence[int], caches: Sequence[Any]
    ) -> None:
        """Add the caches of a prompt, which replace those of its prefixes.

        Args:
            adapters: as for `find`.
            tokens: all tokens in the caches.
            caches: one for each layer, of one row.
        """
        if len(tokens) < FEWEST_TOKENS:
            return
        state = dict(tree_flatten([cache.state for cache in caches]))
        arrays = [array for array in state.values() if isinstance(array, mx.array)]
        nbytes = sum(array.nbytes for array in arrays)
        if nbytes > self.limit_bytes:
            return
        entry = _Entry(adapters, np.asarray(tokens, dtype=np.int64), list(caches), nbytes)
        trims = _trimmable(entry)
        for number, other in list(self._entries.items()):
            if other.adapters != adapters:
                continue
            common = _common(other.tokens, entry.tokens)
            if common == len(entry.tokens) and _trimmable(other):
                self._entries.move_to_end(number)
                return
            if common == len(other.tokens) and (trims or common == len(entry.tokens)):
                self._drop(number)
        mx.eval(arrays)
        self._count += 1
        self._entries[self._count] = entry
        self.nbytes += nbytes
        while self.nbytes > self.limit_bytes or len(self._entries) > MOST_ENTRIES:
            self._drop(next(iter(self._entries)))

    def forget(self, adapter: Hashable) -> None:
        """Delete the entries of an adapter, whatever its scale.

        Args:
            adapter: its content, the first item of its pair in `adapters`.
        """
        for number, entry in list(self._entries.items()):
            if any(isinstance(pair, tuple) and pair[0] == adapter for pair in entry.adapters):
                self._drop(number)

    def clear(self) -> None:
        """Delete all entries."""
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).nbytes


def _usable_tokens(entry: _Entry, wanted: NDArray[np.int64]) -> int:
    """Number of a prompt's tokens that an entry can supply."""
    common = _common(entry.tokens, wanted)
    return common if common == len(entry.tokens) or _trimmable(entry) else 0


def _trimmable(entry: _Entry) -> bool:
    return all(cache.is_trimmable() for cache in entry.caches)


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
