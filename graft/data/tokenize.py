"""Many texts to token ids at once, with a mark on the tokens of chosen stretches.

A token is marked where it covers at least one character of a stretch, so that one that straddles
the edge is marked: it is not among the tokens of what stands before. Tokens are always those of the
whole text. Knows tokenizers; knows nothing of rows.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graft import __version__
from graft.pretrained.tokenizer import SentencePieceTokenizer, Tokenizer

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
Marks = NDArray[np.bool_]
_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Passage:
    """A stretch of text that is tokenized as one.

    Attributes:
        text: what it says.
        spans: (first, last + 1) characters of what is to be learnt, where prompts are masked.
        starts: whether the tokenizer's start token comes before it.
        ends: whether the token that ends texts comes after it.
    """

    text: str
    spans: tuple[Span, ...]
    starts: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Encoded:
    """The tokens of a passage.

    Attributes:
        ids: (tokens,) without the token that ends texts, unless the tokenizer itself adds it.
        marks: (tokens,) bool, where asked for; `None` where the tokenizer cannot tell.
    """

    ids: list[int]
    marks: Marks | None = None


def encode(
    passages: Sequence[Passage], tokenizer: Tokenizer, *, marked: bool = False
) -> list[Encoded]:
    """Tokenize passages, as many at a time as the tokenizer takes.

    Args:
        passages: what to tokenize.
        tokenizer: any; SentencePiece and the fast ones of Hugging Face work on many at once.
        marked: also mark the tokens of the passages' spans.
    """
    results: dict[int, Encoded] = {}
    for starts in (True, False):
        chosen = [number for number, one in enumerate(passages) if one.starts == starts]
        for first in range(0, len(chosen), _TEXTS_AT_ONCE):
            numbers = chosen[first : first + _TEXTS_AT_ONCE]
            group = [passages[number] for number in numbers]
            found = _encode_group(group, tokenizer, starts=starts, marked=marked)
            results.update(zip(numbers, found, strict=True))
    return [results[number] for number in range(len(passages))]


def identity(tokenizer: Tokenizer) -> str | None:
    """A hash of everything that makes a tokenizer's ids, wherever its files lie.

    Returns:
        `None` for a tokenizer that cannot be written out.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        parts = [tokenizer.serialize(), str(tokenizer.eos_token_id).encode()]
    elif _is_fast(model := hugging_face(tokenizer)):
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


def hugging_face(tokenizer: Tokenizer) -> Any:
    """The tokenizer of transformers within mlx-lm's wrapper, or what was given."""
    return getattr(tokenizer, "_tokenizer", tokenizer)


def _is_fast(model: Any) -> bool:
    """Whether a Hugging Face tokenizer does what its Rust core does, and nothing besides."""
    if not getattr(model, "is_fast", False):
        return False
    from transformers import PreTrainedTokenizerBase

    return type(model).encode is PreTrainedTokenizerBase.encode


def _encode_group(
    group: Sequence[Passage], tokenizer: Tokenizer, *, starts: bool, marked: bool
) -> list[Encoded]:
    texts = [passage.text for passage in group]
    if isinstance(tokenizer, SentencePieceTokenizer):
        results = tokenizer.encode_many(texts, add_special_tokens=starts, offsets=marked)
    elif _is_fast(model := hugging_face(tokenizer)):
        # Said outright, or the library warns when MLX starts a compiler.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        output = model(
            texts,
            add_special_tokens=starts,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=marked,
            verbose=False,
        )
        offsets = output["offset_mapping"] if marked else [None] * len(texts)
        results = list(zip(output["input_ids"], offsets, strict=True))
    else:
        return list(_encode_singly(group, tokenizer, starts=starts, marked=marked))
    return [
        Encoded(ids, None if spans is None else mark(spans, passage.spans))
        for (ids, spans), passage in zip(results, group, strict=True)
    ]


def mark(offsets: Sequence[Span], spans: Sequence[Span]) -> Marks:
    """Which tokens cover a character of one of the spans.

    Args:
        offsets: (first, last + 1) characters of each token. What lies between two tokens belongs to
            the second: some tokenizers leave spaces out.
        spans: characters to mark.
    """
    edges = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(edges[:, 1])
    starts = np.minimum(edges[:, 0], np.concatenate([[0], ends])[: len(ends)])
    marks = np.zeros(len(ends), dtype=np.bool_)
    for first, last in spans:
        marks |= (ends > first) & (starts < last)
    return marks


def _encode_singly(
    group: Sequence[Passage], tokenizer: Any, *, starts: bool, marked: bool
) -> Iterator[Encoded]:
    """The plain way, for tokenizers that know no offsets: spans lie between prefixes."""
    settings = {} if starts else {"add_special_tokens": False}

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, **settings)
        return ids

    for passage in group:
        ids = tokens(passage.text)
        if not marked:
            yield Encoded(ids)
            continue
        marks: Marks | None = np.zeros(len(ids), dtype=np.bool_)
        for first, last in passage.spans:
            before = tokens(passage.text[:first])
            through = ids if last == len(passage.text) else tokens(passage.text[:last])
            if ids[: len(before)] != before or ids[: len(through)] != through:
                marks = None
                break
            assert marks is not None
            marks[len(before) : len(through)] = True
        yield Encoded(ids, marks)
