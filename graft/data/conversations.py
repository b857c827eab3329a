"""Conversations: the roles of messages, and what is wrong with a message or a list of tools."""

import json
from typing import Any

MESSAGE_ROLES = ("system", "user", "assistant", "tool")


def message_problem(number: int, message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"message {number} must be a JSON object, not {shortened(message)}"
    role = message.get("role")
    if role not in MESSAGE_ROLES:
        return (
            f"message {number} has the unknown role {role!r}; known are {', '.join(MESSAGE_ROLES)}"
        )
    calls = message.get("tool_calls")
    if calls is not None and not _are_calls(calls):
        return f"'tool_calls' of message {number} must be a list of functions with a name"
    if message.get("content") is None and calls:
        return None
    return string_problem(f"'content' of message {number}", message.get("content"))


def _are_calls(calls: Any) -> bool:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return False
    functions = [call.get("function", call) for call in calls]
    return all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in functions)


def string_problem(name: str, value: Any, kind: str = "") -> str | None:
    if not isinstance(value, str):
        return f"{name} must be a string{kind}, not {shortened(value)}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name} holds half of a surrogate pair, which is no character"
    return None


def parse_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a row, which may be JSON in a string; `None` if they are no list of objects."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            return None
    fits = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return tools if fits else None


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
