"""Training examples: rows to token ids with a loss mask, truncated or cut into windows.

    text                    BOS, text, EOS; all of it is trained
    prompt, completion      BOS, prompt, completion, EOS; with `mask_prompt` the completion and EOS
                            are trained
    messages, tools         the model's chat template (`graft.data.chat_template`); with
                            `mask_prompt` the assistant's turns are trained, each with the token
                            that ends it
    documents               concatenated, each between BOS and EOS, and cut into windows

Knows rows and tokenizers; knows nothing of batches or models.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graft.data.chat_template import ChatFormat
from graft.data.conversations import ChatError
from graft.data.rows import Row, raise_problems, shape_of
from graft.data.sources import SplitSource, find_split_sources
from graft.data.token_cache import read_entry, write_entry
from graft.data.tokenize import Encoded, Mask, Passage, encode, tokenizer_digest
from graft.errors import InputError
from graft.pretrained.tokenizer import Tokenizer

import numpy as np
from numpy.typing import NDArray

# Part of every key of the token cache: entries of other versions are not found.
_CACHE_FORMAT = 5


@dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Attributes:
        tokens: (tokens,) int32.
        loss_mask: (tokens,) bool; whether predicting this token counts toward the loss.
        states: (tokens - 1, dims), if `graft.training.activation_cache` computed them: the hidden
            states that enter the first trained layer.
    """

    tokens: NDArray[np.int32]
    loss_mask: Mask
    states: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Split:
    """The examples of train, valid or test, and what became of its rows.

    Attributes:
        examples: to train or evaluate on.
        truncated: number of rows that were longer than allowed.
        skipped: number of rows with nothing to train on, which are not among the examples.
        shape_counts: number of rows of each shape, or of documents.
        origin: where the rows came from, for messages.
        notes: what should be known about the rows, a line each.
        cached: whether the tokens came from the token cache.
    """

    examples: list[Example]
    truncated: int = 0
    skipped: int = 0
    shape_counts: dict[str, int] = field(default_factory=dict)
    origin: str = ""
    notes: Sequence[str] = ()
    cached: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens in all examples."""
        return sum(map(len, self.examples))

    @cached_property
    def trained_tokens(self) -> int:
        """Number of tokens that count toward the loss."""
        return sum(int(example.loss_mask.sum()) for example in self.examples)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and loss masks, in order."""
        digest = hashlib.sha256()
        for array in _to_arrays(self.examples).values():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_splits(
    data: str,
    tokenizer: Tokenizer,
    needed: Sequence[str],
    *,
    max_length: int,
    overlap: int = 0,
    mask_prompt: bool = False,
    add_eos: bool = True,
    valid_fraction: float = 0.1,
) -> dict[str, Split]:
    """Find, read and tokenize the splits that a run needs, or load them from the token cache.

    Args:
        data: as for `graft.data.sources.find_split_sources`.
        tokenizer: of the model.
        needed: which of train, valid and test.
        max_length: of an example, in tokens: longer rows are truncated, documents are cut into
            windows.
        overlap: number of tokens that a window repeats from the one before.
        mask_prompt: train only completions and the assistant's turns.
        add_eos: end rows with EOS.
        valid_fraction: of the rows, to hold out if the data has no valid split.

    Raises:
        InputError: the data is missing or invalid or has nothing to train on, or an option is out
            of range.
    """
    if not 0 <= valid_fraction <= 1:
        raise InputError(f"--valid-fraction {valid_fraction}: give a fraction between 0 and 1")
    if not 0 <= overlap < max_length:
        raise InputError(
            f"--overlap {overlap}: give at least 0 and less than a window's {max_length} tokens"
        )
    if not needed:
        return {}
    sources = find_split_sources(data, needed, valid_fraction=valid_fraction)
    settings = {
        "max_length": max_length,
        "overlap": overlap,
        "mask_prompt": mask_prompt,
        "add_eos": add_eos,
    }
    digest = tokenizer_digest(tokenizer)
    # Splits with the same rows are loaded once.
    splits = {
        source: _load_split(source, tokenizer, settings, digest)
        for source in dict.fromkeys(sources.values())
    }
    return {name: splits[source] for name, source in sources.items()}


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    mask_prompt: bool = False,
    add_eos: bool = True,
) -> Split:
    """Turn rows into examples of at most `max_length` tokens.

    All tokens but the first are trained, or with `mask_prompt` those of completions and of the
    assistant's turns. EOS is always trained, so that the model learns where to stop; a truncated
    row has none.

    Args:
        rows: of any shape, checked by `graft.data.rows.row_problem`.
        tokenizer: of the model.
        max_length: of an example, in tokens.
        mask_prompt: train only completions and the assistant's turns.
        add_eos: end rows with EOS.

    Raises:
        InputError: the chat template refuses rows, or prompts cannot be separated from answers.
    """
    if mask_prompt:
        _refuse_rows_without_prompt(rows)
    chat_format = ChatFormat(tokenizer)
    whole = _encode_rows(
        rows, tokenizer, chat_format=chat_format, mask_prompt=mask_prompt, add_eos=add_eos
    )
    truncated = sum(len(example) > max_length for example in whole)
    examples = [
        Example(example.tokens[:max_length], example.loss_mask[:max_length]) for example in whole
    ]
    trained = [example for example in examples if example.loss_mask.any()]
    counts = Counter(shape_of(row).name for row in rows)
    skipped = len(examples) - len(trained)
    return Split(
        trained,
        truncated=truncated,
        skipped=skipped,
        shape_counts=dict(counts),
        notes=chat_format.notes(),
    )


def tokenize_documents(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlap: int = 0,
    add_eos: bool = True,
) -> Split:
    """Concatenate documents and cut them into windows of `max_length` tokens.

    Each token is trained once, except the first of a document. A window starts with the last
    `overlap` tokens of the one before, as context that is not trained again. It is at least one
    token, since the first token of a window has no context to be predicted from.

    Args:
        rows: documents as `text`.
        tokenizer: of the model.
        max_length: of a window, in tokens.
        overlap: number of tokens repeated from the window before, less than `max_length`.
        add_eos: end documents with EOS.
    """
    documents = _to_arrays(
        _encode_rows(
            rows,
            tokenizer,
            chat_format=ChatFormat(tokenizer),
            mask_prompt=False,
            add_eos=add_eos,
        )
    )
    overlap = max(overlap, 1)
    windows = []
    for start in range(0, max(len(documents["tokens"]) - overlap, 1), max_length - overlap):
        window = slice(start, start + max_length)
        loss_mask = documents["loss_mask"][window].copy()
        loss_mask[: overlap if start else 1] = False
        if loss_mask.any():
            windows.append(Example(documents["tokens"][window], loss_mask))
    return Split(windows, shape_counts={"document": len(rows)})


def describe_split(split: Split, max_length: int) -> str:
    """A split's size, what was truncated or skipped, where it is from, and notes on more lines."""
    facts = [_count(len(split), "row"), _count(split.tokens, "token")]
    if split.trained_tokens < split.tokens - len(split):
        facts.append(f"{split.trained_tokens:,} trained")
    if split.truncated:
        facts.append(f"{split.truncated:,} truncated to {max_length} tokens")
    if split.skipped:
        facts.append(f"{split.skipped:,} skipped with nothing to train on")
    shapes = " and ".join(_count(number, name) for name, number in split.shape_counts.items())
    cached = " (tokens from the cache)" if split.cached else ""
    return f"{', '.join(facts)}: {shapes} from {split.origin}{cached}" + "".join(
        f"\n  {note}" for note in split.notes
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _load_split(
    source: SplitSource, tokenizer: Tokenizer, settings: dict[str, Any], digest: str | None
) -> Split:
    if source.whole_documents and settings["mask_prompt"]:
        raise InputError(f"--mask-prompt: {source.source.name} is plain text and has no prompts")
    key = digest and _cache_key(source, settings, digest)
    if key and (entry := read_entry(key)):
        arrays, record = entry
        return Split(_from_arrays(arrays), **record, origin=source.origin, cached=True)
    split = _tokenize_source(source, tokenizer, settings)
    record = {
        "truncated": split.truncated,
        "skipped": split.skipped,
        "shape_counts": split.shape_counts,
        "notes": list(split.notes),
    }
    if key:
        write_entry(key, _to_arrays(split.examples), record)
    return Split(split.examples, **record, origin=source.origin)


def _cache_key(source: SplitSource, settings: dict[str, Any], digest: str) -> str:
    """A hash of everything that the tokens and loss masks of a split depend on."""
    parts = json.dumps([_CACHE_FORMAT, digest, source.key, settings])
    return hashlib.sha256(parts.encode()).hexdigest()


def _tokenize_source(source: SplitSource, tokenizer: Tokenizer, settings: dict[str, Any]) -> Split:
    max_length, add_eos = settings["max_length"], settings["add_eos"]
    if source.whole_documents:
        split = tokenize_documents(
            source.rows(),
            tokenizer,
            max_length=max_length,
            overlap=settings["overlap"],
            add_eos=add_eos,
        )
    else:
        split = tokenize_rows(
            source.rows(),
            tokenizer,
            max_length=max_length,
            mask_prompt=settings["mask_prompt"],
            add_eos=add_eos,
        )
    if not split.examples:
        raise InputError(
            f"{source.source.name}: no row has anything to train on ({split.skipped} skipped; "
            f"{split.truncated} truncated to {max_length} tokens): give a longer --max-seq-length"
            + (", or leave out --mask-prompt" if settings["mask_prompt"] else "")
        )
    return split


def _encode_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    chat_format: ChatFormat,
    mask_prompt: bool,
    add_eos: bool,
) -> list[Example]:
    """All tokens of each row, with their loss mask."""
    passages_of_rows = _passages(rows, chat_format, mask_prompt=mask_prompt)
    passages = list(itertools.chain(*passages_of_rows))
    encoded = iter(encode(passages, tokenizer))
    examples = []
    problems = []
    for row, passages in zip(rows, passages_of_rows, strict=True):
        pieces = [(passage, next(encoded)) for passage in passages]
        if any(one.spans is not None and piece.loss_mask is None for one, piece in pieces):
            problems.append((row.location, "the tokenizer does not separate prompt and answer"))
            continue
        ended = [_with_eos(*piece, tokenizer, add_eos=add_eos) for piece in pieces]
        tokens, loss_masks = map(np.concatenate, zip(*ended, strict=True))
        loss_masks[:1] = False  # Nothing precedes the first token.
        examples.append(Example(tokens, loss_masks))
    raise_problems(problems, noun="rows")
    return examples


def _passages(
    rows: Sequence[Row], chat_format: ChatFormat, *, mask_prompt: bool
) -> list[list[Passage]]:
    """The text of each row."""
    passages = []
    problems = []
    for row in rows:
        try:
            passages.append(shape_of(row).passages(row, chat_format, mask_prompt))
        except ChatError as error:
            problems.append((row.location, str(error)))
    raise_problems(problems, noun="rows")
    return passages


def _with_eos(
    passage: Passage, encoded: Encoded, tokenizer: Tokenizer, *, add_eos: bool
) -> tuple[NDArray[np.int32], Mask]:
    """The tokens and loss mask of a passage, with EOS if the text ends there."""
    ids = encoded.ids
    loss_mask = encoded.loss_mask
    if loss_mask is None:
        loss_mask = np.ones(len(ids), dtype=np.bool_)
    eos = tokenizer.eos_token_id
    if passage.ends and add_eos and eos is not None and eos >= 0:
        # A text may end with its own; it is trained with what it ends.
        has_end = bool(ids) and ids[-1] in {eos, *tokenizer.eos_token_ids}
        without, end = (ids[:-1], ids[-1]) if has_end else (ids, eos)
        spans = passage.spans
        is_trained = spans is None or any(last == len(passage.text) for _, last in spans)
        ids, loss_mask = [*without, end], np.append(loss_mask[: len(without)], is_trained)
    return np.array(ids, dtype=np.int32), loss_mask


def _refuse_rows_without_prompt(rows: Sequence[Row]) -> None:
    shapes = [(row.location, shape_of(row)) for row in rows]
    problems = [
        (location, f"--mask-prompt, but a {shape.name} row has no prompt")
        for location, shape in shapes
        if not shape.has_prompt
    ]
    raise_problems(problems, noun="rows")


def _to_arrays(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """All examples concatenated, with their lengths."""
    empty = Example(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))
    examples = [empty, *examples]
    return {
        "lengths": np.array([len(example) for example in examples[1:]], dtype=np.int64),
        "tokens": np.concatenate([example.tokens for example in examples]),
        "loss_mask": np.concatenate([example.loss_mask for example in examples]),
    }


def _from_arrays(arrays: dict[str, NDArray[Any]]) -> list[Example]:
    """The examples that `_to_arrays` concatenated."""
    edges = np.cumsum([0, *arrays["lengths"]]).tolist()
    return [
        Example(arrays["tokens"][start:end], arrays["loss_mask"][start:end])
        for start, end in itertools.pairwise(edges)
    ]
