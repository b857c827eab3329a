"""Which rows stand together in a batch, and how they are padded.

Rows of like length share a batch, and all batches together have few widths, so that little is
padding and few shapes reach the compiler. Packed, several rows are the documents of one that is
filled as far as it goes; `graft.training.packing` keeps them apart. Batches of an epoch are a
function of (seed, epoch). Knows nothing of models.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.data.examples import Example
from graft.runtime.prefetch import ahead
from graft.runtime.workers import groups

import numpy as np
from numpy.typing import NDArray

# The fewest widths are taken that leave this share of what is computed to padding, or so many.
ROUNDING_SHARE = 0.03
MOST_WIDTHS = 32
# Lengths that are told apart in choosing them.
DISTINCT_LENGTHS = 512


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length.

    Attributes:
        inputs: (rows, tokens) int32, padded with 0; or (rows, tokens, dims), where
            `graft.training.activation_cache` kept states.
        targets: (rows, tokens) int32, the token ids moved on by one.
        loss_mask: (rows, tokens) bool; false on padding and on what is not to be learnt.
        rows: which examples these are.
        documents: (rows, tokens) int32, which document of its row a token belongs to; padding is
            one more. `None` where a row is one.
    """

    inputs: NDArray[Any]
    targets: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    rows: tuple[int, ...]
    documents: NDArray[np.int32] | None = None


class TrainingBatches:
    """The batches of a training, without end: an iterator of one list of micro-batches a step.

    Those of the next step are padded, and read where the trunk's states are on disk, while a step
    is computed.

    Rows are grouped for whole steps and then divided, so that half the rows a micro-batch and twice
    the accumulation train on the same rows in the same steps.

    Args:
        examples: the rows.
        batch_size: rows a batch.
        accumulation: such batches a step.
        lanes: micro-batches that each of them is divided into.
        seed: of the order; that of an epoch is a function of (seed, epoch).
        capacity: tokens up to which rows are packed into one, which `batch_size` then counts;
            `None` packs nothing.

    Attributes:
        examples: the rows; may be exchanged for others of the same lengths.
        step_size: rows a step, packed ones where they are.
        capacity: as given, or what the longest row or all of them take.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        accumulation: int = 1,
        lanes: int = 1,
        seed: int = 0,
        capacity: int | None = None,
    ) -> None:
        self.examples = examples
        self._lengths = _predictions(examples)
        self.capacity = capacity and int(
            min(max(capacity, self._lengths.max()), self._lengths.sum())
        )
        self._micro_size, self._lanes = -(-batch_size // lanes), lanes
        self.step_size = batch_size * accumulation
        self._seed = seed
        # Packs of later epochs may be fuller than those of the first.
        fullest = np.array([self.capacity] if self.capacity else [], dtype=np.int64)
        self._all_widths = choose_widths(np.append(self._sums(self._arrange(0)), fullest))
        self.restore({"epoch": 0, "position": 0})

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was seen once; packed, it may be one more in another epoch."""
        return -(-len(self._packs) // self.step_size)

    @property
    def pack_count(self) -> int:
        """How many rows there are in the present epoch, packed ones where they are."""
        return len(self._packs)

    def steps_in(self, epochs: float) -> int:
        """Steps until every row was seen so often."""
        whole = int(epochs)
        counts = [len(self._arrange(epoch)) for epoch in range(math.ceil(epochs))]
        steps = [-(-count // self.step_size) for count in counts]
        return max(math.ceil(sum(steps[:whole]) + (epochs - whole) * steps[-1]), 1)

    @property
    def padding_share(self) -> float:
        """The part of what is computed in the present epoch that is padding, 0 to 1."""
        real = sum(len(example) - 1 for example in self.examples)
        return 1 - real / sum(rows * tokens for rows, tokens in self.shapes())

    def shapes(self) -> list[tuple[int, int]]:
        """(rows, tokens) of every micro-batch of the present epoch."""
        return [
            (len(packs), self._width(packs))
            for group in self._groups
            for packs in self._divided(group)
        ]

    def widest(self) -> list[Batch]:
        """The most that is computed at one time: a micro-batch in each lane."""
        micro_batches = (self._divided(group) for group in self._groups)
        at_one_time = [part for parts in micro_batches for part in groups(parts, self._lanes)]
        most = max(
            at_one_time, key=lambda parts: sum(map(len, parts)) * max(map(self._width, parts))
        )
        return [self._batch(packs) for packs in most]

    def state(self) -> dict[str, int]:
        """Where the iterator stands: the epoch and the steps taken in it."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was."""
        self._epoch, self._position = state["epoch"], state["position"]
        generator = np.random.default_rng([self._seed, self._epoch])
        self._packs = self._arrange(self._epoch)
        self._widths = _rounded_up(self._sums(self._packs), self._all_widths)
        self._groups = _slices(_shuffled(self._widths, generator), self.step_size)
        generator.shuffle(self._groups)
        self._coming = ahead(map(self._step, self._groups[self._position :]))

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> list[Batch]:
        if self._position == len(self._groups):
            self.restore({"epoch": self._epoch + 1, "position": 0})
        self._position += 1
        return next(self._coming)

    def _step(self, group: Sequence[int]) -> list[Batch]:
        return [self._batch(packs) for packs in self._divided(group)]

    def _arrange(self, epoch: int) -> list[list[int]]:
        """The rows of each pack of an epoch; one each where nothing is packed."""
        if self.capacity is None:
            return [[row] for row in range(len(self._lengths))]
        generator = np.random.default_rng([self._seed, epoch, 1])
        return fill(self._lengths, self.capacity, generator)

    def _sums(self, packs: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        lengths = self._lengths[list(itertools.chain(*packs))]
        starts = np.cumsum([0, *map(len, packs[:-1])])
        sums: NDArray[np.int64] = np.add.reduceat(lengths, starts)
        return sums

    def _batch(self, packs: Sequence[int]) -> Batch:
        batch = pack(self.examples, [self._packs[number] for number in packs], self._width(packs))
        return batch if self.capacity else replace(batch, documents=None)

    def _width(self, packs: Sequence[int]) -> int:
        return int(self._widths[packs].max())

    def _divided(self, packs: Sequence[int]) -> list[Sequence[int]]:
        """The packs of a step as those of its micro-batches."""
        return groups(packs, self._micro_size)


def group_rows(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Divide the rows into batches of like length, short ones first."""
    lengths = np.array([len(example) for example in examples])
    return _slices(np.argsort(lengths, kind="stable"), batch_size)


def choose_widths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The widths, ascending, that rows are padded to: few, which together add little.

    They are those of least padding for their number, found by dynamic programming over the lengths
    in order: the least cost of the first j lengths with k widths is that of the first i with k - 1,
    plus the rest padded to the last of them.
    """
    step = -(-lengths.max() // DISTINCT_LENGTHS)
    values, counts = np.unique(-(-lengths // step) * step, return_counts=True)
    widths: NDArray[np.int64] = values[
        _cuts(values, counts, allowed=lengths.sum() / (1 - ROUNDING_SHARE))
    ]
    return widths


def fill(
    lengths: NDArray[np.int64], capacity: int, generator: np.random.Generator
) -> list[list[int]]:
    """Divide rows into packs of at most `capacity`: best fit, longer rows roughly first.

    Each row goes where it leaves the least room. Lengths count with a random factor, so that other
    rows meet every time, at the cost of about one pack in a hundred.

    Args:
        lengths: (rows,) none above `capacity`.
        capacity: most of a pack.
        generator: of the order.

    Returns:
        The rows of each pack.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # Its bit r is set where a pack has room for r.
    for row in np.argsort(-lengths * generator.uniform(0.5, 1, len(lengths))).tolist():
        length = int(lengths[row])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        with_room.setdefault(room - length, []).append(number)
        rooms |= 1 << room - length
    return packs


def _predictions(examples: Sequence[Example]) -> NDArray[np.int64]:
    """How many tokens each row predicts from those before: the positions that it takes."""
    return np.array([max(len(example) - 1, 1) for example in examples])


def _starts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Where rows begin that stand one after the other, and where the last of them ends."""
    return np.concatenate([[0], np.cumsum(_predictions(examples))])


def _rounded_up(lengths: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    return widths[np.searchsorted(widths, lengths)]


def _cuts(values: NDArray[Any], counts: NDArray[Any], *, allowed: float) -> list[int]:
    """Which values to round up to: the fewest whose sum over all rows is at most `allowed`."""
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
    # A little noise lets rows of neighbouring widths meet, at the cost of a little padding.
    return np.argsort(widths * generator.uniform(0.99, 1.01, len(widths)))


def _slices(order: NDArray[np.int64], size: int) -> list[list[int]]:
    rows: list[int] = order.tolist()
    return [list(part) for part in groups(rows, size)]


def sample_rows(examples: Sequence[Example], number: int, *, seed: int) -> Sequence[Example]:
    """The same `number` of examples every time, drawn over all lengths, or all there are."""
    if number >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), size=number, replace=False)
    return [examples[row] for row in sorted(chosen)]


def pad(examples: Sequence[Example], rows: Sequence[int], width: int | None = None) -> Batch:
    """Put rows into one rectangle of this width, or of what the longest of them predicts."""
    return replace(pack(examples, [[row] for row in rows], width), documents=None)


def pack(
    examples: Sequence[Example], packs: Sequence[Sequence[int]], width: int | None = None
) -> Batch:
    """Put rows into one rectangle, those of a pack one after the other in the same row of it.

    What a row predicts stays within it: neither the first token of the next nor padding is trained.

    Args:
        examples: all rows.
        packs: which of them stand in each row of the rectangle.
        width: of the rectangle; by default what the longest pack takes.
    """
    starts = [_starts([examples[row] for row in rows]) for rows in packs]
    shape = len(packs), width or max(int(row[-1]) for row in starts)
    # The last token of a row predicts nothing; the next row begins in its place.
    tokens = np.zeros((shape[0], shape[1] + 1), dtype=np.int32)
    targets, documents = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    loss_mask = np.zeros(shape, dtype=np.bool_)
    first = examples[packs[0][0]].states
    states = None if first is None else np.zeros((*shape, first.shape[-1]), dtype=first.dtype)
    for place, rows in enumerate(packs):
        for row, start in zip(rows, starts[place], strict=False):
            example = examples[row]
            part = slice(start, start + len(example) - 1)
            tokens[place, start : start + len(example)] = example.tokens
            targets[place, part], loss_mask[place, part] = example.tokens[1:], example.loss_mask[1:]
            if states is not None:
                states[place, part] = example.states
        documents[place] = np.searchsorted(starts[place], np.arange(shape[1]), side="right")
    inputs = tokens[:, :-1] if states is None else states
    return Batch(inputs, targets, loss_mask, tuple(itertools.chain(*packs)), documents)
