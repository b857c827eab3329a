"""The fields of request bodies: what each may be, and a check that reports every problem at once.

A field that would change the answer and is not supported is refused, not ignored.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graft.console import did_you_mean
from graft.data.conversations import MESSAGE_ROLES, conversation_problem, is_text, tools_problem
from graft.server.errors import HttpError

MOST_STOP_STRINGS = 16
MOST_TOP_LOGPROBS = 20
LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class FieldRule:
    """What a field may be.

    Attributes:
        allowed: the allowed values, for messages.
        accepts: whether a value that is not null is allowed.
    """

    allowed: str
    accepts: Callable[[Any], bool]


def check_fields(
    body: Any, rules: Mapping[str, FieldRule], *, required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The fields of a body that are not null, if all of them follow the rules.

    Raises:
        HttpError: 400, naming every field that is unknown, missing or wrong.
    """
    if not isinstance(body, dict):
        raise HttpError(400, f"the body is {_shown(body)}: it must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    problems = {name: _unknown(name, rules) for name in body if name not in rules}
    problems |= {
        name: f"{name} is missing: it must be {rules[name].allowed}"
        for name in required
        if name not in given
    }
    problems |= {
        name: f"{name} is {_shown(value)}: it must be {rules[name].allowed}"
        for name, value in given.items()
        if name in rules and not rules[name].accepts(value)
    }
    if problems:
        raise HttpError(400, "; ".join(problems.values()), param=next(iter(problems)))
    return given


def _unknown(name: str, rules: Mapping[str, FieldRule]) -> str:
    hint = did_you_mean(name, rules)
    return f"unknown field {_shown(name)}" + (f" ({hint})" if hint else "")


def _shown(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _number(low: float, high: float) -> FieldRule:
    return FieldRule(
        f"a number from {low:g} to {high:g}", lambda v: _is_number(v) and low <= v <= high
    )


def _integer(low: int, high: int) -> FieldRule:
    return FieldRule(
        f"an integer from {low} to {high}", lambda v: _is_integer(v) and low <= v <= high
    )


def _only(what: str, *values: Any) -> FieldRule:
    """For a field that is not supported, and may only have values that change nothing."""
    return FieldRule(what, lambda v: v in values and not isinstance(v, bool))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_integer(v) and v >= 0 for v in value)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list) and len(value) == 1 and not _is_integer(value[0]):
        return is_text(value[0]) or _is_ids(value[0])
    return is_text(value) or _is_ids(value)


def _is_stop(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return (
        isinstance(strings, list)
        and len(strings) <= MOST_STOP_STRINGS
        and all(is_text(string) and string for string in strings)
    )


def _is_scale(value: Any) -> bool:
    return _is_number(value) and abs(value) <= LARGEST_SCALE


def is_lora(value: Any) -> bool:
    """Whether a value is llama.cpp's list of adapters: `[{"id": 0, "scale": 0.5}]`."""
    return isinstance(value, list) and all(
        isinstance(choice, dict)
        and not set(choice) - {"id", "scale"}
        and _is_integer(choice.get("id"))
        and _is_scale(choice.get("scale", 1.0))
        for choice in value
    )


def _is_adapters(value: Any) -> bool:
    scales = isinstance(value, dict) and all(is_text(k) and _is_scale(v) for k, v in value.items())
    return scales or (is_text(value) and bool(value))


def as_template_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates expect it: content is a string, `developer` is `system`."""
    role = message.get("role")
    content: Any = message.get("content")
    if _are_text_parts(content):
        content = "".join(part["text"] for part in content)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _are_text_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))
        for part in value
    )


def _is_conversation(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return False
    return conversation_problem([as_template_message(message) for message in value]) is None


def _is_tools(value: Any) -> bool:
    return isinstance(value, list) and tools_problem(value) is None


def _is_stream_options(value: Any) -> bool:
    names = {"include_usage", "include_obfuscation"}
    return isinstance(value, dict) and all(
        name in names and isinstance(v, bool | None) for name, v in value.items()
    )


LORA = FieldRule(
    f'a list like [{{"id": 0, "scale": 0.5}}], scales from -{LARGEST_SCALE:g} to {LARGEST_SCALE:g}',
    is_lora,
)
BOOLEAN = FieldRule("true or false", lambda value: isinstance(value, bool))
NAME = FieldRule("a string that is not empty", lambda value: is_text(value) and bool(value))
_TOKENS = _integer(0, 2**31)
_ANY = FieldRule("anything", lambda value: True)
# Accepted and ignored: they are for accounting and for the service behind the interface.
_IGNORED = (
    *("user", "store", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "cache_prompt"),
)
_COMMON = {
    "model": NAME,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": FieldRule(f"a string, or a list of up to {MOST_STOP_STRINGS}, none empty", _is_stop),
    "stream": BOOLEAN,
    "stream_options": FieldRule('like {"include_usage": true}', _is_stream_options),
    "max_tokens": _TOKENS,
    "lora": LORA,
    "adapters": FieldRule('an adapter\'s path or name, or scales like {"NAME": 0.5}', _is_adapters),
    "return_token_ids": BOOLEAN,
    "n": _only("1: send one request for each answer", 1),
    "presence_penalty": _only("0: penalties are not supported", 0),
    "frequency_penalty": _only("0: penalties are not supported", 0),
    "repetition_penalty": _only("1: penalties are not supported", 1, 0),
    "logit_bias": _only("{}: biases are not supported", {}),
    "top_k": _only("0 or -1: use top_p", 0, -1),
    "min_p": _only("0: use top_p", 0),
    **dict.fromkeys(_IGNORED, _ANY),
}
COMPLETION_FIELDS = {
    **_COMMON,
    "prompt": FieldRule("a string or a list of token ids, one prompt per request", _is_prompt),
    "logprobs": _integer(0, MOST_TOP_LOGPROBS),
    "echo": BOOLEAN,
    "best_of": _only("1", 1),
    "suffix": _only("null: only continuations are supported"),
}
CHAT_FIELDS = {
    **_COMMON,
    "messages": FieldRule(
        "a list of at least one message, each an object with a role "
        f"({', '.join([*MESSAGE_ROLES, 'developer'])}) and text content",
        _is_conversation,
    ),
    "max_completion_tokens": _TOKENS,
    "logprobs": BOOLEAN,
    "top_logprobs": _integer(0, MOST_TOP_LOGPROBS),
    "tools": FieldRule("a list of objects", _is_tools),
    "tool_choice": _only('"auto" or "none": calls cannot be forced', "auto", "none"),
    "response_format": _only('{"type": "text"}: the format cannot be forced', {"type": "text"}),
    "modalities": _only('["text"]', ["text"]),
}
