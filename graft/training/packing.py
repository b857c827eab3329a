"""Packing: several documents in one row that do not attend to each other.

Architectures ask their cache which positions attend to which. A stand-in for the cache, which
stores nothing, lets position i attend to the positions j up to itself in the same segment s, and
within a window if the architecture has one:

    mask[i, j] = (s_i = s_j) and (i - window < j <= i)

Rotary positions are relative, so a document may begin anywhere in a row. Not every architecture has
such positions or asks its cache, so packed logits are compared with plain ones once. Which
documents share a row is decided in `graft.data.batches`.
Reference: Krell et al., "Efficient Sequence Packing without Cross-contamination" (2021),
https://arxiv.org/abs/2107.02027.
"""

from functools import partial

from graft.data.collate import Batch, collate, collate_packed
from graft.data.examples import Example
from graft.pretrained.context_length import context_length
from graft.training.probe import works

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# Documents to compare on, in two rows with padding.
SAMPLE_LENGTHS = (6, 4, 8, 9, 5)
SAMPLE_PACKS = ((0, 1, 2), (3, 4))


class SegmentMask:
    """Stands in for the cache of a block and masks other documents.

    Args:
        segment_ids: (rows, tokens) which document of its row a token belongs to.
        offset: the position of the first token of each row.
    """

    def __init__(self, segment_ids: mx.array, *, offset: int = 0) -> None:
        self.offset = offset
        self._segment_ids = segment_ids

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """The mask (rows, 1, tokens, tokens), bool, the same for all heads."""
        positions = mx.arange(tokens)
        distances = positions[:, None] - positions
        near = distances >= 0
        if window_size is not None:
            near = near & (distances < window_size)
        same = self._segment_ids[:, :, None] == self._segment_ids[:, None]
        return (same & near)[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values of this call: nothing is stored."""
        return keys, values


def forward(
    model: nn.Module, inputs: mx.array, segment_ids: mx.array | None = None, *, offset: int = 0
) -> mx.array:
    """The logits of rows, packed or not.

    Args:
        model: of mlx-lm, or with its interface.
        inputs: (rows, tokens) token ids, or (rows, tokens, dims) from the activation cache.
        segment_ids: (rows, tokens) which document of its row a token belongs to; `None` if each
            row is one document.
        offset: the position of the first token of each packed row.
    """
    if segment_ids is None:
        return model(inputs)
    segment_mask = SegmentMask(segment_ids, offset=offset)
    return model(inputs, cache=[segment_mask] * len(model.layers))


def find_capacity(model: nn.Module, tokens: int) -> int | None:
    """How many tokens a packed row may have; `None`, with a message, if the model cannot pack.

    Packed documents must have the logits that they have alone, at both ends of such a row.

    Args:
        model: with or without an adapter.
        tokens: length of the longest row wanted.
    """
    model.eval()
    capacity = min(tokens, context_length(model) or tokens)
    examples = [_document(length) for length in SAMPLE_LENGTHS]
    logits = model(mx.array(collate(examples, range(len(examples)))["inputs"]))
    expected = mx.concatenate([row[: len(e) - 1] for row, e in zip(logits, examples, strict=True)])
    batch = collate_packed(examples, SAMPLE_PACKS)
    # If positions are absolute, far ones may not exist, so near ones are tried first.
    for offset in (0, max(capacity - batch["targets"].shape[1], 0)):
        if not works("packing", partial(_packed_logits, model, batch, offset), expected):
            return None
    return capacity


def _document(length: int) -> Example:
    tokens = (length * np.arange(length, dtype=np.int32) + 1) % 16
    return Example(tokens, np.ones(length, dtype=np.bool_))


def _packed_logits(model: nn.Module, batch: Batch, offset: int) -> mx.array:
    """The logits (tokens, vocabulary) of the trained tokens of packed rows."""
    arrays = batch.to_mlx()
    logits = forward(model, arrays["inputs"], arrays["segment_ids"], offset=offset)
    return logits.flatten(0, 1)[mx.array(np.flatnonzero(batch["loss_mask"]))]
