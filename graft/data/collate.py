"""Collating: puts token rows into the padded, named arrays of a batch."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.data.examples import Example

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length, as named arrays.

    Attributes:
        rows: the numbers of its examples.
        arrays: by name: `inputs` (rows, tokens) int32, padded with 0, or (rows, tokens, dims) if
            they come from the activation cache; `targets` (rows, tokens) int32, the token ids that
            follow; `loss_mask` (rows, tokens) bool, false on padding and on what is not trained;
            and, if rows are packed, `segment_ids` (rows, tokens) int32, which document of its row a
            token belongs to, padding counting as one more. Objectives may add others.
    """

    rows: tuple[int, ...]
    arrays: Mapping[str, NDArray[Any]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def without(self, name: str) -> "Batch":
        """The same batch without one of its arrays."""
        kept = {other: array for other, array in self.arrays.items() if other != name}
        return replace(self, arrays=kept)

    def to_mlx(self, *, tokens: slice = slice(None)) -> dict[str, mx.array]:
        """The arrays in MLX, or a part of their tokens."""
        return {name: mx.array(array[:, tokens]) for name, array in self.arrays.items()}


def collate(examples: Sequence[Example], rows: Sequence[int], width: int | None = None) -> Batch:
    """Put rows into one rectangle.

    Args:
        examples: all rows.
        rows: the numbers of those in the batch.
        width: of the rectangle; by default what the longest of them needs.
    """
    return collate_packed(examples, [[row] for row in rows], width).without("segment_ids")


def collate_packed(
    examples: Sequence[Example], packs: Sequence[Sequence[int]], width: int | None = None
) -> Batch:
    """Put rows into one rectangle, those of a pack one after another in the same row of it.

    Predictions stay within a document: neither the first token of the next one nor padding is
    trained.

    Args:
        examples: all rows.
        packs: for each row of the rectangle, the numbers of the examples in it.
        width: of the rectangle; by default what the longest pack needs.
    """
    starts = [_starts([examples[row] for row in rows]) for rows in packs]
    shape = len(packs), width or max(int(ends[-1]) for ends in starts)
    # The last token of a document predicts nothing; the next document begins in its place.
    tokens = np.zeros((shape[0], shape[1] + 1), dtype=np.int32)
    targets, segment_ids = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    loss_mask = np.zeros(shape, dtype=np.bool_)
    first = examples[packs[0][0]].states
    states = None if first is None else np.zeros((*shape, first.shape[-1]), dtype=first.dtype)
    for line, rows in enumerate(packs):
        for row, start in zip(rows, starts[line], strict=False):
            example = examples[row]
            part = slice(start, start + len(example) - 1)
            tokens[line, start : start + len(example)] = example.tokens
            targets[line, part], loss_mask[line, part] = example.tokens[1:], example.loss_mask[1:]
            if states is not None:
                states[line, part] = example.states
        segment_ids[line] = np.searchsorted(starts[line], np.arange(shape[1]), side="right")
    inputs = tokens[:, :-1] if states is None else states
    arrays = {"inputs": inputs, "targets": targets, "loss_mask": loss_mask}
    return Batch(tuple(itertools.chain(*packs)), {**arrays, "segment_ids": segment_ids})


def prediction_counts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """How many tokens each row predicts: the positions that it takes in a batch, at least 1."""
    return np.array([max(len(example) - 1, 1) for example in examples])


def _starts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Where rows begin that follow one another, and where the last of them ends."""
    return np.concatenate([[0], np.cumsum(prediction_counts(examples))])
