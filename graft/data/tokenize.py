"""Tokenization of many texts at once, with a mask over the tokens of chosen spans.

A token is in the mask if it covers at least one character of a span. Texts are always tokenized as
a whole, so that a span does not change the tokens. Knows tokenizers; knows nothing of rows.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graft import __version__
from graft.pretrained.tokenizer import SentencePieceTokenizer, Tokenizer, without_second_start

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
Mask = NDArray[np.bool_]
_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Passage:
    """Text that is tokenized as one piece.

    Attributes:
        text: the characters.
        spans: (first, last + 1) characters that count toward the loss; `None` if all do.
        starts: whether the tokenizer's BOS comes before the text.
        ends: whether EOS comes after the text.
    """

    text: str
    spans: tuple[Span, ...] | None = None
    starts: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Encoded:
    """The tokens of a passage.

    Attributes:
        ids: token ids, without EOS unless the tokenizer itself adds it.
        loss_mask: (tokens,) bool, the tokens of the passage's spans; `None` if it has no spans, or
            if the tokenizer merges characters across the edge of a span.
    """

    ids: list[int]
    loss_mask: Mask | None = None


def encode(passages: Sequence[Passage], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenize passages, in batches if the tokenizer can.

    Args:
        passages: what to tokenize.
        tokenizer: any; SentencePiece and Hugging Face's fast tokenizers work on batches.
    """
    results: dict[int, Encoded] = {}
    for starts, with_masks in itertools.product((True, False), repeat=2):
        indices = [
            at
            for at, passage in enumerate(passages)
            if (passage.starts, passage.spans is not None) == (starts, with_masks)
        ]
        for first in range(0, len(indices), _TEXTS_AT_ONCE):
            batch = indices[first : first + _TEXTS_AT_ONCE]
            encoded = _encode_batch(
                [passages[at] for at in batch], tokenizer, starts=starts, with_masks=with_masks
            )
            results.update(zip(batch, encoded, strict=True))
    return [results[at] for at in range(len(passages))]


def span_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> Mask:
    """The tokens that cover a character of one of the spans.

    Args:
        offsets: (first, last + 1) characters of each token. Characters between two tokens count as
            the second one's: some tokenizers leave spaces out.
        spans: (first, last + 1) characters.
    """
    edges = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(edges[:, 1])
    starts = np.minimum(edges[:, 0], np.concatenate([[0], ends])[: len(ends)])
    mask = np.zeros(len(ends), dtype=np.bool_)
    for first, last in spans:
        mask |= (ends > first) & (starts < last)
    return mask


def tokenizer_digest(tokenizer: Tokenizer) -> str | None:
    """A hash of everything that token ids depend on, independent of the tokenizer's path.

    Returns:
        `None` for a tokenizer that cannot be serialized.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        parts = [tokenizer.serialize(), str(tokenizer.eos_token_id).encode()]
    elif _is_fast(model := transformers_tokenizer(tokenizer)):
        settings = {
            "class": type(model).__name__,
            "template": model.chat_template,
            "renderer": getattr(getattr(tokenizer, "_chat_template", None), "__module__", None),
            "special": model.special_tokens_map,
            "eos": sorted(tokenizer.eos_token_ids),
        }
        parts = [
            model.backend_tokenizer.to_str().encode(),
            json.dumps(settings, default=str).encode(),
        ]
    else:
        return None
    return hashlib.sha256(b"\0".join([__version__.encode(), *parts])).hexdigest()


def transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper, or the tokenizer itself."""
    return getattr(tokenizer, "_tokenizer", tokenizer)


def _is_fast(model: Any) -> bool:
    """Whether a Hugging Face tokenizer only calls its Rust core."""
    if not getattr(model, "is_fast", False):
        return False
    from transformers import PreTrainedTokenizerBase

    return type(model).encode is PreTrainedTokenizerBase.encode


def _encode_batch(
    batch: Sequence[Passage], tokenizer: Tokenizer, *, starts: bool, with_masks: bool
) -> list[Encoded]:
    texts = [passage.text for passage in batch]
    if isinstance(tokenizer, SentencePieceTokenizer):
        results = tokenizer.encode_many(
            texts, add_special_tokens=starts, offsets=with_masks, written_edges=starts
        )
    elif _is_fast(model := transformers_tokenizer(tokenizer)):
        # Without this setting the library warns when MLX starts a compiler.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        output = model(
            texts,
            add_special_tokens=starts,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=with_masks,
            verbose=False,
        )
        offsets = output["offset_mapping"] if with_masks else [None] * len(texts)
        results = list(zip(output["input_ids"], offsets, strict=True))
    else:
        return list(_encode_singly(batch, tokenizer, starts=starts, with_masks=with_masks))
    encoded = []
    for (ids, offsets), passage in zip(results, batch, strict=True):
        shown = without_second_start(ids, tokenizer) if starts else ids
        mask = None if offsets is None else span_mask(offsets, passage.spans or ())
        encoded.append(Encoded(shown, mask if mask is None else mask[len(ids) - len(shown) :]))
    return encoded


def _encode_singly(
    batch: Sequence[Passage], tokenizer: Any, *, starts: bool, with_masks: bool
) -> Iterator[Encoded]:
    """Tokenize one passage at a time, for tokenizers that report no offsets."""
    settings = {} if starts else {"add_special_tokens": False}

    def encode_text(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, **settings)
        return without_second_start(ids, tokenizer) if starts else ids

    for passage in batch:
        ids = encode_text(passage.text)
        yield Encoded(ids, _prefix_mask(ids, passage, encode_text) if with_masks else None)


def _prefix_mask(
    ids: list[int], passage: Passage, encode_text: Callable[[str], list[int]]
) -> Mask | None:
    """The tokens of the spans, found by tokenizing the text up to the start and end of each.

    Returns:
        `None` if the tokens of such a prefix are not the first tokens of the text.
    """
    mask = np.zeros(len(ids), dtype=np.bool_)
    for first, last in passage.spans or ():
        start = encode_text(passage.text[:first])
        end = ids if last == len(passage.text) else encode_text(passage.text[:last])
        if ids[: len(start)] != start or ids[: len(end)] != end:
            return None
        mask[len(start) : len(end)] = True
    return mask
