"""Rows to token ids, each with a mark on the tokens that are trained.

    text                    start token, text, end token; all of it is trained
    prompt, completion      one after the other as they are; with `mask_prompt` the completion and
                            the end token are trained
    messages, tools         the model's chat template (`graft.data.chat_template`); with
    `mask_prompt` the assistant's turns are trained, through the token that ends each
    documents               one after the other, each between start and end token, and cut into
                            windows

Knows rows and tokenizers; knows nothing of batches or models.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graft.data import token_cache
from graft.data.chat_template import ChatError, ChatFormat
from graft.data.conversations import parse_tools
from graft.data.rows import Row, refuse, shape
from graft.data.sources import Part, find_parts
from graft.data.tokenize import Encoded, Passage, encode, identity
from graft.errors import InputError
from graft.pretrained.tokenizer import Tokenizer

import numpy as np
from numpy.typing import NDArray

_CACHE_FORMAT = 2


@dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Attributes:
        tokens: (tokens,) int32.
        loss_mask: (tokens,) bool; whether the model is to predict this token from those before it.
        states: (tokens - 1, dims) what `graft.training.activation_cache` kept of them, where it
        did.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    states: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Split:
    """The examples of train, valid or test, and what became of the rows.

    Attributes:
        examples: what to train or measure on.
        cut: rows that were longer than allowed.
        skipped: rows with nothing to train on, which are no examples.
        shapes: how many rows, or documents, there were of each shape.
        origin: where the rows came from, for people.
        cached: whether the tokens were there from an earlier start.
    """

    examples: list[Example]
    cut: int = 0
    skipped: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    origin: str = ""
    cached: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(map(len, self.examples))

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that are to be predicted."""
        return sum(int(example.loss_mask.sum()) for example in self.examples)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all token ids and marks, in order."""
        return _fingerprint(*_flattened(self.examples).values())


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
    """Find, read and tokenize what a run needs, or take it from the cache of an earlier start.

    Args:
        data: as for `graft.data.sources.find_parts`.
        tokenizer: the model's.
        needed: which of train, valid and test.
        max_length: as for `tokenize`; likewise `overlap`, `mask_prompt` and `add_eos`.
        overlap: of the windows.
        mask_prompt: learn answers only.
        add_eos: teach where texts end.
        valid_fraction: what to set aside for validation, where the data does not tell.

    Raises:
        InputError: the data is missing, broken or has nothing to train on, or an option does not
            fit.
    """
    if not 0 <= valid_fraction <= 1:
        raise InputError(f"--valid-fraction {valid_fraction}: give a share between 0 and 1")
    if not 0 <= overlap < max_length:
        raise InputError(
            f"--overlap {overlap}: give at least 0 and less than a window's {max_length} tokens"
        )
    if not needed:
        return {}
    parts = find_parts(data, needed, valid_fraction=valid_fraction)
    settings = {
        "max_length": max_length,
        "overlap": overlap,
        "mask_prompt": mask_prompt,
        "add_eos": add_eos,
    }
    name = identity(tokenizer)
    loaded: dict[Part, Split] = {}
    for part in parts.values():
        if part not in loaded:
            loaded[part] = _load(part, tokenizer, settings, name)
    return {split: loaded[part] for split, part in parts.items()}


def tokenize(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    mask_prompt: bool = False,
    add_eos: bool = True,
) -> Split:
    """Turn rows into examples, each at most `max_length` tokens.

    Every token but the first is trained, or those of completions and of the assistant only. The
    token that ends a row is trained, too: the model is to learn where to stop. A row that is cut
    has none, since it does not end there.

    Args:
        rows: of any shape, as `graft.data.sources` reads and checks them.
        tokenizer: the model's.
        max_length: where rows are cut, in tokens.
        mask_prompt: learn completions and the assistant's turns only.
        add_eos: end rows with the token that ends texts.

    Raises:
        InputError: the chat template refuses rows, or prompts cannot be told from answers.
    """
    if mask_prompt:
        _refuse_texts(rows)
    encoded = _encode_rows(rows, tokenizer, mask_prompt=mask_prompt, add_eos=add_eos)
    cut = sum(len(ids) > max_length for ids, _ in encoded)
    examples = [_example(ids[:max_length], marks[:max_length]) for ids, marks in encoded]
    kept = [example for example in examples if example.loss_mask.any()]
    shapes = Counter(str(shape(row.fields)) for row in rows)
    return Split(kept, cut=cut, skipped=len(examples) - len(kept), shapes=dict(shapes))


def cut_documents(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlap: int = 0,
    add_eos: bool = True,
) -> Split:
    """Turn documents, one after the other, into windows of `max_length` tokens.

    Each token is trained once, but for the first of a document. A window begins with the last
    `overlap` tokens of the one before, which are there to be read only. That is at least one token:
    without it the first of a window would never be predicted, so an overlap of 0 is one of 1.

    Args:
        rows: documents as `text`.
        tokenizer: the model's.
        max_length: of a window, in tokens.
        overlap: tokens of context from the window before, less than `max_length`.
        add_eos: end documents with the token that ends texts.
    """
    encoded = _encode_rows(rows, tokenizer, mask_prompt=False, add_eos=add_eos)
    documents = _flattened([_example(ids, marks) for ids, marks in encoded])
    context = max(overlap, 1)
    windows = []
    for start in range(0, max(len(documents["tokens"]) - context, 1), max_length - context):
        window = slice(start, start + max_length)
        loss_mask = documents["loss_mask"][window].copy()
        loss_mask[: context if start else 1] = False
        if loss_mask.any():
            windows.append(Example(documents["tokens"][window], loss_mask))
    return Split(windows, shapes={"documents": len(rows)})


def describe(split: Split, max_length: int) -> str:
    """What a person is told of a split, in one line."""
    facts = [f"{len(split):,} rows", f"{split.tokens:,} tokens"]
    if split.trained_tokens < split.tokens - len(split):
        facts.append(f"{split.trained_tokens:,} trained")
    if split.cut:
        facts.append(f"{split.cut:,} cut at {max_length} tokens")
    if split.skipped:
        facts.append(f"{split.skipped:,} skipped with nothing to train on")
    shapes = " and ".join(f"{number:,} {name}" for name, number in split.shapes.items())
    kept = " (tokenized before)" if split.cached else ""
    return f"{', '.join(facts)}: {shapes} from {split.origin}{kept}"


def _load(part: Part, tokenizer: Tokenizer, settings: dict[str, Any], name: str | None) -> Split:
    if part.documents and settings["mask_prompt"]:
        raise InputError(f"--mask-prompt: {part.source.name} is plain text and has no prompts")
    parts = json.dumps([_CACHE_FORMAT, name, part.key, settings])
    key = hashlib.sha256(parts.encode()).hexdigest() if name else None
    found = token_cache.read(key) if key else None
    if found is not None:
        arrays, record = found
        return Split(_divided(arrays), **record, origin=part.origin, cached=True)
    settings = {option: settings[option] for option in _options_of(part)}
    make = cut_documents if part.documents else tokenize
    split = make(part.rows(), tokenizer, **settings)
    if not split.examples:
        raise InputError(
            f"{part.source.name}: no row has anything to train on ({split.skipped} skipped; "
            f"{split.cut} cut at {settings['max_length']} tokens): give a longer --max-seq-length"
            + (", or leave out --mask-prompt" if settings.get("mask_prompt") else "")
        )
    record = {"cut": split.cut, "skipped": split.skipped, "shapes": split.shapes}
    if key:
        token_cache.write(key, _flattened(split.examples), record)
    return Split(split.examples, **record, origin=part.origin)


def _options_of(part: Part) -> tuple[str, ...]:
    return ("max_length", "add_eos", "overlap" if part.documents else "mask_prompt")


def _encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, *, mask_prompt: bool, add_eos: bool
) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Token ids and marks of each row, before any cut."""
    passages = _passages(rows, tokenizer, marked=mask_prompt)
    flat = [passage for of_row in passages for passage in of_row]
    encoded = iter(encode(flat, tokenizer, marked=mask_prompt))
    results = []
    problems = []
    for row, of_row in zip(rows, passages, strict=True):
        pieces = [(passage, next(encoded)) for passage in of_row]
        if mask_prompt and any(one.marks is None for _, one in pieces):
            problems.append((row.place, "the tokenizer does not keep prompt and answer apart"))
            continue
        ended = [_ended(*piece, tokenizer, add_eos=add_eos) for piece in pieces]
        ids, marks = zip(*ended, strict=True)
        results.append((np.concatenate(ids), np.concatenate(marks)))
    refuse(problems, of="rows")
    return results


def _passages(rows: Sequence[Row], tokenizer: Tokenizer, *, marked: bool) -> list[list[Passage]]:
    chats = ChatFormat(tokenizer)
    found: list[list[Passage]] = []
    problems = []
    for row in rows:
        try:
            found.append(_passages_of(row, chats, marked=marked))
        except ChatError as error:
            problems.append((row.place, str(error)))
    refuse(problems, of="rows")
    return found


def _passages_of(row: Row, chats: ChatFormat, *, marked: bool) -> list[Passage]:
    fields = row.fields
    kind = shape(fields)
    if kind == "chats":
        tools = None if fields.get("tools") is None else parse_tools(fields["tools"])
        return chats.passages(fields["messages"], tools, marked=marked)
    if kind == "texts":
        return [Passage(fields["text"], (), ends=row.ends)]
    text = fields["prompt"] + fields["completion"]
    return [Passage(text, ((len(fields["prompt"]), len(text)),))]


def _ended(
    passage: Passage, encoded: Encoded, tokenizer: Tokenizer, *, add_eos: bool
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """A passage's ids and marks, with the token that ends texts where it belongs."""
    ids = encoded.ids
    marks = np.ones(len(ids), dtype=np.bool_) if encoded.marks is None else encoded.marks
    eos = tokenizer.eos_token_id
    if passage.ends and add_eos and eos is not None and eos >= 0:
        # The end of a text, a completion or an answer is always to be learnt.
        bare = ids[:-1] if ids[-1:] == [eos] else ids
        ids, marks = [*bare, eos], np.append(marks[: len(bare)], True)
    return np.array(ids, dtype=np.int32), marks


def _example(ids: NDArray[np.int32], marks: NDArray[np.bool_]) -> Example:
    loss_mask = marks.copy()
    loss_mask[:1] = False
    return Example(ids, loss_mask)


def _refuse_texts(rows: Sequence[Row]) -> None:
    texts = [row.place for row in rows if shape(row.fields) == "texts"]
    refuse(
        [(place, "--mask-prompt, but this row has only 'text' and no prompt") for place in texts],
        of="rows",
    )


def _flattened(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """All examples one after another: lengths, tokens and marks."""
    none = Example(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))
    return {
        "lengths": np.array([len(example) for example in examples], dtype=np.int64),
        "tokens": np.concatenate([none.tokens, *(example.tokens for example in examples)]),
        "loss_mask": np.concatenate([none.loss_mask, *(example.loss_mask for example in examples)]),
    }


def _divided(arrays: dict[str, NDArray[Any]]) -> list[Example]:
    """The examples of `_flattened`."""
    ends = np.cumsum(arrays["lengths"]).tolist()
    places = zip([0, *ends], ends, strict=False)
    return [
        Example(arrays["tokens"][start:end], arrays["loss_mask"][start:end])
        for start, end in places
    ]


def _fingerprint(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
