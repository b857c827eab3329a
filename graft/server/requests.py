"""Parses request bodies: from JSON to a checked `GenerationRequest`.

Follows OpenAI's completions and chat completions, with llama.cpp's `lora`, mlx-lm's `adapters` and
vLLM's `return_token_ids`. Does not know the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.server.errors import HttpError
from graft.server.fields import CHAT_FIELDS, COMPLETION_FIELDS, as_template_message, check_fields
from graft.storage.json_file import parse_json


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A checked request for a completion or a chat completion.

    Attributes:
        model: name of the base model or an adapter; `None` is the base model.
        prompt: text or token ids of a completion.
        messages: messages of a chat.
        tools: tools that the chat template includes.
        max_tokens: longest answer; `None` for the interface's default.
        logprobs: number of alternatives for each token; `None` for no log-probabilities.
        lora: llama.cpp's choice of adapters, as (id, scale).
        adapters: mlx-lm's path, or scales by name.
        include_usage: whether a stream ends with the usage.
        return_token_ids: whether the response includes token ids, as vLLM's does.
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


def parse_body(body: bytes) -> Any:
    """Parse a body as JSON.

    Raises:
        HttpError: 400, the body is not valid JSON.
    """
    try:
        return parse_json(body.decode(), allow_constants=False)
    except ValueError as error:
        raise HttpError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def parse_completion(body: Any) -> GenerationRequest:
    """Parse a request for a completion.

    Raises:
        HttpError: 400, naming every field that is wrong.
    """
    given = check_fields(body, COMPLETION_FIELDS, required=("prompt",))
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
    """Parse a request for a chat completion.

    Raises:
        HttpError: 400, naming every field that is wrong.
    """
    given = check_fields(body, CHAT_FIELDS, required=("messages",))
    if "top_logprobs" in given and not given.get("logprobs"):
        raise HttpError(400, "top_logprobs is given: logprobs must be true", param="top_logprobs")
    with_tools = given.get("tool_choice") != "none"
    return GenerationRequest(
        messages=[
            {**message, "content": message["content"] or ""}
            for message in map(as_template_message, given["messages"])
        ],
        tools=given.get("tools", []) if with_tools else [],
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        logprobs=given.get("top_logprobs", 0) if given.get("logprobs") else None,
        **_common(given),
    )


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both kinds of requests have, as arguments of `GenerationRequest`."""
    same = ("model", "temperature", "top_p", "seed", "stream", "adapters", "return_token_ids")
    common = {name: given[name] for name in same if name in given}
    stop = given.get("stop", ())
    common["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    common["include_usage"] = (given.get("stream_options") or {}).get("include_usage") is True
    if "lora" in given:
        common["lora"] = lora_scales(given["lora"])
    return common


def lora_scales(choices: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """llama.cpp's choice of adapters, such as `[{"id": 0, "scale": 0.5}]`, as (id, scale)."""
    return [(choice["id"], float(choice.get("scale", 1.0))) for choice in choices]
