"""Keys and values of prompts that were processed, for requests that begin alike.

They depend on the adapters as well as on the tokens, so an entry is found by the content of the
adapters and their scales, never by a name or a path. The least recently used go first when the
bound on memory or number is reached. Knows nothing of batches.
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

# Shorter prompts are computed sooner than they are looked up and copied.
FEWEST_TOKENS = 16
MOST_ENTRIES = 256


@dataclass(eq=False)
class _Entry:
    adapters: frozenset[Hashable]
    tokens: NDArray[np.int64]
    caches: list[Any]
    nbytes: int


class PromptCache:
    """Prompts of a model with their keys and values; used on one thread.

    Args:
        limit_bytes: what all entries may take together.

    Attributes:
        hits: look-ups that found something.
        misses: look-ups that found nothing.
        nbytes: what the entries take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapters: frozenset[Hashable], tokens: Sequence[int]) -> tuple[list[Any], int]:
        """The caches of the longest beginning that is known, and how many tokens it has.

        One token at least is left over, as the model needs one to go on from.

        Args:
            adapters: identifies content and scale of each.
            tokens: of the whole prompt.

        Returns:
            Caches that the caller may change, one a layer; `[]` and 0 where there are none.
        """
        wanted = np.asarray(tokens[:-1], dtype=np.int64)
        found = [
            (_usable(entry, wanted), number)
            for number, entry in self._entries.items()
            if entry.adapters == adapters
        ]
        length, number = max(found, default=(0, -1))
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
        """Add the caches of a prompt; those of its beginnings are given up for it.

        Args:
            adapters: as for `find`.
            tokens: that the caches hold, all of them.
            caches: one a layer, of one row.
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
        """Give up what was computed with an adapter, whatever its scale.

        Args:
            adapter: the first of the pair by which `adapters` holds it.
        """
        for number, entry in list(self._entries.items()):
            if any(isinstance(own, tuple) and own[0] == adapter for own in entry.adapters):
                self._drop(number)

    def clear(self) -> None:
        """Give up everything."""
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).nbytes


def _usable(entry: _Entry, wanted: NDArray[np.int64]) -> int:
    """How many tokens of a prompt an entry can serve."""
    common = _common(entry.tokens, wanted)
    return common if common == len(entry.tokens) or _trimmable(entry) else 0


def _trimmable(entry: _Entry) -> bool:
    return all(cache.is_trimmable() for cache in entry.caches)


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
