"""Several documents in one row that do not see each other.

Architectures ask their cache which positions attend to which. A stand-in for it, which keeps
nothing, lets position i attend to position j of the same document d up to itself, within a window
where the architecture asks for one:

    mask[i, j] = (d_i = d_j) and (i - window < j <= i)

Rotary positions are relative, so documents may stand anywhere in a row. Not every architecture has
such positions or asks its cache, so packed logits are compared with plain ones once. Knows nothing
of which documents stand together: `graft.data.batches` does.
Reference: Krell et al., "Efficient Sequence Packing without Cross-contamination" (2021),
https://arxiv.org/abs/2107.02027.
"""

from typing import Any

from graft.data.batches import Batch, pack, pad
from graft.data.examples import Example
from graft.runtime.agreement import agrees

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# Documents to compare on, in two rows with padding.
SAMPLE_LENGTHS = (6, 4, 8, 9, 5)
SAMPLE_PACKS = ((0, 1, 2), (3, 4))


class Separator:
    """Stands in for the cache of a block and keeps documents apart.

    Args:
        documents: (rows, tokens) which document of its row a token belongs to.
        offset: the position of the first token of each row.
    """

    def __init__(self, documents: mx.array, *, offset: int = 0) -> None:
        self.offset = offset
        self._documents = documents

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """The mask (rows, 1, tokens, tokens), bool, for all heads alike."""
        places = mx.arange(tokens)
        distances = places[:, None] - places
        near = distances >= 0
        if window_size is not None:
            near = near & (distances < window_size)
        same = self._documents[:, :, None] == self._documents[:, None]
        return (same & near)[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What came in: there is nothing to remember."""
        return keys, values


def forward(
    model: nn.Module, inputs: mx.array, documents: mx.array | None = None, *, offset: int = 0
) -> mx.array:
    """What a model gives for rows, packed or not.

    Args:
        model: of mlx-lm, or with its interface.
        inputs: (rows, tokens) token ids, or what the model takes in their place.
        documents: (rows, tokens) which document of its row a token belongs to; `None` where a row
            is one.
        offset: the position of the first token of each packed row.
    """
    if documents is None:
        return model(inputs)
    separator = Separator(documents, offset=offset)
    return model(inputs, cache=[separator] * len(model.layers))


def find_capacity(model: nn.Module, tokens: int) -> int | None:
    """How many tokens a packed row may have; `None`, and said, where the model cannot pack.

    Packed documents must give the logits that they give alone, at both ends of such a row.

    Args:
        model: an adapter may be attached.
        tokens: of the longest row that is wanted.
    """
    model.eval()
    capacity = min(tokens, _context(model) or tokens)
    examples = [_document(length) for length in SAMPLE_LENGTHS]
    logits = model(mx.array(pad(examples, range(len(examples))).inputs))
    expected = mx.concatenate([row[: len(e) - 1] for row, e in zip(logits, examples, strict=True)])
    batch = pack(examples, SAMPLE_PACKS)
    # Where positions count from the start of a row, far ones may not exist: near ones first.
    for offset in (0, max(capacity - batch.targets.shape[1], 0)):
        if not _agrees(model, batch, offset, expected):
            print("packing: none, since this model's logits are others where rows share one")
            return None
    return capacity


def _context(model: nn.Module) -> int | None:
    return getattr(getattr(model, "args", None), "max_position_embeddings", None)


def _document(length: int) -> Example:
    tokens = (length * np.arange(length, dtype=np.int32) + 1) % 16
    return Example(tokens, np.ones(length, dtype=np.bool_))


def _agrees(model: nn.Module, batch: Batch, offset: int, expected: mx.array) -> bool:
    try:
        documents: Any = batch.documents
        logits = forward(model, mx.array(batch.inputs), mx.array(documents), offset=offset)
        found = logits.flatten(0, 1)[mx.array(np.flatnonzero(batch.loss_mask))]
        return agrees(found, expected)
    except Exception:  # Every architecture that keeps more than keys fails in its own way.
        return False
