"""Lets the adapters of each row ride through mlx-lm's continuous batching.

mlx-lm's `BatchGenerator` knows no adapters, but it moves every entry of a row's cache wherever the
row goes. So `RidingModel` puts one more entry before those of the layers, `Riders`, which tells the
rows' adapters; the generator needs no change. Knows nothing of requests.
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from graft.engine.adapter_bank import AdapterBank, Lane, RowAdapters

import mlx.core as mx

# Of the largest logit; half precision rounds each to a 256th.
TOLERANCE = 5e-2


class Riders:
    """The adapters of a batch's rows, as an entry of its cache.

    Args:
        rows: the adapters of each, with their scales.
    """

    state: tuple[()] = ()
    nbytes = 0

    def __init__(self, rows: Sequence[RowAdapters]) -> None:
        self.rows = list(rows)
        self._lanes: tuple[int, list[Lane]] | None = None

    def lanes(self, bank: AdapterBank) -> list[Lane]:
        """The rows' lanes, made anew when the rows or the bank changed."""
        if self._lanes is None or self._lanes[0] != bank.version:
            self._lanes = bank.version, bank.lanes(self.rows)
        return self._lanes[1]

    @classmethod
    def merge(cls, caches: Iterable["Riders"]) -> "Riders":
        """One batch of several."""
        return cls([row for cache in caches for row in cache.rows])

    def extend(self, other: "Riders") -> None:
        """Add the rows of another batch."""
        self._set([*self.rows, *other.rows])

    def filter(self, keep: Iterable[int]) -> None:
        """Keep some of the rows, in the order given."""
        self._set([self.rows[number] for number in keep])

    def extract(self, index: int) -> "Riders":
        """One row alone."""
        return Riders([self.rows[index]])

    def prepare(self, **_: Any) -> None:
        """Nothing to do: adapters are the same for padding."""

    def finalize(self) -> None:
        """Nothing to do."""

    def empty(self) -> bool:
        """Whether it holds nothing, which it never does."""
        return False

    def size(self) -> int:
        """Tokens that it holds: none."""
        return 0

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken out again."""
        return True

    def trim(self, count: int) -> int:
        """Take the last tokens out."""
        return count

    def __deepcopy__(self, _: Any) -> "Riders":
        return Riders(self.rows)

    def _set(self, rows: list[RowAdapters]) -> None:
        self.rows, self._lanes = rows, None


class RidingModel:
    """A model as `BatchGenerator` calls it, each row with the adapters that its cache tells.

    Args:
        model: the base.
        bank: of its adapters.
        alone: whether a row never meets another, so that it can keep the caches that the model
            makes, whatever they are, without padding and its masks.
    """

    def __init__(self, model: Any, bank: AdapterBank, *, alone: bool = False) -> None:
        self._model = model
        self._bank = bank
        self._alone = alone

    def make_cache(self, adapters: RowAdapters = ()) -> list[Any]:
        """An empty cache of one row with these adapters."""
        from mlx_lm.models.cache import make_prompt_cache

        layers = make_prompt_cache(self._model)
        if self._alone:
            for cache in layers:
                kind: Any = type(cache)
                cache.__class__ = _alone(kind)
        return [Riders([adapters]), *layers]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits (rows, tokens, vocabulary), float32, of token ids (rows, tokens)."""
        riders, *layers = cache
        with self._bank.riding(riders.lanes(self._bank), len(riders.rows)):
            logits: mx.array = self._model(tokens, cache=layers)
        return logits.astype(mx.float32)


class _Alone:
    """What `BatchGenerator` asks of a cache, for one that is a batch of one row as it is."""

    @staticmethod
    def merge(caches: Sequence["_Alone"]) -> "_Alone":
        (only,) = caches
        return only

    def filter(self, keep: Sequence[int]) -> None:
        """Keep the row; a batch without any drops its caches."""

    def extract(self, _: int) -> "_Alone":
        return copy.deepcopy(self)

    def is_trimmable(self) -> bool:
        # A ChunkedKVCache says that it is, after it gave up its first tokens too.
        own: Any = super()
        return bool(own.is_trimmable()) and not getattr(self, "start_position", 0)


@functools.cache
def _alone(kind: type) -> type:
    """A kind of cache as a batch of one row."""
    return type(kind.__name__, (_Alone, kind), {})


def shares_batches(riding: RidingModel) -> bool:
    """Whether rows of different lengths have the logits together that they have alone.

    Some architectures of mlx-lm fail with the masks that such batches need, so this is tried.
    """
    prompts, following = [[1, 2, 3], [4, 5, 6, 7, 8]], [9, 10]
    alone = []
    for prompt, token in zip(prompts, following, strict=True):
        cache = riding.make_cache()
        riding(mx.array([prompt]), cache)
        alone.append(riding(mx.array([[token]]), cache))
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [riding.make_cache() for _ in prompts]
    try:
        batch = [entries[0].merge(list(entries)) for entries in zip(*rows, strict=True)]
        for entry in batch:
            entry.prepare(lengths=list(map(len, prompts)), right_padding=padding)
        padded = [prompt + [0] * more for prompt, more in zip(prompts, padding, strict=True)]
        riding(mx.array(padded), batch)
        for entry in batch:
            entry.finalize()
        together = riding(mx.array(following)[:, None], batch)
        difference = mx.abs(together - mx.concatenate(alone)).max()
        return bool((difference <= TOLERANCE * mx.abs(together).max()).item())
    except Exception:  # every architecture fails in its own way
        return False
