"""The bodies of requests: what each field may be, and everything that is wrong with one at once.

Follows OpenAI's completions and chat completions, with llama.cpp's `lora`, mlx-lm's `adapters` and
vLLM's `return_token_ids`. A field that would change the answer and is not supported is refused
rather than passed over. Knows nothing of the engine or of HTTP.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from graft.data.conversations import MESSAGE_ROLES, conversation_problem, is_text, tools_problem
from graft.server.errors import HttpError

MOST_STOP_STRINGS = 16
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Rule:
    """What a field may be.

    Attributes:
        allowed: for the message.
        holds: whether a value that is not null is allowed.
    """

    allowed: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What a request for text asks for, checked.

    Attributes:
        model: name of the base or an adapter; `None` is the base.
        prompt: text or token ids, of a completion.
        messages: of a chat.
        tools: that its template shows.
        max_tokens: of the answer; `None` for what the interface gives by default.
        logprobs: how many alternatives at each token; `None` for no log-probabilities.
        lora: llama.cpp's choice of adapters, as (id, scale).
        adapters: mlx-lm's path, or scales by names.
        include_usage: whether a stream ends with the usage.
        return_token_ids: whether the answer tells token ids, as vLLM's does.
    """

    model: str | None = None
    prompt: str | list[int] = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    lora: list[tuple[int, float]] | None = None
    adapters: str | dict[str, float] | None = None
    return_token_ids: bool = False


def parse_json(body: bytes) -> Any:
    """The value that a body holds.

    Raises:
        HttpError: 400, it is not JSON.
    """

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise HttpError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None


def parse_completion(body: Any) -> GenerationRequest:
    """A request to /v1/completions.

    Raises:
        HttpError: 400, with every field that is wrong.
    """
    given = checked(body, COMPLETION, required=("prompt",))
    prompt = given["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    return GenerationRequest(
        prompt=prompt,
        max_tokens=given.get("max_tokens"),
        logprobs=given.get("logprobs"),
        echo=given.get("echo", False),
        **_common(given),
    )


def parse_chat(body: Any) -> GenerationRequest:
    """A request to /v1/chat/completions.

    Raises:
        HttpError: 400, with every field that is wrong.
    """
    given = checked(body, CHAT, required=("messages",))
    if "top_logprobs" in given and not given.get("logprobs"):
        raise HttpError(400, "top_logprobs is given: logprobs must be true", param="top_logprobs")
    shown = given.get("tool_choice") != "none"
    return GenerationRequest(
        messages=[
            {**message, "content": message["content"] or ""}
            for message in map(_plain, given["messages"])
        ],
        tools=given.get("tools", []) if shown else [],
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        logprobs=given.get("top_logprobs", 0) if given.get("logprobs") else None,
        **_common(given),
    )


def checked(
    body: Any, rules: Mapping[str, Rule], *, required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The fields of a body that are not null, all of them as the rules say.

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
        if name in rules and not rules[name].holds(value)
    }
    if problems:
        raise HttpError(400, "; ".join(problems.values()), param=next(iter(problems)))
    return given


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    """What both kinds of requests have, as `GenerationRequest` takes it."""
    same = ("model", "temperature", "top_p", "seed", "stream", "adapters", "return_token_ids")
    found = {name: given[name] for name in same if name in given}
    stop = given.get("stop", ())
    found["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    found["include_usage"] = (given.get("stream_options") or {}).get("include_usage") is True
    if "lora" in given:
        found["lora"] = [(one["id"], float(one.get("scale", 1.0))) for one in given["lora"]]
    return found


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it: content is a string, and a developer is the system."""
    role = message.get("role")
    content: Any = message.get("content")
    if _are_text_parts(content):
        content = "".join(part["text"] for part in content)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _unknown(name: str, rules: Mapping[str, Rule]) -> str:
    near = difflib.get_close_matches(name, rules, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown field {_shown(name)}{hint}"


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _number(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda v: _is_number(v) and low <= v <= high)


def _integer(low: int, high: int) -> Rule:
    return Rule(f"an integer from {low} to {high}", lambda v: _is_integer(v) and low <= v <= high)


def _only(what: str, *values: Any) -> Rule:
    """For a field of which one value changes nothing, and others are not supported."""
    return Rule(what, lambda v: v in values and not isinstance(v, bool))


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
        isinstance(one, dict)
        and not set(one) - {"id", "scale"}
        and _is_integer(one.get("id"))
        and _is_scale(one.get("scale", 1.0))
        for one in value
    )


def _is_adapters(value: Any) -> bool:
    scales = isinstance(value, dict) and all(is_text(k) and _is_scale(v) for k, v in value.items())
    return scales or (is_text(value) and bool(value))


def _are_text_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))
        for part in value
    )


def _is_conversation(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return False
    return conversation_problem([_plain(message) for message in value]) is None


def _is_tools(value: Any) -> bool:
    return isinstance(value, list) and tools_problem(value) is None


def _is_stream_options(value: Any) -> bool:
    names = {"include_usage", "include_obfuscation"}
    return isinstance(value, dict) and all(
        name in names and isinstance(v, bool | None) for name, v in value.items()
    )


LARGEST_SCALE = 100.0
LORA = Rule(
    f'a list like [{{"id": 0, "scale": 0.5}}], scales from -{LARGEST_SCALE:g} to {LARGEST_SCALE:g}',
    is_lora,
)
BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
NAME = Rule("a text that is not empty", lambda value: is_text(value) and bool(value))
_TOKENS = _integer(0, 2**31)
_ANY = Rule("anything", lambda value: True)
# What changes no answer here: for accounting, or for what the service does behind it.
_IDLE = (
    *("user", "store", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "cache_prompt"),
)
_COMMON = {
    "model": NAME,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": Rule(f"a text, or a list of up to {MOST_STOP_STRINGS}, none empty", _is_stop),
    "stream": BOOLEAN,
    "stream_options": Rule('like {"include_usage": true}', _is_stream_options),
    "max_tokens": _TOKENS,
    "lora": LORA,
    "adapters": Rule('an adapter\'s path or name, or scales like {"NAME": 0.5}', _is_adapters),
    "return_token_ids": BOOLEAN,
    "n": _only("1: ask several times for several answers", 1),
    "presence_penalty": _only("0: penalties are not supported", 0),
    "frequency_penalty": _only("0: penalties are not supported", 0),
    "repetition_penalty": _only("1: penalties are not supported", 1, 0),
    "logit_bias": _only("{}: biases are not supported", {}),
    "top_k": _only("0 or -1: use top_p", 0, -1),
    "min_p": _only("0: use top_p", 0),
    **dict.fromkeys(_IDLE, _ANY),
}
COMPLETION = {
    **_COMMON,
    "prompt": Rule("a text or a list of token ids, one prompt a request", _is_prompt),
    "logprobs": _integer(0, MOST_TOP_LOGPROBS),
    "echo": BOOLEAN,
    "best_of": _only("1", 1),
    "suffix": _only("null: only continuations are supported"),
}
CHAT = {
    **_COMMON,
    "messages": Rule(
        "a list of at least one message, each an object with a role "
        f"({', '.join([*MESSAGE_ROLES, 'developer'])}) and content that is text",
        _is_conversation,
    ),
    "max_completion_tokens": _TOKENS,
    "logprobs": BOOLEAN,
    "top_logprobs": _integer(0, MOST_TOP_LOGPROBS),
    "tools": Rule("a list of objects", _is_tools),
    "tool_choice": _only('"auto" or "none": no call can be enforced', "auto", "none"),
    "response_format": _only('{"type": "text"}: no form can be enforced', {"type": "text"}),
    "modalities": _only('["text"]', ["text"]),
}
