"""Batches: which rows share a batch, and how wide each batch is.

Rows of similar length share a batch, and all batches together have few widths, so that there is
little padding and little to compile. With packing, several documents share a row;
`graft.training.packing` keeps them apart. The batches of an epoch are a function of (seed, epoch).
Knows nothing of models.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from graft.data.collate import Batch, collate_packed, prediction_counts
from graft.data.examples import Example
from graft.runtime.prefetch import prefetch
from graft.runtime.workers import in_groups

import numpy as np
from numpy.typing import NDArray

# The number of widths: the fewest that add at most this share of padding, up to a limit.
ROUNDING_SHARE = 0.03
MOST_WIDTHS = 32
# Distinct lengths considered in choosing them.
DISTINCT_LENGTHS = 512


class TrainingBatches:
    """The batches of a training run: an endless iterator of one list of micro-batches per step.

    The batches of the next step are collated, and read if the activation cache is on disk, while a
    step is computed.

    Rows are grouped for whole steps and then divided, so that half the rows per micro-batch and
    twice the accumulation train on the same rows in the same steps.

    Args:
        examples: the rows.
        batch_size: rows per batch.
        accumulation: batches per step.
        workers: micro-batches that each batch is divided into.
        seed: of the order; the order of an epoch is a function of (seed, epoch).
        capacity: pack documents into rows of up to this many tokens, which `batch_size` then
            counts; `None` packs nothing.

    Attributes:
        examples: the rows; may be replaced by others of the same lengths.
        step_size: rows per step, packed rows if there are any.
        capacity: as given, but at least the longest row and at most all rows together.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        accumulation: int = 1,
        workers: int = 1,
        seed: int = 0,
        capacity: int | None = None,
    ) -> None:
        self.examples = examples
        self._lengths = prediction_counts(examples)
        self.capacity = capacity and int(
            min(max(capacity, self._lengths.max()), self._lengths.sum())
        )
        self._micro_size, self._workers = -(-batch_size // workers), workers
        self.step_size = batch_size * accumulation
        self._seed = seed
        # Packs of later epochs may be fuller than those of the first.
        fullest = np.array([self.capacity] if self.capacity else [], dtype=np.int64)
        self._all_widths = choose_widths(np.append(self._sums(self._arrange(0)), fullest))
        self.restore({"epoch": 0, "position": 0})

    @property
    def steps_per_epoch(self) -> int:
        """Steps per pass over the data; with packing, epochs may differ by one."""
        return -(-len(self._packs) // self.step_size)

    @property
    def pack_count(self) -> int:
        """Rows in this epoch, packed rows if there are any."""
        return len(self._packs)

    def steps_in(self, epochs: float) -> int:
        """Steps in this many passes over the data, at least 1."""
        whole = int(epochs)
        counts = [len(self._arrange(epoch)) for epoch in range(math.ceil(epochs))]
        steps = [-(-count // self.step_size) for count in counts]
        return max(math.ceil(sum(steps[:whole]) + (epochs - whole) * steps[-1]), 1)

    @property
    def padding_share(self) -> float:
        """The share of padding in what this epoch computes, 0 to 1."""
        real = sum(len(example) - 1 for example in self.examples)
        return 1 - real / sum(rows * tokens for rows, tokens in self.shapes())

    def shapes(self) -> list[tuple[int, int]]:
        """(rows, tokens) of every micro-batch of this epoch."""
        return [
            (len(packs), self._width(packs))
            for group in self._groups
            for packs in self._divided(group)
        ]

    def widest(self) -> list[Batch]:
        """The micro-batches, one for each worker, that take the most tokens at the same time."""
        micro_batches = (self._divided(group) for group in self._groups)
        at_one_time = [part for parts in micro_batches for part in in_groups(parts, self._workers)]
        most = max(
            at_one_time, key=lambda parts: sum(map(len, parts)) * max(map(self._width, parts))
        )
        return [self._batch(packs) for packs in most]

    def state(self) -> dict[str, int]:
        """The position: the epoch, and the steps taken in it."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go back to a position that `state` returned."""
        self._epoch, self._position = state["epoch"], state["position"]
        generator = np.random.default_rng([self._seed, self._epoch])
        self._packs = self._arrange(self._epoch)
        self._widths = _rounded_up(self._sums(self._packs), self._all_widths)
        self._groups = _slices(_shuffled(self._widths, generator), self.step_size)
        generator.shuffle(self._groups)
        self._prefetched = prefetch(map(self._step, self._groups[self._position :]))

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> list[Batch]:
        if self._position == len(self._groups):
            self.restore({"epoch": self._epoch + 1, "position": 0})
        self._position += 1
        return next(self._prefetched)

    def _step(self, group: Sequence[int]) -> list[Batch]:
        return [self._batch(packs) for packs in self._divided(group)]

    def _arrange(self, epoch: int) -> list[list[int]]:
        """The rows of each pack of an epoch; one each without packing."""
        if self.capacity is None:
            return [[row] for row in range(len(self._lengths))]
        generator = np.random.default_rng([self._seed, epoch, 1])
        return pack_rows(self._lengths, self.capacity, generator)

    def _sums(self, packs: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        lengths = self._lengths[list(itertools.chain(*packs))]
        starts = np.cumsum([0, *map(len, packs[:-1])])
        sums: NDArray[np.int64] = np.add.reduceat(lengths, starts)
        return sums

    def _batch(self, packs: Sequence[int]) -> Batch:
        batch = collate_packed(
            self.examples, [self._packs[number] for number in packs], self._width(packs)
        )
        return batch if self.capacity else batch.without("segment_ids")

    def _width(self, packs: Sequence[int]) -> int:
        return int(self._widths[packs].max())

    def _divided(self, packs: Sequence[int]) -> list[Sequence[int]]:
        """The packs of a step as those of its micro-batches."""
        return in_groups(packs, self._micro_size)


def group_rows(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Divide the rows into batches of similar length, short ones first."""
    lengths = np.array([len(example) for example in examples])
    return _slices(np.argsort(lengths, kind="stable"), batch_size)


def choose_widths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The widths that rows are padded to, ascending: few widths that add little padding.

    They have the least padding of all sets of that size, found by dynamic programming over the
    sorted lengths: the least cost of the first j lengths with k widths is that of the first i with
    k - 1 widths, plus the others padded to length j.
    """
    step = -(-lengths.max() // DISTINCT_LENGTHS)
    values, counts = np.unique(-(-lengths // step) * step, return_counts=True)
    widths: NDArray[np.int64] = values[
        _cuts(values, counts, allowed=lengths.sum() / (1 - ROUNDING_SHARE))
    ]
    return widths


def pack_rows(
    lengths: NDArray[np.int64], capacity: int, generator: np.random.Generator
) -> list[list[int]]:
    """Divide rows into packs of at most `capacity` tokens: best fit, longer rows roughly first.

    Each row goes into the pack where it leaves the least room. Lengths are multiplied by a random
    factor for the order, so that packs differ between epochs; this costs about one pack in 100.

    Args:
        lengths: (rows,) tokens, none above `capacity`.
        capacity: most tokens in a pack.
        generator: for the order.

    Returns:
        The rows of each pack.
    """
    packs: list[list[int]] = []
    packs_with_room: dict[int, list[int]] = {}
    rooms = 0  # A set of integers: bit r is set if some pack has room for r tokens.
    for row in np.argsort(-lengths * generator.uniform(0.5, 1, len(lengths))).tolist():
        length = int(lengths[row])
        sufficient = rooms >> length
        if sufficient:
            # The lowest bit is the smallest room that suffices.
            room = length + (sufficient & -sufficient).bit_length() - 1
            number = packs_with_room[room].pop()
            rooms ^= 0 if packs_with_room[room] else 1 << room
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        packs_with_room.setdefault(room - length, []).append(number)
        rooms |= 1 << room - length
    return packs


def _rounded_up(lengths: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    return widths[np.searchsorted(widths, lengths)]


def _cuts(values: NDArray[Any], counts: NDArray[Any], *, allowed: float) -> list[int]:
    """Indices of the values to round up to: the fewest whose sum over all rows is allowed."""
    last = len(values)
    rows = np.concatenate([[0], np.cumsum(counts)])
    # [i, j]: the rows of values i to j, all padded to value j.
    costs = (values * (rows[1:] - rows[:-1, None])).astype(np.float64)
    costs[np.tri(last, k=-1, dtype=np.bool_)] = np.inf
    best, starts = costs[0], [np.zeros(last, dtype=np.int64)]
    while best[-1] > allowed and len(starts) < min(MOST_WIDTHS, last):
        sums = np.concatenate([[np.inf], best[:-1]])[:, None] + costs
        starts.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    cuts = [last - 1]
    for start in reversed(starts[1:]):
        cuts.append(int(start[cuts[-1]]) - 1)
    return cuts[::-1]


def _shuffled(widths: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """The rows by width, those of one width in random order."""
    # A little noise mixes rows of neighbouring widths, at the cost of a little padding.
    return np.argsort(widths * generator.uniform(0.99, 1.01, len(widths)))


def _slices(order: NDArray[np.int64], size: int) -> list[list[int]]:
    rows: list[int] = order.tolist()
    return [list(part) for part in in_groups(rows, size)]


def sample_rows(examples: Sequence[Example], number: int, *, seed: int) -> Sequence[Example]:
    """A sample of the examples that depends on `seed` alone, in order; all if there are fewer."""
    if number >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), size=number, replace=False)
    return [examples[row] for row in sorted(chosen)]
