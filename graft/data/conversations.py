"""Conversations: the roles of messages, and what is wrong with a conversation or its tools.

Rows of a dataset and requests to the server go through the same checks.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from graft.storage.json_file import parse_json

Message = Mapping[str, Any]
MESSAGE_ROLES = ("system", "user", "assistant", "tool")
# Keys by which datasets say whether a message is to be learnt: OpenAI's, and those of other tools.
TRAIN_KEYS = ("weight", "train", "training", "loss")


class ChatError(Exception):
    """The template refuses a conversation, or renders it so that turns cannot be located."""


def conversation_problem(messages: Any, tools: Any = None) -> str | None:
    """What is wrong with a conversation, or `None`.

    Args:
        messages: a list of objects, each with a `role` of `MESSAGE_ROLES` and `content` that is a
            string, or with `tool_calls` in place of content.
        tools: descriptions of functions, as `parse_tools` takes them; `None` if there are none.
    """
    if not isinstance(messages, list) or not messages:
        return f"'messages' must be a list that is not empty, not {shortened(messages)}"
    problems = (_message_problem(number, message) for number, message in enumerate(messages, 1))
    problem = next(filter(None, problems), None)
    if problem is None and tools is not None:
        return tools_problem(tools)
    return problem


def is_trained(message: Message) -> bool:
    """Whether a message is to be learnt: its weight, or another key of `TRAIN_KEYS`, is not 0."""
    return all(message.get(key) in (None, 1) for key in TRAIN_KEYS)


def weight_problem(messages: Sequence[Message]) -> str | None:
    """What is wrong with the weights of messages, or `None`; they are 0 or 1, or booleans."""
    for number, message in enumerate(messages, 1):
        for key in TRAIN_KEYS:
            value = message.get(key)
            if value is not None and not (isinstance(value, int | float) and value in (0, 1)):
                return f"{key!r} of message {number} must be 0 or 1, not {shortened(value)}"
    return None


def tools_problem(tools: Any) -> str | None:
    """What is wrong with the descriptions of tools, or `None`."""
    if parse_tools(tools) is None:
        return f"'tools' must be a list of JSON objects, not {shortened(tools)}"
    return _encoding_problem("'tools'", tools)


def parse_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Descriptions of tools as a list of objects; `None` if they are not one.

    Args:
        tools: the list, or a string that holds it as JSON.
    """
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except ValueError:
            return None
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return tools if is_list else None


def string_problem(name: str, value: Any, *, may_be_empty: bool = True) -> str | None:
    """What is wrong with a value that has to be a string, or `None`.

    Args:
        name: what the value is, for the message.
        value: any.
        may_be_empty: whether an empty string is allowed.
    """
    if not isinstance(value, str) or not (value or may_be_empty):
        kind = "" if may_be_empty else " that is not empty"
        return f"{name} must be a string{kind}, not {shortened(value)}"
    if not is_text(value):
        return f"{name} contains half of a surrogate pair, which is not a character"
    return None


def is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can encode; JSON can write half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def shortened(value: Any) -> str:
    """A value as Python writes it, for a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message_problem(number: int, message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"message {number} must be a JSON object, not {shortened(message)}"
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if role not in MESSAGE_ROLES:
        known = ", ".join(MESSAGE_ROLES)
        return f"message {number} has the unknown role {role!r}; known are {known}"
    if calls is not None and not _are_calls(calls):
        return f"'tool_calls' of message {number} must be a list of functions with a name"
    if content is not None or not calls:
        problem = string_problem(f"'content' of message {number}", content)
        if problem is not None:
            return problem
    return _encoding_problem(f"message {number}", message)


def _encoding_problem(name: str, value: Any) -> str | None:
    return string_problem(name, json.dumps(value, ensure_ascii=False, default=str))


def _are_calls(calls: Any) -> bool:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return False
    functions = [call.get("function", call) for call in calls]
    return all(
        isinstance(function, dict) and isinstance(function.get("name"), str)
        for function in functions
    )
