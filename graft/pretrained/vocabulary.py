"""Whether a model's embedding has a row for every token id that it is given.

MLX does not check indices: an id beyond the embedding reads memory that is not the model's. Models
with more rows than their tokenizer has tokens are common, and right. So are tokenizers with an
added token that the model has no row for, as in text models made from multimodal ones; such a token
is refused where a text contains it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.architectures import is_embedding
from graft.pretrained.tokenizer import SentencePieceTokenizer, Tokenizer

import mlx.nn as nn
import numpy as np
from numpy.typing import ArrayLike

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def vocabulary_rows(model: nn.Module) -> int | None:
    """The number of rows of a model's token embedding; `None` if it cannot be told which it is."""
    rows = {
        path.removesuffix(".linear"): int(module.weight.shape[0])
        for path, module in model.named_modules()
        if isinstance(module, _EMBEDDINGS)
    }
    named = [number for path, number in rows.items() if is_embedding(path)]
    return min(named or (rows.values() if len(rows) == 1 else ()), default=None)


def check_tokenizer(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse a tokenizer whose vocabulary is not that of the model in the same folder.

    Raises:
        InputError: an ordinary text can have ids that the embedding has no row for.
    """
    rows, largest = vocabulary_rows(model), _largest_id(tokenizer)
    if rows is not None and largest is not None and largest >= rows:
        raise InputError(
            f"{folder}: the tokenizer has {largest + 1:,} tokens but the model's embedding only "
            f"{rows:,} rows; use the tokenizer that the model was trained with"
        )


def check_token_ids(model: nn.Module, texts: Iterable[ArrayLike]) -> None:
    """Refuse token ids that a model's embedding has no row for.

    Args:
        model: with or without an adapter.
        texts: the ids of each text.

    Raises:
        InputError: there are such ids; the message names the largest.
    """
    rows = vocabulary_rows(model)
    largest = max((int(np.max(ids, initial=-1)) for ids in texts), default=-1)
    if rows is not None and largest >= rows:
        raise InputError(
            f"the text has token id {largest}, but the model's embedding only {rows:,} rows: the "
            "tokenizer has tokens that the model does not know; leave them out of the text"
        )


def _largest_id(tokenizer: Tokenizer) -> int | None:
    """The largest id of a vocabulary without added tokens, if the tokenizer tells."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.vocab_size - 1
    model: Any = getattr(tokenizer, "_tokenizer", tokenizer)
    try:
        added = model.get_added_vocab()
        return max(id for token, id in model.get_vocab().items() if token not in added)
    except (AttributeError, NotImplementedError, ValueError):
        return None
