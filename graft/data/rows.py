"""What a row of data holds: the shapes that are known, and what is wrong with a row.

Knows neither files nor tokenizers.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.conversations import conversation_problem, string_problem
from graft.errors import InputError

Fields = Mapping[str, Any]
# The first shape whose keys a row has is its shape.
SHAPES = {
    "chats": ("messages",),
    "prompts and completions": ("prompt", "completion"),
    "texts": ("text",),
}
KEYS = ("text", "prompt", "completion", "messages", "tools")
_ROWS_TOLD = 5


@dataclass(frozen=True)
class Row:
    """One row as it was read.

    Attributes:
        fields: the row's values by key.
        place: where it stands, as file:line.
        ends: whether the text ends where the row does.
    """

    fields: Fields
    place: str
    ends: bool = True


def shape(fields: Fields) -> str | None:
    """Which of `SHAPES` a row has; a key whose value is null counts as missing."""
    present = {key for key, value in fields.items() if value is not None}
    return next((name for name, keys in SHAPES.items() if present.issuperset(keys)), None)


def content(fields: Fields) -> Fields:
    """The part of a row that is trained on, without what is told beside it."""
    keys = SHAPES.get(shape(fields) or "", ())
    keys = (*keys, "tools") if "messages" in keys else keys
    return {key: fields[key] for key in keys if fields.get(key) is not None}


def place_number(fields: Fields) -> float:
    """A number in [0, 1) that is a function of the row's content, evenly spread over contents."""
    text = json.dumps(content(fields), sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def refuse(problems: Sequence[tuple[str, str]], *, of: str) -> None:
    """Raise one error for all problems, if there are any.

    Args:
        problems: place and reason of each.
        of: what they are, in the plural.

    Raises:
        InputError: with the first five problems and the number of the others.
    """
    if problems:
        told = "; ".join(f"{place}: {reason}" for place, reason in problems[:_ROWS_TOLD])
        others = len(problems) - _ROWS_TOLD
        raise InputError(told + (f" (and {others} more {of})" if others > 0 else ""))


def problem(fields: Fields) -> str | None:
    """What is wrong with a row, if anything."""
    name = shape(fields)
    if name is None:
        null = [key for key, value in fields.items() if value is None]
        keys = ", ".join(repr(key) + " (null)" * (key in null) for key in fields)
        return (
            "no 'text', no 'prompt' with 'completion' and no 'messages' in this row; "
            f"it has {keys or 'nothing'}"
        )
    return _CHECKS[name](fields)


def _problem_of_text(fields: Fields) -> str | None:
    return string_problem("'text'", fields["text"], may_be_empty=False)


def _problem_of_completion(fields: Fields) -> str | None:
    problems = (string_problem(f"'{key}'", fields[key]) for key in ("prompt", "completion"))
    return next(filter(None, problems), None)


def _problem_of_chat(fields: Fields) -> str | None:
    return conversation_problem(fields["messages"], fields.get("tools"))


_CHECKS: dict[str, Callable[[Fields], str | None]] = {
    "chats": _problem_of_chat,
    "prompts and completions": _problem_of_completion,
    "texts": _problem_of_text,
}
