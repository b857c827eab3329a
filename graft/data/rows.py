"""Row shapes: the keys that rows of data may have, their checks, and how a row becomes text.

A shape is one entry of `ROW_SHAPES`; readers, error messages and tokenization follow from it. Knows
nothing of files.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.chat_template import ChatFormat
from graft.data.conversations import (
    conversation_problem,
    parse_tools,
    string_problem,
    weight_problem,
)
from graft.data.tokenize import Passage
from graft.errors import InputError

Fields = Mapping[str, Any]
_MOST_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
        fields: the row's values by key.
        location: where the row was read, as FILE:LINE.
        ends: whether the text ends here; `False` if its rest was held out for validation.
    """

    fields: Fields
    location: str
    ends: bool = True


@dataclass(frozen=True)
class RowShape:
    """A kind of row, recognized by its keys.

    Attributes:
        name: what one such row is called.
        keys: what the row must have; a key whose value is null counts as missing.
        problem: given a row's fields, says what is wrong with the values, or returns `None`.
        passages: given a row, the model's chat format and whether prompts are masked, returns the
            text to tokenize; if prompts are masked, with the spans that count toward the loss.
        optional_keys: further keys that the text is made from.
        has_prompt: whether part of the row is a prompt, so that `--mask-prompt` applies.
    """

    name: str
    keys: tuple[str, ...]
    problem: Callable[[Fields], str | None]
    passages: Callable[[Row, ChatFormat, bool], list[Passage]]
    optional_keys: tuple[str, ...] = ()
    has_prompt: bool = True


# Keys of other tools that change what is learnt from a row, and what to do instead.
_UNSUPPORTED_KEYS = {
    "weight": "rows have no weights; leave the row out, or give messages the weight 0",
    "train": "leave out rows that are not to be learnt",
    "loss_mask": "give the row as 'messages', or as 'prompt' and 'completion'",
    "loss_scale": "rows have no weights",
    "system": "make it the first of the 'messages', or a part of the 'prompt'",
    "functions": "give them as 'tools'",
    "chat_template_kwargs": "the template gets no arguments from rows",
}


def _unsupported_key(fields: Fields) -> str | None:
    for key, advice in _UNSUPPORTED_KEYS.items():
        if fields.get(key) not in (None, "", 1, [], {}):
            return f"{key!r} is not supported: {advice}"
    return None


def _chat_problem(fields: Fields) -> str | None:
    problem = conversation_problem(fields["messages"], fields.get("tools"))
    return problem or weight_problem(fields["messages"]) or _unsupported_key(fields)


def _chat_passages(row: Row, chat_format: ChatFormat, mask_prompt: bool) -> list[Passage]:
    tools = row.fields.get("tools")
    parsed = None if tools is None else parse_tools(tools)
    return chat_format.passages(row.fields["messages"], parsed, mask_prompt=mask_prompt)


def _completion_problem(fields: Fields) -> str | None:
    problems = (string_problem(f"'{key}'", fields[key]) for key in ("prompt", "completion"))
    return next(filter(None, problems), None) or _unsupported_key(fields)


def _completion_passages(row: Row, chat_format: ChatFormat, mask_prompt: bool) -> list[Passage]:
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    text = prompt + completion
    return [Passage(text, ((len(prompt), len(text)),) if mask_prompt else None)]


def _text_problem(fields: Fields) -> str | None:
    return string_problem("'text'", fields["text"], may_be_empty=False)


def _text_passages(row: Row, chat_format: ChatFormat, mask_prompt: bool) -> list[Passage]:
    return [Passage(row.fields["text"], ends=row.ends)]


# A row has the first of these shapes whose keys it has.
ROW_SHAPES = [
    RowShape("chat", ("messages",), _chat_problem, _chat_passages, optional_keys=("tools",)),
    RowShape(
        "prompt-completion pair",
        ("prompt", "completion"),
        _completion_problem,
        _completion_passages,
    ),
    RowShape("text", ("text",), _text_problem, _text_passages, has_prompt=False),
]


def find_shape(fields: Fields) -> RowShape | None:
    """The shape of a row with these fields, or `None` if it has none."""
    present = {key for key, value in fields.items() if value is not None}
    return next((shape for shape in ROW_SHAPES if present.issuperset(shape.keys)), None)


def shape_of(row: Row) -> RowShape:
    """The shape of a row that was checked."""
    shape = find_shape(row.fields)
    assert shape is not None, row.location
    return shape


def content_keys() -> set[str]:
    """Every key that some shape reads, or that must not be passed over."""
    keys = {key for shape in ROW_SHAPES for key in (*shape.keys, *shape.optional_keys)}
    return keys | set(_UNSUPPORTED_KEYS)


def content(fields: Fields) -> Fields:
    """The fields that the model sees, without metadata such as a source or a score."""
    shape = find_shape(fields)
    keys = (*shape.keys, *shape.optional_keys) if shape else ()
    return {key: fields[key] for key in keys if fields.get(key) is not None}


def content_fraction(fields: Fields) -> float:
    """A hash of the row's content as a number, evenly distributed over [0, 1)."""
    text = json.dumps(content(fields), sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def row_problem(fields: Fields) -> str | None:
    """What is wrong with a row, or `None`."""
    shape = find_shape(fields)
    if shape is not None:
        return shape.problem(fields)
    keys = [repr(key) + " (null)" * (value is None) for key, value in fields.items()]
    return f"a row needs {expected_keys()}; this one has {', '.join(keys) or 'no keys'}"


def expected_keys() -> str:
    """The keys of all shapes, for a message: 'text', or 'prompt' with 'completion', or ..."""
    return ", or ".join(" with ".join(map(repr, shape.keys)) for shape in reversed(ROW_SHAPES))


def raise_problems(problems: Sequence[tuple[str, str]], *, noun: str) -> None:
    """Raise one error for all problems; do nothing if there are none.

    Args:
        problems: location and reason of each.
        noun: what has the problems, in the plural.

    Raises:
        InputError: names the first five problems and counts the rest.
    """
    if problems:
        shown = [f"{location}: {reason}" for location, reason in problems[:_MOST_PROBLEMS_SHOWN]]
        rest = len(problems) - len(shown)
        raise InputError("; ".join(shown) + (f" (and {rest} more {noun})" if rest else ""))
